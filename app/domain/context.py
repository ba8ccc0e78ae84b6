"""Request + chain → Context: what a run starts from. Every 400 about state happens here."""

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeGuard

from msgspec import UNSET, Struct
from msgspec.structs import replace

from app.domain.approvals import was_asked
from app.domain.chat_request import is_carried
from app.domain.client_tools import ID_PREFIXES, is_client_run, is_found_by
from app.domain.compaction import is_compaction, is_instruction, newest_compaction, open_compacted
from app.domain.hosted import Kind
from app.domain.lifecycle import IN_FLIGHT
from app.domain.sealed import SIGNATURE_DIGITS, TenantSeal
from app.domain.tool_filters import is_by_read_only
from app.domain.toolbox import Toolbox, open_toolbox
from app.domain.tools.table import SERVER_TOOLS
from app.errors import InvalidRequest
from app.ids import NewId, rest_of
from app.wire.decoding import json_object
from app.wire.items import (
    AnyItem,
    Compaction,
    CompactionTrigger,
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    InputText,
    ItemReference,
    McpApprovalRequest,
    McpApprovalResponse,
    McpCall,
    McpListTools,
    Message,
    OpaqueItem,
    OutputText,
    PromptedMessage,
    Reasoning,
    call_id_of,
    is_unknown,
    tools_added_by,
    type_of,
    with_id,
)
from app.wire.requests import CreateResponse
from app.wire.resources import Status
from app.wire.tools import AnyTool, McpTool

PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "additional_tools": "at",
    "compaction": "cmp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
    "mcp_approval_response": "mcpa",
    **{type_: tool.id_prefix for type_, tool in SERVER_TOOLS.items() if tool.id_prefix},
    **ID_PREFIXES,
}
"""Item type → id prefix; other items get `item_…`."""

CUT_OFF = ("incomplete", "in_progress")
"""Statuses of a call that can't be answered."""

Call = FunctionCall | CustomToolCall
Output = FunctionCallOutput | CustomToolCallOutput


NO_ORIGINS: Mapping[str, str] = MappingProxyType({})


class LeftOut(Struct, frozen=True):
    """Types of tools and items that the model does not see: no server here runs them, this version does not know them, they are
    calls of other servers that have no output, or their tools are not all taken. And ids or addresses of files that are gone."""

    tools: tuple[str, ...]
    items: tuple[str, ...]
    files: tuple[str, ...] = ()


class Context(Struct, frozen=True):
    """What a run starts from: every item, in order, and the model's toolbox."""

    items: tuple[AnyItem, ...]
    input: tuple[AnyItem, ...]
    """The new ones among them: this request's own, with their ids."""
    answers: Mapping[int, AnyItem]
    """Position of a call in `items` → the output that answers it. Left out are pairs that a compaction item stands for."""
    approved: tuple[McpApprovalRequest, ...]
    """Calls that this request's input approves: they are made before the first turn."""
    decisions: tuple[tuple[str, bool], ...]
    """Every approval request that this request's input answers, and how."""
    instructions: str | Sequence[PromptedMessage] | None
    toolbox: Toolbox
    hosted: frozenset[Kind]
    """Hosted tools that have a tool server."""
    origins: Mapping[str, str]
    """A declared MCP server's label → the suffix of the ids of its own lists."""
    lists: tuple[McpListTools, ...]
    """Those of the declared MCP servers, oldest first."""
    unheeded: tuple[str, ...]
    """Types of items whose tools are not all taken: an agent lets nothing add any, or Chat Completions can't carry their calls."""

    @property
    def visible(self) -> list[tuple[int, AnyItem]]:
        """The items that the model sees, with their positions: all of them, or the newest compaction item and what follows it.
        Of what precedes that, instructions stay before it; calls that are answered after it come right after it."""
        start = newest_compaction(self.items)
        if start < 0:
            return list(enumerate(self.items))
        instructions = (at for at in range(start) if is_instruction(self.items[at]))
        calls = sorted(at for at in self.answers if at < start)
        positions = (*instructions, start, *calls, *range(start + 1, len(self.items)))
        return [(at, self.items[at]) for at in positions]

    @property
    def left_out(self) -> LeftOut:
        """What the model does not see of what it would see in the hosted API."""
        unseen = (type_of(item) for at, item in self.visible if is_unknown(item) or self._is_open_call(at, item))
        return LeftOut(self.toolbox.left_out, tuple(dict.fromkeys((*unseen, *self.unheeded))))

    def _is_open_call(self, position: int, item: AnyItem) -> bool:
        """Whether an item is a call of another server that has no output."""
        is_call = isinstance(item, OpaqueItem) and _called(item) is not None
        return is_call and position not in self.answers and not is_client_run(item)


