"""What the document says of each route, beside what its handler and its scope say: a new route needs its line here."""

from typing import Any, Literal

from msgspec import Struct

from app.api import queries
from app.api.openapi import examples
from app.api.openapi.examples import Examples
from app.api.openapi.schemas import reference
from app.api.openapi.shapes import ChatMessageOf, Compact, CountTokens, UpdateAgent, Upload, page_of
from app.domain.agents import CreateAgent
from app.wire import (
    admin,
    agents,
    chat_requests,
    compactions,
    completions,
    conversations,
    files,
    requests,
    resources,
    tool_credentials,
    usage,
)

Media = Literal["text/html", "text/plain", "text/javascript", "application/json", "application/octet-stream"]

TAGS = {
    "Responses": "What the models answer: as JSON, as events while it is made, or in the background.",
    "Chat Completions": "The same runs for clients that speak Chat Completions only. A stored completion is a response, too.",
    "Conversations": "Lists of items that responses continue and are appended to.",
    "Files": "Files that parts of messages refer to.",
    "Models": "What may be asked for as `model`.",
    "Agents": "Models with instructions, tools and parameters of their own.",
    "Tool credentials": "What MCP servers are sent as authorization, stored for a tenant, a user or a key. No reply has a secret.",
    "Administration": "For keys with the scope `admin`: the keys of their tenant, its audit log and its usage.",
    "Tenants": "For keys with the scope `operator`: the tenants of this server, their limits, and keys for them.",
    "Server": "For browsers, probes and tools; without a key.",
}


class Operation(Struct, frozen=True, kw_only=True):
    """One route of the application."""

    summary: str
    tag: str
    sends: Any
    """The type of a reply, or a media type."""
    takes: type[Struct] | None = None
    """The type of the body."""
    query: type[Struct] = queries.Nothing
    or_sends: str | None = None
    """Another media type that a query may ask for."""
    events: str | None = None
    """The component of the events of a stream, if the reply may be one."""
    calls: bool = False
    """Whether it calls a model's server, whose errors are passed on."""
    form: bool = False
    """Whether the body is a form."""
    examples: Examples = {}


ITEM = reference("Item", "sent")
ITEMS = page_of(ITEM, "ItemList")

_RESPONSES, _CHAT, _CONVERSATIONS, _FILES, _MODELS, _AGENTS, _CREDENTIALS, _ADMIN, _TENANTS, _SERVER = TAGS

