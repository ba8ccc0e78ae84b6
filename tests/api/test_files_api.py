"""Files: uploaded, listed, read and deleted through the official client; hostile forms."""

import asyncio
import base64
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import openai
import pytest

from tests.servers import Served
from tests.waiting import until

KIB = 1024
FILE_BYTES_MAX = 1024 * KIB
TENANT_BYTES_MAX = 3 * 1024 * KIB
FILES_MAX = 20


class Store:
    """A server with small limits, its client, and what its database holds."""

    def __init__(self, served: Served, database_url: str) -> None:
        self.client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=served.url, timeout=30)
        self.url, self._database_url = served.url, database_url

    def sql(self, *statements: str) -> Any:
        async def run() -> Any:
            connection = await asyncpg.connect(self._database_url)
            try:
                return [await connection.fetchval(statement) for statement in statements]
            finally:
                await connection.close()

        return asyncio.run(run())

    def counts(self) -> tuple[int, int]:
        files, pieces = self.sql("select count(*) from files", "select count(*) from file_pieces")
        return files, pieces


@pytest.fixture(scope="module")
def module_store(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Store]:
    url = new_database()
    limits = {
        "REPRISE_FILE_BYTES_MAX": f"{FILE_BYTES_MAX}",
        "REPRISE_FILES_TENANT_BYTES_MAX": f"{TENANT_BYTES_MAX}",
        "REPRISE_FILES_TENANT_MAX": f"{FILES_MAX}",
        "REPRISE_CONTEXT_BYTES_MAX": f"{2 * FILE_BYTES_MAX}",
        "REPRISE_CONTEXT_FILES_MAX": "5",
    }
    with Served({**base_env, "DATABASE_URL": url, **limits}) as served:
        made = Store(served, url)
        with made.client, made.http:
            yield made


@pytest.fixture
def store(module_store: Store) -> Store:
    """Without files."""
    for file in module_store.client.files.list():
        module_store.client.files.delete(file.id)
    assert module_store.counts() == (0, 0)
    return module_store


def upload(store, content=b"hello", name="notes.txt", purpose="user_data"):
    return store.client.files.create(file=(name, content), purpose=purpose)


@pytest.mark.parametrize("size", [1, 192 * KIB, 192 * KIB + 1, FILE_BYTES_MAX])
def test_a_file_comes_back_as_it_was(store, size):
    content = os.urandom(size)
    made = upload(store, content, "naïve “file”.bin")
    assert (made.bytes, made.filename, made.purpose) == (size, "naïve “file”.bin", "user_data")
    assert (made.object, made.status, made.expires_at) == ("file", "processed", None)
    assert store.client.files.retrieve(made.id) == made
    reply = store.client.files.content(made.id)
    assert reply.read() == content
    assert reply.response.headers["content-type"] == "application/octet-stream"
    assert reply.response.headers["content-disposition"] == (
        "attachment; filename*=UTF-8''na%C3%AFve%20%E2%80%9Cfile%E2%80%9D.bin"
    )


def test_a_file_of_the_largest_size_is_no_larger_than_allowed(store):
    with pytest.raises(openai.APIStatusError) as refused:
        upload(store, b"x" * (FILE_BYTES_MAX + 1))
    assert (refused.value.status_code, refused.value.param) == (413, "file")
    assert "REPRISE_FILE_BYTES_MAX" in refused.value.message
    assert store.counts() == (0, 0)


def test_files_are_listed_page_by_page(store):
    made = [upload(store, name=f"{n}.txt", purpose="vision" if n % 2 else "user_data") for n in range(5)]
    ids = [file.id for file in made]
    assert [file.id for file in store.client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in store.client.files.list(order="asc", limit=1)] == ids
    assert [file.id for file in store.client.files.list(purpose="vision")] == [ids[3], ids[1]]
    assert store.client.files.list(limit=5).has_more is False
    store.client.files.delete(ids[2])
    assert [file.id for file in store.client.files.list(after=ids[2])] == [ids[1], ids[0]]
    assert [file.id for file in store.client.files.list(after=ids[2], order="asc")] == ids[3:]
    for query in ("after=nothing", "limit=0", "limit=10001", "order=up", "x=1"):
        assert store.http.get(f"/files?{query}").json()["error"]["param"] == query.partition("=")[0]


def test_a_deleted_file_is_gone_at_once_with_its_content(store):
    made = upload(store, b"x" * 400 * KIB)
    assert store.counts() == (1, 3)
    deleted = store.client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    assert store.counts() == (0, 0)
    for call in (store.client.files.retrieve, store.client.files.content, store.client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert list(store.client.files.list()) == []


@pytest.mark.parametrize("path", ["/files/file_x", "/files/file_x/content", "/files/file%00x"])
def test_an_unknown_file_is_not_found(store, path):
    reply = store.http.get(path)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "id")


