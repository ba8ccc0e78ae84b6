"""Looking up the names that clients give.

For a name whose zone never answers the system's resolver takes half a minute, also when its answer is no longer wanted. The
event loop's own look-ups share a few threads, and upstreams, Postgres and Redis need those. So these have threads of their own,
of which no tenant takes more than its share.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from weakref import WeakValueDictionary

LOOKUPS_MAX = 64
"""At once in this process; more wait."""

LOOKUPS_TENANT_MAX = 8
"""Of one tenant at once."""

_THREADS = ThreadPoolExecutor(LOOKUPS_MAX, thread_name_prefix="names")


class Names:
    """The system's resolver, for tenants."""

    def __init__(self) -> None:
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __call__(self, host: str, port: int, tenant: str) -> list[str]:
        """The addresses of a host. Raises OSError for an unknown one. A look-up that is given up keeps its place to its end."""
        if _is_address(host):
            return [host]
        places = self._places.setdefault(tenant, asyncio.Semaphore(LOOKUPS_TENANT_MAX))
        await places.acquire()
        lookup = asyncio.get_running_loop().run_in_executor(_THREADS, _ask_system, host, port)

        def over(done: asyncio.Future[list[str]]) -> None:
            places.release()
            done.exception()  # perhaps nobody else looks at it

        lookup.add_done_callback(over)
        await asyncio.wait([lookup])
        return lookup.result()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _ask_system(host: str, port: int) -> list[str]:
    # As bytes, since it is encoded already: a text would be again, and one with a long label is no OSError.
    return [str(address[0]) for *_, address in socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)]
