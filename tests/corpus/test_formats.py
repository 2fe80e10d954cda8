"""The text of files: encodings, formats, and what has none."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from lmcache_rag.corpus import formats, read_document
from lmcache_rag.corpus.formats import UnusableDocumentError, decoded, install_note, lacking, text_of

FRENCH = "L'élève a été reçu à l'école, où il dîne avec son père âgé."
RUSSIAN = "Привет, мир. Это простой текст для проверки кодировки, который достаточно длинный."
POLISH = "Zażółć gęślą jaźń. Wszystko będzie dobrze, jeśli przeczytasz instrukcję obsługi."
JAPANESE = "これは日本語のテキストです。文字コードを調べます。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Grüße", "utf-8"),
        ("Grüße", "utf-8-sig"),
        ("Grüße", "utf-16"),
        ("Grüße", "utf-32"),
        ("Keep the pump dry. " * 9, "utf-16-le"),
        (FRENCH, "latin-1"),
        ("The café is open.", "latin-1"),
        ("Keep it below 5 °C and away from heat.", "latin-1"),
        ("“Quoted”, and then…", "cp1252"),
        (POLISH, "cp1250"),
        (RUSSIAN, "cp1251"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "utf-8"),
    ],
)
def test_encodings_are_found(text: str, encoding: str) -> None:
    assert decoded(text.encode(encoding)) == text


def pdf(*pages: str, font: bool = True) -> bytes:
    """A PDF file with a line of text on each page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if font else "0 0 m"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    written, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(written))
        written += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return (
        f"{written}{head}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF".encode()
    )


def docx(body: str) -> bytes:
    """A Word document."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            '<Override PartName="/word/document.xml" ContentType='
            '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>',
        )
        file.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" '
            'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
            'Target="word/document.xml"/></Relationships>',
        )
        file.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>{body}</w:body>'
            "</w:document>",
        )
    return content.getvalue()


def test_ends_of_lines_are_pythons() -> None:
    """Splitters know no others, and clients that read the same file by Python send these."""
    assert text_of("a.md", b"One.\r\n\r\nTwo.\rThree.\n") == "One.\n\nTwo.\nThree.\n"


def test_pdf() -> None:
    pytest.importorskip("pypdf")
    text = text_of("a.pdf", pdf("Press the reset button.", "Wait for the green light."))
    assert text.split("\n\n") == ["Press the reset button.", "Wait for the green light."]


def test_html_becomes_markdown_without_its_scripts(tmp_path: Path) -> None:
    pytest.importorskip("markdownify")
    page = (
        '<html><head><title>t</title><meta charset="latin-1"></head><body><h2>Gr\xfc\xdfe</h2><script>var x</script>'
        "<p>Press <b>both</b> <a href='x'>buttons</a>, see set_mode.</p><ul><li>one</li></ul></body></html>"
    )
    path = tmp_path / "page.html"
    path.write_bytes(page.encode("latin-1"))
    document = read_document(path)
    assert document.is_markdown
    lines = [line for line in document.text.splitlines() if line]
    assert lines == ["## Grüße", "Press **both** buttons, see set_mode.", "* one"]


def test_word() -> None:
    pytest.importorskip("mammoth")
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
    body = (
        "<w:p><w:r><w:t>Press the button.</w:t></w:r></w:p>"
        f"<w:tbl><w:tr>{cell.format('weight')}{cell.format('3 kg')}</w:tr></w:tbl>"
    )
    text = text_of("a.docx", docx(body))
    assert "Press the button." in text and "| weight | 3 kg |" in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("scan.pdf", pdf("", font=False), "scan.pdf has no text in it, only pictures: run it through OCR."),
        ("bad.pdf", b"%PDF-1.4 nothing", r"bad.pdf cannot be read as PDF \("),
        ("bad.docx", b"PK nothing", r"bad.docx cannot be read as Word \("),
        ("page.html", b"<p> </p>", "page.html has no text in it"),
        ("empty.txt", b"", "empty.txt has no text in it"),
        ("photo.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "photo.txt is a binary file: convert it"),
    ],
)
def test_what_has_no_text_says_why(name: str, content: bytes, problem: str) -> None:
    if lacking([Path(name)]):
        pytest.skip("needs the extra `documents`")
    with pytest.raises(UnusableDocumentError, match=problem):
        text_of(name, content)


def test_an_encrypted_pdf_says_so() -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(io.BytesIO(pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    content = io.BytesIO()
    writer.write(content)
    with pytest.raises(UnusableDocumentError, match="has not been decrypted"):
        text_of("a.pdf", content.getvalue())


def test_half_surrogates_of_a_library_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = formats.Format("odd", (".pdf",), lambda content: "a\0b\udcff \ud83d\ude00", needs=("x",))
    monkeypatch.setitem(formats._BY_SUFFIX, ".pdf", odd)
    assert text_of("a.pdf", b"") == "ab\ufffd \U0001f600"


def test_what_is_not_installed_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    paths = [Path(name) for name in ("a.txt", "a.pdf", "b.pdf", "c.PDF", "d.pdf", "e.html")]
    missing = lacking(paths)
    assert missing == {**dict.fromkeys(paths[1:5], "pypdf"), paths[5]: "bs4"}
    assert install_note(paths[1:5], "pypdf") == (
        "a.pdf, b.pdf, c.PDF and 1 more: to read such files pypdf is needed, which is not installed: "
        "pip install 'lmcache-rag[documents]'."
    )
