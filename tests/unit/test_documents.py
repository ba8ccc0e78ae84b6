"""PDFs and office files → their text; what is damaged or hostile; what a process remembers, and whose turn it is."""

import asyncio
import base64
from typing import Any

import pytest

from app.documents import Unreadable, read
from app.domain.dialect import Dialect
from app.domain.files import FileText, Place, Wanted
from app.errors import InvalidRequest
from app.outbound import extraction
from app.outbound.extraction import CpuTime, Extraction
from app.runs.files import FileReading, Found
from app.settings import Settings
from app.wire.items import InputFile
from tests.documents import ENCRYPTED, archive, docx, paragraph, pdf, pptx, xlsx

MIB = 1024 * 1024

TABLE = f"<w:tbl><w:tr><w:tc>{paragraph('a')}</w:tc><w:tc>{paragraph('b')}</w:tc></w:tr></w:tbl>"
TABS = (
    "<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>x</w:t><w:tab/><w:t>y</w:t><w:br/><w:t>z</w:t></w:r></w:p>"
)
TWICE = "<w:p><Choice><w:r><w:t>once</w:t></w:r></Choice><Fallback><w:r><w:t>once</w:t></w:r></Fallback></w:p>"
DATES = (
    '<numFmts><numFmt numFmtId="164" formatCode="dd/mm/yyyy"/><numFmt numFmtId="165" formatCode="0.00 &quot;days&quot;"/></numFmts>'
    '<cellStyleXfs><xf numFmtId="14"/></cellStyleXfs>'
    '<cellXfs><xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="20"/></cellXfs>'
)


@pytest.mark.parametrize(
    ("content", "kind", "pages", "text"),
    [
        (pdf("One", "Two"), "PDF", 2, "[Page 1]\nOne\n\n[Page 2]\nTwo"),
        (docx(paragraph("Hello ", "world") + TABLE), "Word document", 0, "Hello world\na \tb"),
        (docx(TABS + TWICE), "Word document", 0, "x\ty\nz\nonce"),
        (
            docx(paragraph("a"), **{"word/footnotes.xml": "<f><p><r><t>note</t></r></p></f>"}),
            "Word document",
            0,
            "a\n\n[Footnotes]\nnote",
        ),
        (pptx("First", "Second"), "presentation", 2, "[Slide 1]\nFirst\n\n[Slide 2]\nSecond"),
        (
            xlsx(
                '<row><c r="A1" t="s"><v>0</v></c><c r="C1"><v>4.5</v></c><c t="b"><v>1</v></c></row><row/>'
                '<row><c r="B3" t="inlineStr"><is><r><t>in</t></r><rPh><t>no</t></rPh></is></c></row>',
                ["sum"],
            ),
            "spreadsheet",
            1,
            "[Sheet Sums]\nsum\t\t4.5\tTRUE\n\tin",
        ),
        (
            xlsx(
                "<row>"
                + "".join(f'<c s="{s}"><v>45292.5</v></c>' for s in range(4))
                + '<c s="4"><v>0.25</v></c></row>',
                (),
                DATES,
            ),
            "spreadsheet",
            1,
            "[Sheet Sums]\n45292.5\t2024-01-01 12:00:00\t2024-01-01 12:00:00\t45292.5\t06:00:00",
        ),
    ],
)
def test_a_document_becomes_text(content, kind, pages, text):
    outcome, made = read(content, MIB)
    assert (outcome["kind"], outcome["pages"], made.decode()) == (kind, pages, text)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (pdf("One", extra=ENCRYPTED), "is encrypted"),
        (pdf(""), "has no text"),
        (pdf("a" * 2000), "more than 1000 bytes"),
        (docx(paragraph("é" * 600)), "more than 1000 bytes"),
        (docx(""), "has no text"),
        (archive({"a.txt": "hello"}), "is an archive"),
    ],
)
def test_a_document_without_text_says_why(content, fault):
    with pytest.raises(Unreadable, match=fault):
        read(content, 1000)


def test_a_document_type_definition_is_refused():
    bomb = '<!DOCTYPE a [<!ENTITY b "bbb">]><w:document xmlns:w="w"><w:p><w:t>&b;</w:t></w:p></w:document>'
    with pytest.raises(Exception, match="DTDForbidden"):
        read(archive({"word/document.xml": bomb}), 1000)


async def text_of(texts: Extraction, tenant: str, key: bytes, content: bytes, cpu_s: float = 20.0) -> FileText:
    return await texts.text((tenant, key), content, CpuTime(cpu_s), wait_s=None)