OPERATIONS: dict[str, Operation] = {
    "POST /v1/responses": Operation(
        summary="Create a response",
        tag=_RESPONSES,
        takes=requests.Body,
        sends=resources.Response,
        events="StreamEvent",
        calls=True,
        examples=examples.CREATE,
    ),
    "GET /v1/responses": Operation(
        summary="List responses", tag=_RESPONSES, query=queries.ResponsePage, sends=page_of(resources.Response)
    ),
    "GET /v1/responses/{response_id}": Operation(
        summary="Retrieve a response",
        tag=_RESPONSES,
        query=queries.Retrieve,
        sends=resources.Response,
        events="StreamEvent",
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        summary="Delete a response", tag=_RESPONSES, sends=resources.Deleted
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        summary="Cancel a response", tag=_RESPONSES, sends=resources.Response
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        summary="List input items", tag=_RESPONSES, query=queries.ItemPage, sends=ITEMS
    ),
    "POST /v1/responses/input_tokens": Operation(
        summary="Count input tokens",
        tag=_RESPONSES,
        takes=CountTokens,
        sends=resources.InputTokens,
        calls=True,
        examples=examples.COUNT,
    ),
    "POST /v1/responses/compact": Operation(
        summary="Compact a context",
        tag=_RESPONSES,
        takes=Compact,
        sends=compactions.CompactedResponse,
        calls=True,
        examples=examples.COMPACT,
    ),
    "POST /v1/chat/completions": Operation(
        summary="Create a chat completion",
        tag=_CHAT,
        takes=chat_requests.ChatBody,
        sends=completions.Completion,
        events="ChatStreamEvent",
        calls=True,
        examples=examples.CHAT,
    ),
    "GET /v1/chat/completions": Operation(
        summary="List chat completions",
        tag=_CHAT,
        query=queries.CompletionPage,
        sends=page_of(completions.Completion, "ChatCompletionList"),
    ),
    "GET /v1/chat/completions/{completion_id}": Operation(
        summary="Retrieve a chat completion", tag=_CHAT, sends=completions.Completion
    ),
    "POST /v1/chat/completions/{completion_id}": Operation(
        summary="Update a chat completion",
        tag=_CHAT,
        takes=chat_requests.UpdateCompletion,
        sends=completions.Completion,
        examples=examples.METADATA,
    ),
    "DELETE /v1/chat/completions/{completion_id}": Operation(
        summary="Delete a chat completion", tag=_CHAT, sends=resources.Deleted
    ),
    "GET /v1/chat/completions/{completion_id}/messages": Operation(
        summary="List messages", tag=_CHAT, query=queries.MessagePage, sends=page_of(ChatMessageOf, "ChatMessageList")
    ),
    "POST /v1/conversations": Operation(
        summary="Create a conversation",
        tag=_CONVERSATIONS,
        takes=conversations.CreateConversation,
        sends=conversations.Conversation,
        examples=examples.CONVERSATION,
    ),
    "GET /v1/conversations": Operation(
        summary="List conversations",
        tag=_CONVERSATIONS,
        query=queries.ConversationPage,
        sends=page_of(conversations.Conversation),
    ),
    "GET /v1/conversations/{conversation_id}": Operation(
        summary="Retrieve a conversation", tag=_CONVERSATIONS, sends=conversations.Conversation
    ),
    "POST /v1/conversations/{conversation_id}": Operation(
        summary="Update a conversation",
        tag=_CONVERSATIONS,
        takes=conversations.UpdateConversation,
        sends=conversations.Conversation,
        examples=examples.METADATA,
    ),
    "DELETE /v1/conversations/{conversation_id}": Operation(
        summary="Delete a conversation", tag=_CONVERSATIONS, sends=resources.Deleted
    ),
    "POST /v1/conversations/{conversation_id}/fork": Operation(
        summary="Fork a conversation",
        tag=_CONVERSATIONS,
        takes=conversations.ForkConversation,
        sends=conversations.Conversation,
        examples=examples.FORK,
    ),
    "GET /v1/conversations/{conversation_id}/items": Operation(
        summary="List items", tag=_CONVERSATIONS, query=queries.ItemPage, sends=ITEMS
    ),
    "POST /v1/conversations/{conversation_id}/items": Operation(
        summary="Append items",
        tag=_CONVERSATIONS,
        takes=conversations.CreateItems,
        query=queries.Included,
        sends=ITEMS,
        examples=examples.ITEMS,
    ),
    "GET /v1/conversations/{conversation_id}/items/{item_id}": Operation(
        summary="Retrieve an item", tag=_CONVERSATIONS, query=queries.Included, sends=ITEM
    ),
    "DELETE /v1/conversations/{conversation_id}/items/{item_id}": Operation(
        summary="Remove an item", tag=_CONVERSATIONS, sends=conversations.Conversation
    ),
    "POST /v1/files": Operation(summary="Upload a file", tag=_FILES, takes=Upload, form=True, sends=files.File),
    "GET /v1/files": Operation(summary="List files", tag=_FILES, query=queries.FilePage, sends=page_of(files.File)),
    "GET /v1/files/{file_id}": Operation(summary="Retrieve a file", tag=_FILES, sends=files.File),
    "GET /v1/files/{file_id}/content": Operation(
        summary="Download a file", tag=_FILES, sends="application/octet-stream"
    ),
    "DELETE /v1/files/{file_id}": Operation(summary="Delete a file", tag=_FILES, sends=resources.Deleted),
    "GET /v1/models": Operation(summary="List models", tag=_MODELS, sends=resources.Models, calls=True),
    "GET /v1/models/{model_id}": Operation(summary="Retrieve a model", tag=_MODELS, sends=resources.Model, calls=True),
    "POST /v1/agents": Operation(
        summary="Create an agent", tag=_AGENTS, takes=CreateAgent, sends=agents.Agent, examples=examples.AGENT
    ),
    "GET /v1/agents": Operation(
        summary="List agents", tag=_AGENTS, query=queries.AgentPage, sends=page_of(agents.Agent)
    ),
    "GET /v1/agents/{agent_id}": Operation(summary="Retrieve an agent", tag=_AGENTS, sends=agents.Agent),
    "POST /v1/agents/{agent_id}": Operation(
        summary="Update an agent", tag=_AGENTS, takes=UpdateAgent, sends=agents.Agent, examples=examples.AGENT_UPDATE
    ),
    "DELETE /v1/agents/{agent_id}": Operation(summary="Delete an agent", tag=_AGENTS, sends=resources.Deleted),
    "POST /v1/admin/keys": Operation(
        summary="Create a key",
        tag=_ADMIN,
        takes=admin.CreateKey,
        sends=admin.ApiKey,
        examples=examples.KEY,
    ),
    "GET /v1/admin/keys": Operation(
        summary="List keys", tag=_ADMIN, query=queries.KeyPage, sends=page_of(admin.ApiKey)
    ),
    "GET /v1/admin/keys/{key_id}": Operation(summary="Retrieve a key", tag=_ADMIN, sends=admin.ApiKey),
    "POST /v1/admin/keys/{key_id}": Operation(
        summary="Change a key",
        tag=_ADMIN,
        takes=admin.UpdateKey,
        sends=admin.ApiKey,
        examples=examples.KEY_UPDATE,
    ),
    "POST /v1/admin/keys/{key_id}/rotate": Operation(
        summary="Rotate a key",
        tag=_ADMIN,
        takes=admin.RotateKey,
        sends=admin.ApiKey,
        examples=examples.ROTATE,
    ),
    "DELETE /v1/admin/keys/{key_id}": Operation(summary="Revoke a key", tag=_ADMIN, sends=resources.Deleted),
    "GET /v1/admin/audit": Operation(
        summary="List the audit log", tag=_ADMIN, query=queries.AuditPage, sends=page_of(admin.AuditEntry)
    ),
    "POST /v1/admin/tenants": Operation(
        summary="Create a tenant", tag=_TENANTS, takes=admin.CreateTenant, sends=admin.Tenant, examples=examples.TENANT
    ),
    "GET /v1/admin/tenants": Operation(
        summary="List tenants", tag=_TENANTS, query=queries.TenantPage, sends=page_of(admin.Tenant)
    ),
    "GET /v1/admin/tenants/{tenant_id}": Operation(summary="Retrieve a tenant", tag=_TENANTS, sends=admin.Tenant),
    "POST /v1/admin/tenants/{tenant_id}": Operation(
        summary="Change a tenant",
        tag=_TENANTS,
        takes=admin.UpdateTenant,
        sends=admin.Tenant,
        examples=examples.TENANT_UPDATE,
    ),
    "POST /v1/admin/tenants/{tenant_id}/keys": Operation(
        summary="Create a key of a tenant",
        tag=_TENANTS,
        takes=admin.CreateKey,
        sends=admin.ApiKey,
        examples=examples.TENANT_KEY,
    ),
    "POST /v1/tool_credentials": Operation(
        summary="Store a tool credential",
        tag=_CREDENTIALS,
        takes=tool_credentials.CreateToolCredential,
        sends=tool_credentials.ToolCredential,
        examples=examples.TOOL_CREDENTIAL,
    ),
    "GET /v1/tool_credentials": Operation(
        summary="List tool credentials",
        tag=_CREDENTIALS,
        query=queries.ToolCredentialPage,
        sends=page_of(tool_credentials.ToolCredential),
    ),
    "GET /v1/tool_credentials/{credential_id}": Operation(
        summary="Retrieve a tool credential", tag=_CREDENTIALS, sends=tool_credentials.ToolCredential
    ),
    "POST /v1/tool_credentials/{credential_id}": Operation(
        summary="Update a tool credential",
        tag=_CREDENTIALS,
        takes=tool_credentials.UpdateToolCredential,
        sends=tool_credentials.ToolCredential,
        examples=examples.TOOL_CREDENTIAL_UPDATE,
    ),
    "DELETE /v1/tool_credentials/{credential_id}": Operation(
        summary="Delete a tool credential", tag=_CREDENTIALS, sends=resources.Deleted
    ),
    "GET /v1/usage": Operation(
        summary="Report usage",
        tag=_ADMIN,
        query=queries.UsagePage,
        sends=page_of(usage.GroupUsage),
        or_sends="text/csv",
    ),
    "GET /": Operation(summary="Home page", tag=_SERVER, sends="text/html"),
    "GET /docs": Operation(summary="This page", tag=_SERVER, sends="text/html"),
    "GET /docs/redoc.standalone.js": Operation(summary="The viewer's script", tag=_SERVER, sends="text/javascript"),
    "GET /openapi.json": Operation(summary="This document", tag=_SERVER, sends="application/json"),
    "GET /livez": Operation(summary="Liveness", tag=_SERVER, sends="text/plain"),
    "GET /readyz": Operation(summary="Readiness", tag=_SERVER, sends="text/plain"),
}

