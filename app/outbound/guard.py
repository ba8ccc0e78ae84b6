"""The guard against SSRF: which addresses may be called for a client.

Only http and https, no user or password in the URL, and only targets on the public internet: no private, loopback, link-local,
shared, multicast or reserved address, also not inside an IPv6 address (IPv4-mapped, 6to4, NAT64), and no cloud's metadata
service; unless the operator's REPRISE_OUTBOUND_ALLOW names the host or its network.

A name is resolved when the connection is made, and the connection goes to the address that was checked, so DNS rebinding changes
nothing; TLS and the Host header keep the name. Every redirect is a new request, which is checked too. Proxies of the environment
are not used.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Self

import httpcore2
import httpx2

from app.outbound.names import Names
from app.settings import Allowed, Settings, parse_allowed

Address = IPv4Address | IPv6Address

Resolve = Callable[[str, int, str], Awaitable[Sequence[str]]]
"""Host, port and tenant → the host's addresses. Raises OSError."""

NAT64 = IPv6Network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address."""

NEVER_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's metadata and wire server, on a public address
        # Special in IANA's registries, but not in `ipaddress` of every Python version.
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.88.99.0/24",  # relays of 6to4
        "64:ff9b:1::/48",  # NAT64 of one's own
        "100::/63",  # discarded
        "2001::/23",  # protocol assignments, Teredo
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
    )
)


READ_BYTES_MAX = 8 * 1024
"""Of a client's server, read at once."""


class OutboundRefused(Exception):
    """The guard refuses this URL; the message has the host and the reason."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(f"Calling '{host}' is not allowed: {why}.")


def _private(host: str) -> OutboundRefused:
    return OutboundRefused(
        host, "it is not on the public internet, and REPRISE_OUTBOUND_ALLOW of this server does not name it"
    )


class Guard:
    """Allows public and listed addresses. One for the whole process."""

    def __init__(self, allowed: Allowed, *, resolve: Resolve | None = None) -> None:
        """`resolve` finds the addresses of a host; tests have their own."""
        self._allowed = allowed
        self._resolve = resolve or Names()

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The guard of REPRISE_OUTBOUND_ALLOW."""
        return cls(parse_allowed(settings.outbound_allow))

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """The trusted certificates, loaded once."""
        return httpx2.create_ssl_context()

    def transport(self, tenant: str) -> httpx2.AsyncHTTPTransport:
        """A transport for a tenant's `httpx2.AsyncClient` that calls only what may be called. Raises OutboundRefused from a
        request.

        Give it to a client with `trust_env=False`: proxies of the environment would have transports of their own.
        """
        return _GuardedTransport(self, tenant)

    def open_transport(self) -> httpx2.AsyncHTTPTransport:
        """A transport without a guard, for addresses that the operator wrote down."""
        return httpx2.AsyncHTTPTransport(verify=self.tls, trust_env=False)

    def check_form(self, url: httpx2.URL) -> None:
        """Check what needs no network. Raises OutboundRefused."""
        host = url.host
        if url.scheme not in {"http", "https"}:
            raise OutboundRefused(host or str(url.scheme), "only http and https URLs are called")
        if not host:
            raise OutboundRefused("", "the URL names no host")
        if url.userinfo:
            raise OutboundRefused(host, "the URL carries a user name or password")
        if url.port is not None and not 0 < url.port < 65536:
            raise OutboundRefused(host, "the URL's port is none")

    async def addresses(self, host: str, port: int, tenant: str) -> list[str]:
        """The addresses of a host, all of which may be called. Raises OutboundRefused, OSError for an unknown host."""
        found = list(dict.fromkeys(await self._resolve(host, port, tenant)))
        if host.lower().rstrip(".") in self._allowed.hosts:
            return found
        # One private address among public ones may be an attack: refuse all.
        if not all(self._may_call(ip_address(address)) for address in found):
            raise _private(host)
        return found

    def _may_call(self, address: Address) -> bool:
        meant = _unembedded(address)
        return any(meant in network for network in self._allowed.networks) or _is_public(meant)


def _unembedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one embeds, or the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not (isinstance(address, IPv6Address) and address.is_site_local)
        and not any(address in network for network in NEVER_PUBLIC)
    )


class _GuardedTransport(httpx2.AsyncHTTPTransport):
    """httpx2's transport, on a pool whose connections go to checked addresses."""

    def __init__(self, guard: Guard, tenant: str) -> None:
        limits = httpx2.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=5)
        super().__init__(verify=guard.tls, trust_env=False, limits=limits)
        self._guard = guard
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=guard.tls,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_GuardedNetwork(guard, tenant),
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._guard.check_form(request.url)
        return await super().handle_async_request(request)


class _GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to checked addresses, not to names."""

    def __init__(self, guard: Guard, tenant: str) -> None:
        self._guard, self._tenant = guard, tenant
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._guard.addresses(host, port, self._tenant)
                return await self._connect(addresses, port, timeout, local_address, socket_options)
        except TimeoutError:
            raise httpcore2.ConnectTimeout from None
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} can't be resolved") from error

    async def _connect(
        self,
        addresses: list[str],
        port: int,
        timeout: float | None,  # noqa: ASYNC109
        local_address: str | None,
        socket_options: Iterable[Any] | None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first address that answers; each gets an equal share of the time."""
        share = None if timeout is None else timeout / max(1, len(addresses))
        failed: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                return _SmallReads(await self._network.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed


class _SmallReads(httpcore2.AsyncNetworkStream):
    """A connection with small reads: the parser processes a read without a pause, and few bytes can be much work."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self.write, self.aclose, self.get_extra_info = stream.write, stream.aclose, stream.get_extra_info  # type: ignore[method-assign]

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        return await self._stream.read(min(max_bytes, READ_BYTES_MAX), timeout)

    async def start_tls(self, *given: Any, **more: Any) -> httpcore2.AsyncNetworkStream:
        return _SmallReads(await self._stream.start_tls(*given, **more))
