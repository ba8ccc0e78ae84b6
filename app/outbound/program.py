"""MCP over the standard input and output of a program, as JSON-RPC in lines, like the SDK's `stdio_client`.

A program that many runs share needs more than that has: the length of an answer is limited, and a longer one fails its own call only;
stderr is read and limited; and `keeper.py`, which starts the program, kills all its processes when this process exits.
"""

import asyncio
import contextlib
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import mcp_types
import structlog
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage

from app.outbound.masking import Mask
from app.outbound.toolserver import ToolServer
from app.wire.requests import mend_surrogates

log = structlog.get_logger()

KEEPER = Path(__file__).with_name("keeper.py")
CHUNK_BYTES = 64 * 1024
FLUSH_S = 0.5
"""How long written messages may take to reach the program before its stdin is closed."""
KEEPER_S = 5.0
"""How long the keeper may take to end the program: twice its own deadlines."""
STDERR_CHARS_MAX = 500
STDERR_LINES_MAX = 20
"""Lines of stderr that are logged at level info, before the session is initialized."""

IDENTIFIER = rb'"id"\s*:\s*("[^"\\]{1,100}"|\d{1,18})\s*'
VERSION = rb'"jsonrpc"\s*:\s*"2\.0"\s*'
HEAD = re.compile(rb"\s*\{\s*(?:" + VERSION + rb",\s*)?" + IDENTIFIER + rb",")
TAIL = re.compile(rb"(?<!\\)" + IDENTIFIER + rb"(?:,\s*" + VERSION + rb")?\}\s*$")
"""A message's id as one of its first keys or its last, where it is found without parsing the message."""
ID_BYTES_MAX = 256

TooLong = Callable[[str | int], None]
"""Called with the id of an answer that is over the limit."""


@contextlib.asynccontextmanager
async def program_streams(
    server: ToolServer, *, line_bytes_max: int, too_long: TooLong, initialized: Callable[[], bool]
) -> AsyncIterator[Any]:
    """The streams of a program that runs until the end of the block. Raises OSError."""
    environment = {**get_default_environment(), **server.environment}
    if shutil.which(server.command[0], path=environment.get("PATH")) is None:
        raise FileNotFoundError(server.command[0])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-ISB", str(KEEPER), *server.command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    to_us, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, to_program = anyio.create_memory_object_stream[SessionMessage](0)
    reading = asyncio.create_task(_read(process.stdout, to_us, line_bytes_max, too_long))
    writing = asyncio.create_task(_write(process.stdin, to_program, to_us))
    listening = asyncio.create_task(_log_stderr(process.stderr, server, initialized))
    try:
        yield incoming, outgoing
    finally:
        has_exited = reading.done()
        incoming.close()
        outgoing.close()
        await asyncio.wait({writing}, timeout=FLUSH_S)
        process.stdin.close()
        tasks = {reading, writing, listening}
        try:
            await asyncio.wait_for(process.wait(), KEEPER_S)
        except TimeoutError:
            process.kill()
        finally:
            if has_exited:
                status = process.returncode
                log.warning(
                    "A tool server's program ended.", action="tool_program_ended", label=server.label, status=status
                )
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 the SDK does so too: nothing public does
            to_us.close()
            to_program.close()


async def _read(stdout: asyncio.StreamReader, to_us: Any, line_bytes_max: int, too_long: TooLong) -> None:
    """Pass on the program's messages; when the session is closed, discard them until EOF, so that the program can exit."""
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with to_us:
            async for line in _lines(stdout, line_bytes_max, too_long):
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(mend_surrogates(line), by_name=False)
                except ValueError:
                    continue  # some programs also print other things
                await to_us.send(SessionMessage(message))
    while await stdout.read(CHUNK_BYTES):
        pass


async def _lines(stdout: asyncio.StreamReader, bytes_max: int, too_long: TooLong) -> AsyncIterator[bytes]:
    """Whole lines of up to `bytes_max` bytes; of a longer one `too_long` gets the id."""
    parts: list[bytes] = []
    size = 0
    while chunk := await stdout.read(CHUNK_BYTES):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            parts.append(end)
            line, length = b"".join(parts), size
            parts, size = [], 0
            if length <= bytes_max:
                yield line
            elif (found := _identifier(line)) is not None:
                too_long(found)
        size += len(rest)
        parts.append(rest)
        if size > bytes_max:
            joined = b"".join(parts)
            parts = [joined[:ID_BYTES_MAX], joined[-ID_BYTES_MAX:]]  # enough to find the id


def _identifier(line: bytes) -> str | int | None:
    """The id of a message, from its beginning and its end."""
    found = HEAD.match(line) or TAIL.search(line[-ID_BYTES_MAX:])
    if found is None:
        return None
    text = found[1].decode(errors="replace")
    return text[1:-1] if text.startswith('"') else int(text)


async def _write(stdin: asyncio.StreamWriter, to_program: Any, to_us: Any) -> None:
    """Write messages to the program; if it closes its stdin, end the session as if it had exited."""
    try:
        async with to_program:
            async for message in to_program:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                stdin.write(text.encode() + b"\n")
                await stdin.drain()
    except OSError:
        await to_us.aclose()


async def _log_stderr(stderr: asyncio.StreamReader, server: ToolServer, initialized: Callable[[], bool]) -> None:
    """Log lines of stderr; once the session is initialized they may quote arguments, so their level is debug."""
    count, mask = 0, Mask(server.secrets)
    while chunk := await stderr.read(CHUNK_BYTES):
        for line in chunk.decode(errors="replace").splitlines():
            count += 1
            text = mask.text(line[:STDERR_CHARS_MAX])
            write = log.debug if initialized() or count > STDERR_LINES_MAX else log.info
            write("A tool server wrote to stderr.", action="tool_program_stderr", label=server.label, line=text)
