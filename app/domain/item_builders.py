"""Builders of output items: reasoning, a message, a call. Each opens, drains what it has buffered, and closes."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct

from app.domain.citations import NO_SOURCES, Sources
from app.domain.client_tools import ClientTool, Unfit
from app.domain.complete_json import WholeObject
from app.domain.dialect import WRAPPED_INPUT
from app.domain.toolbox import MODEL_NAME_CHARS_MAX, ClientCall, Rejected, Toolbox, Verdict
from app.ids import NewId
from app.wire.chat import Logprob
from app.wire.decoding import Json, json_object
from app.wire.events import (
    AnnotationAdded,
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
    OpaqueItem,
    OutputText,
    Reasoning,
    ReasoningText,
    Refusal,
    SummaryText,
)


class OutputOptions(Struct, frozen=True):
    """What the request asks of the events beyond the defaults."""

    summarize: bool = False
    """Mirror the reasoning into the summary, which is all that some clients show."""
    summary_follows: bool = False
    """Leave reasoning open until its summary is given."""
    seal: Callable[[str], str] | None = None
    """Makes `encrypted_content`, where it is included."""


PLAIN = OutputOptions()
"""The defaults."""


class ItemBuilder(Protocol):
    """Builds one output item."""

    @property
    def ready(self) -> bool:
        """Whether enough is known to open it."""
        ...

    @property
    def complete(self) -> bool:
        """Whether it may be closed once another builder has begun."""
        ...

    def open(self, output_index: int) -> Iterator[Event]:
        """The events that add the item."""
        ...

    def drain(self) -> Iterator[Event]:
        """The deltas that are buffered."""
        ...

    def close(self, status: ItemStatus) -> Iterator[Event]:
        """The events that end the item."""
        ...


class MessageBuilder:
    """Text and refusals: one content part each time the kind changes."""

    ready = complete = True

    def __init__(self, id: str, sources: Sources = NO_SOURCES) -> None:
        self.id = id
        self.pending: list[tuple[str, str, list[Raw]]] = []
        self.annotations: list[Json] = []
        """The upstream's own, of the open part."""
        self._sources = sources
        self._kind: str | None = None
        self._drained: list[str] = []
        self._logprobs: list[Raw] = []
        self._parts: list[Any] = []

    def open(self, output_index: int) -> Iterator[Event]:
        self._output_index = output_index
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
            self._drained.append(text)
            if kind == "text":
                self._logprobs += logprobs
                yield TextDelta(
                    item_id=self.id,
                    output_index=self._output_index,
                    content_index=len(self._parts),
                    delta=text,
                    logprobs=logprobs,
                )
            else:
                yield RefusalDelta(**self._at, content_index=len(self._parts), delta=text)
        self.pending.clear()

    def _close_part(self) -> Iterator[Event]:
        if self._kind is None:
            return
        at = {**self._at, "content_index": len(self._parts)}
        text, self._drained = "".join(self._drained), []
        part: OutputText | Refusal
        if self._kind == "text":
            logprobs, self._logprobs = self._logprobs, []
            cited, self.annotations = [*self.annotations, *self._sources.cited(text)], []
            for index, annotation in enumerate(cited):
                yield AnnotationAdded(**at, annotation_index=index, annotation=annotation)
            part = OutputText(
                text=text, annotations=[Raw(msgspec.json.encode(one)) for one in cited], logprobs=logprobs
            )
            yield TextDone(**at, text=text, logprobs=logprobs)
        else:
            part = Refusal(refusal=text)
            yield RefusalDone(**at, refusal=text)
        yield PartDone(**at, part=part)
        self._parts.append(part)

    def close(self, status: ItemStatus) -> Iterator[Event]:
        yield from self._close_part()
        item = Message(id=self.id, role="assistant", content=self._parts, status=status)
        yield _done(self._output_index, item)


