"""Making responses: what a client may ask for, what the upstream is asked then, and what the reply says."""

import asyncio
import base64
import json

import asyncpg
import openai
import pydantic
import pytest

from app.storage.tables import metadata as tables
from tests.unit.build import ECHO
from tests.upstream import answer, finish, no_usage, note, reasoning, script, text, usage

PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG pixel").decode()

BARE = ECHO | {"status": "completed"}
"""The reply to a request that gives nothing but model and input, without what is made."""

MADE = {"id", "created_at", "completed_at", "output", "usage"}
"""The keys that the server makes."""


def echo_of(answer):
    """A reply without what the server makes."""
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in MADE}


# -- The reply --------------------------------------------------------------------------------------------------------------


def test_a_text_answer_comes_back_and_is_retrieved_as_it_was(client):
    made = client.responses.create(model="m", input=script(answer("Hello there")))
    assert made.output_text == "Hello there"
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()


def test_a_stream_is_the_stored_response(client):
    with client.responses.stream(model="m", input=script(answer("Hello there"))) as stream:
        final = stream.get_final_response()
    assert final.output_text == "Hello there"
    assert client.responses.retrieve(final.id).output_text == "Hello there"


def test_a_bare_request_is_answered_with_every_key_and_its_default(http):
    given = script([text("Hello"), finish(), usage(7, 2, prompt_tokens_details={"cached_tokens": 3})])
    reply = http.post("/responses", json={"model": "m", "input": given})
    assert echo_of(reply) == BARE
    made = reply.json()
    assert made["id"].startswith("resp_")
    assert 0 <= made["completed_at"] - made["created_at"] < 10
    [item] = made["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert made["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 9,
    }


def test_every_parameter_is_echoed_as_it_was_given(http, said):
    given = {
        "instructions": "Be brief.",
        "max_output_tokens": 100,
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "prompt_cache_retention": "24h",
        "safety_identifier": "someone",
        "temperature": 0.5,
        "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "tool_choice": "none",
        "tools": [
            {
                "type": "function",
                "name": "f",
                "description": "F.",
                "parameters": {"type": "object", "properties": {}},
                "strict": True,
            }
        ],
        "top_logprobs": 2,
        "top_p": 0.5,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "truncation": "auto",
        "user": "somebody",
        "metadata": {"a": "1"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "store": False,
    }
    assert echo_of(http.post("/responses", json={"model": "m", "input": said, **given})) == BARE | given


def test_null_for_every_parameter_is_the_same_as_leaving_it_out(http, said):
    """As llama-index asks, and more."""
    names = (
        "instructions previous_response_id conversation prompt store background stream stream_options include metadata "
        "max_output_tokens max_tool_calls temperature top_p frequency_penalty presence_penalty top_logprobs "
        "parallel_tool_calls tools tool_choice text reasoning truncation context_management moderation service_tier "
        "prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier user image access_programs "
        "multi_agent"
    ).split()
    reply = http.post("/responses", json={"model": "m", "input": said, **dict.fromkeys(names)})
    assert echo_of(reply) == BARE


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "priority"])
def test_the_service_tier_of_the_reply_is_the_one_that_there_is(http, said, tier):
    reply = http.post("/responses", json={"model": "m", "input": said, "service_tier": tier})
    assert echo_of(reply) == BARE


