"""Failed attempts to authenticate: replies to them wait, the longer the more often a client's address fails.

Only failures wait, so that a client with a valid key does not notice others at its address. How many addresses are remembered is
bounded: the one whose last failure is the longest ago is forgotten first.
"""

import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from app.api.sites import Headers
from app.settings import Networks, Settings, parse_networks

ADDRESSES_MAX = 10_000

MINUTE_S = 60.0

SITE_BITS = 64
"""The part of an IPv6 address that one client has for itself."""

Address = IPv4Address | IPv6Address


class FailedAttempts:
    """Remembers failures by the client's address: a leaky bucket for each."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = MINUTE_S / settings.auth_attempts_per_minute
        self._delay_max_s = settings.auth_delay_max_s
        self._proxies = parse_networks(settings.proxies)
        self._clock = clock
        self._empty_at: dict[str, float] = {}
        """For each address, when its bucket will be empty."""

    def address(self, peer: str | None, headers: Headers) -> str:
        """The address of a client: that of its connection, or what trusted proxies have written into X-Forwarded-For."""
        named = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1")
        return str(client_address(peer, named.split(","), self._proxies) or "unknown")

    def count(self, address: str) -> float:
        """Count a failure of an address. Returns how long its reply waits, in seconds."""
        now, bucket = self._clock(), _bucket(address)
        empty_at = max(self._empty_at.pop(bucket, 0.0), now) + self._interval_s
        delay_s = min(max(0.0, empty_at - now - MINUTE_S), self._delay_max_s)
        while len(self._empty_at) >= ADDRESSES_MAX:
            del self._empty_at[next(iter(self._empty_at))]
        self._empty_at[bucket] = min(empty_at, now + MINUTE_S + self._delay_max_s)
        return delay_s


def client_address(peer: str | None, forwarded: Iterable[str], proxies: Networks) -> Address | None:
    """The last address that no trusted proxy has: each of them appends the one that it sees."""
    found = _parsed(peer or "")
    for entry in reversed(list(forwarded)):
        if found is None or not any(found in network for network in proxies):
            break
        further = _parsed(entry.strip())
        if further is None:
            break
        found = further
    return found


def _parsed(text: str) -> Address | None:
    """An address, perhaps with a port; an IPv6 zone is any text, and left out."""
    text = text.partition("%")[0]
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _bucket(address: str) -> str:
    """What counts as one client."""
    if ":" not in address:
        return address
    return str(IPv6Network((IPv6Address(address), SITE_BITS), strict=False))
