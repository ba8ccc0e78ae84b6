"""Files by their addresses: how many, of which types, and servers that take their time."""

import socket
from typing import Any

import pytest

from app.domain.dialect import Dialect
from app.domain.files import Gone, Needs, Place, Wanted, media_type, unfetched, wanted
from app.errors import InvalidParameter, InvalidRequest
from app.outbound.extraction import Extraction
from app.outbound.guard import Guard
from app.runs.files import FileReading, Found
from app.settings import Settings, parse_allowed
from app.wire.items import InputFile, InputImage


async def test_the_files_of_a_context_share_the_time_for_fetching_and_the_request_s_own_have_it_first():
    nothing: Any = None
    settings = Settings(file_fetch_timeout_s=0.5)
    reading = FileReading(settings, nothing, Guard(parse_allowed("127.0.0.1")), Extraction(settings))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{number}" for number in range(4)]
        silence = {
            url: Wanted("url", Place(InputFile(file_url=url), "input", is_new=False), is_file=True) for url in urls
        }
        found = Found({}, fetched_bytes_max=1024, text_bytes_max=1024, bytes=2048)
        read = await reading.read("t", silence, found, [Dialect()], wait_s=None)
        with socket.socket() as closed, pytest.raises(InvalidRequest, match="connection failed"):
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/own"
            own = Wanted("url", Place(InputFile(file_url=url), "input[0].content[0]", is_new=True), is_file=True)
            await reading.read("t", {**silence, url: own}, found, [Dialect()], wait_s=None)
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert read == dict.fromkeys(urls, Gone())


NEEDS = Needs(texts=False, data=False, images=True)


def image(address: str, path: str = "") -> Place:
    return Place(InputImage(image_url=address), path or "input", is_new=bool(path))


def test_the_newest_addresses_are_fetched_and_the_request_s_own_first():
    found = [image("a"), image("b"), image("c"), image("a", "input[0].output")]
    assert unfetched(wanted(found, NEEDS), 3) == frozenset()
    assert unfetched(wanted(found, NEEDS), 2) == {"b"}
    assert unfetched(wanted(found, NEEDS), 1) == {"b", "c"}


def test_the_first_address_of_a_request_that_is_too_many_is_named():
    found = [image("b"), *(image(address, f"input[{n}].output") for n, address in enumerate("acab"))]
    assert unfetched(wanted(found, NEEDS), 3) == frozenset()
    with pytest.raises(InvalidParameter, match="3 files that have to be fetched; more than 2") as refused:
        unfetched(wanted(found, NEEDS), 2)
    assert refused.value.param == "input[3].output.image_url"


@pytest.mark.parametrize(
    ("given", "is_type"),
    [
        ("text/csv", True),
        ("application/vnd.oasis.opendocument.text", True),
        ("image/svg+xml", True),
        ("a/" + "b" * 127, True),
        ("a/" + "b" * 128, False),
        ("text/plain,hello", False),
        ("text/plain\n", False),
        ("text", False),
        ("a/b/c", False),
        ('a/"b', False),
        (None, False),
    ],
)
def test_a_type_that_is_none_does_not_count(given, is_type):
    assert media_type(b"a,b", given) == (given if is_type else "application/octet-stream")
    assert media_type(b"%PDF-1.4", given) == "application/pdf"
