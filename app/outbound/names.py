"""Looking up the names that clients give.

For a name whose zone never answers the system's resolver takes half a minute, also when its answer is no longer wanted. The
event loop's own look-ups share a few threads, and upstreams, Postgres and Redis need those. So these have threads of their own,
of which no tenant takes more than its share.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future
from ipaddress import ip_address
from weakref import WeakValueDictionary

LOOKUPS_MAX = 64
"""At once in this process; more wait."""

LOOKUPS_TENANT_MAX = 8
"""Of one tenant at once."""


class Names:
    """The system's resolver, for tenants."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(LOOKUPS_MAX)
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __call__(self, host: str, port: int, tenant: str) -> list[str]:
        """The addresses of a host. Raises OSError for an unknown one. A look-up that is given up keeps its place to its end."""
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

        def over(_: asyncio.Future[list[str]]) -> None:
            places.release()
            self._all.release()
            lookup.exception()  # perhaps nobody else looks at it

        lookup.add_done_callback(over)
        await asyncio.wait([lookup])
        return lookup.result()


def _begin(host: str, port: int) -> Future[list[str]]:
    """Look up in a thread that no end of the process waits for, as it does for an executor's."""
    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found.set_result(_ask_system(host, port))
        except Exception as error:  # noqa: BLE001 whatever it is, who waits has to hear of it
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
    # As bytes, since it is encoded already: a text would be again, and one with a long label is no OSError.
    return [str(address[0]) for *_, address in socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)]
