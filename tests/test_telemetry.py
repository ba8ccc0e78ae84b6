"""The log: what went wrong and where, whatever exceptions, libraries and event loops would say of it."""

import re
import subprocess
import sys
import textwrap

import pytest

from tests.servers import ROOT

BEGIN = """
import asyncio, gc, logging, sys, warnings
import stamina, structlog
from app import cli, telemetry
from app.errors import UpstreamUnavailable

telemetry.start_logging("debug")
logging.getLogger().setLevel(logging.DEBUG)
log = structlog.get_logger()

def fail(given="SECRET"):
    raise ValueError(given)
"""

CASES = {
    "an exception with its causes": (
        """
        try:
            try:
                fail()
            except ValueError as error:
                raise KeyError("SECRET") from error
        except KeyError:
            log.exception("It failed.", action="failed")
        """,
        ["It failed.", "KeyError", "because of", "ValueError", "in fail"],
    ),
    "a group": (
        """
        try:
            raise ExceptionGroup("SECRET", [ValueError("SECRET")])
        except ExceptionGroup:
            log.exception("It failed.")
        """,
        ["ExceptionGroup", "because of", "ValueError"],
    ),
    "a task that nobody asks": (
        """
        async def main():
            task = asyncio.create_task(asyncio.to_thread(fail), name="the task")
            await asyncio.wait([task])
            del task
            gc.collect()
        cli._run(main())
        """,
        ["task_failed", "ValueError", "in fail"],
    ),
    "a callback with arguments": (
        """
        async def main():
            asyncio.get_running_loop().call_soon(fail, "SECRET")
            await asyncio.sleep(0.01)
        cli._run(main())
        """,
        ["task_failed", "ValueError"],
    ),
    "a failure that Python ignores": (
        """
        class Fails:
            def __del__(self):
                fail()
        Fails()
        """,
        ["unraisable", "ValueError"],
    ),
    "libraries": (
        """
        for name in ("mcp.client", "client", "httpx2", "openai", "redis", "aiohttp.client", "sqlalchemy", "asyncio", "any"):
            try:
                fail()
            except ValueError as error:
                logging.getLogger(name).error(f"SECRET {error} %s", "SECRET", exc_info=True)
        """,
        ['"logger": "redis"', "ValueError"],
    ),
    "the server": (
        """
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        """,
        ["Invalid HTTP request received."],
    ),
    "attempts": (
        """
        class Server:
            @stamina.retry(on=ValueError, attempts=2, wait_initial=0.01, wait_jitter=0)
            async def ask(self, prompt, key):
                fail(prompt)
        async def main():
            try:
                await Server().ask("SECRET", key="SECRET")
            except ValueError:
                pass
            try:
                for attempt in stamina.retry_context(on=UpstreamUnavailable, attempts=2, wait_initial=0.01, wait_jitter=0):
                    with attempt:
                        error = UpstreamUnavailable("SECRET")
                        error.upstream = "spare"
                        raise error from ConnectionRefusedError(111, "SECRET")
            except UpstreamUnavailable:
                pass
        cli._run(main())
        """,
        [
            '"attempt": 1',
            '"wait_s": 0.01',
            '"error": "ValueError"',
            '"what": "a write to the database"',
            "UpstreamUnavailable(spare) < ConnectionRefusedError(ECONNREFUSED)",
        ],
    ),
}


@pytest.fixture(scope="module")
def told():
    """What each case has printed, all of them in one process: it takes a second to begin."""
    marked = [f"print({name!r}, file=sys.stderr){textwrap.dedent(code)}" for name, (code, _) in CASES.items()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([BEGIN, *marked])], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    parts = re.split(f"^({'|'.join(CASES)})$", done.stderr, flags=re.MULTILINE)
    assert len(parts) == 1 + 2 * len(CASES), done.stderr
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_log_says_what_went_wrong_and_quotes_nobody(told, name):
    for words in CASES[name][1]:
        assert words in told[name]
    assert "SECRET" not in told[name]