HOSTILE = Settings(file_text_cpu_s=2.0, file_text_memory_bytes_max=256 * MIB)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (lambda: docx(f"<w:p><w:r><w:t>{'a' * 200 * MIB}</w:t></w:r></w:p>"), "takes too much memory"),
        (lambda: docx(f"<w:p>{'<w:r/>' * 5 * MIB}</w:p>"), "takes too (much memory|long)"),
        (lambda: pdf("One")[:60], "is damaged"),
        (lambda: b"PK\x03\x04" + bytes(100), "is damaged"),
        (lambda: b"\0\1\2\3", "is of no type"),
    ],
)
async def test_a_hostile_file_has_an_outcome_and_is_not_read_twice(content, fault, monkeypatch):
    monkeypatch.setattr(extraction, "WALL_TIMES", 120)  # a busy machine may be slow to give it its CPU time
    made, texts = content(), Extraction(HOSTILE)
    with pytest.raises(extraction.Unreadable, match=fault):
        await text_of(texts, "t", b"1", made, HOSTILE.file_text_cpu_s)
    monkeypatch.setattr(extraction.sys, "executable", "/nowhere")
    with pytest.raises(extraction.Unreadable, match=fault):
        await text_of(texts, "t", b"1", made, HOSTILE.file_text_cpu_s)


async def test_many_short_texts_do_not_take_more_memory_than_they_may():
    texts = Extraction(Settings(file_texts_cached_bytes_max=64 * 1024))
    for number in range(200):
        await text_of(texts, "t", b"%d" % number, b"a")
    assert texts.known(("t", b"0")) is None
    assert texts.known(("t", b"199"))
    await text_of(texts, "t", b"wide", ("a" * 20_000 + "\N{ROCKET}").encode())
    assert texts.known(("t", b"wide")) is None  # it takes 80 kB


async def test_a_text_is_extracted_once_for_each_tenant(monkeypatch):
    texts = Extraction(Settings(file_texts_cached_bytes_max=1000))
    first = await text_of(texts, "t", b"1", pdf("One"))
    monkeypatch.setattr(extraction.sys, "executable", "/nowhere")
    assert await text_of(texts, "t", b"1", pdf("One")) is first
    with pytest.raises(FileNotFoundError):
        await text_of(texts, "other", b"1", pdf("One"))
    assert (await text_of(texts, "t", b"2", b"x" * 60)).text == "x" * 60
    assert texts.known(("t", b"1")) is None  # it made room


async def test_what_a_library_says_about_a_file_is_not_logged(capfd):
    assert (await text_of(Extraction(Settings()), "t", b"1", pdf("One", extra=b"/Private 1 /Private 2"))).pages == 1
    assert capfd.readouterr() == ("", "")


# -- Many files, and many tenants -------------------------------------------------------------------------------------------


async def test_the_files_of_a_context_share_the_cpu_time(monkeypatch):
    monkeypatch.setattr(extraction, "WALL_TIMES", 100_000)
    nothing: Any = None
    settings = Settings(file_text_cpu_s=0.001)
    reading = FileReading(settings, nothing, nothing, Extraction(settings))
    data = [base64.b64encode(pdf(f"File {n}")).decode() for n in range(3)]
    places = [Place(InputFile(file_data=one), f"input[0].content[{n}]", is_new=True) for n, one in enumerate(data)]
    wanted = {place.part.file_data: Wanted("data", place, is_file=True) for place in places}
    found = Found({}, fetched_bytes_max=0, text_bytes_max=4096, bytes=4096)
    for too_late in (1, 2):  # texts are remembered, so a request that is repeated gets further
        with pytest.raises(InvalidRequest, match=r"all files of a context have 0.001 seconds of CPU time") as refused:
            await reading.read("t", wanted, found, [Dialect()], wait_s=None)
        assert (refused.value.code, refused.value.param) == (
            "unsupported_file",
            f"input[0].content[{too_late}].file_data",
        )
    read = await reading.read("t", wanted, found, [Dialect()], wait_s=None)
    assert [file.text.text for file in read.values()] == [f"[Page 1]\nFile {n}" for n in range(3)]


READER = """#!/bin/sh
read -r line
case "$line" in *wait*) exec /bin/sleep 60;; esac
echo '{"cpu_s": 0, "kind": "PDF", "pages": 1, "unit": "page"}'
"""
"""Reads a file at once, or takes its time."""


@pytest.fixture
def reader(monkeypatch, tmp_path):
    made = tmp_path / "reader"
    made.write_text(READER)
    made.chmod(0o700)
    monkeypatch.setattr(extraction.sys, "executable", str(made))


@pytest.mark.usefixtures("reader")
async def test_one_tenant_does_not_hold_all_places():
    texts = Extraction(Settings(file_programs_max=2))
    held = [asyncio.create_task(text_of(texts, "a", b"%d" % n, b"%PDF-wait\n")) for n in range(3)]
    await asyncio.sleep(0)
    assert await texts.text(("b", b"0"), b"%PDF-\n", CpuTime(20.0), wait_s=5)
    for task in held:
        task.cancel()
    await asyncio.wait(held)


@pytest.mark.usefixtures("reader")
async def test_tenants_take_turns():
    texts, order = Extraction(Settings(file_programs_max=1)), []

    async def read(tenant: str, number: int) -> None:
        await text_of(texts, tenant, b"%d" % number, b"%PDF-\n")
        order.append((tenant, number))

    await asyncio.gather(*(read(tenant, number) for tenant, number in [("a", 1), ("a", 2), ("a", 3), ("b", 1)]))
    assert order == [("a", 1), ("b", 1), ("a", 2), ("a", 3)]