def references(given: Sequence[AnyItem]) -> list[str]:
    """Ids of stored items that given ones stand for."""
    return [item.id for item in given if isinstance(item, ItemReference)]


def answered_requests(items: Sequence[AnyItem]) -> list[str]:
    """Ids of the approval requests that these items answer."""
    return [item.approval_request_id for item in items if isinstance(item, McpApprovalResponse)]


def waits_for_client(item: AnyItem) -> bool:
    """Whether the client has to answer an output item: then its response ends."""
    if isinstance(item, OpaqueItem):
        return is_client_run(item) and item.fields.get("status") == "completed"
    return isinstance(item, Call | McpApprovalRequest) and not _cut_off(item)


def check_parent(response_id: str, status: Status | str) -> None:
    """A response that is still being made can't be continued. Raises InvalidRequest."""
    if status in IN_FLIGHT:
        raise InvalidRequest(
            f"Previous response with id '{response_id}' is still in progress.", param="previous_response_id"
        )


def resolve(
    request: CreateResponse,
    chain: Sequence[AnyItem],
    referenced: Mapping[str, AnyItem],
    new_id: NewId,
    *,
    seal: TenantSeal,
    requests: Mapping[str, McpApprovalRequest] | None = None,
    hosted: frozenset[Kind] = frozenset(),
    origins: Mapping[str, str] = NO_ORIGINS,
) -> Context:
    """The context of a run. `chain` holds the items of all earlier responses, oldest first; `requests` are the
    stored approval requests of this tenant that the input answers; `seal` is the tenant's.

    Raises InvalidRequest for an unknown reference, a duplicate item, an unanswered call, an output without its call, an
    approval that was not requested, reasoning or a compaction that this server did not seal, or no context to compact.
    """
    given = [item for item in request.input if not isinstance(item, CompactionTrigger)]
    fresh = accept_items(given, chain, referenced, new_id, seal=seal)
    every = (*chain, *fresh)
    _refuse_sealed_by_others(every, seal)
    if request.compacts and not every:
        raise InvalidRequest("There is nothing to compact: the context holds no items.", param="input")
    decided = _decided(every, fresh, requests or {}, seal)
    _refuse_undeclared(request, decided)
    lists = () if _relies_on_lists(request) else every
    return _context(request, every, fresh, decided, hosted, origins, _lists_of(lists, origins))


def accept_items(
    given: Sequence[AnyItem],
    earlier: Sequence[AnyItem],
    referenced: Mapping[str, AnyItem],
    new_id: NewId,
    *,
    seal: TenantSeal,
    param: str = "input",
) -> tuple[AnyItem, ...]:
    """Items that a client adds to earlier ones, as they are stored: references replaced by what they stand for. `param` is the
    parameter that holds them.

    Raises InvalidRequest for an unknown reference, a duplicate item, reasoning that this server did not seal.
    """
    _refuse_unsealed(given, seal, param)
    found = [_dereference(item, referenced, param) for item in given]
    _refuse_duplicates(earlier, found, param)
    return tuple(normalise(item, new_id) for item in found)


