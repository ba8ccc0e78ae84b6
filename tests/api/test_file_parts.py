"""Images, files and sounds in requests: by data, address and id, in the form that each upstream takes, or refused by their path."""

import base64
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import openai
import pytest

from tests.documents import archive, docx, paragraph, pdf, pptx, xlsx
from tests.servers import Served
from tests.waiting import until

KIB = 1024
PLAN = pdf("The first page", "The second")
PLAN_TEXT = "[Page 1]\nThe first page\n\n[Page 2]\nThe second"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
WAV = b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)
MP3 = b"ID3\x04" + bytes(40)
BINARY = bytes(range(256))

CATALOG = """
default = "plain"

[upstreams.plain]
base_url = "{url}"
dialect = "plain"

[upstreams.hosted]
base_url = "{url}"
dialect = "openai"

[upstreams.inline]
base_url = "{url}"
dialect = "ollama"

[upstreams.none]
base_url = "{url}"
dialect = {{ files = "none" }}

[[models]]
name = "texts"
routes = [{{ upstream = "plain", lacks = ["images", "audio"] }}]
"""

SERVED = {
    "/plan.pdf": PLAN,
    "/pixel.png": PNG,
    "/tone.wav": WAV,
    "/large.bin": bytes(300 * KIB),
    "/empty": b"",
    "/half.bin": bytes(200 * KIB),
    "/table.csv": b"a,b",
}