class ReasoningBuilder:
    """Raw reasoning text, with a summary where one was asked for: the same text, or what is given before it is closed."""

    ready = complete = True

    def __init__(self, id: str, options: OutputOptions) -> None:
        self.id = id
        self.pending: list[str] = []
        self.summary: str | None = None
        """Made from the text; empty if there is none, None if it may follow."""
        self._options = options
        self._drained: list[str] = []

    @property
    def text(self) -> str:
        """What has been drained."""
        return "".join(self._drained)

    @property
    def waits(self) -> bool:
        """Whether a summary is to be given before it is closed."""
        return self._options.summary_follows and self.summary is None

    def open(self, output_index: int) -> Iterator[Event]:
        self._at: dict[str, Any] = {"item_id": self.id, "output_index": output_index}
        yield ItemAdded(output_index=output_index, item=Reasoning(id=self.id, status="in_progress"))
        yield PartAdded(**self._at, part=ReasoningText(text=""))
        if self._options.summarize:
            yield SummaryPartAdded(**self._at, part=SummaryText(text=""))

    def drain(self) -> Iterator[Event]:
        for text in self.pending:
            self._drained.append(text)
            yield ReasoningDelta(**self._at, delta=text)
            if self._options.summarize:
                yield SummaryDelta(**self._at, delta=text)
        self.pending.clear()

    def close(self, status: ItemStatus) -> Iterator[Event]:
        text = self.text
        yield ReasoningDone(**self._at, text=text)
        yield PartDone(**self._at, part=ReasoningText(text=text))
        summary = text if self._options.summarize else self.summary
        if self.summary:
            yield SummaryPartAdded(**self._at, part=SummaryText(text=""))
            yield SummaryDelta(**self._at, delta=self.summary)
        if summary:
            yield SummaryDone(**self._at, text=summary)
            yield SummaryPartDone(**self._at, part=SummaryText(text=summary))
        item = Reasoning(
            id=self.id,
            summary=[SummaryText(text=summary)] if summary else [],
            content=[ReasoningText(text=text)],
            encrypted_content=self._options.seal(text) if self._options.seal else UNSET,
            status=status,
        )
        yield _done(self._at["output_index"], item)