def restore(
    request: CreateResponse,
    stored: Sequence[AnyItem],
    own: Sequence[AnyItem],
    earlier: Sequence[AnyItem],
    *,
    seal: TenantSeal,
    requests: Mapping[str, McpApprovalRequest],
    hosted: frozenset[Kind],
    origins: Mapping[str, str] = NO_ORIGINS,
) -> Context:
    """The context of a run that another worker continues: `stored` are its stored items, `own` its own input among them,
    `earlier` the output of earlier owners."""
    every = (*stored, *earlier)
    _refuse_sealed_by_others(every, seal)
    decided = _decided(every, own, requests, seal, earlier)
    lists = earlier if _relies_on_lists(request) else every
    return _context(request, every, (), decided, hosted, origins, _lists_of(lists, origins))


def proceed(context: Context, request: CreateResponse, more: Sequence[AnyItem]) -> Context:
    """The context after a turn: with the items of its output, and of calls and lists that were made."""
    lists = (*context.lists, *_lists_of(more, context.origins))
    return _context(request, (*context.items, *more), context.input, {}, context.hosted, context.origins, lists)


def _context(
    request: CreateResponse,
    every: tuple[AnyItem, ...],
    fresh: tuple[AnyItem, ...],
    decided: Mapping[str, McpApprovalRequest | None],
    hosted: frozenset[Kind],
    origins: Mapping[str, str],
    lists: tuple[McpListTools, ...],
) -> Context:
    # A call for the client that was cut off can't be answered, so it is left out.
    items = tuple(item for item in every if not _cut_off(item))
    added: list[AnyTool] = []
    unheeded: list[str] = []
    for item in items:
        tools = tools_added_by(item)
        taken = _taken(tools, item, request)
        added += taken
        if len(taken) < len(tools):
            unheeded.append(type_of(item))
    listed = {item.server_label: item.tools for item in lists}
    return Context(
        items=items,
        input=fresh,
        answers=pair(items),
        approved=tuple(asked for asked in decided.values() if asked and request.generate),
        decisions=() if not request.generate else tuple((id, asked is not None) for id, asked in decided.items()),
        instructions=request.instructions,
        toolbox=open_toolbox(request.tools, added, request.tool_choice, listed=listed, hosted=hosted),
        hosted=hosted,
        origins=origins,
        lists=lists,
        unheeded=tuple(dict.fromkeys(unheeded)),
    )


def _taken(tools: Sequence[AnyTool], item: AnyItem, request: CreateResponse) -> Sequence[AnyTool]:
    """The tools of an item that join those of the request: for Chat Completions those whose calls it can carry."""
    if not (request.items_add_tools or is_found_by(request.tools, item)):
        return ()
    return [tool for tool in tools if is_carried(tool)] if request.is_chat else tools


def _relies_on_lists(request: CreateResponse) -> bool:
    """Whether an agent limits what is called by what servers say of their tools: then only lists count that its own run has made, since
    clients can send any."""
    servers = [tool for tool in request.tools if isinstance(tool, McpTool)] if request.agent else []
    return any(is_by_read_only(one) for one in servers)


def _lists_of(items: Sequence[AnyItem], origins: Mapping[str, str]) -> tuple[McpListTools, ...]:
    return tuple(item for item in items if _is_list_of(item, origins))


def _is_list_of(item: AnyItem, origins: Mapping[str, str]) -> TypeGuard[McpListTools]:
    """Whether an item lists the tools of the server that is now declared under its label. Lists by other makers are accepted."""
    if not isinstance(item, McpListTools) or item.error:
        return False
    origin = rest_of(item.id)
    return len(origin) != SIGNATURE_DIGITS or origin == origins.get(item.server_label, origin)