def test_a_tenant_has_so_many_bytes(store):
    kept = [upload(store, b"x" * FILE_BYTES_MAX) for _ in range(3)]
    with pytest.raises(openai.BadRequestError, match="REPRISE_FILES_TENANT_BYTES_MAX") as refused:
        upload(store, b"x")
    assert (refused.value.code, refused.value.param) == ("storage_limit_exceeded", "file")
    assert store.counts()[0] == 3
    store.client.files.delete(kept[0].id)
    upload(store, b"x")


def test_a_tenant_has_so_many_files(store):
    kept = [upload(store) for _ in range(FILES_MAX)]
    with pytest.raises(openai.BadRequestError, match="REPRISE_FILES_TENANT_MAX"):
        upload(store)
    assert store.counts() == (FILES_MAX, FILES_MAX)
    store.client.files.delete(kept[0].id)
    upload(store)


# -- Forms -------------------------------------------------------------------------------------------------------------------


def part(head: str, content: bytes = b"hello") -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"


FILE = part('name="file"; filename="a.txt"')
PURPOSE = part('name="purpose"', b"user_data")
END = b"--b--\r\n"


def send(store, body, content_type="multipart/form-data; boundary=b"):
    reply = store.http.post("/files", content=body, headers={"Content-Type": content_type})
    return reply.status_code, reply.json().get("error", reply.json())


@pytest.mark.parametrize("body", [FILE + PURPOSE + END, PURPOSE + FILE + END, b"\r\n" + PURPOSE + FILE + b"--b--"])
def test_the_fields_come_in_any_order(store, body):
    status, made = send(store, body)
    assert (status, made["bytes"], made["filename"]) == (200, 5, "a.txt")


def test_a_form_may_arrive_byte_by_byte(store):
    body = FILE + PURPOSE + END
    status, made = send(store, (body[at : at + 1] for at in range(len(body))))
    assert (status, made["bytes"]) == (200, 5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{}", None),
        (FILE + PURPOSE, None),
        (b"x" * 1000, None),
        (b"--b\r\nContent-Disposition: attachment\r\n\r\nx\r\n" + END, None),
        (b"--b\r\n" + b"X-A: b\r\n" * 100 + b"\r\nx\r\n" + END, None),
        (b"--b\r\nX-A: " + b"b" * 10_000 + b"\r\n\r\nx\r\n" + END, None),
        (b"--b\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n" + END, None),
        (PURPOSE + END, "file"),
        (FILE + END, "purpose"),
        (PURPOSE + FILE + FILE + END, "file"),
        (PURPOSE + part('name="file"') + END, "file"),
        (PURPOSE + part('name="file"; filename=""') + END, "file"),
        (PURPOSE + part('name="file"; filename="a.txt"', b"") + END, "file"),
        (PURPOSE + part('name="file"; filename="a\0.txt"') + END, "file"),
        (PURPOSE + part('name="file"; filename="a%0D%0Ab: c"') + END, "file"),
        (PURPOSE + part(f'name="file"; filename="{"n" * 256}"') + END, "file"),
        (part('name="purpose"', b"fine-tune") + FILE + END, "purpose"),
        (part('name="purpose"', b"p" * 100_000) + FILE + END, "purpose"),
        (part('name="expires_after[seconds]"', b"3600") + FILE + END, "expires_after"),
        (part('name="other"') + FILE + END, "other"),
        (FILE + part('name="purpose"', b"batch") + END, "purpose"),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(store, body, param):
    status, error = send(store, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert store.counts() == (0, 0)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 201}"]
)
def test_a_body_without_a_boundary_is_refused(store, content_type):
    status, error = send(store, PURPOSE + FILE + END, content_type)
    assert (status, error["message"]) == (400, "The body must be multipart/form-data, with a boundary.")


def test_what_surrounds_a_file_is_bounded(store):
    status, error = send(store, (b"x" * 64 * KIB for _ in range(18)))
    assert (status, error["code"]) == (413, "request_too_large")


def test_an_upload_that_breaks_off_leaves_nothing(store):
    url = urlsplit(store.url)
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 900000\r\n\r\n" + PURPOSE + FILE[:-7] + b"x" * 500 * KIB
        )
        until(lambda: store.counts() == (1, 2))
        assert list(store.client.files.list()) == []  # it is no file yet
    until(lambda: store.counts() == (0, 0))


@pytest.mark.parametrize(("hours", "left"), [(0, 2), (2, 1)])
def test_what_a_dead_process_left_of_an_upload_is_deleted_with_a_later_one(store, hours, left):
    store.sql(
        "insert into files (tenant_id, id, created_at, filename, bytes, written_at) "
        f"values ('t', 'file_1', 0, 'a.txt', 1, now() - interval '{hours} hours')",
        "insert into file_pieces (tenant_id, file_id, number, data) values ('t', 'file_1', 0, 'x')",
    )
    upload(store)
    assert store.counts() == (left, left)
    store.sql("delete from files where tenant_id = 't'")


# -- By their ids in what the model gets -------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + bytes(200 * KIB)
PDF = b"%PDF-1.7\n" + bytes(10)


