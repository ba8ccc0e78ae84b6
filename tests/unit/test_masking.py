"""Masking: secrets in every form that a server may give them back in, and only secrets."""

import base64
import json
import time
from urllib.parse import quote, quote_plus

import pytest

from app.outbound.masking import Mask, secrets_of
from app.outbound.toolserver import ToolServer

SECRET = 'p4ss/w+rd "ü" & more'
RAW = SECRET.encode()

FORMS = {
    "as it stands": SECRET,
    "inside": f"x{SECRET}x",
    "JSON": json.dumps(SECRET, ensure_ascii=False),
    "ASCII JSON": json.dumps(SECRET),
    "URL": quote(SECRET),
    "URL, no slash": quote(SECRET, safe=""),
    "form": quote_plus(SECRET),
    "URL in small letters": quote(SECRET, safe="").lower(),
    "base64": base64.b64encode(RAW).decode(),
    "base64url": base64.urlsafe_b64encode(RAW).decode(),
    "base64 without padding": base64.b64encode(RAW).decode().rstrip("="),
    **{
        f"base64 of more, {before} bytes before": base64.b64encode(
            b"user:x"[: before + 3] + RAW + b"and so on"
        ).decode()
        for before in range(3)
    },
    "base64url of more": base64.urlsafe_b64encode(b"Bearer " + RAW + b";").decode(),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_secret_is_masked_in_every_form(text):
    masked = Mask([SECRET]).text(f"before {text} after")
    assert masked.startswith("before ")
    assert masked.endswith(" after")
    assert "***" in masked
    # At the ends of base64 a character may be left that other bytes have a share in.
    core = text[5:-5]
    assert core not in masked
    assert len(masked) < len(f"before {text} after")


def test_json_is_masked_in_keys_strings_and_numbers_at_any_depth():
    given = {"a": [{"s3cret": [1, "xs3cretx", None, True, 12345678, 1.5]}], "b": "other"}
    assert Mask(["s3cret", "12345678"]).json(given) == {
        "a": [{"***": [1, "x***x", None, True, "***", 1.5]}],
        "b": "other",
    }


def test_json_without_secrets_is_the_same_object():
    given = {"a": ["nothing"]}
    assert Mask(["s3cret"]).json(given) is given
    assert Mask([]).json(given) is given


def test_of_two_secrets_that_begin_alike_the_longer_is_masked():
    assert Mask(["s3cret", "s3cret-longer"]).text("s3cret-longer s3cret") == "*** ***"


def test_short_values_are_no_secrets():
    assert Mask(["true", "1", "en", ""]).text('{"ok": true, "n": 1}') == '{"ok": true, "n": 1}'


@pytest.mark.parametrize(
    ("headers", "echo"),
    [
        ({"Authorization": "Bearer tok-123"}, "tok-123"),
        ({"authorization": "Bearer tok-123"}, "bearer tok-123"),
        ({"X-Auth": "Custom tok-123"}, "tok-123"),
        ({"x-api-key": "tok-123"}, "tok-123"),
        ({"authorization": "Basic " + base64.b64encode(b"ada:tok-123").decode()}, "tok-123"),
        ({"cookie": "lang=en; session=tok-123; x=1"}, "tok-123"),
        ({"authorization": 'Digest username="ada", response="tok-123"'}, "tok-123"),
    ],
    ids=["bearer", "small letters", "another header", "a key", "basic", "cookie", "digest"],
)
def test_the_secret_inside_a_header_is_masked_alone(headers, echo):
    assert Mask(secrets_of(headers)).text(f"got {echo}!").rstrip() in {"got ***!", "got bearer ***!"}


@pytest.mark.parametrize("credentials", ["é", "a", "_w"])
def test_credentials_that_cannot_be_decoded_are_masked_as_they_stand(credentials):
    assert list(secrets_of({"authorization": f"Basic {credentials}"})) == [f"Basic {credentials}", credentials]


def test_what_a_tool_server_is_told_is_secret_and_what_it_is_called_is_not():
    server = ToolServer(
        label="box",
        url="https://ada:passw0rd@tools.example.com/archive/k3y-of-the-server/mcp?token=abcdef&toolsets=issues&id=9f8e7d6c5b4a",
        headers={
            "x-team": "blue research",
            "accept-language": "en-US,en",
            "mcp-session-id": "0123456789",
            "x-shared": "s0me value",
        },
        authorization="tok-123",
        environment={"PASSWORD": "swordfish", "DATA_DIR": "/srv/data", "FEATURE": "enabled"},
    )
    said = "tools.example.com issues 0123456789 en-US,en /srv/data box enabled blue research"
    assert Mask(server.secrets).text(said) == said
    for secret in ("passw0rd", "k3y-of-the-server", "abcdef", "9f8e7d6c5b4a", "s0me value", "tok-123", "swordfish"):
        assert Mask(server.secrets).text(f"<{secret}>") == "<***>", secret


def test_what_is_no_key_does_not_garble_ordinary_answers():
    server = ToolServer(
        label="box",
        url="https://tools.example.com/acme-team-42/mcp",
        headers={"x-region": "us-east-1a", "X-GitHub-Api-Version": "2022-11-28", "x-user-id": "100000"},
    )
    said = {"arn": "arn:aws:s3:us-east-1a:1000001:b", "n": 1000001, "at": "2022-11-28T10:00", "team": "acme-team-42"}
    assert Mask(server.secrets).json(said) == said


def test_a_number_is_masked_only_as_a_whole():
    assert Mask(secrets_of({"x-key": "100000"})).json([100000, 1000001, 0.100000]) == ["***", 1000001, 0.1]


def test_masking_takes_no_longer_for_more_secrets():
    """As many as a request may have, a long text that is nearly all of them: a replace for each would take minutes."""
    secrets = [f"{number:06d}-{'ab' * 50}" for number in range(600)]
    text = "".join(secret[:-1] for secret in secrets) * 60
    few, many = Mask(secrets[:10]), Mask(secrets)

    def seconds(mask: Mask, text: str) -> float:
        mask.text("build it now")
        begun = time.thread_time()  # other processes of a busy machine do not count
        assert mask.text(text) == text
        return time.thread_time() - begun

    once = min(seconds(many, text) for _ in range(3))
    assert once < 20 * min(seconds(few, text) for _ in range(3))
    assert min(seconds(many, text * 8) for _ in range(3)) < 8 * 4 * once
