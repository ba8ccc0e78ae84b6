"""Every error a client can meet, in one tree.

    ApiError
      InvalidRequest 400          the request can't be served as it stands; `code` says why
        InvalidParameter          a value has the wrong type, form or range
        UnsupportedParameter      a parameter, tool or item of the API that this server does not offer
        PreviousResponseNotFound  `previous_response_id` is unknown, deleted, another tenant's
        ToolCredentialExists      the server has a credential for the same holder
        TokensNotCounted          the upstream has nothing that counts the tokens of this request
        BodyTooLarge 413          the body is over REPRISE_BODY_BYTES_MAX, or a prompt with its variables
        RequestTooLarge 413       its tokens are more than a quota has in a minute
        HeadTooLarge 431          the headers are over a limit
        UriTooLong 414            the request line is
        RequestTooSlow 408        the headers or the body did not arrive in time
      AuthenticationFailed 401    the key or token is missing, unknown, revoked, expired, not valid
      ForeignSite 403             a web page of another site calls a server that has no keys
      MissingScope 403            the key may not do this
      ModelNotAllowed 403         the key may not use this model
      StorageQuotaExceeded 403    as much is stored as the tenant or the key may store
      NotFound 404                an unknown id or path; another tenant's id looks the same
        PromptNotFound            the catalog has no such prompt, or no such version of it
      MethodNotAllowed 405        the path exists, the method does not
      TooManyRequests 429         a limit of this server is reached
        RateLimited               a quota of the tenant or the key is used up
      ServerError 500             a bug in this server
        ServerUnavailable 503     this process has too many connections, or is shutting down
        IssuerUnavailable 503     the keys of a token's issuer can't be fetched
        DatabaseUnavailable 503   Postgres does not answer, or can't serve this now
          OutcomeUnknown          the connection was lost during a commit
        TooMuchUnread 503         clients leave more unread than REPRISE_UNREAD_BYTES_MAX
      UpstreamError 502           the upstream failed
        UpstreamRefused           its own 4xx, passed on with its status
          ContextTooLong 400      the prompt does not fit into its model's context
        UpstreamBusy 429          its 429, passed on with Retry-After
        UpstreamUnavailable       it can't be reached, answers 5xx, or breaks off
        UpstreamStalled 504       it sent nothing for longer than a timeout
        UpstreamGarbled           it sent something that is not a completion
      ToolsUnavailable 424        `tool_choice` asks for tools of an MCP server that can't be listed
      RunTooLong                  a run met REPRISE_RUN_DURATION_MAX_S or REPRISE_RUN_OUTPUT_BYTES_MAX
    Fenced                        internal: another worker owns this response; stop quietly

Only `api/problems.py` turns these into HTTP replies, only `runs/recorder.py` into `response.failed`. Before the
first event an error is an HTTP status, after it an event; never both.
"""

from collections.abc import Mapping, Sequence

RESPONSE_ID_HEADER = "x-reprise-response-id"
"""A header of errors: the response whose output exists although the create failed."""

TEXT_CHARS_MAX = 2_000
"""Of a message and of `param`: both quote input, which may be as long as a body."""


def shortened(text: str) -> str:
    """The text, without its middle if it is too long: it begins with what is wrong, and ends with where, or with what is right."""
    half = TEXT_CHARS_MAX // 2
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[: half - 1]}…{text[-half:]}"


class ApiError(Exception):
    """An error with OpenAI's four keys; subclasses give status, type and default code."""

    status = 500
    type = "server_error"
    code: str | None = None
    is_final = False
    """Whether a retry can't succeed, or would repeat work: then `x-should-retry: false` asks SDKs not to retry."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`message` is for people, `param` is the parameter's path (`input[0].role`), `code` is for programs."""
        self.message = shortened(message)
        super().__init__(self.message)
        self.param = None if param is None else shortened(param)
        self.code = code if code is not None else type(self).code
        self.headers = dict(headers or {})

    @property
    def with_path(self) -> str:
        """The message, with the parameter's path in it, for people who see nothing else."""
        message = self.message.removesuffix(".")
        return message if self.param is None or self.param in message else f"{self.param}: {message}"

    @property
    def event_code(self) -> str:
        """The `error.code` of a failed response, which may not be null."""
        return self.code or "server_error"


class InvalidRequest(ApiError):
    """The request can't be served as it stands."""

    status = 400
    type = "invalid_request_error"

    @property
    def event_code(self) -> str:
        """`invalid_prompt` is a code that clients do not retry."""
        return self.code or "invalid_prompt"


