"""`/v1/responses/compact`: a context → the window that replaces it. Nothing is stored."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from litestar import Controller, Request, Response, post

from app.api.connected import run_while_connected
from app.api.left_out import left_out_headers
from app.api.replies import json_reply
from app.api.services import Services
from app.domain.compaction import retained
from app.domain.run_limits import OF_RUN
from app.errors import InvalidRequest, UpstreamError, UpstreamGarbled
from app.offload import offload
from app.runs.admission import Caller
from app.runs.foreground import ForegroundRun
from app.wire import resources
from app.wire.compactions import CompactedResponse, decode_compact
from app.wire.items import AnyItem, encode_item
from app.wire.redaction import Redaction
from app.wire.resources import NO_USAGE, encode


class CompactionsController(Controller):
    """Compaction on demand."""

    path = "/v1/responses/compact"

    @post(status_code=200)
    async def compact(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """The messages to the model, and one compaction item that stands for the whole context."""
        with ExitStack() as taking:
            raw = await taking.enter_context(services.bodies.reading(request)).read()
            create = await offload(len(raw), decode_compact, raw, services.catalog.passed_on)
            size = len(raw)
            del raw

            async def read(run: ForegroundRun) -> tuple[list[AnyItem], resources.Response]:
                taking.close()
                messages = retained(run.context.items)
                try:
                    return messages, await run.finished()
                except UpstreamError as error:
                    error.is_final = False  # a retry repeats no call of a tool
                    raise

            start = partial(services.admission.start, caller, create)
            run, (messages, made) = await run_while_connected(request.receive, start, read)
        incomplete = made.incomplete_details
        if incomplete and incomplete.reason in OF_RUN:
            raise InvalidRequest(
                "The summary would be longer than the limits of the run allow.", code=incomplete.reason
            )
        if made.status != "completed":
            raise UpstreamGarbled("The upstream's summary is not complete.")
        body = await offload(size, _encoded, messages, made)
        return json_reply(body, services.backlogs, left_out_headers(run.left_out), made=made.id, stored=False)


def _encoded(messages: list[AnyItem], made: resources.Response) -> bytes:
    return encode(
        CompactedResponse(
            id=made.id,
            created_at=made.created_at,
            output=[*(msgspec.Raw(encode_item(message)) for message in messages), *Redaction(()).output(made.output)],
            usage=made.usage or NO_USAGE,  # clients demand one, even where the upstream reports none
        )
    )