def test_a_defaulted_tool_is_echoed_with_every_key_that_strict_clients_demand(client, said):
    made = client.responses.create(model="m", input=said, tools=[{"type": "function", "name": "f"}])
    assert made.to_dict()["tools"] == [
        {"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}
    ]


def test_usage_is_null_where_the_upstream_reports_none(client):
    made = client.responses.create(model="m", input=script([no_usage(), text("Hello"), finish()]))
    assert made.to_dict()["usage"] is None


@pytest.mark.parametrize(
    ("finish_reason", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_is_cut_short_is_incomplete_and_says_why(client, finish_reason, reason):
    made = client.responses.create(model="m", input=script([text("Once upon"), finish(finish_reason)]))
    assert (made.status, made.incomplete_details.reason) == ("incomplete", reason)
    assert (made.output_text, made.output[0].status) == ("Once upon", "incomplete")
    assert made.to_dict()["completed_at"] is None


# -- Input → messages -------------------------------------------------------------------------------------------------------


def test_a_string_is_one_user_message(client, said, heard):
    assert client.responses.create(model="m", input=said).output_text == f"ok: {said}"
    assert heard()["messages"] == [{"role": "user", "content": said}]


def test_instructions_come_first(client, said, heard):
    client.responses.create(
        model="m",
        instructions="Be brief.",
        input=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": said}],
    )
    assert heard()["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": said},
    ]


def test_instructions_alone_are_enough_of_an_input(client, upstream):
    made = client.responses.create(model="m", instructions="Greet somebody in test_create.")
    assert made.instructions == "Greet somebody in test_create."
    assert upstream.requests[-1].body["messages"] == [{"role": "system", "content": "Greet somebody in test_create."}]


def test_every_role_is_a_message_with_or_without_a_type(client, said, heard):
    client.responses.create(
        model="m",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"type": "message", "role": "assistant", "content": "Hello"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Again"}]},
            {
                "type": "message",
                "id": "msg_of_elsewhere",
                "role": "assistant",
                "status": "completed",
                "phase": "final_answer",
                "content": [{"type": "output_text", "text": "Hello again", "annotations": []}],
            },
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": said},
        ],
    )
    assert heard()["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Hello again"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": said},
    ]


def test_a_refusal_of_the_past_is_text_for_an_upstream_that_knows_no_refusals(client, said, heard):
    client.responses.create(
        model="m",
        input=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": said},
        ],
    )
    assert heard()["messages"][1] == {"role": "assistant", "content": "No."}


def test_several_parts_stay_parts(client, said, heard):
    client.responses.create(
        model="m",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": said},
                    {"type": "input_image", "image_url": "https://example.com/cat.png", "detail": "high"},
                    {"type": "input_image", "image_url": PIXEL},
                    {"type": "input_file", "file_data": "aGk=", "filename": "a.txt"},
                    {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                    {"type": "input_text", "text": "What is all this?"},
                ],
            }
        ],
    )
    assert heard()["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": said},
                {"type": "image_url", "image_url": {"url": "https://example.com/cat.png", "detail": "high"}},
                {"type": "image_url", "image_url": {"url": PIXEL}},
                {
                    "type": "text",
                    "text": 'Extracted text of the file "a.txt" (plain text):\n\nhi\n\n(End of the file "a.txt".)',
                },
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                {"type": "text", "text": "What is all this?"},
            ],
        }
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image"},
        {"type": "input_file", "filename": "a.pdf"},
    ],
    ids=["image", "file"],
)
def test_parts_without_content_are_refused(client, said, part):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="m", input=[{"role": "user", "content": [{"type": "input_text", "text": said}, part]}]
        )
    assert refused.value.code == "unsupported_parameter"


def test_reasoning_of_the_past_is_not_shown_to_an_upstream_that_takes_none(
    new_server, upstream, catalog_file, said, heard
):
    catalog = f'upstreams.mute.base_url = "{upstream.base_url}"\nupstreams.mute.dialect = {{ reasoning = "none" }}'
    with new_server(REPRISE_CATALOG=catalog_file(catalog)).client() as client:
        client.responses.create(
            model="m",
            input=[
                {"role": "user", "content": "Hi"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": said},
            ],
        )
    assert heard()["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": said},
    ]


# -- Parameters → chat request ----------------------------------------------------------------------------------------------


def test_the_upstream_is_asked_for_no_more_than_the_client_asked_for(client, said, heard):
    client.responses.create(model="some/model", input=said)
    assert heard() == {
        "model": "some/model",
        "messages": [{"role": "user", "content": said}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_parameters_reach_the_upstream_under_its_own_names(http, said, heard):
    given = {"temperature": 0, "top_p": 0.5, "frequency_penalty": 1, "presence_penalty": -1}
    reply = http.post(
        "/responses",
        json={
            "model": "m",
            "input": said,
            **given,
            "max_output_tokens": 50,
            "reasoning": {"effort": "high"},
            "top_logprobs": 3,
            "user": "somebody",
            "prompt_cache_key": "key",
            "metadata": {"a": "1"},
            "truncation": "auto",
            "text": {"verbosity": "low"},
        },
    )
    assert reply.status_code == 200
    assert heard() == {
        "model": "m",
        "messages": [{"role": "user", "content": said}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **given,
        "max_tokens": 50,
        "reasoning_effort": "high",
        "logprobs": True,
        "top_logprobs": 3,
    }


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("format", "response_format"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "name": "x", "schema": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        ),
        (
            {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True, "description": "An x."},
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True, "description": "An x."},
            },
        ),
    ],
    ids=["text", "json_object", "json_schema", "strict json_schema"],
)
def test_the_text_format_is_the_response_format_of_the_upstream(client, said, heard, format, response_format):
    made = client.responses.create(model="m", input=said, text={"format": format})
    assert heard().get("response_format") == response_format
    assert made.to_dict()["text"]["format"] | format == made.to_dict()["text"]["format"]