def data_url(type_: str, content: bytes) -> str:
    return f"data:{type_};base64,{base64.b64encode(content).decode()}"


def image(file_id: str) -> dict[str, Any]:
    return {"type": "input_image", "file_id": file_id, "detail": "high"}


def of_user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_an_image_reaches_the_model_in_every_turn_and_its_item_keeps_the_id(store, upstream, said):
    file = upload(store, PNG, "pixel", "vision")
    first = store.client.responses.create(model="m", input=[of_user(image(file.id), "What is it?")])
    store.client.responses.create(model="m", input=said, previous_response_id=first.id)
    [record] = upstream.asked(said)
    seen = {"type": "image_url", "image_url": {"url": data_url("image/png", PNG), "detail": "high"}}
    assert record.body["messages"][0] == {"role": "user", "content": [seen, {"type": "text", "text": "What is it?"}]}
    [item] = store.client.responses.input_items.list(first.id)
    assert (item.content[0].file_id, item.content[0].image_url) == (file.id, None)


def test_an_output_of_a_function_may_hold_an_image(store, upstream, said):
    file = upload(store, PNG, "pixel.png", "vision")
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [image(file.id)]}
    store.client.responses.create(model="m", input=[of_user("Look."), call, output, of_user(said)])
    [record] = upstream.asked(said)
    assert record.body["messages"][3]["content"][1]["image_url"]["url"] == data_url("image/png", PNG)


@pytest.mark.parametrize("background", [False, True])
def test_an_image_of_a_conversation_is_looked_up_when_it_is_used(store, upstream, said, background):
    file = upload(store, PNG, "pixel.png", "vision")
    conversation = store.client.conversations.create(items=[of_user(image(file.id), "Keep this.")])
    made = store.client.responses.create(model="m", input=said, conversation=conversation.id, background=background)
    until(lambda: store.client.responses.retrieve(made.id).status == "completed")
    [record] = upstream.asked(said)
    assert record.body["messages"][0]["content"][0]["image_url"]["url"] == data_url("image/png", PNG)
    tokens = store.client.responses.input_tokens.count(model="m", input=f"{said} count", conversation=conversation.id)
    assert tokens.input_tokens > 0
    counted = upstream.asked(f"{said} count")[0]
    assert counted.body["messages"][0] == record.body["messages"][0]


def test_a_compaction_keeps_the_reference(store, upstream, said):
    file = upload(store, PNG, "pixel.png", "vision")
    given = [of_user("Hi"), {"role": "assistant", "content": "Hello"}, of_user(image(file.id), "Look.")]
    window = store.http.post("/responses/compact", json={"model": "m", "input": given}).json()["output"]
    store.client.responses.create(model="m", input=[*window, of_user(said)])
    [record] = upstream.asked(said)
    urls = [p["image_url"]["url"] for m in record.body["messages"] for p in m["content"] if "image_url" in p]
    assert urls
    assert set(urls) == {data_url("image/png", PNG)}


@pytest.mark.parametrize("path", ["/responses", "/responses/input_tokens", "/responses/compact"])
def test_a_reference_to_no_file_names_its_path(store, path):
    file = upload(store, PNG, "pixel.png", "vision")
    given = [of_user("Hi"), of_user(image(file.id), image("file_x"))]
    reply = store.http.post(path, json={"model": "m", "input": given})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "file_not_found")
    assert (error["param"], error["message"]) == ("input[1].content[1].file_id", "File with id 'file_x' not found.")


def test_what_is_no_image_is_not_sent_as_one(store):
    file = upload(store, PDF, "plan.png")
    reply = store.http.post("/responses", json={"model": "m", "input": [of_user(image(file.id))]})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "unsupported_image_media_type")
    assert error["param"] == "input[0].content[0].file_id"


def test_files_count_as_a_part_of_the_context(store):
    ids = [upload(store, PNG + bytes([n]) * 200 * KIB, "pixel.png", "vision").id for n in range(5)]
    first = store.client.responses.create(model="m", input=[of_user(*map(image, ids[:3]), "Look.")])
    reply = store.http.post(
        "/responses",
        json={"model": "m", "input": [of_user(*map(image, ids[3:]), "More.")], "previous_response_id": first.id},
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_file_counts_each_time_that_the_context_refers_to_it(store):
    look = image(upload(store, PNG, "pixel.png", "vision").id)
    first = store.client.responses.create(model="m", input=[of_user(*[look] * 4, "Look.")])
    for given, more in (([look] * 8, {}), ([look] * 4, {"previous_response_id": first.id})):
        reply = store.http.post("/responses", json={"model": "m", "input": [of_user(*given, "More.")], **more})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_context_refers_to_so_many_files(store):
    given = [of_user(*(image(f"file_{n}") for n in range(6)))]
    reply = store.http.post("/responses", json={"model": "m", "input": given})
    assert (reply.status_code, "more than 5" in reply.json()["error"]["message"]) == (400, True)
