"""Approvals: which tools need one, and the requests of responses that are not stored, whose ids hold a signature.

The client sends such a request back with its answer; it is accepted if the signature matches. Arguments are signed as canonical
JSON, since clients decode and encode them.
"""

from typing import Any

import msgspec

from app.domain.sealed import SIGNATURE_DIGITS, TenantSeal
from app.domain.tool_filters import Matches, matching
from app.ids import NewId
from app.wire.decoding import json_object
from app.wire.items import McpApprovalRequest
from app.wire.tools import McpApproval, McpTool

EXACT = 2**53
"""A float below this and without a fraction is an integer to clients with a single type of number."""


def needs_approval(server: McpTool) -> Matches:
    """Whether a tool of a server needs approval."""
    wanted = server.require_approval
    if not isinstance(wanted, McpApproval):
        return lambda tool: wanted != "never"
    always, never = (matching(one) if one else None for one in (wanted.always, wanted.never))
    return lambda tool: never is None or not never(tool) or (always is not None and always(tool))


def signing(new_id: NewId, seal: TenantSeal, label: str, name: str, arguments: str) -> NewId:
    """Makes the id of the request to approve this call."""

    def make(prefix: str) -> str:
        id = new_id(prefix)
        return id + seal.sign("approval", id, label, name, _canonical(arguments))

    return make


def was_asked(seal: TenantSeal, request: McpApprovalRequest) -> bool:
    """Whether this server has asked this tenant for this approval, in a response that is not stored."""
    id, signature = request.id[:-SIGNATURE_DIGITS], request.id[-SIGNATURE_DIGITS:]
    return seal.has_signed(signature, "approval", id, request.server_label, request.name, _canonical(request.arguments))


def _whole(digits: str) -> Any:
    number = float(digits)
    return int(number) if abs(number) < EXACT and number.is_integer() else number


_OBJECT = msgspec.json.Decoder(dict[str, Any], float_hook=_whole)


def _canonical(arguments: str) -> str:
    """The same text for arguments that are the same JSON object."""
    if json_object(arguments) is None:
        return arguments
    return msgspec.json.encode(_OBJECT.decode(arguments), order="deterministic").decode()
