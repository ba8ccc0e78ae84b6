"""python -m tests.toolserver: the scripted MCP server as a program of its own, over HTTP with --port, else over stdio."""

import argparse
import asyncio
import concurrent.futures
import json
import os
import sys
from typing import Any

from tests.toolserver.server import Toolserver
from tests.toolserver.tools import Cut, Endless, Script, Session


async def over_pipes(script: Script, options: dict[str, str]) -> None:
    """Answer messages from standard input until it ends; several calls at once."""
    session = Session("stdio", options.pop("name", "any"), options)
    running: set[asyncio.Task[None]] = set()

    async def send(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    async def answer(message: dict[str, Any]) -> None:
        try:
            found = await script.answer(session, message, dict(os.environ), send)
        except Cut:
            os._exit(3)
        except Endless:
            while True:
                await send({"jsonrpc": "2.0", "method": "notifications/progress", "params": {}})
        if found is not None:
            await send(found)

    while line := await asyncio.to_thread(sys.stdin.readline):
        task = asyncio.create_task(answer(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    for task in running:
        task.cancel()


def main() -> None:
    """Serve until killed, or until standard input ends."""
    parser = argparse.ArgumentParser(description="A scripted MCP server.")
    parser.add_argument("--port", type=int)
    parser.add_argument("--record", default="")
    parser.add_argument("options", nargs="*", help="name=value, as in a URL; over stdio only")
    given = parser.parse_args()
    if given.port is None:
        options = dict(option.split("=", 1) for option in given.options)
        asyncio.run(over_pipes(Script(given.record), options))
        return
    server = Toolserver(port=given.port, record=given.record)
    ready: concurrent.futures.Future[None] = concurrent.futures.Future()
    ready.add_done_callback(lambda done: print(done.exception() or f"http://127.0.0.1:{server.port}", flush=True))
    asyncio.run(server.serve(ready))


if __name__ == "__main__":
    main()
