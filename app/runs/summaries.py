"""Summaries of a run's reasoning, by a model that the catalog names. Without one an answer is as good: no failure here ends a run."""

import asyncio
from functools import partial

import structlog

from app.domain.lifecycle import outcome_of
from app.domain.prices import Prices
from app.domain.prompt import reasoning_summary_request
from app.domain.think import ThinkSplitter
from app.domain.toolbox import open_toolbox
from app.domain.turn import Turn, texts_of
from app.errors import ApiError, UpstreamGarbled
from app.ids import new_id
from app.offload import offload
from app.outbound.catalog import Route
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.settings import Settings
from app.wire.requests import Detail

log = structlog.get_logger()


class Summaries:
    """The summaries of one run."""

    def __init__(self, plan: RunPlan, recorder: Recorder, settings: Settings, prompt: str) -> None:
        self._plan, self._recorder, self._prompt = plan, recorder, prompt
        self._left = settings.reasoning_summaries_max
        self._prices: Prices | None = None
        self._timeout_s = settings.reasoning_summary_timeout_s
        self._bytes_max = settings.reasoning_summary_bytes_max

    async def of(self, text: str) -> str:
        """A summary of this reasoning; empty where there is none."""
        if not (self._left and text.strip()):
            return ""
        self._left -= 1
        try:
            async with asyncio.timeout(self._timeout_s):
                stream = await self._plan.first_in_order(partial(self._open, text), self._plan.summary_routes)
                return await self._read(stream)
        except TimeoutError:
            code = "timeout"
        except ApiError as error:
            code = type(error).__name__
        log.warning("No summary of reasoning was made.", action="reasoning_not_summarized", error=code)
        return ""

    async def _open(self, text: str, upstream: Upstream, route: Route) -> ChunkStream:
        body = await offload(
            len(text),
            reasoning_summary_request,
            text,
            self._prompt,
            self._detail,
            model=route.model,
            dialect=upstream.dialect_for(route),
        )
        stream = await upstream.open(route.model, body, self._plan.caller_key)
        self._prices = route.prices
        return stream

    @property
    def _detail(self) -> Detail:
        given = self._plan.request.body.reasoning
        return (given and (given.summary or given.generate_summary)) or "auto"

    async def _read(self, stream: ChunkStream) -> str:
        """Raises ApiError; UpstreamGarbled for a summary that is not whole."""
        turn = Turn(
            open_toolbox((), (), "none"), new_id, splitter=ThinkSplitter(stream.upstream.dialect.think), calls_max=0
        )
        texts: list[str] = []
        left = self._bytes_max
        try:
            async for chunks in stream:
                texts += texts_of(event for chunk in chunks for event in turn.feed(chunk))
                left -= stream.read_bytes
                if left < 0:
                    raise UpstreamGarbled(f"The upstream made a summary of more than {self._bytes_max} bytes.")
        finally:
            self._recorder.spend(turn.usage, self._prices, is_limited=False)
            await asyncio.shield(stream.close())
        if outcome_of(turn.finish_reason).status != "completed":
            raise UpstreamGarbled("The upstream's summary is not whole.")
        return "".join([*texts, *texts_of(turn.close())]).strip()