class InvalidParameter(InvalidRequest):
    """A value has the wrong type, form or range."""

    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A parameter, tool or item that exists in the API and that this server does not offer."""

    code = "unsupported_parameter"


class PreviousResponseNotFound(InvalidRequest):
    """400, not 404: that is what clients of the hosted API look for."""

    code = "previous_response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Previous response with id '{response_id}' not found.", param="previous_response_id")


class ToolCredentialExists(InvalidRequest):
    """400, not 409, which SDKs repeat."""

    code = "tool_credential_exists"

    def __init__(self, credential_id: str, param: str) -> None:
        super().__init__(
            f"There is a credential for this server and this holder already: '{credential_id}'. Update it, or delete it.",
            param=param,
        )


class TokensNotCounted(InvalidRequest):
    """The upstream has nothing that counts the tokens of this request."""

    code = "token_count_not_available"


class ConversationLocked(InvalidRequest):
    """400, not 409, which SDKs repeat at once; the Agents SDK waits and repeats this code."""

    code = "conversation_locked"

    def __init__(self) -> None:
        super().__init__(
            "Another process is currently operating on this conversation. Please retry in a few seconds.",
            param="conversation",
        )


class BodyTooLarge(InvalidRequest):
    """The body is over the limit."""

    status = 413
    code = "request_too_large"


class RequestTooLarge(InvalidRequest):
    """The tokens of one request are more than a quota has in a minute: no waiting helps."""

    status = 413
    type = "tokens"
    code = "request_too_large"


class HeadTooLarge(InvalidRequest):
    """The headers are over a limit."""

    status = 431
    code = "request_headers_too_large"


class UriTooLong(InvalidRequest):
    """The request line alone is over the limit of a head."""

    status = 414
    code = "uri_too_long"


class RequestTooSlow(InvalidRequest):
    """The headers or the body did not arrive in time."""

    status = 408
    code = "request_timeout"


class AuthenticationFailed(ApiError):
    """The key or token is missing, unknown, revoked, expired, not valid."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str, *, code: str | None = None, key_id: str | None = None) -> None:
        """`key_id` names a known key, or the issuer of a token, for the log."""
        super().__init__(message, code=code)
        self.key_id = key_id


class ForeignSite(ApiError):
    """`Host` or `Origin` is not this machine, and the server has no keys."""

    status = 403
    type = "invalid_request_error"
    code = "foreign_site"


class MissingScope(ApiError):
    """The key lacks the scope that this endpoint needs."""

    status = 403
    type = "invalid_request_error"
    code = "missing_scope"

    def __init__(self, scope: str) -> None:
        super().__init__(f"You have insufficient permissions for this operation. Missing scopes: {scope}.")


class ModelNotAllowed(ApiError):
    """The model exists, and the key may not use it."""

    status = 403
    type = "invalid_request_error"
    code = "model_not_allowed"

    def __init__(self, model: str, *, param: str = "model") -> None:
        super().__init__(f"This API key does not have access to the model '{model}'.", param=param)


class StorageQuotaExceeded(ApiError):
    """As much is stored as the tenant or the key may store. 403, not 429: SDKs would repeat that, and waiting frees nothing."""

    status = 403
    type = "insufficient_quota"
    code = "storage_quota_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} Delete what is not needed; it counts until the next measurement.")


class NotFound(ApiError):
    """An unknown id or path; another tenant's id looks the same."""

    status = 404
    type = "invalid_request_error"


class ResponseNotFound(NotFound):
    """An unknown response."""

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id}' not found.")


class CompletionNotFound(NotFound):
    """An unknown chat completion."""

    def __init__(self, completion_id: str) -> None:
        super().__init__(f"Chat completion with id '{completion_id}' not found.")


class PromptNotFound(NotFound):
    """The catalog has no such prompt, or no such version of it."""

    code = "prompt_not_found"

    def __init__(self, prompt_id: str, version: str | None = None) -> None:
        message, param = f"Prompt with id '{prompt_id}' not found.", "prompt.id"
        if version is not None:
            message, param = f"Prompt with id '{prompt_id}' has no version '{version}'.", "prompt.version"
        super().__init__(message, param=param)


class ConversationNotFound(NotFound):
    """An unknown conversation; `param` where a body names it."""

    def __init__(self, conversation_id: str, *, param: str | None = None) -> None:
        super().__init__(f"Conversation with id '{conversation_id}' not found.", param=param)


