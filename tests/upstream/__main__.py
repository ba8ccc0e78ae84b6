"""python -m tests.upstream --port N: the scripted upstream for other processes."""

import argparse
import asyncio
import concurrent.futures

from tests.upstream.server import Upstream


def main() -> None:
    """Serve other processes until killed; requests are not kept, so that a benchmark does not grow."""
    parser = argparse.ArgumentParser(description="A scripted Chat Completions upstream.")
    parser.add_argument("--port", type=int, default=8100)
    upstream = Upstream(port=parser.parse_args().port, keep_requests=False)
    ready: concurrent.futures.Future[None] = concurrent.futures.Future()
    ready.add_done_callback(
        lambda done: print(upstream.base_url if not done.exception() else done.exception(), flush=True)
    )
    try:
        import uvloop
    except ImportError:
        asyncio.run(upstream.serve(ready))
    else:
        uvloop.run(upstream.serve(ready))


if __name__ == "__main__":
    main()