class Web:
    """A web server of files; those in `gone` are not there any more. It has a type for those in `types`."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.types: dict[str, str] = {}
        self.asked: list[str] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                web.asked.append(self.path)
                if path == "/redirect":
                    self.send_response(302)
                    self.send_header("Location", "http://10.255.255.1/plan.pdf")
                    self.end_headers()
                    return
                if path == "/endless":
                    self.send_response(302)
                    self.send_header("Location", "/plan.pdf")
                    self.send_header("Content-Length", "1000000000")
                    self.end_headers()
                    self.rfile.read(1)  # until the client closes the connection
                    return
                content = None if path in web.gone else SERVED.get(path)
                self.send_response(404 if content is None else 200)
                if path in web.types:
                    self.send_header("Content-Type", web.types[path])
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    made = Web()
    threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def served(
    base_env: Mapping[str, str], new_database: Callable[[], str], upstream, tmp_path_factory
) -> Iterator[Served]:
    catalog = tmp_path_factory.mktemp("parts") / "catalog.toml"
    catalog.write_text(CATALOG.format(url=upstream.base_url))
    limits = {
        "REPRISE_CONTEXT_BYTES_MAX": f"{2048 * KIB}",
        "REPRISE_FILE_FETCH_BYTES_MAX": f"{256 * KIB}",
        "REPRISE_CONTEXT_FETCHED_FILES_MAX": "2",
        "REPRISE_FILE_TEXT_BYTES_MAX": f"{64 * KIB}",
    }
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog), **limits}
    with Served(env) as running:
        yield running


@pytest.fixture(scope="module")
def api(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def data_url(type_: str, content: bytes) -> str:
    return f"data:{type_};base64,{encoded(content)}"


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def of_user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": p} if isinstance(p, str) else p for p in parts]}


def file_of(content: bytes, name: str = "plan.pdf", type_: str = "application/pdf") -> dict[str, Any]:
    return {"type": "input_file", "file_data": data_url(type_, content), "filename": name}


def extracted(name: str, what: str, text: str) -> dict[str, Any]:
    shown = f'Extracted text of the file "{name}" ({what}):\n\n{text}\n\n(End of the file "{name}".)'
    return {"type": "text", "text": shown}


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def upload(api: openai.OpenAI, content: bytes, name: str) -> str:
    return api.files.create(file=(name, content), purpose="user_data").id


def by(source: str, api: openai.OpenAI, web: Web, kind: str, content: bytes, name: str) -> dict[str, Any]:
    """A part of this kind with the content by data, address or id."""
    if source == "id":
        return {"type": f"input_{kind}", "file_id": upload(api, content, name)}
    if source == "address":
        return {"type": f"input_{kind}", f"{kind}_url": f"{web.url}/{name}?signature=s"}
    given = {
        "file": lambda: {"file_data": data_url("application/pdf", content), "filename": name},
        "image": lambda: {"image_url": data_url("image/png", content)},
        "audio": lambda: {"input_audio": {"data": encoded(content), "format": "wav"}},
    }
    return {"type": f"input_{kind}", **given[kind]()}


SOURCES = ("data", "address", "id")


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_is_a_file_or_its_text(api, web, upstream, said, source):
    part = by(source, api, web, "file", PLAN, "plan.pdf")
    for model in ("m", "hosted@m"):
        api.responses.create(model=model, input=[of_user(part, "Read."), of_user(said)])
    text, native = [record.body["messages"][0]["content"][0] for record in upstream.asked(said)]
    assert text == extracted("plan.pdf", "PDF, 2 pages", PLAN_TEXT)
    assert native == {"type": "file", "file": {"file_data": data_url("application/pdf", PLAN), "filename": "plan.pdf"}}


@pytest.mark.parametrize(
    ("name", "content", "what", "text"),
    [
        ("a.docx", docx(paragraph("Dear Ada")), "Word document", "Dear Ada"),
        ("a.xlsx", xlsx('<row><c t="s"><v>0</v></c></row>', ["sum"]), "spreadsheet, 1 sheet", "[Sheet Sums]\nsum"),
        ("a.pptx", pptx("Hi", "Bye"), "presentation, 2 slides", "[Slide 1]\nHi\n\n[Slide 2]\nBye"),
        ("a.md", "# Überschrift".encode(), "plain text", "# Überschrift"),
    ],
)
def test_office_files_and_texts_become_text(api, upstream, said, name, content, what, text):
    api.responses.create(
        model="m", input=[of_user(file_of(content, name, "application/octet-stream"), "Read."), of_user(said)]
    )
    [record] = upstream.asked(said)
    assert record.body["messages"][0]["content"][0] == extracted(name, what, text)


def test_a_chain_and_a_background_run_have_the_text_again(api, upstream, said):
    part = {"type": "input_file", "file_id": upload(api, PLAN, "plan.pdf"), "filename": "b.pdf"}
    first = api.responses.create(model="m", input=[of_user(part, "Read.")], background=True)
    until(lambda: api.responses.retrieve(first.id).status == "completed")
    api.responses.create(model="m", input=said, previous_response_id=first.id)
    [record] = upstream.asked(said)
    assert record.body["messages"][0]["content"][0] == extracted("b.pdf", "PDF, 2 pages", PLAN_TEXT)


def test_a_queued_run_fails_if_its_file_is_deleted_or_not_read_in_time(new_server, upstream, said):
    queueing = new_server(REPRISE_WORKERS_IN_API="false")
    with queueing.client() as client:
        ids = [upload(client, PLAN, name) for name in ("deleted.pdf", "slow.pdf")]
        parts = [{"type": "input_file", "file_id": id} for id in ids]
        inputs = [[of_user(part, "Read."), of_user(said)] for part in parts]
        queued = [client.responses.create(model="m", input=given, background=True) for given in inputs]
        client.files.delete(ids[0])
        new_server(DATABASE_URL=queueing.database_url, REPRISE_FILE_TEXT_CPU_S="0.001")  # ten times that for the child
        until(lambda: all(client.responses.retrieve(one.id).status == "failed" for one in queued))
        errors = [client.responses.retrieve(one.id).error for one in queued]
    assert [(error.code, error.message) for error in errors] == [
        ("file_not_found", f"File with id '{ids[0]}' not found."),
        ("rate_limit_exceeded", "A file could not be read in time; please try again."),
    ]
    assert upstream.asked(said) == []


def test_an_output_of_a_function_has_texts_and_images(api, upstream, said):
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    image = {"type": "input_image", "file_id": upload(api, PNG, "pixel.png")}
    output = {"type": "function_call_output", "call_id": "c", "output": [file_of(PLAN), image]}
    api.responses.create(model="m", input=[of_user("Look."), call, output, of_user(said)])
    [record] = upstream.asked(said)
    assert PLAN_TEXT in record.body["messages"][2]["content"]
    assert record.body["messages"][3]["content"][1]["image_url"]["url"] == data_url("image/png", PNG)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_file_that_is_an_image_or_a_sound_is_sent_as_one(api, upstream, said, kind):
    content, type_ = {"image": (PNG, "image/png"), "audio": (MP3, "audio/mpeg")}[kind]
    by_id = {"type": "input_file", "file_id": upload(api, content, "a.bin")}
    api.responses.create(model="hosted@m", input=[of_user(by_id, file_of(content, "a.bin", type_), said)])
    [record] = upstream.asked(said)
    seen = {"type": "image_url", "image_url": {"url": data_url("image/png", PNG)}}
    heard = {"type": "input_audio", "input_audio": {"data": encoded(MP3), "format": "mp3"}}
    assert record.body["messages"][0]["content"][:2] == [seen if kind == "image" else heard] * 2


@pytest.mark.parametrize("source", SOURCES)
def test_a_sound_reaches_the_model(api, web, upstream, said, source):
    made = api.responses.create(model="m", input=[of_user(by(source, api, web, "audio", WAV, "tone.wav"), said)])
    [record] = upstream.asked(said)
    assert record.body["messages"][0]["content"][0] == {
        "type": "input_audio",
        "input_audio": {"data": encoded(WAV), "format": "wav"},
    }
    [item] = api.responses.input_items.list(made.id)
    assert (item.content[0].type, "data" in str(item.content[0])) == ("input_audio", source == "data")


def test_an_image_by_its_address_is_fetched_for_upstreams_that_do_not(api, web, upstream, said):
    part = {"type": "input_image", "image_url": f"{web.url}/pixel.png"}
    for model in ("m", "inline@m"):
        api.responses.create(model=model, input=[of_user(part, said)])
    urls = [record.body["messages"][0]["content"][0]["image_url"]["url"] for record in upstream.asked(said)]
    assert urls == [f"{web.url}/pixel.png", data_url("image/png", PNG)]


@pytest.mark.parametrize(
    ("given", "sent"),
    [("Text/CSV; charset=utf-8", "text/csv"), ("text/csv,hello", "application/octet-stream")],
)
def test_the_type_of_a_fetched_file_is_sent_if_it_is_one(api, web, upstream, said, given, sent):
    web.types["/table.csv"] = given
    part = {"type": "input_file", "file_url": f"{web.url}/table.csv"}
    api.responses.create(model="hosted@m", input=[of_user(part, said)])
    [record] = upstream.asked(said)
    assert record.body["messages"][0]["content"][0]["file"]["file_data"] == data_url(sent, b"a,b")


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "FILE:/etc/passwd", "/etc/passwd", "ftp://10.0.0.1/a.png", "http:a"]
)
def test_the_path_of_an_upstream_s_own_file_does_not_reach_it(served, api, upstream, said, address):
    part = {"type": "input_image", "image_url": address}
    reply = httpx.post(f"{served.url}/responses", json={"model": "m", "input": [of_user(said, part)]}, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "invalid_image_url")
    assert error["param"] == "input[0].content[1].image_url"
    kept = api.conversations.create(items=[of_user(part, "Look.")])
    api.responses.create(model="m", input=said, conversation=kept.id)
    [record] = upstream.asked(said)
    assert address not in str(record.body["messages"][0])
    assert "not available any more" in text_of(record.body["messages"][0])


def test_a_screenshot_by_its_id_reaches_the_model(api, upstream, said):
    call = {
        "type": "computer_call",
        "id": "cu_1",
        "call_id": "c",
        "actions": [{"type": "screenshot"}],
        "status": "completed",
        "pending_safety_checks": [],
    }
    output = {"type": "computer_screenshot", "file_id": upload(api, PNG, "screen.png")}
    answer = {"type": "computer_call_output", "call_id": "c", "output": output}
    api.responses.create(model="m", input=[of_user("Look."), call, answer, of_user(said)], tools=[{"type": "computer"}])
    [record] = upstream.asked(said)
    assert record.body["messages"][3]["content"][1]["image_url"]["url"] == data_url("image/png", PNG)


# -- Refused, before anything starts -----------------------------------------------------------------------------------------

IMAGE = {"type": "input_image", "image_url": data_url("image/png", PNG)}
SOUND = {"type": "input_audio", "input_audio": {"data": encoded(WAV), "format": "wav"}}
UNSUPPORTED, UNREADABLE = "unsupported_parameter", "unsupported_file"


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"background": True}], ids=["json", "stream", "background"])
@pytest.mark.parametrize(
    ("model", "part", "key", "code"),
    [
        ("texts", IMAGE, "image_url", UNSUPPORTED),
        ("texts", SOUND, "input_audio", UNSUPPORTED),
        ("texts", file_of(PNG, "a.png", "image/png"), "file_data", UNSUPPORTED),
        ("none@m", file_of(PLAN), "file_data", UNSUPPORTED),
        ("m", file_of(BINARY, "a.exe"), "file_data", UNREADABLE),
        ("m", file_of(archive({"a": "b"}), "a.zip"), "file_data", UNREADABLE),
        ("m", file_of(pdf(""), "scan.pdf"), "file_data", UNREADABLE),
        ("m", file_of(b"a" * 65 * KIB, "long.txt"), "file_data", UNREADABLE),
        ("m", {"type": "input_file", "file_data": "no base64!", "filename": "a.pdf"}, "file_data", "invalid_value"),
        ("m", {"type": "input_audio"}, "input_audio", UNSUPPORTED),
    ],
)
def test_what_the_model_takes_in_no_form_is_refused_by_its_path(served, upstream, said, model, part, key, code, more):
    body = {"model": model, "input": [of_user("Hi"), of_user(said, part)], **more}
    reply = httpx.post(f"{served.url}/responses", json=body, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, code, f"input[1].content[1].{key}")
    assert upstream.asked(said) == []


@pytest.mark.parametrize("more", [{}, {"background": True}], ids=["json", "background"])
@pytest.mark.parametrize(
    ("part", "key", "given"),
    [
        ({**IMAGE, "file_id": "file_x"}, "image_url", "'image_url' or 'file_id'"),
        ({**file_of(PLAN), "file_id": "file_x"}, "file_data", "'file_data' or 'file_id'"),
        ({**file_of(PLAN), "file_url": "http://a.example/"}, "file_data", "'file_data' or 'file_url'"),
        ({**SOUND, "audio_url": "http://a.example/"}, "input_audio", "'input_audio' or 'audio_url'"),
    ],
)
def test_of_two_contents_of_one_part_none_is_dropped(served, upstream, said, part, key, given, more):
    body = {"model": "m", "input": [of_user(said, part)], **more}
    error = httpx.post(f"{served.url}/responses", json=body, timeout=30).json()["error"]
    assert (error["code"], error["param"]) == ("mutually_exclusive_parameters", f"input[0].content[1].{key}")
    assert error["message"] == f"Mutually exclusive parameters: give {given}, not both."
    assert upstream.asked(said) == []


def test_a_content_beside_nulls_is_one(api, said):
    parts = ({**IMAGE, "file_id": None}, {**file_of(PLAN), "file_url": None, "file_id": None})
    assert api.responses.create(model="m", input=[of_user(said, *parts)]).status == "completed"


def test_of_two_contents_of_a_part_of_a_chat_none_is_dropped(http):
    file = {"file_data": data_url("text/plain", b"hello"), "filename": "a.txt", "file_id": "file_x"}
    message = {"role": "user", "content": [{"type": "file", "file": file}]}
    error = http.post("/chat/completions", json={"model": "m", "messages": [message]}).json()["error"]
    assert (error["code"], error["param"]) == (
        "mutually_exclusive_parameters",
        "messages[0].content[0].file.file_data",
    )


def test_texts_that_are_too_long_together_are_refused(served):
    parts = [file_of(bytes([65 + n]) * 40 * KIB, "a.txt") for n in range(2)]
    reply = httpx.post(f"{served.url}/responses", json={"model": "m", "input": [of_user(*parts)]})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "input[0].content[1].file_data"


@pytest.mark.parametrize("source", SOURCES)
def test_a_text_counts_each_time_that_the_context_refers_to_its_file(served, api, web, source):
    part = by(source, api, web, "file", PLAN, "plan.pdf")
    for times, status in ((10, 200), (64 * KIB // len(PLAN_TEXT) + 1, 400)):
        reply = httpx.post(
            f"{served.url}/responses", json={"model": "m", "input": [of_user(*[part] * times)]}, timeout=30
        )
        assert reply.status_code == status
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_what_is_fetched_once_counts_each_time_that_it_is_sent(served, web, upstream, said):
    part = {"type": "input_file", "file_url": f"{web.url}/half.bin"}
    for times, status in ((4, 200), (8, 400)):
        body = {"model": "hosted@m", "input": [of_user(*[part] * times, said)]}
        reply = httpx.post(f"{served.url}/responses", json=body, timeout=30)
        assert reply.status_code == status
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert len(upstream.asked(said)) == 1


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("{web}/nothing.pdf", "status 404"),
        ("{web}/large.bin", "more than"),
        ("{web}/empty", "empty"),
        ("{web}/redirect", "not on the public internet"),
        ("http://10.255.255.1/plan.pdf", "not on the public internet"),
        ("http://user:pass@127.0.0.1/plan.pdf", "user name or password"),
        ("file:///etc/passwd", "http"),
        ("http://[", "failed"),
        ("plan.pdf", "http"),
    ],
)
def test_what_can_t_be_fetched_is_refused_by_its_path(served, web, address, why):
    part = {"type": "input_file", "file_url": address.format(web=web.url)}
    reply = httpx.post(f"{served.url}/responses", json={"model": "m", "input": [of_user(part)]}, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "file_not_fetched")
    assert error["param"] == "input[0].content[0].file_url"
    assert why in error["message"]
    assert "pass" not in error["message"].replace("password", "")


def test_files_of_addresses_that_are_too_large_together_are_refused_with_the_limit(served, web):
    parts = [{"type": "input_file", "file_url": f"{web.url}/half.bin?{n}"} for n in range(2)]
    reply = httpx.post(f"{served.url}/responses", json={"model": "hosted@m", "input": [of_user(*parts)]}, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "file_not_fetched")
    assert error["param"] == "input[0].content[1].file_url"
    assert f"more than {256 * KIB} bytes" in error["message"]


def test_addresses_that_are_too_many_are_refused_or_left_out(api, web, upstream, said):
    def part(name: str) -> dict[str, Any]:
        return {"type": "input_file", "file_url": f"{web.url}/plan.pdf?{said}{name}", "filename": f"{name}.pdf"}

    def fetched() -> list[str]:
        return [path.partition(said)[2] for path in web.asked if said in path]

    with pytest.raises(openai.BadRequestError, match="more than 2") as refused:
        api.responses.create(model="m", input=[of_user("Hi", part("a")), of_user(part("b"), part("c"))])
    assert (refused.value.code, refused.value.param) == ("invalid_value", "input[1].content[1].file_url")
    assert fetched() == []
    first = api.responses.create(model="m", input=[of_user(part("a"), part("b"), "Read.")])
    web.asked.clear()
    reply = api.responses.with_raw_response.create(
        model="m", input=[of_user(part("c"), "And."), of_user(said)], previous_response_id=first.id
    )
    assert sorted(fetched()) == ["b", "c"]
    assert reply.headers["x-reprise-left-out-files"] == f"{web.url}/plan.pdf"
    [record] = upstream.asked(said)
    assert '"a.pdf", which was attached here, is not' in text_of(record.body["messages"][0])


def test_the_body_of_a_redirect_is_not_read(api, web, upstream, said):
    part = {"type": "input_file", "file_url": f"{web.url}/endless"}
    api.responses.create(model="m", input=[of_user(part, "Read."), of_user(said)])
    [record] = upstream.asked(said)
    assert PLAN_TEXT in record.body["messages"][0]["content"][0]["text"]


# -- Files that are gone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["response", "conversation"])
def test_a_chain_continues_without_a_file_that_is_deleted_and_says_so(api, upstream, said, kind):
    file_id = upload(api, PNG, "pixel.png")
    image = {"type": "input_image", "file_id": file_id}
    conversation = {"conversation": api.conversations.create().id} if kind == "conversation" else {}
    first = api.responses.create(model="m", input=[of_user(image, "Look.")], **conversation)
    api.files.delete(file_id)
    later = conversation or {"previous_response_id": first.id}
    reply = api.responses.with_raw_response.create(model="m", input=said, **later)
    assert reply.headers["x-reprise-left-out-files"] == file_id
    [record] = upstream.asked(said)
    note = f'(The file "{file_id}", which was attached here, is not available any more.)'
    assert text_of(record.body["messages"][0]) == f"{note}\nLook."
    with pytest.raises(openai.BadRequestError) as refused:
        api.responses.create(model="m", input=[of_user(image)], **later)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "input[0].content[0].file_id")


def test_a_chain_continues_without_what_is_gone_from_its_address(api, web, upstream, said):
    part = {"type": "input_file", "file_url": f"{web.url}/plan.pdf?secret=s"}
    first = api.responses.create(model="m", input=[of_user(part, "Read.")])
    web.gone.add("/plan.pdf")
    reply = api.responses.with_raw_response.create(model="m", input=said, previous_response_id=first.id)
    web.gone.clear()
    assert reply.headers["x-reprise-left-out-files"] == f"{web.url}/plan.pdf"
    [record] = upstream.asked(said)
    assert '"plan.pdf", which was attached here,' in text_of(record.body["messages"][0])
