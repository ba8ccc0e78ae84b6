"""Small PDFs and office files."""

import io
from collections.abc import Mapping, Sequence
from zipfile import ZIP_DEFLATED, ZipFile


def pdf(*pages: str, extra: bytes = b"") -> bytes:
    """A PDF with a line of text on each page; `extra` goes into its trailer."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode()]
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        page = (
            f"<< /Type /Page /Parent 2 0 R /Resources {font} /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R >>"
        )
        objects += [page.encode(), b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream)]
    made = bytearray(b"%PDF-1.4\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(made)
    made += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    made += b"".join(b"%010d 00000 n \n" % place for place in places)
    made += b"trailer\n<< /Size %d /Root 1 0 R %b >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, extra, start)
    return bytes(made)


ENCRYPTED = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%b> /U <%b> >> /ID [<00> <00>]" % (
    b"11" * 32,
    b"22" * 32,
)

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
A = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
R = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'


def archive(parts: Mapping[str, str | bytes]) -> bytes:
    """A ZIP archive."""
    made = io.BytesIO()
    with ZipFile(made, "w", ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return made.getvalue()


def relations(paths: Sequence[str]) -> str:
    """The parts that a part names, as r0, r1 and so on."""
    named = (f'<Relationship Id="r{n}" Target="{path}"/>' for n, path in enumerate(paths))
    return f"<R>{''.join(named)}</R>"


def docx(body: str, **parts: str) -> bytes:
    """A Word document with this XML as its body."""
    return archive({"word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>", **parts})


def paragraph(*runs: str) -> str:
    """A paragraph of a Word document."""
    return f"<w:p>{''.join(f'<w:r><w:t>{run}</w:t></w:r>' for run in runs)}</w:p>"


def xlsx(sheet: str, strings: Sequence[str] = (), styles: str = "") -> bytes:
    """A spreadsheet with this XML as the rows of its sheet."""
    return archive(
        {
            "xl/workbook.xml": f'<w {R}><sheets><sheet name="Sums" sheetId="7" r:id="r0"/></sheets></w>',
            "xl/_rels/workbook.xml.rels": relations(["worksheets/sheet1.xml"]),
            "xl/worksheets/sheet1.xml": f"<s><sheetData>{sheet}</sheetData></s>",
            "xl/sharedStrings.xml": f"<sst>{''.join(f'<si><t>{one}</t></si>' for one in strings)}</sst>",
            "xl/styles.xml": f"<st>{styles}</st>",
        }
    )


def pptx(*slides: str) -> bytes:
    """A presentation with a line of text on each slide, stored in the reverse order."""
    paths = [f"slides/slide{len(slides) - n}.xml" for n in range(len(slides))]
    ids = "".join(f'<sldId id="{256 + n}" r:id="r{n}"/>' for n in range(len(slides)))
    texts = {
        f"ppt/{path}": f"<p {A}><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p>"
        for path, text in zip(paths, slides, strict=True)
    }
    return archive(
        {
            "ppt/presentation.xml": f"<p {R}><sldIdLst>{ids}</sldIdLst></p>",
            "ppt/_rels/presentation.xml.rels": relations(paths),
            **texts,
        }
    )