def test_parse_gives_an_object_of_the_clients_own_class(client):
    class Capital(pydantic.BaseModel):
        country: str
        city: str

    given = script(answer(json.dumps({"country": "Norway", "city": "Oslo"})))
    made = client.responses.parse(model="m", input=given, text_format=Capital)
    assert made.output_parsed == Capital(country="Norway", city="Oslo")
    assert made.text.format.schema_ == {
        "title": "Capital",
        "type": "object",
        "properties": {
            "country": {"title": "Country", "type": "string"},
            "city": {"title": "City", "type": "string"},
        },
        "required": ["country", "city"],
        "additionalProperties": False,
    }


def test_log_probabilities_come_with_the_text_when_asked_for(client, upstream):
    given = script(
        [
            text(
                "Hi", logprobs={"content": [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}]}
            ),
            text(
                "!",
                logprobs={
                    "content": [
                        {
                            "token": "!",
                            "logprob": -1.5,
                            "top_logprobs": [{"token": "?", "logprob": -2.5, "bytes": None}],
                        }
                    ]
                },
            ),
            finish(),
        ]
    )
    made = client.responses.create(
        model="m", input=given, top_logprobs=1, include=["message.output_text.logprobs"], store=False
    )
    assert made.to_dict()["output"][0]["content"][0]["logprobs"] == [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []},
        {
            "token": "!",
            "logprob": -1.5,
            "bytes": [33],
            "top_logprobs": [{"token": "?", "logprob": -2.5, "bytes": [63]}],
        },
    ]
    [record] = upstream.asked(given)
    assert (record.body["logprobs"], record.body["top_logprobs"]) == (True, 1)


def test_log_probabilities_without_alternatives_are_asked_for_by_include_alone(client, said, heard):
    client.responses.create(model="m", input=said, include=["message.output_text.logprobs"])
    assert (heard()["logprobs"], heard()["top_logprobs"]) == (True, 0)


def test_parameters_of_the_common_engines_reach_the_upstream_as_they_are(client, said, heard):
    given = {
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["\n\n"],
        "chat_template_kwargs": {"enable_thinking": False},
        "guided_choice": ["yes", "no"],
        "cache_salt": "tenant",
        "priority": 3,
    }
    made = client.responses.create(model="m", input=said, extra_body=given)
    assert {key: heard()[key] for key in given} == given
    assert not given.keys() & made.to_dict().keys()


def test_hints_that_clients_add_go_nowhere(http, said, heard):
    hints = {
        "client_metadata": {"x-codex-installation-id": "1"},
        "internal_chat_message_metadata_passthrough": {"a": 1},
    }
    reply = http.post("/responses", json={"model": "m", "input": said, **hints})
    assert echo_of(reply) == BARE
    assert not hints.keys() & heard().keys()


@pytest.mark.parametrize("include", ["reasoning.encrypted_content", "file_search_call.results"])
def test_include_takes_every_value_of_the_api(client, said, include):
    assert client.responses.create(model="m", input=said, include=[include]).status == "completed"


# -- Reasoning --------------------------------------------------------------------------------------------------------------


def test_reasoning_comes_as_an_item_before_the_message(client):
    made = client.responses.create(
        model="m", input=script([reasoning("Hm, "), reasoning("yes."), text("Hi"), finish()])
    )
    thought, message = made.to_dict()["output"]
    assert thought.pop("id").startswith("rs_")
    assert thought == {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm, yes."}],
        "status": "completed",
    }
    assert message["content"][0]["text"] == "Hi"