def _decided(
    every: Sequence[AnyItem],
    fresh: Sequence[AnyItem],
    requests: Mapping[str, McpApprovalRequest],
    seal: TenantSeal,
    earlier: Sequence[AnyItem] = (),
) -> dict[str, McpApprovalRequest | None]:
    """The approval requests that the fresh items answer; None for one that is denied. Left out are those whose call is among
    the fresh items, as in a whole history that is sent again, or was made by an earlier owner."""
    asked = {item.id: item for item in every if isinstance(item, McpApprovalRequest)}
    made = {item.approval_request_id for item in (*fresh, *earlier) if isinstance(item, McpCall)}
    decided: dict[str, McpApprovalRequest | None] = {}
    for index, item in enumerate(fresh):
        if not isinstance(item, McpApprovalResponse) or item.approval_request_id in made:
            continue
        id, param = item.approval_request_id, f"input[{index}].approval_request_id"
        if id in decided:
            raise InvalidRequest(f"Approval request '{id}' is answered twice.", param=param)
        stored, copy = requests.get(id), asked.get(id)
        if stored is None and copy and was_asked(seal, copy):
            stored = copy
        if stored is None or copy is None:
            raise InvalidRequest(
                f"Approval request with id '{id}' not found. Requests are not persisted when `store` is set to false.",
                param=param,
            )
        if not _same_call(stored, copy):
            raise InvalidRequest(f"Approval request '{id}' is not what was asked for.", param=param)
        decided[id] = stored if item.approve else None
    return decided


def _refuse_undeclared(request: CreateResponse, decided: Mapping[str, McpApprovalRequest | None]) -> None:
    """An approval is used up by its call, which can't be made without its server."""
    declared = {tool.server_label for tool in request.tools if isinstance(tool, McpTool)}
    for asked in decided.values():
        if asked and asked.server_label not in declared:
            raise InvalidRequest(
                f"Approval request '{asked.id}' is for the server '{asked.server_label}', which is not in 'tools'.",
                param="tools",
            )


def _same_call(one: McpApprovalRequest, other: McpApprovalRequest) -> bool:
    """Clients decode and encode arguments, so they are compared as JSON."""
    same = (one.server_label, one.name) == (other.server_label, other.name)
    return same and (one.arguments == other.arguments or _is_same_json(one.arguments, other.arguments))


def _is_same_json(one: str, other: str) -> bool:
    given = json_object(one)
    return given is not None and given == json_object(other)


def _refuse_unsealed(given: Sequence[AnyItem], seal: TenantSeal, param: str) -> None:
    for index, item in enumerate(given):
        if isinstance(item, Reasoning) and item.encrypted_content and seal.open(item.encrypted_content) is None:
            raise _unsealed(item, f"{param}[{index}].encrypted_content")
        if is_compaction(item) and open_compacted(item, seal.open) is None:
            raise _unsealed(item, f"{param}[{index}].encrypted_content")


def _refuse_sealed_by_others(every: Sequence[AnyItem], seal: TenantSeal) -> None:
    """A stored compaction item, too, must be readable: its key may be lost."""
    newest = newest_compaction(every)
    item = every[newest] if newest >= 0 else None
    if isinstance(item, Compaction) and open_compacted(item, seal.open) is None:
        raise _unsealed(item, "input")


def _unsealed(item: Reasoning | Compaction, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"The encrypted content of item '{item.id}' could not be verified: this server did not make it.",
        param=param,
        code="invalid_encrypted_content",
    )


def _dereference(item: AnyItem, referenced: Mapping[str, AnyItem], param: str) -> AnyItem:
    if not isinstance(item, ItemReference):
        return item
    if found := referenced.get(item.id):
        return found
    raise InvalidRequest(
        f"Item with id '{item.id}' not found. Items are not persisted when `store` is set to false. "
        "Try again with `store` set to true, or remove this item from your input.",
        param=param,
    )


def _refuse_duplicates(chain: Sequence[AnyItem], given: Sequence[AnyItem], param: str) -> None:
    seen = {item.id for item in chain}
    for item in given:
        if item.id and item.id in seen:
            raise InvalidRequest(
                f"Duplicate item found with id {item.id}. Remove duplicate items from your input and try again.",
                param=param,
            )
        seen.add(item.id)


def _cut_off(item: AnyItem) -> bool:
    return isinstance(item, Call) and item.status in CUT_OFF


