"""Files at addresses that clients give, fetched through the guard."""

import asyncio
from urllib.parse import unquote

import httpx2
from msgspec import Struct

from app.outbound.guard import Guard, OutboundRefused

REDIRECTS_MAX = 5
FILENAME_CHARS_MAX = 255


class NotFetched(Exception):
    """A file can't be fetched; the message has the reason, and the host at most."""


class Download(Struct, frozen=True):
    """What was fetched; `media_type` is the server's word."""

    content: bytes
    media_type: str
    filename: str


async def fetch(guard: Guard, tenant: str, url: str, *, bytes_max: int, timeout_s: float) -> Download:
    """The file at an address. Raises NotFetched."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx2.AsyncClient(
                transport=guard.transport(tenant),
                headers={"Accept": "*/*", "Accept-Encoding": "identity"},
                follow_redirects=True,
                max_redirects=REDIRECTS_MAX,
                timeout=timeout_s,
                trust_env=False,
            ) as client,
            client.stream("GET", url) as response,
        ):
            return await _read(response, bytes_max)
    except OutboundRefused as error:
        raise NotFetched(str(error)) from None
    except (TimeoutError, httpx2.TimeoutException):
        raise NotFetched(f"The file was not sent in {timeout_s:g} s.") from None
    except httpx2.TooManyRedirects:
        raise NotFetched(f"There are more than {REDIRECTS_MAX} redirects.") from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError):
        raise NotFetched("It is no http:// or https:// URL.") from None
    except httpx2.HTTPError:
        raise NotFetched("The connection failed.") from None


async def _read(response: httpx2.Response, bytes_max: int) -> Download:
    if response.status_code != 200:
        raise NotFetched(f"The server answered with status {response.status_code}.")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise NotFetched("The server's answer is compressed, which was not asked for.")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > bytes_max:
        raise NotFetched(f"The file has more than {bytes_max} bytes.")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > bytes_max:
            raise NotFetched(f"The file has more than {bytes_max} bytes.")
    if not content:
        raise NotFetched("The file is empty.")
    name = unquote(response.url.path).rpartition("/")[2][:FILENAME_CHARS_MAX]
    return Download(bytes(content), response.headers.get("content-type", "").partition(";")[0].strip().lower(), name)
