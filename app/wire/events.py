"""Events: what a client receives while a response is made.

`sequence_number` is 0 until the recorder stamps it, just before it encodes. An `Entry` is an encoded event: after that
only bytes move.
"""

from typing import Any, ClassVar, cast

import msgspec
from msgspec import Raw, Struct

from app.wire.resources import Response


class Event(Struct, tag_field="type", kw_only=True):
    """Every event has a `type` and a `sequence_number` (0-based, one more each, per response)."""

    sequence_number: int = 0


class Lifecycle(Event, kw_only=True):
    """Events about the response as a whole; `response` is its snapshot of that moment."""

    response: Response


class Created(Lifecycle, tag="response.created"):
    pass


class Queued(Lifecycle, tag="response.queued"):
    pass


class InProgress(Lifecycle, tag="response.in_progress"):
    pass


class Completed(Lifecycle, tag="response.completed"):
    pass


class Incomplete(Lifecycle, tag="response.incomplete"):
    pass


class Failed(Lifecycle, tag="response.failed"):
    pass


TERMINAL: dict[str, type[Lifecycle]] = {
    "completed": Completed,
    "incomplete": Incomplete,
    "failed": Failed,
    "cancelled": Failed,
}
"""Status → the event that ends the stream. No stream schema knows a `response.cancelled`, and the node SDK throws at it: a
cancelled response ends with `response.failed`, whose response has the status `cancelled`."""


_SNAPSHOTS: tuple[type[Lifecycle], ...] = (Created, Queued, InProgress, *TERMINAL.values())
SNAPSHOTS = frozenset(str(event.__struct_config__.tag) for event in _SNAPSHOTS)
"""Types of the lifecycle events, which repeat the request."""


class ItemEvent(Event, kw_only=True):
    output_index: int


class ItemAdded(ItemEvent, tag="response.output_item.added"):
    item: Any


class ItemDone(ItemEvent, tag="response.output_item.done"):
    item: Raw


class OfItem(ItemEvent, kw_only=True):
    item_id: str


class OfContent(OfItem, kw_only=True):
    content_index: int = 0


class PartAdded(OfContent, tag="response.content_part.added"):
    part: Any


class PartDone(OfContent, tag="response.content_part.done"):
    part: Any


class TextDelta(OfContent, tag="response.output_text.delta"):
    delta: str
    logprobs: list[Raw] = []


class TextDone(OfContent, tag="response.output_text.done"):
    text: str
    logprobs: list[Raw] = []


class RefusalDelta(OfContent, tag="response.refusal.delta"):
    delta: str


class RefusalDone(OfContent, tag="response.refusal.done"):
    refusal: str


class ReasoningDelta(OfContent, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(OfContent, tag="response.reasoning_text.done"):
    text: str


class OfSummary(OfItem, kw_only=True):
    summary_index: int = 0


class SummaryPartAdded(OfSummary, tag="response.reasoning_summary_part.added"):
    part: Any


class SummaryPartDone(OfSummary, tag="response.reasoning_summary_part.done"):
    part: Any


class SummaryDelta(OfSummary, tag="response.reasoning_summary_text.delta"):
    delta: str


class SummaryDone(OfSummary, tag="response.reasoning_summary_text.done"):
    text: str


class ArgumentsDelta(OfItem, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(OfItem, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


class AnnotationAdded(OfContent, tag="response.output_text.annotation.added"):
    annotation_index: int
    annotation: Any


class McpArgumentsDelta(OfItem, tag="response.mcp_call_arguments.delta"):
    delta: str


class McpArgumentsDone(OfItem, tag="response.mcp_call_arguments.done"):
    arguments: str


class CodeDelta(OfItem, tag="response.code_interpreter_call_code.delta"):
    delta: str


class CodeDone(OfItem, tag="response.code_interpreter_call_code.done"):
    code: str


class OfCommand(ItemEvent, kw_only=True):
    """About one command of a shell call; these events name no item."""

    command_index: int


class CommandAdded(OfCommand, tag="response.shell_call_command.added"):
    command: str


class CommandDelta(OfCommand, tag="response.shell_call_command.delta"):
    delta: str


class CommandDone(OfCommand, tag="response.shell_call_command.done"):
    command: str


class CommandOutputDone(OfItem, tag="response.shell_call_output_content.done"):
    command_index: int
    output: list[Any]


class CustomInputDelta(OfItem, tag="response.custom_tool_call_input.delta"):
    delta: str


class CustomInputDone(OfItem, tag="response.custom_tool_call_input.done"):
    input: str


class Compacting(OfItem, tag="response.compaction.compacting"):
    """The model makes the summary; no event has any of it."""


STAGES: dict[str, tuple[str, ...]] = {
    "mcp_list_tools": ("in_progress", "completed", "failed"),
    "mcp_call": ("in_progress", "completed", "failed"),
    "web_search_call": ("in_progress", "searching", "completed"),
    "file_search_call": ("in_progress", "searching", "completed"),
    "code_interpreter_call": ("in_progress", "interpreting", "completed"),
    "image_generation_call": ("in_progress", "generating", "completed"),
}
"""Item type → the stages of its progress, each of which has an event."""

_PROGRESS = {
    tag: cast("type[OfItem]", msgspec.defstruct(tag, (), bases=(OfItem,), tag=tag))
    for tag in (f"response.{type_}.{stage}" for type_, stages in STAGES.items() for stage in stages)
}


def progress(item_type: str, *stages: str, item_id: str, output_index: int) -> list[Event]:
    """The events of an item's progress; a stage of which the API has no event has none."""
    tags = (f"response.{item_type}.{stage}" for stage in stages)
    return [_PROGRESS[tag](item_id=item_id, output_index=output_index) for tag in tags if tag in _PROGRESS]


class Entry(Struct, frozen=True):
    """An encoded event: `frame` is the SSE frame, its JSON between `data: ` and the blank line."""

    sequence_number: int
    type: str
    frame: bytes

    TERMINAL_TYPES: ClassVar[frozenset[str]] = frozenset(
        str(event.__struct_config__.tag) for event in TERMINAL.values()
    )

    @property
    def is_terminal(self) -> bool:
        """Nothing follows this one."""
        return self.type in self.TERMINAL_TYPES

    @property
    def body(self) -> bytes:
        """The event's JSON."""
        return self.frame[self.frame.index(b"\ndata: ") + 7 : -2]


_encode = msgspec.json.Encoder().encode


def encode_event(event: Event) -> Entry:
    """A stamped event → its entry. The frame's lines end in a bare newline; `event:` equals the JSON's `type`; there is no `id:`."""
    type_: str = event.__struct_config__.tag  # type: ignore[assignment]
    frame = b"event: %b\ndata: %b\n\n" % (type_.encode(), _encode(event))
    return Entry(event.sequence_number, type_, frame)


class _Stamp(Struct):
    type: str
    sequence_number: int


_STAMP = msgspec.json.Decoder(_Stamp)


def split_frames(frames: bytes) -> list[Entry]:
    """Joined frames → entries. JSON holds no bare newline, so a blank line is always the end of a frame."""
    entries = []
    for frame in frames.split(b"\n\n")[:-1]:
        stamp = _STAMP.decode(frame[frame.index(b"\ndata: ") + 7 :])
        entries.append(Entry(stamp.sequence_number, stamp.type, frame + b"\n\n"))
    return entries


DONE_FRAME = b"data: [DONE]\n\n"
"""Ends a stream, as the open specification asks; the hosted API's clients ignore it."""