class KeyNotFound(NotFound):
    """An unknown key, or one that is revoked."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no valid key {key_id}.")


class TenantNotFound(NotFound):
    """An unknown tenant; only operators meet it."""

    def __init__(self, tenant: str) -> None:
        super().__init__(f"There is no tenant '{tenant}'.")


class ToolCredentialNotFound(NotFound):
    """An unknown credential, or one that the caller does not see."""

    def __init__(self, credential_id: str) -> None:
        super().__init__(f"Tool credential with id '{credential_id}' not found.")


class AgentNotFound(NotFound):
    """An unknown agent."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"Agent with id '{agent_id}' not found.")


class StoredFileNotFound(NotFound):
    """An unknown file."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"No such File object: {file_id}", param="id")


class ItemNotFound(NotFound):
    """An item that is not in the conversation."""

    def __init__(self, item_id: str) -> None:
        super().__init__(f"Item with id '{item_id}' not found.")


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooManyRequests(ApiError):
    """A limit of this server is reached; try again."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class RateLimited(TooManyRequests):
    """A quota of the tenant or the key is used up; its headers say for how long."""

    def __init__(self, message: str, *, type: str, headers: Mapping[str, str]) -> None:
        """`type` is `requests` or `tokens`."""
        super().__init__(message, headers=headers)
        self.type = type


class ServerError(ApiError):
    """A bug in this server. The message shows no internals."""


class ServerUnavailable(ServerError):
    """This process has too many connections, or is shutting down. A retry may reach another process."""

    status = 503

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"Retry-After": "1"})


class IssuerUnavailable(ServerError):
    """The keys of a token's issuer can't be fetched, so it is unknown whether the token is valid."""

    status = 503

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            "The keys of this token's issuer can't be fetched now; please try again.",
            headers={"Retry-After": str(retry_after_s)},
        )


class DatabaseUnavailable(ServerError):
    """Postgres does not answer, or can't serve this now."""

    status = 503
    is_unknown = False
    """Whether what was to be written may be written."""


class OutcomeUnknown(DatabaseUnavailable):
    """The connection to Postgres was lost before the outcome of a commit was known."""

    is_unknown = True


class TooMuchUnread(ServerError):
    """Clients together leave so much unread that this large reply can't be added. A retry would repeat the work of a response
    that was `made` for it."""

    status = 503

    def __init__(self, made: str | None = None, *, stored: bool = True) -> None:
        """`made` is the id of the response, `stored` whether it can be retrieved."""
        if made is None:
            message, headers = "please try again", {"Retry-After": "1"}
        elif stored:
            message, headers = f"retrieve '{made}' later", {RESPONSE_ID_HEADER: made}
        else:
            message, headers = "the response was made and is lost because 'store' is false", {}
        super().__init__(f"Clients leave too much of this server's replies unread; {message}.", headers=headers)
        self.is_final = made is not None


class UpstreamError(ApiError):
    """The upstream failed."""

    status = 502
    code: str | None = "server_error"
    upstream: str | None = None
    """The upstream's name, if known. It is logged; the message may quote the upstream, and is not."""


class UpstreamRefused(UpstreamError):
    """The upstream's own 4xx, passed on with its status, type, code and param."""

    code = None

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status, self.type = status, type

    @property
    def event_code(self) -> str:
        """`invalid_prompt` is a code that clients do not retry."""
        return self.code or "invalid_prompt"


class ContextTooLong(UpstreamRefused):
    """The prompt does not fit into the model's context."""

    def __init__(self, message: str, *, tokens_max: int | None = None, share_over: float | None = None) -> None:
        """`tokens_max` is the size of the context, and `share_over` how much of the prompt is too much, from 0 to 1, as far as the
        upstream has named them."""
        super().__init__(message, param="input", code="context_length_exceeded")
        self.tokens_max, self.share_over = tokens_max, share_over


class UpstreamBusy(UpstreamError):
    """The upstream's 429; its Retry-After is passed on."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class UpstreamUnavailable(UpstreamError):
    """The upstream can't be reached, answers 5xx, or breaks off."""


class UpstreamStalled(UpstreamError):
    """The upstream sent nothing for longer than a timeout."""

    status = 504


class UpstreamGarbled(UpstreamError):
    """The upstream sent something that is not a completion."""


class ToolsUnavailable(ApiError):
    """`tool_choice` requires a call, but there is no tool: the MCP servers can't be listed, or offer none."""

    status = 424
    type = "external_connector_error"

    def __init__(self, unlisted: Sequence[str]) -> None:
        why = f"; servers that can't be listed: {', '.join(unlisted)}" if unlisted else ""
        super().__init__(f"'tool_choice' asks for a call, but there is no tool to call{why}.", param="tool_choice")


class RunTooLong(ServerError):
    """A run met a limit on its duration or on the bytes of its output."""

    is_final = True


class Fenced(Exception):
    """Another worker owns this response; stop quietly. Never leaves `runs`."""
