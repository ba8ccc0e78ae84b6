"""Files by their addresses: servers that take their time."""

import socket
from typing import Any

import pytest

from app.domain.dialect import Dialect
from app.domain.files import Gone, Place, Wanted
from app.outbound.extraction import Extraction
from app.outbound.guard import Guard
from app.runs.files import FileReading, Found
from app.settings import Settings, parse_allowed
from app.wire.items import InputFile


async def test_the_files_of_a_context_share_the_time_for_fetching():
    nothing: Any = None
    settings = Settings(file_fetch_timeout_s=0.5)
    reading = FileReading(settings, nothing, Guard(parse_allowed("127.0.0.1")), Extraction(settings))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{number}" for number in range(4)]
        wanted = {
            url: Wanted("url", Place(InputFile(file_url=url), "input", is_new=False), is_file=True) for url in urls
        }
        found = Found({}, fetched_bytes_max=1024, text_bytes_max=1024, bytes=2048)
        read = await reading.read("t", wanted, found, [Dialect()], wait_s=None)
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert read == dict.fromkeys(urls, Gone())
