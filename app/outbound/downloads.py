"""Files at addresses that clients give, fetched through the guard."""

import asyncio
from urllib.parse import unquote

import httpx2
from msgspec import Struct

from app.outbound.guard import Guard, OutboundRefused

REDIRECTS_MAX = 5
FILENAME_CHARS_MAX = 255
TOO_LATE = "The file was not sent in time."


class NotFetched(Exception):
    """A file can't be fetched; the message has the reason, and the host at most."""


class Allowance(Struct):
    """What the fetches for one context may still take together."""

    bytes: int
    seconds: float
    too_large: str
    """The reason for NotFetched if a file has more bytes."""
    redirects: int = REDIRECTS_MAX


class Download(Struct, frozen=True):
    """What was fetched; `media_type` is the server's word."""

    content: bytes
    media_type: str
    filename: str


async def fetch(guard: Guard, tenant: str, url: str, allowance: Allowance) -> Download:
    """The file at an address; what it takes is taken from the allowance. Raises NotFetched."""
    if allowance.seconds <= 0:
        raise NotFetched(TOO_LATE)
    time = asyncio.get_running_loop().time
    began = time()
    try:
        async with (
            asyncio.timeout(allowance.seconds),
            httpx2.AsyncClient(
                transport=guard.transport(tenant),
                headers={"Accept": "*/*", "Accept-Encoding": "identity"},
                timeout=allowance.seconds,
                trust_env=False,
            ) as client,
        ):
            return await _follow(client, url, allowance)
    except OutboundRefused as error:
        raise NotFetched(str(error)) from None
    except (TimeoutError, httpx2.TimeoutException):
        raise NotFetched(TOO_LATE) from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError):
        raise NotFetched("It is no http:// or https:// URL.") from None
    except httpx2.HTTPError:
        raise NotFetched("The connection failed.") from None
    finally:
        allowance.seconds -= time() - began


async def _follow(client: httpx2.AsyncClient, url: str, allowance: Allowance) -> Download:
    """The file at the end of the redirects. Their bodies, which the client would read whole and decompress, are not read."""
    request = client.build_request("GET", url)
    for _ in range(1 + allowance.redirects):
        response = await client.send(request, stream=True)
        try:
            if response.next_request is None:
                return await _read(response, allowance)
        finally:
            await response.aclose()
        request = response.next_request
    raise NotFetched(f"There are more than {allowance.redirects} redirects.")


async def _read(response: httpx2.Response, allowance: Allowance) -> Download:
    if response.status_code != 200:
        raise NotFetched(f"The server answered with status {response.status_code}.")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise NotFetched("The server's answer is compressed, which was not asked for.")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > allowance.bytes:
        raise NotFetched(allowance.too_large)
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > allowance.bytes:
            raise NotFetched(allowance.too_large)
    if not content:
        raise NotFetched("The file is empty.")
    allowance.bytes -= len(content)
    name = unquote(response.url.path).rpartition("/")[2][:FILENAME_CHARS_MAX]
    return Download(bytes(content), response.headers.get("content-type", "").partition(";")[0].strip().lower(), name)
