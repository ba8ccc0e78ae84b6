"""A server without keys answers only requests to names of this machine, and from its pages.

Any page in a browser on this machine can send requests to loopback, under a name of its own (DNS rebinding) or across
origins. Browsers name both in `Host` and `Origin`. With keys in use neither is checked: a page has no key.
"""

import ipaddress
import re
from collections.abc import Iterable

from app.errors import ForeignSite

Headers = Iterable[tuple[bytes, bytes]]

AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@?#\s]+)(:\d*)?")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(.*)")


def refuse_foreign(headers: Headers, *, http_version: str) -> None:
    """Raises ForeignSite unless each `Host` and `Origin` is a name of this machine. Only HTTP/1.0, which no browser speaks, may
    leave `Host` out."""
    hosts = [value for name, value in headers if name == b"host"]
    if not all(_is_loopback(host.decode("latin-1")) for host in hosts) or not (hosts or http_version == "1.0"):
        raise ForeignSite("Without keys this server answers only to names of its own machine, such as 'localhost'.")
    for name, value in headers:
        if name == b"origin":
            origin = ORIGIN.fullmatch(value.decode("latin-1").strip().lower())
            if not (origin and _is_loopback(origin[1])):
                raise ForeignSite("Without keys this server answers no web page of another site.")


def _is_loopback(authority: str) -> bool:
    """Whether a host, with or without a port, is this machine."""
    found = AUTHORITY.fullmatch(authority.strip().lower())
    if not found:
        return False
    host = found[1].removesuffix(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_loopback