PARAMETERS = {
    "after": "The page begins after the one with this id: the `last_id` of the page before.",
    "agent_id": "The id of an agent, or its name.",
    "before": "The page ends before the item with this id.",
    "completion_id": "The id of a stored chat completion.",
    "conversation_id": "The id of a conversation.",
    "created_after": "Only those that were created then or later, in Unix seconds.",
    "created_before": "Only those that were created then or earlier, in Unix seconds.",
    "credential_id": "The id of a tool credential.",
    "file_id": "The id of a file.",
    "format": "JSON or CSV.",
    "group_by": "What rows differ in; without it there is one row for each currency. Also as `group_by[]`.",
    "include": "What is left out unless it is named here. Also as `include[]`.",
    "include_obfuscation": "Pad the events of deltas, so that the sizes of packets reveal less.",
    "item_id": "The id of an item.",
    "key_id": "The id of a key; it is not its secret.",
    "limit": "How many there are on a page, at most. A page may end earlier: `has_more` counts.",
    "metadata": "Only those with these values, as `metadata[key]=value`.",
    "model": "Only those that were made with this model.",
    "model_id": "The name of a model; it may contain slashes.",
    "order": "By creation: the oldest first (`asc`) or the newest first (`desc`).",
    "purpose": "Only those with this purpose.",
    "response_id": "The id of a response.",
    "since": "The first day, in UTC.",
    "starting_after": "With `stream`: only the events after the one with this `sequence_number`.",
    "status": "Only those with this status.",
    "stream": "Send the events, of a background response that was created with `stream`.",
    "tenant_id": "The name of a tenant.",
    "type": "Only entries of this type.",
    "until": "The last day, in UTC.",
    "user": "Only that of this user of the tenant; empty: of none.",
}
"""What the parameters of paths and queries mean."""