class CallBuilder:
    """A call of a function or custom tool. Its name may come in pieces and its id late: it opens with its first argument."""

    def __init__(self, toolbox: Toolbox, new_id: NewId, item_id: NewId) -> None:
        self.call_id = ""
        self.upstream_id: str | None = None
        self.name = ""
        self.native = False
        self._toolbox, self._new_id, self._item_id = toolbox, new_id, item_id
        self._pending: list[str] = []
        self._drained: list[str] = []
        self._arguments = WholeObject()
        self._item: FunctionCall | CustomToolCall | OpaqueItem | None = None
        self._tool: ClientTool | None = None

    def take_name(self, name: str | None) -> None:
        """A name in pieces is put together, one that is repeated is not. What is too long for a tool's name grows no more."""
        begun = bool(self.name) and bool(self._drained or self._pending)
        if name and not begun and name != self.name and len(self.name) <= MODEL_NAME_CHARS_MAX:
            self.name = name if name.startswith(self.name) else self.name + name

    def take_input(self, text: str) -> None:
        if text:
            self._pending.append(text)
            self._arguments.take(text)

    @property
    def input(self) -> str:
        return "".join((*self._drained, *self._pending))

    @property
    def verdict(self) -> Verdict:
        """Where the call goes; to be asked of one for a client's tool that has items of its own when it is whole."""
        verdict = self._toolbox.verdict(self.name)
        if isinstance(verdict, ClientCall) and verdict.tool:
            try:
                verdict.tool.item("", self.call_id, self.input)
            except Unfit as unfit:
                return Rejected(str(unfit))
        return verdict

    @property
    def ready(self) -> bool:
        if not (self.name and self.call_id and (self._drained or self._pending)):
            return False
        verdict = self._toolbox.verdict(self.name)
        return not (isinstance(verdict, ClientCall) and verdict.tool)

    @property
    def complete(self) -> bool:
        """Whether the next item may open."""
        return self.native or (self.whole and bool(self.call_id and self.name))

    @property
    def whole(self) -> bool:
        """Whether the arguments are a whole JSON object."""
        return self._arguments.whole

    def settle(self) -> None:
        """Fill in what is missing, as no more will come."""
        self.call_id = self.call_id or self._new_id("call")
        if not self.input and not self.native:
            self._pending.append("{}")

    def open(self, output_index: int) -> Iterator[Event]:
        verdict = self.verdict
        assert isinstance(verdict, ClientCall)
        namespace = verdict.namespace or UNSET
        self._tool = verdict.tool
        if verdict.tool:
            self._item = verdict.tool.item(self._item_id(verdict.tool.id_prefix), self.call_id, self.input)
        elif verdict.kind == "custom":
            self._item = CustomToolCall(
                id=self._item_id("ctc"),
                call_id=self.call_id,
                name=verdict.name,
                input="",
                namespace=namespace,
                status="in_progress",
            )
        else:
            self._item = FunctionCall(
                id=self._item_id("fc"),
                call_id=self.call_id,
                name=verdict.name,
                arguments="",
                namespace=namespace,
                status="in_progress",
            )
        self._at: dict[str, Any] = {"item_id": self._item.id, "output_index": output_index}
        added = self._item.fields if isinstance(self._item, OpaqueItem) else self._item
        yield ItemAdded(output_index=output_index, item=added)

    def drain(self) -> Iterator[Event]:
        if isinstance(self._item, FunctionCall):
            for text in self._pending:
                yield ArgumentsDelta(**self._at, delta=text)
        elif self.native and isinstance(self._item, CustomToolCall):
            for text in self._pending:
                yield CustomInputDelta(**self._at, delta=text)
        self._drained += self._pending
        self._pending.clear()

    def close(self, status: ItemStatus) -> Iterator[Event]:
        text = self.input
        if isinstance(self._item, OpaqueItem):
            assert self._tool is not None
            at = self._at["output_index"]
            yield from self._tool.progress(self._item, at)
            yield _done(at, {**self._item.fields, "status": status if status == "completed" else self._tool.cut_off})
            return
        if isinstance(self._item, FunctionCall):
            item: Item = msgspec.structs.replace(self._item, arguments=text, status=status)
            yield ArgumentsDone(**self._at, name=self._item.name, arguments=text)
        else:
            assert self._item is not None
            if not self.native:
                text = _unwrap(text)
                if text:
                    yield CustomInputDelta(**self._at, delta=text)
            item = msgspec.structs.replace(self._item, input=text, status=status)
            yield CustomInputDone(**self._at, input=text)
        yield _done(self._at["output_index"], item)


def _unwrap(arguments: str) -> str:
    """The text of a custom tool that was wrapped as a function; a model that forgot the wrapping is taken at its word."""
    text = (json_object(arguments) or {}).get(WRAPPED_INPUT)
    return text if isinstance(text, str) else arguments


def _done(output_index: int, item: Item | Json) -> ItemDone:
    """The item's JSON is made here, once: the event, the row and the response carry these bytes."""
    return ItemDone(output_index=output_index, item=Raw(msgspec.json.encode(item)))


class _OutputLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["_OutputLogprob"] | msgspec.UnsetType = UNSET


def output_logprob(given: Logprob) -> Raw:
    """A token's log probability in the form of the Responses API."""
    top = [_OutputLogprob(one.token, one.logprob, _bytes(one.token, one.bytes)) for one in given.top_logprobs or ()]
    made = _OutputLogprob(given.token, given.logprob, _bytes(given.token, given.bytes), top)
    return Raw(msgspec.json.encode(made))


def _bytes(token: str, given: list[int] | None) -> list[int]:
    return given if given is not None else list(token.encode())
