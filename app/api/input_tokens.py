"""`/v1/responses/input_tokens`: how long a prompt would be."""

from contextlib import ExitStack
from typing import Any

from litestar import Request, Response, post

from app.api.connected import while_connected
from app.api.left_out import left_out_headers
from app.api.replies import small_reply
from app.api.services import Services
from app.offload import offload
from app.runs.admission import Caller
from app.wire.requests import decode_count
from app.wire.resources import InputTokens


@post("/v1/responses/input_tokens", status_code=200)
async def input_tokens(request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
    """The tokens that the model would read if a response was created with these parameters."""
    with ExitStack() as taking:
        raw = await taking.enter_context(services.bodies.reading(request)).read()
        create = await offload(len(raw), decode_count, raw, services.catalog.passed_on)
        del raw
        counted = await while_connected(request.receive, services.counts.count(caller, create, taking.close))
    return small_reply(InputTokens(counted.tokens), left_out_headers(counted.left_out))
