"""One upstream completion: chunks → events. A push parser without await, clock or dice of its own.

What the model says is a queue of groups: reasoning, a message, a call. Only the head of the queue speaks; it is closed when it
is complete and something follows, and what the next one has gathered meanwhile is said at once. So groups never interleave,
whatever order an upstream streams its parallel calls in, and a single group streams without delay.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct

from app.domain.prompt import WRAPPED_INPUT
from app.domain.think import ThinkSplitter
from app.domain.toolbox import HandOver, Refuse, Toolbox
from app.ids import NewId
from app.wire.chat import CallDelta, ChatUsage, Choice, Chunk, Delta, Logprob
from app.wire.events import (
    ArgumentsDelta,
    ArgumentsDone,
    CustomInputDelta,
    CustomInputDone,
    Event,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    RefusalDelta,
    RefusalDone,
    SummaryDelta,
    SummaryDone,
    SummaryPartAdded,
    SummaryPartDone,
    TextDelta,
    TextDone,
)
from app.wire.items import (
    CustomToolCall,
    FunctionCall,
    Item,
    ItemStatus,
    Message,
    OutputText,
    Reasoning,
    ReasoningText,
    Refusal,
    SummaryText,
)

CALL_ID_CHARS_MAX = 64


class Manner(Struct, frozen=True):
    """How a run wants its events: what the request asked for beyond the plain order."""

    summarize: bool = False
    """Mirror the reasoning into the summary, which is all that some clients show."""
    seal: Callable[[str], str] | None = None
    """Makes `encrypted_content`, where it is included."""


PLAIN = Manner()


class _Group(Protocol):
    """One output item in the making."""

    @property
    def ready(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    def open(self, output_index: int) -> Iterator[Event]: ...
    def drain(self) -> Iterator[Event]: ...
    def close(self, status: ItemStatus) -> Iterator[Event]: ...


class RefusedCall(Struct, frozen=True):
    """A call that went nowhere; the model is told why in the next turn."""

    call_id: str
    name: str
    arguments: str
    reason: str


class Turn:
    """Feed chunks, then close. `usage`, `finish_reason`, `refused` and `said` are there to be read."""

    def __init__(
        self,
        toolbox: Toolbox,
        new_id: NewId,
        *,
        output_index: int = 0,
        manner: Manner = PLAIN,
        splitter: ThinkSplitter | None = None,
    ) -> None:
        """`output_index` is that of the first item that this turn makes."""
        self.output_index = output_index
        self.usage: ChatUsage | None = None
        self.finish_reason: str | None = None
        self.refused: list[RefusedCall] = []
        self.handed_over = 0
        self._toolbox, self._new_id, self._manner = toolbox, new_id, manner
        self._splitter = splitter or ThinkSplitter()
        self._queue: list[_Group] = []
        self._opened = False
        self._calls: dict[int, _Call] = {}
        self._blank = ""

    def feed(self, chunk: Chunk) -> list[Event]:
        """The events that a chunk leads to."""
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return []
        choice = chunk.choices[0]
        if choice.delta is not None:
            self._take(choice.delta, choice)
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
        return list(self._advance())

    def close(self, status: ItemStatus = "completed") -> list[Event]:
        """End the turn. With status `incomplete` the item that was being said is marked so."""
        for kind, text in self._splitter.close():
            self._reason(text) if kind == "reasoning" else self._say(text, "text", [])
        events = list(self._advance())
        while self._queue:
            head = self._queue.pop(0)
            last = not self._queue
            if isinstance(head, _Call):
                head.settle()
            if self._is_refused(head):
                continue
            if not self._opened:
                events += self._open(head)
            events += head.drain()
            events += head.close(status if last or not head.complete else "completed")
            self._opened = False
        return events

    # -- What the chunk says goes to its group --

    def _take(self, delta: Delta, choice: Choice) -> None:
        if reasoning := delta.reasoning_content or delta.reasoning:
            self._reason(reasoning)
        if delta.content:
            logprobs = [_logprob(one) for one in (choice.logprobs.content if choice.logprobs else None) or ()]
            for kind, text in self._splitter.feed(delta.content):
                if kind == "reasoning":
                    self._reason(text)
                else:
                    self._say(text, "text", logprobs)
                    logprobs = []
        if delta.refusal:
            self._say(delta.refusal, "refusal", [])
        for call in delta.tool_calls or ():
            self._call(call)

    def _reason(self, text: str) -> None:
        group = self._queue[-1] if self._queue else None
        if not isinstance(group, _Reasoning):
            group = _Reasoning(self._new_id("rs"), self._manner)
            self._queue.append(group)
        group.pending.append(text)

    def _say(self, text: str, kind: str, logprobs: list[Raw]) -> None:
        group = self._queue[-1] if self._queue else None
        if not isinstance(group, _Message):
            # White space alone, as some models put before their calls, is no message.
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return
            group = _Message(self._new_id("msg"))
            self._queue.append(group)
        group.pending.append((kind, text, logprobs))

    def _call(self, delta: CallDelta) -> None:
        group = self._group_of(delta)
        said = delta.function or delta.custom
        if delta.id and not group.call_id:
            taken = {call.call_id for call in self._queue if isinstance(call, _Call)}
            group.call_id = delta.id[:CALL_ID_CHARS_MAX] if delta.id not in taken else self._new_id("call")
        if said is not None:
            group.take_name(said.name)
        if delta.custom is not None:
            group.native = True
            group.take_input(delta.custom.input or "")
        elif delta.function is not None:
            arguments = delta.function.arguments
            group.take_input(
                msgspec.json.encode(arguments).decode() if isinstance(arguments, dict) else arguments or ""
            )

    def _group_of(self, delta: CallDelta) -> "_Call":
        """By `index`; dialects without one, or with the same one for every call, tell calls apart by a new id and name."""
        index = delta.index if delta.index is not None else max(self._calls, default=0)
        known = self._calls.get(index)
        named = delta.function.name if delta.function else None
        if known and delta.id and known.upstream_id and delta.id != known.upstream_id and named:
            index, known = max(self._calls) + 1, None
        if known is None:
            known = self._calls[index] = _Call(self._toolbox, self._new_id)
            self._queue.append(known)
        known.upstream_id = known.upstream_id or delta.id
        return known

    # -- The head of the queue speaks --

    def _advance(self) -> Iterator[Event]:
        while self._queue:
            head = self._queue[0]
            followed = len(self._queue) > 1
            if not self._opened:
                if not head.ready and not (followed and head.complete):
                    return
                if self._is_refused(head):
                    if not (followed and head.complete):
                        return
                    self._queue.pop(0)
                    continue
                yield from self._open(head)
            yield from head.drain()
            if not (followed and head.complete):
                return
            yield from head.close("completed")
            self._queue.pop(0)
            self._opened = False

    def _open(self, head: _Group) -> Iterator[Event]:
        self._opened = True
        yield from head.open(self.output_index)
        self.output_index += 1
        self.handed_over += isinstance(head, _Call)

    def _is_refused(self, head: _Group) -> bool:
        if not isinstance(head, _Call) or not isinstance(head.verdict, Refuse):
            return False
        if head.complete or head not in self._queue:
            head.settle()
            self.refused.append(RefusedCall(head.call_id, head.name, head.input or "{}", head.verdict.reason))
        return True


class _Message:
    """Text and refusals: one content part each time the kind changes."""

    ready = complete = True

    def __init__(self, id: str) -> None:
        self.id = id
        self.pending: list[tuple[str, str, list[Raw]]] = []
        self._kind: str | None = None
        self._said: list[str] = []
        self._logprobs: list[Raw] = []
        self._parts: list[Any] = []

    def open(self, output_index: int) -> Iterator[Event]:
        self._at: dict[str, Any] = {"item_id": self.id, "output_index": output_index}
        yield ItemAdded(
            output_index=output_index, item=Message(id=self.id, role="assistant", content=[], status="in_progress")
        )

    def drain(self) -> Iterator[Event]:
        for kind, text, logprobs in self.pending:
            if kind != self._kind:
                yield from self._close_part()
                self._kind = kind
                part = OutputText(text="", annotations=[], logprobs=[]) if kind == "text" else Refusal(refusal="")
                yield PartAdded(**self._at, content_index=len(self._parts), part=part)
            self._said.append(text)
            if kind == "text":
                self._logprobs += logprobs
                yield TextDelta(**self._at, content_index=len(self._parts), delta=text, logprobs=logprobs)
            else:
                yield RefusalDelta(**self._at, content_index=len(self._parts), delta=text)
        self.pending.clear()

    def _close_part(self) -> Iterator[Event]:
        if self._kind is None:
            return
        at = {**self._at, "content_index": len(self._parts)}
        said, self._said = "".join(self._said), []
        part: OutputText | Refusal
        if self._kind == "text":
            logprobs, self._logprobs = self._logprobs, []
            part = OutputText(text=said, annotations=[], logprobs=logprobs)
            yield TextDone(**at, text=said, logprobs=logprobs)
        else:
            part = Refusal(refusal=said)
            yield RefusalDone(**at, refusal=said)
        yield PartDone(**at, part=part)
        self._parts.append(part)

    def close(self, status: ItemStatus) -> Iterator[Event]:
        yield from self._close_part()
        item = Message(id=self.id, role="assistant", content=self._parts, status=status)
        yield _done(self._at["output_index"], item)


class _Reasoning:
    """Raw reasoning text, mirrored into the summary where one was asked for."""

    ready = complete = True

    def __init__(self, id: str, manner: Manner) -> None:
        self.id = id
        self.pending: list[str] = []
        self._manner = manner
        self._said: list[str] = []

    def open(self, output_index: int) -> Iterator[Event]:
        self._at: dict[str, Any] = {"item_id": self.id, "output_index": output_index}
        yield ItemAdded(output_index=output_index, item=Reasoning(id=self.id, status="in_progress"))
        yield PartAdded(**self._at, part=ReasoningText(text=""))
        if self._manner.summarize:
            yield SummaryPartAdded(**self._at, part=SummaryText(text=""))

    def drain(self) -> Iterator[Event]:
        for text in self.pending:
            self._said.append(text)
            yield ReasoningDelta(**self._at, delta=text)
            if self._manner.summarize:
                yield SummaryDelta(**self._at, delta=text)
        self.pending.clear()

    def close(self, status: ItemStatus) -> Iterator[Event]:
        said = "".join(self._said)
        yield ReasoningDone(**self._at, text=said)
        yield PartDone(**self._at, part=ReasoningText(text=said))
        if self._manner.summarize:
            yield SummaryDone(**self._at, text=said)
            yield SummaryPartDone(**self._at, part=SummaryText(text=said))
        item = Reasoning(
            id=self.id,
            summary=[SummaryText(text=said)] if self._manner.summarize else [],
            content=[ReasoningText(text=said)],
            encrypted_content=self._manner.seal(said) if self._manner.seal else UNSET,
            status=status,
        )
        yield _done(self._at["output_index"], item)


class _Call:
    """A call of a function or custom tool. Its name may come in pieces and its id late: it opens with its first argument."""

    def __init__(self, toolbox: Toolbox, new_id: NewId) -> None:
        self.call_id = ""
        self.upstream_id: str | None = None
        self.name = ""
        self.native = False
        self._toolbox, self._new_id = toolbox, new_id
        self._pending: list[str] = []
        self._said: list[str] = []
        self._item: FunctionCall | CustomToolCall | None = None

    def take_name(self, name: str | None) -> None:
        """A name in pieces is put together, one that is repeated is not."""
        if name and not self._said and not self._pending and name != self.name:
            self.name = name if name.startswith(self.name) else self.name + name

    def take_input(self, text: str) -> None:
        if text:
            self._pending.append(text)

    @property
    def input(self) -> str:
        return "".join((*self._said, *self._pending))

    @property
    def verdict(self) -> HandOver | Refuse:
        return self._toolbox.verdict(self.name)

    @property
    def ready(self) -> bool:
        return bool(self.name and self.call_id and (self._said or self._pending))

    @property
    def complete(self) -> bool:
        """Whether the arguments are whole: then what comes next may be said."""
        if self.native:
            return True
        try:
            msgspec.json.decode(self.input)
        except msgspec.DecodeError:
            return False
        return bool(self.call_id and self.name)

    def settle(self) -> None:
        """No more will come: what is still missing is made up."""
        self.call_id = self.call_id or self._new_id("call")
        if not self.input and not self.native:
            self._pending.append("{}")

    def open(self, output_index: int) -> Iterator[Event]:
        verdict = self.verdict
        assert isinstance(verdict, HandOver)
        namespace = verdict.namespace or UNSET
        if verdict.kind == "custom":
            self._item = CustomToolCall(
                id=self._new_id("ctc"),
                call_id=self.call_id,
                name=verdict.name,
                input="",
                namespace=namespace,
                status="in_progress",
            )
        else:
            self._item = FunctionCall(
                id=self._new_id("fc"),
                call_id=self.call_id,
                name=verdict.name,
                arguments="",
                namespace=namespace,
                status="in_progress",
            )
        self._at: dict[str, Any] = {"item_id": self._item.id, "output_index": output_index}
        yield ItemAdded(output_index=output_index, item=self._item)

    def drain(self) -> Iterator[Event]:
        if isinstance(self._item, FunctionCall):
            for text in self._pending:
                yield ArgumentsDelta(**self._at, delta=text)
        elif self.native:
            for text in self._pending:
                yield CustomInputDelta(**self._at, delta=text)
        self._said += self._pending
        self._pending.clear()

    def close(self, status: ItemStatus) -> Iterator[Event]:
        said = self.input
        if isinstance(self._item, FunctionCall):
            item: Item = msgspec.structs.replace(self._item, arguments=said, status=status)
            yield ArgumentsDone(**self._at, name=self._item.name, arguments=said)
        else:
            assert self._item is not None
            if not self.native:
                said = _unwrap(said)
                if said:
                    yield CustomInputDelta(**self._at, delta=said)
            item = msgspec.structs.replace(self._item, input=said, status=status)
            yield CustomInputDone(**self._at, input=said)
        yield _done(self._at["output_index"], item)


def _unwrap(arguments: str) -> str:
    """The text of a custom tool that was wrapped as a function; a model that forgot the wrapping is taken at its word."""
    try:
        wrapped = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.ValidationError, msgspec.DecodeError):
        return arguments
    text = wrapped.get(WRAPPED_INPUT)
    return text if isinstance(text, str) else arguments


def _done(output_index: int, item: Item) -> ItemDone:
    """The item's JSON is made here, once: the event, the row and the response carry these bytes."""
    return ItemDone(output_index=output_index, item=Raw(msgspec.json.encode(item)))


class _OutputLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["_OutputLogprob"] | msgspec.UnsetType = UNSET


def _logprob(given: Logprob) -> Raw:
    top = [_OutputLogprob(one.token, one.logprob, _bytes(one.token, one.bytes)) for one in given.top_logprobs or ()]
    made = _OutputLogprob(given.token, given.logprob, _bytes(given.token, given.bytes), top)
    return Raw(msgspec.json.encode(made))


def _bytes(token: str, given: list[int] | None) -> list[int]:
    return given if given is not None else list(token.encode())