def normalise(item: AnyItem, new_id: NewId) -> AnyItem:
    """An input item as it is stored and listed: with an id, a status, and parts instead of a bare string."""
    if not item.id:
        item = with_id(item, new_id(PREFIXES.get(type_of(item), "item")))
    match item:
        case Message():
            return _normal_message(item)
        case FunctionCall() | CustomToolCall():
            return replace(item, status=item.status or "completed", namespace=item.namespace or UNSET, dumped=UNSET)
        case FunctionCallOutput() | CustomToolCallOutput():
            return replace(item, status=item.status or "completed")
        case Compaction():
            return replace(item, summary=UNSET)
        case Reasoning():
            return replace(
                item,
                content=item.content or UNSET,
                encrypted_content=item.encrypted_content or UNSET,
                status=item.status or UNSET,
            )
    return item


def _normal_message(message: Message) -> Message:
    content = message.content
    if isinstance(content, str):
        content = [OutputText(text=content) if message.role == "assistant" else InputText(text=content)]
    return replace(message, content=content, status=message.status or "completed", phase=message.phase or UNSET)


def pair(items: Sequence[AnyItem]) -> dict[int, AnyItem]:
    """Position of each call → its output. Ids may repeat in a long context, so an output answers the earliest call
    before it that is still open. A request for approval is answered by its call; by the client's decision where there is
    none. What a compaction item stands for needs no partner, and has none unless that follows the item. Raises InvalidRequest for
    another call or output that is unpaired."""
    start = newest_compaction(items)
    pairs = _Pairs()
    for position, item in enumerate(items):
        if position == start:
            pairs.compact()
        elif not pairs.take(position, item) and position > start:
            _refuse_orphan(item)
    for call_id, positions in pairs.open_calls.items():
        if positions:
            _refuse_unanswered(call_id, items[positions[0]])
    return pairs.answers


class _Pairs:
    """Calls and their outputs, item by item."""

    def __init__(self) -> None:
        self.answers: dict[int, AnyItem] = {}
        self.open_calls: dict[str, deque[int]] = {}
        self._compacted: dict[str, deque[int]] = {}
        """Those among the open calls that a compaction item stands for."""
        self._requests: dict[str | None, int] = {}

    def take(self, position: int, item: AnyItem) -> bool:
        """Take one more item. False for an output without its call."""
        if isinstance(item, McpApprovalRequest):
            self._requests[item.id] = position
        elif isinstance(item, McpApprovalResponse | McpCall):
            if item.approval_request_id in self._requests:
                self.answers[self._requests[item.approval_request_id]] = item
        elif call_id := _called(item):
            self.open_calls.setdefault(call_id, deque()).append(position)
        elif call_id := _answered(item):
            calls = self.open_calls.get(call_id) or self._compacted.get(call_id)
            if not calls:
                return False
            self.answers[calls.popleft()] = item
        return True

    def compact(self) -> None:
        """A compaction item stands here: only calls that are still open may have a partner that follows."""
        self.answers, self._compacted, self.open_calls = {}, self.open_calls, {}


def _refuse_unanswered(call_id: str, call: AnyItem) -> None:
    """A whole call for the client must have an output."""
    if isinstance(call, Call) or (is_client_run(call) and call.fields.get("status") not in CUT_OFF):
        raise InvalidRequest(f"No tool output found for {_kind(call)} {call_id}.", param="input")


def _refuse_orphan(output: AnyItem) -> None:
    """An output must follow its call, unless it names none."""
    if call_id := call_id_of(output):
        raise InvalidRequest(f"No tool call found for {_kind(output)} with call_id {call_id}.", param="input")


def _kind(item: AnyItem) -> str:
    return type_of(item).replace("_", " ")


def _called(item: AnyItem) -> str | None:
    if isinstance(item, Call):
        return item.call_id
    return _opaque_call_id(item) if type_of(item).endswith("_call") else None


def _answered(item: AnyItem) -> str | None:
    if isinstance(item, Output):
        return item.call_id
    return _opaque_call_id(item) if type_of(item).endswith("_output") else None


def _opaque_call_id(item: AnyItem) -> str | None:
    """What pairs a carried call with its output: some types have no call id, and a local shell's output has it as its id."""
    if not isinstance(item, OpaqueItem) or is_unknown(item):
        return None
    if item.type == "local_shell_call_output":
        return call_id_of(item) or item.id
    return call_id_of(item) or type_of(item).removesuffix("_output").removesuffix("_call")
