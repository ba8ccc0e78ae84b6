"""Resolves host names that clients name.

For a zone that does not answer, the system's resolver takes half a minute, and can't be cancelled. The event loop's look-ups share
a small thread pool that upstreams, Postgres and Redis need. So look-ups for clients have their own threads, limited per tenant.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future
from ipaddress import ip_address
from weakref import WeakValueDictionary

LOOKUPS_MAX = 64
"""At once in this process; others wait."""

LOOKUPS_TENANT_MAX = 8
"""At once for one tenant."""


class Names:
    """The system's resolver, for tenants."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(LOOKUPS_MAX)
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __call__(self, host: str, port: int, tenant: str) -> list[str]:
        """The addresses of a host. Raises OSError for an unknown one. A cancelled look-up counts until its thread ends."""
        if _is_address(host):
            return [host]
        places = self._places.setdefault(tenant, asyncio.Semaphore(LOOKUPS_TENANT_MAX))
        await places.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            places.release()
            raise
        lookup = asyncio.wrap_future(_begin(host, port))

        def release(_: asyncio.Future[list[str]]) -> None:
            places.release()
            self._all.release()
            lookup.exception()  # retrieved, as its caller may be cancelled

        lookup.add_done_callback(release)
        await asyncio.wait([lookup])
        return lookup.result()


def _begin(host: str, port: int) -> Future[list[str]]:
    """Look up in a daemon thread: at its exit the process waits for an executor's threads, but not for this one."""
    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found.set_result(_ask_system(host, port))
        except Exception as error:  # noqa: BLE001 the caller gets it
            found.set_exception(error)

    try:
        threading.Thread(target=look_up, name="names", daemon=True).start()
    except RuntimeError as error:  # the system has no more threads for this process
        found.set_exception(OSError(str(error)))
    return found


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _ask_system(host: str, port: int) -> list[str]:
    # Bytes, as the name is IDNA-encoded already: `str` would be encoded again, which raises UnicodeError for a long label.
    return [str(address[0]) for *_, address in socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)]
