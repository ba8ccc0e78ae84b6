"""The keys of what items carry and this server does not read: calls of clients and of other servers, results, citations.

Only the keys are checked, of what clients send; their values are carried as they came.
"""

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from app.wire.decoding import Json, invalid


class _Object(Struct, kw_only=True, forbid_unknown_fields=True):
    """An object of one or several kinds, with the keys of all of them."""

    type: Any = UNSET


class Caller(_Object):
    """Who made a call: the model, or its program."""

    caller_id: Any = UNSET


class PromptCacheBreakpoint(Struct, forbid_unknown_fields=True):
    mode: Any = UNSET
    ttl: Any = UNSET


class _TokenLogprob(Struct, kw_only=True, forbid_unknown_fields=True):
    token: Any = UNSET
    logprob: Any = UNSET
    bytes: Any = UNSET


class Logprob(_TokenLogprob):
    top_logprobs: list[_TokenLogprob] | UnsetType | None = UNSET


class Annotation(_Object):
    container_id: Any = UNSET
    end_index: Any = UNSET
    file_id: Any = UNSET
    filename: Any = UNSET
    index: Any = UNSET
    start_index: Any = UNSET
    title: Any = UNSET
    url: Any = UNSET


# -- Results of calls that the server runs ----------------------------------------------------------------------------------


class _Source(_Object):
    name: Any = UNSET
    url: Any = UNSET


class WebSearchAction(_Object):
    pattern: Any = UNSET
    queries: Any = UNSET
    query: Any = UNSET
    sources: list[_Source] | UnsetType | None = UNSET
    url: Any = UNSET


class FileSearchResult(Struct, forbid_unknown_fields=True):
    attributes: Any = UNSET
    file_id: Any = UNSET
    filename: Any = UNSET
    score: Any = UNSET
    text: Any = UNSET
    vector_store_id: Any = UNSET


class CodeOutput(_Object):
    logs: Any = UNSET
    url: Any = UNSET


class _ModerationDetails(Struct, forbid_unknown_fields=True):
    categories: Any = UNSET
    moderation_stage: Any = UNSET


class ImageError(_Object):
    code: Any = UNSET
    message: Any = UNSET
    moderation_details: _ModerationDetails | UnsetType | None = UNSET
    param: Any = UNSET


class SvgUsage(Struct, forbid_unknown_fields=True):
    input_tokens: Any = UNSET
    model: Any = UNSET
    output_tokens: Any = UNSET
    reasoning_tokens: Any = UNSET
    total_tokens: Any = UNSET


# -- Items that are carried whole -------------------------------------------------------------------------------------------


class _Item(_Object):
    id: Any = UNSET
    call_id: Any = UNSET
    caller: Caller | UnsetType | None = UNSET
    created_by: Any = UNSET
    internal_chat_message_metadata_passthrough: Any = UNSET
    status: Any = UNSET


class _Point(Struct, forbid_unknown_fields=True):
    x: Any = UNSET
    y: Any = UNSET


class _ComputerAction(_Object):
    button: Any = UNSET
    keys: Any = UNSET
    path: list[_Point] | UnsetType | None = UNSET
    scroll_x: Any = UNSET
    scroll_y: Any = UNSET
    text: Any = UNSET
    x: Any = UNSET
    y: Any = UNSET


class _SafetyCheck(Struct, forbid_unknown_fields=True):
    id: Any = UNSET
    code: Any = UNSET
    message: Any = UNSET


class _ComputerCall(_Item):
    action: _ComputerAction | UnsetType | None = UNSET
    actions: list[_ComputerAction] | UnsetType | None = UNSET
    pending_safety_checks: list[_SafetyCheck] | UnsetType | None = UNSET


class _Screenshot(_Object):
    current_url: Any = UNSET
    detail: Any = UNSET
    file_id: Any = UNSET
    image_url: Any = UNSET


class _ComputerCallOutput(_Item):
    acknowledged_safety_checks: list[_SafetyCheck] | UnsetType | None = UNSET
    output: _Screenshot | UnsetType | None = UNSET


class _LocalShellAction(_Object):
    command: Any = UNSET
    env: Any = UNSET
    timeout_ms: Any = UNSET
    user: Any = UNSET
    working_directory: Any = UNSET


class _LocalShellCall(_Item):
    action: _LocalShellAction | UnsetType | None = UNSET


class _ShellAction(Struct, forbid_unknown_fields=True):
    commands: Any = UNSET
    max_output_length: Any = UNSET
    timeout_ms: Any = UNSET


class _Skill(Struct, forbid_unknown_fields=True):
    description: Any = UNSET
    name: Any = UNSET
    path: Any = UNSET


class _Environment(_Object):
    container_id: Any = UNSET
    skills: list[_Skill] | UnsetType | None = UNSET


class _ShellCall(_Item):
    action: _ShellAction | UnsetType | None = UNSET
    environment: _Environment | UnsetType | None = UNSET


class _Outcome(_Object):
    exit_code: Any = UNSET


class _ShellOutput(Struct, forbid_unknown_fields=True):
    created_by: Any = UNSET
    outcome: _Outcome | UnsetType | None = UNSET
    stderr: Any = UNSET
    stdout: Any = UNSET


class _ShellCallOutput(_Item):
    max_output_length: Any = UNSET
    output: list[_ShellOutput] | UnsetType | None = UNSET


class _Patch(_Object):
    diff: Any = UNSET
    path: Any = UNSET


class _ApplyPatchCall(_Item):
    operation: _Patch | UnsetType | None = UNSET


class _TextOutput(_Item):
    output: Any = UNSET


class _ToolSearchCall(_Item):
    arguments: Any = UNSET
    execution: Any = UNSET


class _ToolSearchOutput(_Item):
    execution: Any = UNSET
    tools: list[Json] | UnsetType | None = UNSET
    """Declarations of tools."""


CARRIED: dict[str, type[_Item]] = {
    "computer_call": _ComputerCall,
    "computer_call_output": _ComputerCallOutput,
    "local_shell_call": _LocalShellCall,
    "local_shell_call_output": _TextOutput,
    "shell_call": _ShellCall,
    "shell_call_output": _ShellCallOutput,
    "apply_patch_call": _ApplyPatchCall,
    "apply_patch_call_output": _TextOutput,
    "tool_search_call": _ToolSearchCall,
    "tool_search_output": _ToolSearchOutput,
}
"""Types of items that are carried whole: histories of other servers hold them."""


def check_keys(given: Any, shape: Any, at: str) -> None:
    """Raises InvalidParameter for a key that the shape does not have, with its path below `at`."""
    try:
        msgspec.convert(given, shape)
    except msgspec.ValidationError as error:
        raise invalid(str(error), at, shape) from None
