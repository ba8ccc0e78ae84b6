"""What upstreams say of their failures → our errors."""

import msgspec
import pytest

from app.errors import ContextTooLong, UpstreamBusy, UpstreamGarbled, UpstreamRefused, UpstreamUnavailable
from app.outbound.failures import ErrorContext, KeyRefused, failed_in_stream, refused
from app.outbound.masking import Mask

OURS = ErrorContext("up", passes_caller=False, mask=Mask(["the-key"]))


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (404, {"message": 'model "x" not found, try pulling it first', "type": "api_error"}, (404, "model_not_found")),
        (400, {"message": "Invalid model name passed in model=x", "code": "400"}, (400, "model_not_found")),
        (404, {"message": "File Not Found", "type": "not_found_error", "code": 404}, (404, None)),
        (400, {"message": "no", "type": "BadRequestError", "code": "BadRequestError"}, (400, None)),
        (400, {"message": "no", "type": "invalid_request_error", "code": "invalid_request_error"}, (400, None)),
        (400, {"message": "no", "code": "unsupported_value"}, (400, "unsupported_value")),
        (402, {"message": "Insufficient Balance", "type": "unknown_error"}, (402, "insufficient_quota")),
        (400, {"message": "litellm.ContextWindowExceededError: x"}, (400, "context_length_exceeded")),
        (500, {"message": "the request exceeds the available context size"}, (400, "context_length_exceeded")),
        (400, {"message": "prompt is too long: 9 tokens > 8"}, (400, "context_length_exceeded")),
        (500, {"message": "Failed to load image or audio file"}, (400, None)),
        (400, {"message": "m is not a multimodal model"}, (400, None)),
        (403, {"message": "no access to model `m`", "code": "model_not_found"}, (403, "model_not_found")),
        (403, {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"]}}, (403, None)),
    ],
)
def test_engines_own_words_become_the_apis(status, error, expected):
    made = refused(status, {}, msgspec.json.encode({"error": error}), OURS)
    assert isinstance(made, UpstreamRefused)
    assert (made.status, made.code) == expected
    assert made.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (
            (
                "This model's maximum context length is 100 tokens. However, you requested 260 tokens (200 in the messages, 60 in the "
                "completion). Please reduce the length of the messages or completion."
            ),
            0.8,
        ),
        ("This model's maximum context length is 100 tokens. However, your messages resulted in 125 tokens.", 0.2),
        ("This model's maximum context length is 100 tokens. However, your request has 125 input tokens.", 0.2),
        (
            "This model's maximum context length is 100 tokens. However, your request has 80 input tokens plus 40 'max_tokens'.",
            0.25,
        ),
        ("Input tokens exceed the configured limit of 100 tokens. Your messages resulted in 200 tokens.", 0.5),
        ("request (200 tokens) exceeds the available context size (100 tokens), try increasing it", 0.5),
        ("Prompt contains 200 tokens and 0 draft tokens, too large for model with 100 maximum context length", 0.5),
        ("prompt is too long: 200 tokens > 100 maximum", 0.5),
        ("The input (200 tokens) is longer than the model's context length (100 tokens).", 0.5),
        (
            (
                "Requested token count exceeds the model's maximum context length of 100 tokens. You requested a total of 130 tokens: "
                "120 tokens from the input messages and 10 tokens for the completion."
            ),
            0.25,
        ),
        ("This model's maximum context length is 9 tokens; your prompt contains at least 10 input tokens.", None),
        ("This model's maximum context length is 100 tokens. However, your messages resulted in 90 tokens.", None),
        ("This model's maximum context length is 100 tokens.", None),
        ("the request exceeds the available context size", None),
    ],
)
def test_an_upstreams_counts_say_how_much_of_a_prompt_is_too_much(words, share):
    made = refused(400, {}, msgspec.json.encode({"error": {"message": words}}), OURS)
    assert isinstance(made, ContextTooLong)
    assert made.share_over == (None if share is None else pytest.approx(share))
    assert made.message == words


def test_counts_beside_the_message_are_in_it():
    error = {"message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 4000}
    made = refused(400, {}, msgspec.json.encode({"error": error}), OURS)
    assert isinstance(made, ContextTooLong)
    assert made.message == "too long (The prompt has 5000 tokens, the model's context 4000.)"
    assert made.share_over == pytest.approx(0.2)
    for wrong in ({"n_ctx": "x"}, {"n_prompt_tokens": 0}, {"n_ctx": True}):
        made = refused(400, {}, msgspec.json.encode({"error": error | wrong}), OURS)
        assert (made.message, made.share_over) == ("too long", None)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, {"message": "no", "code": "account_deactivated"}),
        (403, {"message": "Key limit exceeded", "code": 403, "metadata": None}),
        (403, {"message": "no", "type": "PermissionDeniedError", "code": "PermissionDeniedError"}),
        (403, {"message": "no", "code": "permission_denied"}),
    ],
)
def test_a_401_is_about_the_key_and_a_403_unless_it_names_another_reason(status, error):
    assert type(refused(status, {}, msgspec.json.encode({"error": error}), OURS)) is KeyRefused


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "x", "type": "InternalServerError", "code": 500}, UpstreamUnavailable),
        ({"message": "x", "type": "overloaded_error"}, UpstreamUnavailable),
        ({"message": "x", "status_code": 503}, UpstreamUnavailable),
        ({"message": "x", "type": "rate_limit_error"}, UpstreamBusy),
        ({"message": "x", "http_status_code": 422}, UpstreamRefused),
        ({"message": "x", "type": "NotFoundError"}, UpstreamRefused),
        ({"message": "x", "code": "invalid_api_key"}, KeyRefused),
        ("a text", UpstreamUnavailable),
        (["a list"], UpstreamUnavailable),
    ],
)
def test_an_error_in_a_stream_is_what_its_status_type_or_code_says(error, kind):
    assert type(failed_in_stream(msgspec.Raw(msgspec.json.encode(error)), OURS)) is kind


def test_a_redirect_is_garbled_and_a_key_is_masked():
    assert isinstance(refused(307, {}, b"", OURS), UpstreamGarbled)
    assert "the-key" not in refused(400, {}, b'{"detail": [{"msg": "the-key is odd"}]}', OURS).message