def test_reasoning_is_mirrored_into_the_summary_when_one_is_asked_for(client):
    given = script([reasoning("Hm.", field="reasoning"), text("Hi"), finish()])
    made = client.responses.create(model="m", input=given, reasoning={"summary": "detailed"})
    assert made.to_dict()["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert made.reasoning.summary == "detailed"


def test_the_old_name_of_the_summary_is_understood(client):
    given = script([note("old name"), reasoning("Hm."), text("Hi"), finish()])
    made = client.responses.create(model="m", input=given, reasoning={"generate_summary": "concise"})
    assert made.to_dict()["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert made.to_dict()["reasoning"] == {"effort": None, "summary": "concise"}


@pytest.mark.parametrize("options", [{"store": False}, {"include": ["reasoning.encrypted_content"]}])
def test_encrypted_reasoning_comes_where_it_is_needed_and_does_not_show_the_text(client, options):
    given = script([reasoning("The secret thought."), text("Hi"), finish()])
    made = client.responses.create(model="m", input=given, **options)
    sealed = made.output[0].encrypted_content
    assert len(sealed) > len("The secret thought.")
    assert b"secret" not in base64.b64decode(sealed + "==", altchars=b"-_")


# -- What is not offered ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
        ({"multi_agent": {"enabled": True}}, "multi_agent"),
        ({"image": {"context_compression": "enabled"}}, "image.context_compression"),
        ({"access_programs": {"cyber": "daybreak_1"}}, "access_programs.cyber"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ],
    ids=str,
)
def test_a_parameter_that_is_not_offered_is_refused_by_its_name(http, upstream, said, given, param):
    reply = http.post("/responses", json={"model": "m", "input": said, **given})
    assert reply.status_code == 400
    assert reply.json() == {
        "error": {
            "message": f"Unsupported parameter: '{param}' is not supported by this server.",
            "type": "invalid_request_error",
            "param": param,
            "code": "unsupported_parameter",
        }
    }
    assert upstream.asked(said) == []


@pytest.mark.parametrize(
    "given",
    [
        {"background": False},
        {"context_management": []},
        {"image": {"context_compression": "auto"}},
        {"image": {"context_compression": "disabled"}},
        {"access_programs": {"cyber": "standard"}},
        {"reasoning": {"mode": "standard", "context": "auto"}},
        {"stream": False},
        {"include": []},
        {"tools": []},
        {"metadata": {}},
        {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
    ],
    ids=str,
)
def test_the_harmless_values_of_parameters_pass(http, said, given):
    assert http.post("/responses", json={"model": "m", "input": said, **given}).status_code == 200


def test_metadata_at_its_limits_is_kept(client, said):
    given = {f"{number:064}": "v" * 512 for number in range(16)}
    made = client.responses.create(model="m", input=said, metadata=given)
    assert client.responses.retrieve(made.id).metadata == given


# -- Prewarm, store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prewarm_completes_without_asking_the_upstream_and_can_be_continued(client, upstream, said, stream):
    given = {"model": "m", "input": f"prewarm {said}", "prompt_cache_options": {"prewarm": True}}
    if stream:
        *_, last = client.responses.create(**given, stream=True)
        made = last.response
    else:
        made = client.responses.create(**given)
    assert (made.status, made.output, made.usage) == ("completed", [], None)
    assert upstream.asked(f"prewarm {said}") == []
    client.responses.create(model="m", input=said, previous_response_id=made.id)
    [record] = upstream.asked(said)
    assert [message["content"] for message in record.body["messages"]] == [f"prewarm {said}", said]


def count_rows(server):
    """The rows of every table of the shared server's database."""

    async def count():
        connection = await asyncpg.connect(server.database_url)
        try:
            return {name: await connection.fetchval(f'select count(*) from "{name}"') for name in tables.tables}
        finally:
            await connection.close()

    return asyncio.run(count())


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_stored_leaves_nothing_but_its_usage(client, server, said, stream):
    parent = client.responses.create(model="m", input="Hello")
    before = count_rows(server)
    made = client.responses.create(model="m", input=said, store=False, stream=stream, previous_response_id=parent.id)
    if stream:
        *_, last = made
        made = last.response
    assert (made.store, made.output_text) == (False, f"ok: {said}")
    assert count_rows(server) == {**before, "usage_ledger": before["usage_ledger"] + 1}
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve(made.id)
    assert missing.value.body["message"] == f"Response with id '{made.id}' not found."
    with pytest.raises(openai.BadRequestError) as lost:
        client.responses.create(model="m", input="And?", previous_response_id=made.id)
    assert lost.value.code == "previous_response_not_found"


def test_a_stored_response_is_counted(client, server, said):
    """The counting above would see a row."""
    before = count_rows(server)
    client.responses.create(model="m", input=said)
    after = count_rows(server)
    assert (after["responses"] - before["responses"], after["items"] - before["items"]) == (1, 2)
