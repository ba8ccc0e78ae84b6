"""Making a response for a client that waits, whichever API it speaks."""

from contextlib import ExitStack
from functools import partial
from typing import Any

from litestar import Request

from app.api.connected import run_while_connected
from app.api.left_out import left_out_headers
from app.api.services import Services
from app.runs.admission import Caller
from app.runs.foreground import ForegroundRun
from app.wire.requests import CreateResponse
from app.wire.resources import Response


async def run(
    request: Request[Any, Any, Any], services: Services, caller: Caller, create: CreateResponse, taking: ExitStack
) -> tuple[ForegroundRun, Response | None, dict[str, str]]:
    """A foreground run, its response unless that is streamed, and the reply's headers. `taking` is closed once the run is admitted.

    Raises ApiError, ClientDisconnected."""

    async def read(run: ForegroundRun) -> tuple[Response | None, dict[str, str]]:
        taking.close()
        headers = left_out_headers(run.left_out)
        if not create.stream:
            return await run.finished(), headers
        await run.opened()
        return None, headers

    start = partial(services.admission.start, caller, create)
    run, (made, headers) = await run_while_connected(request.receive, start, read)
    return run, made, headers
