"""MCP with a program: JSON-RPC in lines over its standard input and output, as the SDK's own `stdio_client` speaks it.

What that one has not, and a program that many runs share must have: an answer's length is bounded, and an answer that is too
long fails its own call only; what the program says on stderr is read and bounded; and `keeper.py` between us and the program
sees to it that nothing of the program is left when this process is gone.
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
"""How long what was written may take to reach the program before its input is closed."""
KEEPER_S = 5.0
"""How long the keeper may take to end everything, which is twice what it needs."""
COMPLAINT_CHARS_MAX = 500
COMPLAINTS_MAX = 20
"""Lines of a program's stderr that are logged before its greeting."""

IDENTIFIER = rb'"id"\s*:\s*("[^"\\]{1,100}"|\d{1,18})\s*'
VERSION = rb'"jsonrpc"\s*:\s*"2\.0"\s*'
HEAD = re.compile(rb"\s*\{\s*(?:" + VERSION + rb",\s*)?" + IDENTIFIER + rb",")
TAIL = re.compile(rb"(?<!\\)" + IDENTIFIER + rb"(?:,\s*" + VERSION + rb")?\}\s*$")
"""Where a message's id may stand so that it can be found without reading the message: among the first, or the last."""
ID_BYTES_MAX = 256

TooLong = Callable[[str | int], None]
"""Told the id of an answer that was too long to be read."""


@contextlib.asynccontextmanager
async def program_streams(
    server: ToolServer, *, line_bytes_max: int, too_long: TooLong, greeted: Callable[[], bool]
) -> AsyncIterator[Any]:
    """The streams of a program that runs as long as the block. Raises OSError."""
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
    listening = asyncio.create_task(_listen(process.stderr, server, greeted))
    try:
        yield incoming, outgoing
    finally:
        by_itself = reading.done()
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
            if by_itself:
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
    """Pass on the program's messages until it ends, or nobody wants them: then read them all the same, so that it can end."""
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with to_us:
            async for line in _lines(stdout, line_bytes_max, too_long):
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(mend_surrogates(line), by_name=False)
                except ValueError:
                    continue  # many programs print something else now and then
                await to_us.send(SessionMessage(message))
    while await stdout.read(CHUNK_BYTES):
        pass


async def _lines(stdout: asyncio.StreamReader, bytes_max: int, too_long: TooLong) -> AsyncIterator[bytes]:
    """Whole lines; one that is too long is left out."""
    held: list[bytes] = []
    size = 0
    while chunk := await stdout.read(CHUNK_BYTES):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            held.append(end)
            line, length = b"".join(held), size
            held, size = [], 0
            if length <= bytes_max:
                yield line
            elif (found := _identifier(line)) is not None:
                too_long(found)
        size += len(rest)
        held.append(rest)
        if size > bytes_max:
            joined = b"".join(held)
            held = [joined[:ID_BYTES_MAX], joined[-ID_BYTES_MAX:]]  # enough to find its id


def _identifier(line: bytes) -> str | int | None:
    """The id of a message of which only the beginning and the end are there."""
    found = HEAD.match(line) or TAIL.search(line[-ID_BYTES_MAX:])
    if found is None:
        return None
    text = found[1].decode(errors="replace")
    return text[1:-1] if text.startswith('"') else int(text)


async def _write(stdin: asyncio.StreamWriter, to_program: Any, to_us: Any) -> None:
    """Pass on our messages; where the program takes no more, it is as if it had ended."""
    try:
        async with to_program:
            async for message in to_program:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                stdin.write(text.encode() + b"\n")
                await stdin.drain()
    except OSError:
        await to_us.aclose()


async def _listen(stderr: asyncio.StreamReader, server: ToolServer, greeted: Callable[[], bool]) -> None:
    """Log how the program begins; from its greeting on its words may quote what it was called with, hence are debug."""
    complaints, mask = 0, Mask(server.secrets)
    while chunk := await stderr.read(CHUNK_BYTES):
        for line in chunk.decode(errors="replace").splitlines():
            complaints += 1
            said = mask.text(line[:COMPLAINT_CHARS_MAX])
            tell = log.debug if greeted() or complaints > COMPLAINTS_MAX else log.info
            tell("A tool server's program says something.", action="tool_program_said", label=server.label, line=said)
