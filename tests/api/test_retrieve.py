"""Stored responses: retrieving, listing, paging through their input, deleting, cancelling."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from app.storage import tables
from tests.api.streams import events_of
from tests.servers import Served
from tests.upstream import answer, calling, finish, gate, note, script, text
from tests.waiting import fetch

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}
UNKNOWN = "resp_0123456789abcdef"


def error_of(reply: httpx.Response, status: int) -> dict:
    """The error of a raw reply, which has its four keys and nothing else."""
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def not_found(id):
    return {
        "message": f"Response with id '{id}' not found.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


@pytest.fixture(scope="module")
def own(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Served]:
    """A server whose data nobody else touches, for tests that count them."""
    with Served({**base_env, "DATABASE_URL": new_database()}) as running:
        yield running


@pytest.fixture(scope="module")
def own_client(own: Served) -> Iterator[openai.OpenAI]:
    with own.client() as made:
        yield made


# -- Retrieving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        answer("Hello there"),
        [*calling("look", {"a": 1}, id="call_1")],
        [text("cut"), finish("length")],
        [{"reasoning_content": "hm"}, *answer("Hello")],
        [text("a\u2028\u0000\ufffd😀"), finish()],
    ],
    ids=["text", "call", "incomplete", "reasoning", "odd characters"],
)
def test_what_is_retrieved_is_what_the_last_event_said(http, turn):
    asking = {
        "model": "m",
        "input": script(turn),
        "stream": True,
        "tools": [TOOL],
        "instructions": "x\u0000y",
        "metadata": {"k": "v"},
        "temperature": 0.25,
        "user": "somebody",
    }
    last = events_of(http.post("/responses", json=asking))[-1]
    retrieved = http.get(f"/responses/{last['response']['id']}")
    assert retrieved.status_code == 200
    assert retrieved.json() == last["response"]
    assert list(retrieved.json()) == list(last["response"])
    assert http.get(f"/responses/{last['response']['id']}").content == retrieved.content


def test_what_is_retrieved_is_what_create_gave(http):
    made = http.post("/responses", json={"model": "m", "input": script(answer("Hello"))})
    assert http.get(f"/responses/{made.json()['id']}").json() == made.json()


@pytest.mark.parametrize("id", [UNKNOWN, "nonsense", "a%00b", "%27%20or%20true", "x" * 3000, "..", "%ff"])
@pytest.mark.parametrize(
    ("method", "tail"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")]
)
def test_an_unknown_id_is_not_found_on_every_path(http, id, method, tail):
    error = error_of(http.request(method, f"/responses/{id}{tail}"), 404)
    assert error["type"] == "invalid_request_error"
    if id == UNKNOWN:
        assert error == not_found(id)


def test_a_response_that_was_not_stored_is_not_found(http, client):
    made = client.responses.create(model="m", input="hi", store=False)
    assert error_of(http.get(f"/responses/{made.id}"), 404) == not_found(made.id)


def test_a_foreground_response_is_found_only_once_it_has_ended(client, http, upstream, said):
    asking = script([text("slow"), gate(said), finish()])
    with client.responses.create(model="m", input=asking, stream=True) as stream:
        id = next(stream).response.id
        for method, tail in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
            assert error_of(http.request(method, f"/responses/{id}{tail}"), 404) == not_found(id)
        assert id not in [one["id"] for one in http.get("/responses", params={"limit": 100}).json()["data"]]
        upstream.open(said)
        assert list(stream)[-1].type == "response.completed"
    assert client.responses.retrieve(id).output_text == "slow"
    assert http.get("/responses").json()["data"][0]["id"] == id


def test_a_foreground_response_cannot_be_streamed_again(client, http):
    made = client.responses.create(model="m", input="hi")
    for query in ("stream=true", "stream=true&starting_after=3", "stream=1"):
        error = error_of(http.get(f"/responses/{made.id}?{query}"), 400)
        assert error["message"] == "This response cannot be streamed because it was not created with background=true."
        assert error["param"] == "stream"
    assert error_of(http.get(f"/responses/{UNKNOWN}?stream=true"), 404) == not_found(UNKNOWN)
    assert http.get(f"/responses/{made.id}?stream=false&starting_after=3").status_code == 200


INCLUDES = [
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


def test_every_include_value_of_the_api_is_accepted_in_both_spellings(client, http):
    made = client.responses.create(model="m", input="hi")
    assert client.responses.retrieve(made.id, include=INCLUDES).to_dict() == made.to_dict()
    for tail in ("", "/input_items"):
        for name in ("include", "include[]"):
            assert http.get(f"/responses/{made.id}{tail}", params={name: INCLUDES}).status_code == 200


def test_bad_query_parameters_are_named(client, http):
    made = client.responses.create(model="m", input="hi")
    bad = {
        "?include=everything": "include[0]",
        "?include[]=reasoning.encrypted_content&include[]=x": "include[1]",
        "?stream=maybe": "stream",
        "?starting_after=-1": "starting_after",
        "?starting_after=x": "starting_after",
        "?surprise=1": "surprise",
        "/input_items?limit=0": "limit",
        "/input_items?limit=101": "limit",
        "/input_items?limit=x": "limit",
        "/input_items?order=up": "order",
        "/input_items?include=everything": "include[0]",
        "/input_items?before=x": "before",
    }
    assert {tail: error_of(http.get(f"/responses/{made.id}{tail}"), 400)["param"] for tail in bad} == bad
    assert http.get(f"/responses/{made.id}?beta=true").status_code == 200


# -- Input items ------------------------------------------------------------------------------------------------------------


def message(role, *parts):
    return {"type": "message", "role": role, "content": list(parts), "status": "completed"}


def input_text(content):
    return {"type": "input_text", "text": content}


@pytest.fixture(scope="module")
def context(client: openai.OpenAI) -> tuple[str, list[dict]]:
    """A response of a chain with a call, a branch and a second branch; and the items it was made from, without new ids."""
    asking = script([note("a context"), *calling("look", {"x": 1})], answer("found"))
    root = client.responses.create(model="m", input=asking, tools=[TOOL])
    output = {"type": "function_call_output", "call_id": "call_1", "output": "it"}
    middle = client.responses.create(model="m", input=[output], previous_response_id=root.id, tools=[TOOL])
    client.responses.create(model="m", input="the first branch", previous_response_id=middle.id)
    second = client.responses.create(
        model="m",
        input=[{"role": "developer", "content": "psst"}, {"role": "user", "content": "the second branch"}],
        previous_response_id=middle.id,
    )
    client.responses.create(model="m", input="off the way", previous_response_id=second.id)
    last = client.responses.create(model="m", input="the end", previous_response_id=second.id)
    return last.id, [
        message("user", input_text(asking)),
        root.output[0].to_dict(),
        {**output, "status": "completed"},
        middle.output[0].to_dict(),
        message("developer", input_text("psst")),
        message("user", input_text("the second branch")),
        second.output[0].to_dict(),
        message("user", input_text("the end")),
    ]


def as_sent(item, like):
    """An item as a dict; without its id where the expected one has none, because the server made it."""
    found = item.to_dict()
    return found if "id" in like else {key: value for key, value in found.items() if key != "id"}


@pytest.mark.parametrize("limit", range(1, 10))
def test_input_items_are_the_whole_context_whatever_the_page_size(client, context, limit):
    id, expected = context
    forward = list(client.responses.input_items.list(id, order="asc", limit=limit))
    assert [as_sent(item, like) for item, like in zip(forward, expected, strict=True)] == expected
    backward = list(client.responses.input_items.list(id, order="desc", limit=limit))
    assert [item.to_dict() for item in reversed(backward)] == [item.to_dict() for item in forward]
    assert len({item.id for item in forward}) == len(expected)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_the_page_before_a_cursor_ends_there(client, http, context, order):
    id, expected = context

    def page(**query):
        return http.get(f"/responses/{id}/input_items", params={"order": order, **query})

    ids = [item["id"] for item in page(limit=100).json()["data"]]
    assert len(ids) == len(expected)
    for at, cursor in enumerate(ids):
        found = page(before=cursor, limit=3).json()
        before = ids[max(0, at - 3) : at]
        assert [item["id"] for item in found["data"]] == before
        assert (found["has_more"], found["first_id"]) == (at > 3, before[0] if before else None)
    for query in ({"before": "msg_unknown"}, {"before": ids[3], "after": ids[0]}):
        assert error_of(page(**query), 400)["param"] == "before"


def test_input_items_come_newest_first_and_twenty_at_a_time_by_default(client, http):
    many = [{"role": "user", "content": f"{number}"} for number in range(25)]
    made = client.responses.create(model="m", input=many)
    page = http.get(f"/responses/{made.id}/input_items").json()
    assert [item["content"][0]["text"] for item in page["data"]] == [f"{number}" for number in range(24, 4, -1)]
    assert page.keys() == {"object", "data", "first_id", "last_id", "has_more"}
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    rest = http.get(f"/responses/{made.id}/input_items", params={"after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["4", "3", "2", "1", "0"]
    assert rest["has_more"] is False
    end = http.get(f"/responses/{made.id}/input_items", params={"after": rest["last_id"]}).json()
    assert end == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_response_without_input_has_no_input_items(http):
    made = http.post(
        "/responses", json={"model": "m", "instructions": "speak", "prompt_cache_options": {"prewarm": True}}
    )
    page = http.get(f"/responses/{made.json()['id']}/input_items").json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_cursor_that_is_not_in_the_context_is_refused(client, http, context):
    id, _ = context
    other = client.responses.create(model="m", input="elsewhere")
    for after in ("msg_unknown", other.output[0].id, id, client.responses.retrieve(id).output[0].id):
        error = error_of(http.get(f"/responses/{id}/input_items", params={"after": after}), 400)
        assert error["message"] == f"Item with id '{after}' not found."
        assert error["param"] == "after"
    assert error_of(http.get(f"/responses/{id}/input_items?after=%00"), 400)["type"] == "invalid_request_error"


# -- Listing ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(own: Served, own_client: openai.OpenAI) -> list[dict]:
    """Seven responses of the server that is our own, oldest first; whatever else is in there goes first."""
    for response in httpx.get(f"{own.url}/responses?limit=100").json()["data"]:
        own_client.responses.delete(response["id"])
    ids, previous = [], None
    for number in range(7):
        made = own_client.responses.create(
            model="even" if number % 2 == 0 else "odd",
            input=script([note(f"{number}"), text("a"), finish("length" if number == 3 else "stop")]),
            metadata={"number": f"{number}", "kind": "listed"} if number else None,
            previous_response_id=previous if number in {2, 3} else None,
            stream=number == 5,
        )
        previous = made.id if number != 5 else list(made)[-1].response.id
        ids.append(previous)
    own_client.responses.create(model="even", input="not stored", store=False)
    return [own_client.responses.retrieve(id).to_dict() for id in ids]


@pytest.fixture
def own_http(own: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=30) as made:
        yield made


def pages(http, **query):
    """All responses, page by page, by `last_id`."""
    found = []
    while True:
        page = http.get("/responses", params=query).json()
        assert page.keys() == {"object", "data", "first_id", "last_id", "has_more"}
        assert len(page["data"]) <= query.get("limit", 20)
        found += page["data"]
        ends = (page["data"][0]["id"], page["data"][-1]["id"]) if page["data"] else (None, None)
        assert (page["first_id"], page["last_id"]) == ends
        if not page["has_more"]:
            return found
        query["after"] = page["last_id"]


def test_the_list_is_newest_first_and_whole_objects(own_http, listed):
    page = own_http.get("/responses").json()
    assert page["object"] == "list"
    assert page["data"] == listed[::-1]
    assert page["has_more"] is False


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_list_is_the_same_whatever_the_page_size(own_http, listed, limit):
    assert pages(own_http, limit=limit) == listed[::-1]
    assert pages(own_http, limit=limit, order="asc") == listed


@pytest.fixture(scope="module")
def tight(base_env: Mapping[str, str], own: Served) -> Iterator[httpx.Client]:
    """The same responses from a server whose pages take 4 kB, and which reads one page at a time."""
    bounds = {"REPRISE_PAGE_BYTES_MAX": "4096", "REPRISE_READS_BYTES_MAX": "1024"}
    with (
        Served({**base_env, "DATABASE_URL": own.database_url, **bounds}) as running,
        httpx.Client(base_url=running.url, timeout=30) as made,
    ):
        yield made


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_page_ends_with_its_bytes(tight, listed, order):
    whole = listed if order == "asc" else listed[::-1]
    assert len(tight.get("/responses").json()["data"]) < len(whole)
    assert pages(tight, limit=100, order=order) == whole


def test_what_is_larger_than_a_page_comes_alone(tight, own_client, listed):
    def user(letter: str) -> dict[str, str]:
        return {"role": "user", "content": letter * 10_000}

    made = own_client.responses.create(model="m", input=[user("x"), user("y")], instructions="z" * 100_000)
    try:
        page = tight.get("/responses").json()
        assert ([one["id"] for one in page["data"]], page["has_more"]) == ([made.id], True)
        assert tight.get(f"/responses/{made.id}").json() == page["data"][0]
        whole = own_client.responses.input_items.list(made.id, order="asc").to_dict()["data"]
        path = f"/responses/{made.id}/input_items"
        assert len(whole) == 2
        for query, shown in (("order=asc", 0), ("", 1), (f"order=asc&before={whole[1]['id']}", 0)):
            page = tight.get(f"{path}?{query}").json()
            assert (page["data"], page["has_more"]) == ([whole[shown]], "before" not in query)
        with ThreadPoolExecutor(8) as threads:  # they take turns
            found = list(threads.map(lambda _: tight.get(f"/responses/{made.id}").status_code, range(16)))
        assert found == [200] * 16
    finally:
        own_client.responses.delete(made.id)


def test_the_list_is_filtered(own_http, listed):
    def numbers(**query):
        return [listed.index(found) for found in pages(own_http, order="asc", **query)]

    first, last = listed[0]["created_at"], listed[-1]["created_at"]
    assert numbers(model="odd") == [1, 3, 5]
    assert numbers(model="odd", limit=1) == [1, 3, 5]
    assert numbers(status="incomplete") == [3]
    assert numbers(status="failed") == []
    assert numbers(**{"metadata[kind]": "listed"}) == [1, 2, 3, 4, 5, 6]
    assert numbers(**{"metadata[kind]": "listed", "metadata[number]": "4"}) == [4]
    assert numbers(**{"metadata[kind]": "listed", "model": "even"}) == [2, 4, 6]
    assert numbers(created_after=first, created_before=last) == list(range(7))
    assert numbers(created_after=last + 1) == []
    assert numbers(created_before=first - 1) == []
    half = [number for number in range(7) if listed[number]["created_at"] <= first]
    assert numbers(created_before=first) == half


def test_bad_list_parameters_are_named(own_http):
    bad = {
        "limit=0": "limit",
        "limit=101": "limit",
        "order=x": "order",
        "status=done": "status",
        "created_after=x": "created_after",
        "created_before=-1": "created_before",
        "metadata=x": "metadata",
        "colour=red": "colour",
    }
    assert {query: error_of(own_http.get(f"/responses?{query}"), 400)["param"] for query in bad} == bad


def test_a_websocket_handshake_is_not_taken_for_a_list(http):
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "WebSocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    error = error_of(http.get("/responses", headers=handshake), 400)
    assert error["code"] == "websocket_not_supported"


# -- Deleting ---------------------------------------------------------------------------------------------------------------


def rows(own):
    """How many rows each table of data has."""
    data = "responses facets items parts part_uses branches conversations removals files file_pieces runs event_journal event_archive approvals"
    names = data.split()
    others = "tenants keys retired_secrets audit_log sealing usage_ledger usage_days agents tool_credentials"
    assert {*names, *others.split()} == tables.metadata.tables.keys()
    counts = ", ".join(f"(select count(*) from {name})" for name in names)
    return dict(zip(names, fetch(own.database_url, f"select {counts}")[0], strict=True))


def added(own, before):
    """What has come since, of the tables where anything has."""
    return {name: count - before[name] for name, count in rows(own).items() if count != before[name]}


NOTHING: dict[str, int] = {}


def test_a_deleted_response_is_gone_for_everyone(client, http):
    made = client.responses.create(model="m", input="hi")
    reply = http.delete(f"/responses/{made.id}")
    assert (reply.status_code, reply.json()) == (200, {"id": made.id, "object": "response", "deleted": True})
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        assert error_of(http.request(method, f"/responses/{made.id}{tail}"), 404) == not_found(made.id)
    assert made.id not in [one["id"] for one in http.get("/responses?limit=100").json()["data"]]


def test_the_official_client_deletes(client):
    made = client.responses.create(model="m", input="hi")
    assert client.responses.delete(made.id) is None
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_descendants_keep_the_context_of_a_response_deleted_in_the_middle(client, http, upstream, said):
    ids = [None]
    for number in range(4):
        made = client.responses.create(model="m", input=f"{said} {number}", previous_response_id=ids[-1])
        ids.append(made.id)
    _, root, middle, _, tip = ids
    before = [item.to_dict() for item in client.responses.input_items.list(tip, order="asc")]
    answers = client.responses.retrieve(tip).to_dict()
    assert len(before) == 7
    for id in (middle, root):
        client.responses.delete(id)
        assert error_of(http.get(f"/responses/{id}"), 404) == not_found(id)
        assert [item.to_dict() for item in client.responses.input_items.list(tip, order="asc", limit=2)] == before
        assert client.responses.retrieve(tip).to_dict() == answers
    client.responses.create(model="m", input=said, previous_response_id=tip)
    [record] = upstream.asked(said)
    said_before = [message["content"] for message in record.body["messages"]]
    assert said_before == [
        *(line for number in range(4) for line in (f"{said} {number}", f"ok: {said} {number}")),
        said,
    ]


def test_rows_go_with_the_last_response_that_needs_them(own, own_client):
    before = rows(own)
    create, delete = own_client.responses.create, own_client.responses.delete
    root = create(model="m", input="root").id
    middle = create(model="m", input="middle", previous_response_id=root).id
    tip = create(model="m", input="tip", previous_response_id=middle).id
    branch = create(model="m", input="branch", previous_response_id=middle).id
    twig = create(model="m", input="twig", previous_response_id=branch).id
    assert added(own, before) == {"responses": 5, "facets": 10, "items": 10, "branches": 1}
    delete(middle)
    delete(root)
    assert added(own, before) == {"responses": 5, "facets": 6, "items": 10, "branches": 1}
    delete(tip)
    assert added(own, before) == {"responses": 4, "facets": 4, "items": 8, "branches": 1}
    delete(branch)
    assert added(own, before) == {"responses": 4, "facets": 2, "items": 8, "branches": 1}
    delete(twig)
    assert added(own, before) == NOTHING


def test_a_thread_can_go_on_from_where_its_tip_was_deleted(own, own_client, upstream, said):
    before = rows(own)
    create, delete = own_client.responses.create, own_client.responses.delete
    root = create(model="m", input=f"{said} root").id
    tip = create(model="m", input=f"{said} tip", previous_response_id=root).id
    delete(tip)
    assert added(own, before)["items"] == 2
    other = create(model="m", input=said, previous_response_id=root).id
    [record] = upstream.asked(said)
    assert [message["content"] for message in record.body["messages"]] == [f"{said} root", f"ok: {said} root", said]
    delete(root)
    delete(other)
    assert added(own, before) == NOTHING


def test_a_parent_deleted_while_its_child_is_made_stays_the_childs_context(own, own_client, upstream, said):
    before = rows(own)
    parent = own_client.responses.create(model="m", input="parent").id
    asking = script([note(said), text("child"), gate(said), finish()])
    with own_client.responses.create(model="m", input=asking, previous_response_id=parent, stream=True) as stream:
        next(stream)
        own_client.responses.delete(parent)
        upstream.open(said)
        last = list(stream)[-1]
    assert last.type == "response.completed"
    items = list(own_client.responses.input_items.list(last.response.id, order="asc"))
    assert [item.content[0].text for item in items] == ["parent", "ok: parent", asking]
    own_client.responses.delete(last.response.id)
    assert added(own, before) == NOTHING


def test_a_chain_deleted_from_its_root_to_its_tip_leaves_nothing(own, own_client):
    before = rows(own)
    ids = [None]
    for number in range(30):
        made = own_client.responses.create(model="m", input=f"{number}", previous_response_id=ids[-1])
        ids.append(made.id)
    for id in ids[1:]:
        own_client.responses.delete(id)
    assert added(own, before) == NOTHING


# -- Cancelling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [answer("done"), [text("cut"), finish("length")]], ids=["completed", "incomplete"])
def test_a_foreground_response_cannot_be_cancelled(client, http, turn):
    made = client.responses.create(model="m", input=script(turn))
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.cancel(made.id)
    assert caught.value.body["message"] == "Cannot cancel a synchronous response."
    assert client.responses.retrieve(made.id).status == made.status
