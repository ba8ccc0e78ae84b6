"""One upstream completion: chunks → events. A push parser without await, clock or randomness of its own.

The model's output is a queue of builders: reasoning, a message, a call. Only the head emits events; it is closed when it is
complete and another follows, and then that one's buffer is drained at once. So items never interleave, in whatever order an
upstream streams its parallel calls, and a single item streams without delay.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Raw, Struct

from app.domain.citations import NO_SOURCES, Sources, cited_upstream
from app.domain.dialect import ReasoningForm
from app.domain.item_builders import (
    PLAIN,
    CallBuilder,
    ItemBuilder,
    MessageBuilder,
    OutputOptions,
    ReasoningBuilder,
    output_logprob,
)
from app.domain.think import Kind, ThinkSplitter
from app.domain.toolbox import ClientCall, NeedsApproval, Rejected, ServerCall, Toolbox
from app.ids import NewId
from app.wire.chat import CallDelta, ChatUsage, Choice, Chunk, CustomDelta, Delta, FunctionDelta
from app.wire.decoding import Json
from app.wire.events import Event, TextDelta
from app.wire.items import CALL_ID_CHARS_MAX, ItemStatus


class OwnCall(Struct, frozen=True):
    """A call that does not go to the client: the server runs it, asks for approval, or answers the model why it is rejected."""

    call_id: str
    name: str
    """As the model knows the tool."""
    arguments: str
    verdict: ServerCall | NeedsApproval | Rejected
    place: str
    """What the ids of its items end in: its place among the calls of its turn."""

    def ids(self, prefix: str) -> str:
        """Gives ids to its items."""
        return prefix + self.place


class Turn:
    """Feed chunks, then close and read `usage`, `finish_reason`, `own_calls` and `client_calls`."""

    def __init__(
        self,
        toolbox: Toolbox,
        new_id: NewId,
        *,
        output_index: int = 0,
        options: OutputOptions = PLAIN,
        splitter: ThinkSplitter | None = None,
        call_ids: set[str] | None = None,
        sources: Sources = NO_SOURCES,
        calls_max: int = sys.maxsize,
        call_items: NewId | None = None,
    ) -> None:
        """`output_index` is that of the first item that this turn makes; `call_ids` are those that its response has used, and
        this turn adds its own: clients identify calls by them, while upstreams may begin with `call_0` in every turn.
        `sources` are what its messages may cite. Calls beyond `calls_max` are dropped, and `has_too_many_calls` is set.
        `call_items` gives ids to the items of calls, in their order."""
        self.output_index = output_index
        self.usage: ChatUsage | None = None
        self.finish_reason: str | None = None
        self.own_calls: list[OwnCall] = []
        self.client_calls = 0
        """How many calls went to the client."""
        self.reasoning_form: ReasoningForm | None = None
        """The form of the upstream's reasoning; None if there is none."""
        self.has_too_many_calls = False
        self.unsummarized: str | None = None
        """Reasoning that waits for its summary, and with it all that follows."""
        self._has_ended = False
        self._toolbox, self._new_id, self._options, self._sources = toolbox, new_id, options, sources
        self._splitter = splitter or ThinkSplitter()
        self._call_ids = set() if call_ids is None else call_ids
        self._queue: deque[ItemBuilder] = deque()
        self._opened = False
        self._calls: dict[int, CallBuilder] = {}
        self._calls_left = calls_max
        self._call_items = call_items or new_id
        self._last_index = 0
        self._blank: list[str] = []
        self._logprobs: list[Raw] = []
        """Of text that is still held back."""
        self._annotations: list[Json] = []
        """Those that came before the text."""

    def feed(self, chunk: Chunk) -> list[Event]:
        """The events of a chunk."""
        if chunk.usage is not None and chunk.usage.is_reported:
            self.usage = chunk.usage
        choice = chunk.choices.first if chunk.choices else None
        if choice is None:
            return []
        if choice.delta is not None:
            self._take(choice.delta, choice)
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
        return list(self._advance())

    def summarize(self, summary: str) -> list[Event]:
        """End the reasoning that waits, with its summary; an empty one is none. More reasoning may wait then."""
        head = self._queue[0]
        assert isinstance(head, ReasoningBuilder)
        head.summary, self.unsummarized = summary, None
        return list(self._advance())

    def settle(self) -> list[Event]:
        """No more chunks come: reasoning at the end waits for its summary, too."""
        self._split(self._splitter.close())
        self._has_ended = True
        return list(self._advance())

    def close(self, status: ItemStatus = "completed") -> list[Event]:
        """End the turn; the open item gets this status."""
        self._split(self._splitter.close())
        events = list(self._advance())
        while self._queue:
            head = self._queue.popleft()
            last = not self._queue
            if isinstance(head, CallBuilder):
                head.settle()
                if self._takes(head):
                    continue
            if not self._opened:
                events += self._open(head)
            events += head.drain()
            events += head.close(status if last or not head.complete else "completed")
            self._opened = False
        return events

    # -- Deltas go to their builders --

    def _take(self, delta: Delta, choice: Choice) -> None:
        reasoning = delta.reasoning_content or delta.reasoning or delta.thinking
        if reasoning:
            if self.reasoning_form is None:
                self.reasoning_form = (
                    "reasoning_content" if delta.reasoning_content else "reasoning" if delta.reasoning else "parts"
                )
            self._reason(reasoning)
        if choice.logprobs and choice.logprobs.content and (delta.content or not (reasoning or delta.tool_calls)):
            self._logprobs += map(output_logprob, choice.logprobs.content)
        if delta.content:
            self._split(self._splitter.feed(delta.content))
        if delta.refusal:
            self._say(delta.refusal, "refusal")
        for call in delta.tool_calls or ():
            self._call(call)
        if delta.annotations:
            self._annotate(delta.annotations)

    def _annotate(self, given: list[Raw]) -> None:
        builder = self._queue[-1] if self._queue else None
        annotations = builder.annotations if isinstance(builder, MessageBuilder) else self._annotations
        annotations += filter(None, map(cited_upstream, given))

    def _split(self, pieces: list[tuple[Kind, str]]) -> None:
        for kind, text in pieces:
            if kind == "text":
                self._say(text, "text")
            else:
                self.reasoning_form = self.reasoning_form or "think"
                self._reason(text)
                self._logprobs = []

    def _reason(self, text: str) -> None:
        builder = self._queue[-1] if self._queue else None
        if not isinstance(builder, ReasoningBuilder):
            builder = ReasoningBuilder(self._new_id("rs"), self._options)
            self._queue.append(builder)
        builder.pending.append(text)

    def _say(self, text: str, kind: str) -> None:
        builder = self._queue[-1] if self._queue else None
        if not isinstance(builder, MessageBuilder):
            # White space alone, as some models put before their calls, is not a message.
            self._blank.append(text)
            if not text or text.isspace():
                return
            text = "".join(self._blank)
            self._blank.clear()
            builder = MessageBuilder(self._new_id("msg"), self._sources)
            builder.annotations, self._annotations = self._annotations, []
            self._queue.append(builder)
        logprobs: list[Raw] = []
        if kind == "text":
            logprobs, self._logprobs = self._logprobs, []
        builder.pending.append((kind, text, logprobs))

    def _call(self, delta: CallDelta) -> None:
        builder = self._builder_of(delta)
        if builder is None:
            self.has_too_many_calls = True
            return
        inner = delta.function or delta.custom
        if delta.id and not builder.call_id:
            call_id = delta.id[:CALL_ID_CHARS_MAX]
            builder.call_id = call_id if call_id not in self._call_ids else self._new_id("call")
            self._call_ids.add(builder.call_id)
        builder.native = builder.native or delta.custom is not None
        if inner is not None:
            builder.take_name(inner.name)
            builder.take_input(_input(inner))

    def _builder_of(self, delta: CallDelta) -> CallBuilder | None:
        """By `index`; dialects without one, or with the same one for every call, begin a call with a name and either a new id or,
        where they give none, arguments after whole ones. None for a call too many."""
        index = delta.index if delta.index is not None else self._last_index
        known = self._calls.get(index)
        inner = delta.function or delta.custom
        if known is None or (inner and inner.name and _begins_another(delta, inner, known)):
            if not self._calls_left:
                return None
            self._calls_left -= 1
            known = self._calls[index] = CallBuilder(self._toolbox, self._new_id, self._call_items)
            self._queue.append(known)
        known.upstream_id = known.upstream_id or delta.id
        self._last_index = index
        return known

    # -- The head of the queue emits events --

    def _advance(self) -> Iterator[Event]:
        while self._queue:
            head = self._queue[0]
            followed = len(self._queue) > 1
            if not self._opened:
                if not (head.ready or (followed and head.complete)):
                    return
                if isinstance(head, CallBuilder) and not isinstance(head.verdict, ClientCall):
                    if not (followed and head.complete):
                        return
                    self._takes(head)
                    self._queue.popleft()
                    continue
                yield from self._open(head)
            yield from head.drain()
            if isinstance(head, ReasoningBuilder):
                if not (followed or self._has_ended):
                    return
                if head.waits:
                    self.unsummarized = self.unsummarized or head.text
                    return
            elif not (followed and head.complete):
                return
            yield from head.close("completed")
            self._queue.popleft()
            self._opened = False

    def _open(self, head: ItemBuilder) -> Iterator[Event]:
        self._opened = True
        yield from head.open(self.output_index)
        self.output_index += 1
        self.client_calls += isinstance(head, CallBuilder)

    def _takes(self, call: CallBuilder) -> bool:
        """Whether a call does not go to the client; then it is kept, whole."""
        verdict = call.verdict
        if isinstance(verdict, ClientCall):
            return False
        self.own_calls.append(OwnCall(call.call_id, call.name, call.input, verdict, self._call_items("")))
        return True


def texts_of(events: Iterable[Event]) -> list[str]:
    """What the events of a turn say."""
    return [event.delta for event in events if isinstance(event, TextDelta)]


def _begins_another(delta: CallDelta, inner: FunctionDelta | CustomDelta, known: CallBuilder) -> bool:
    if delta.id:
        return bool(known.upstream_id) and delta.id != known.upstream_id
    return known.whole and bool(_input(inner))


def _input(inner: FunctionDelta | CustomDelta) -> str:
    given = inner.input if isinstance(inner, CustomDelta) else inner.arguments
    return msgspec.json.encode(given).decode() if isinstance(given, dict) else given or ""
