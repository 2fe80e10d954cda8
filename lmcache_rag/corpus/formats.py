"""From a file's bytes to its text: plain text in any encoding, and the formats that libraries read.

HTML and Word documents become Markdown, so that they are split at their headings.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lmcache_rag.errors import CorpusError

_BYTE_ORDER_MARKS = {  # UTF-32's begin with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WESTERN = "cp1252"
"""Latin-1 and more: what is taken where several encodings of one byte per character would do."""

_EAST_ASIAN = (
    "big5", "big5hkscs", "cp932", "cp949", "cp950", "euc_jis_2004", "euc_jisx0213", "euc_jp", "euc_kr", "gb18030",
    "gb2312", "gbk", "johab", "shift_jis", "shift_jis_2004", "shift_jisx0213",
)  # fmt: skip
_FEW = 0.2
"""Texts in these have more bytes than this share outside ASCII; others that have fewer could be mistaken for them."""

_NO_TEXT_TAGS = ("head", "script", "style", "template", "noscript")
_EXTRA = "pip install 'lmcache-rag[documents]'"


class UnusableDocumentError(CorpusError):
    """What is in a file is why it cannot be used, and that stays so until the file changes."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        needs: names of the modules that read it.
        is_markdown: whether its text is.
        text: of a file's bytes; raises `UnusableDocumentError` with what is wrong, or whatever its library does.
    """

    name: str
    suffixes: tuple[str, ...]
    text: Callable[[bytes], str]
    needs: tuple[str, ...] = ()
    is_markdown: bool = False

    @property
    def is_missing(self) -> str:
        """The first module that it needs and that is not installed, or nothing."""
        return next((module for module in self.needs if find_spec(module) is None), "")


def decoded(content: bytes) -> str:
    """The text of bytes in UTF-8, or in whatever encoding they seem to be.

    Raises:
        UnusableDocumentError: they are no text.
    """
    from charset_normalizer import from_bytes, is_binary

    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return _strictly(content, encoding)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        return text
    outside = sum(byte > 127 for byte in content) / len(content)
    found = from_bytes(content, cp_exclusion=list(_EAST_ASIAN) if outside < _FEW else [])
    best = found.best()
    if best is None or is_binary(content):
        raise UnusableDocumentError("is a binary file")
    as_good = (match for match in found if match.chaos <= best.chaos)
    western = any(_WESTERN in match.could_be_from_charset for match in as_good)
    return _strictly(content, _WESTERN if western else best.encoding)


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnusableDocumentError(f"is no {encoding} text, as it begins (byte {error.start})") from error


def _text_of_pdf(content: bytes) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it notes every oddity that it gets over
    text = "\n\n".join(page.extract_text() for page in PdfReader(io.BytesIO(content)).pages)
    if not text.strip():
        raise UnusableDocumentError("has no text in it, only pictures: run it through OCR")
    return text


def _text_of_html(content: bytes | str) -> str:
    from bs4 import BeautifulSoup
    from markdownify import ATX, MarkdownConverter

    soup = BeautifulSoup(content, "html.parser")
    for tag in soup(_NO_TEXT_TAGS):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style=ATX, strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    return str(converter.convert_soup(soup))


def _text_of_docx(content: bytes) -> str:
    import mammoth

    without_pictures = mammoth.images.img_element(lambda _: {})
    return _text_of_html(mammoth.convert_to_html(io.BytesIO(content), convert_image=without_pictures).value)


FORMATS = (
    Format("text", (".txt", ".text", ".rst", ".adoc", ".org", ".csv", ".tsv"), decoded),
    Format("Markdown", (".md", ".markdown"), decoded, is_markdown=True),
    Format("PDF", (".pdf",), _text_of_pdf, needs=("pypdf",)),
    Format("HTML", (".html", ".htm", ".xhtml"), _text_of_html, needs=("bs4", "markdownify"), is_markdown=True),
    Format("Word", (".docx",), _text_of_docx, needs=("mammoth", "bs4", "markdownify"), is_markdown=True),
)

_BY_SUFFIX = {suffix: kind for kind in FORMATS for suffix in kind.suffixes}
SUFFIXES = tuple(_BY_SUFFIX)


def format_of(path: Path | str) -> Format:
    """The format that a file's name stands for; its suffix is one of `SUFFIXES`."""
    return _BY_SUFFIX[Path(path).suffix.lower()]


def text_of(path: Path | str, content: bytes) -> str:
    """The text of a file.

    Raises:
        UnusableDocumentError: it is empty, binary, encrypted, damaged, or without text.
    """
    kind = format_of(path)
    try:
        text = kind.text(content)
    except UnusableDocumentError as error:
        advice = "" if ":" in str(error) else ": convert it to text, or move it away"
        raise UnusableDocumentError(f"{path} {error}{advice}.") from error
    except Exception as error:  # libraries raise anything over what is damaged
        raise UnusableDocumentError(
            f"{path} cannot be read as {kind.name} ({type(error).__name__}: {error}): repair or convert it, "
            "or move it away."
        ) from error
    if kind.needs:
        text = _without_oddities(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python's own files give it, and splitters expect it
    if not text.strip():
        raise UnusableDocumentError(f"{path} has no text in it: fill it, or move it away.")
    return text


def lacking(paths: Iterable[Path]) -> dict[Path, str]:
    """The files whose format needs something that is not installed -> its module's name."""
    found = {path: format_of(path).is_missing for path in paths}
    return {path: module for path, module in found.items() if module}


def install_note(paths: Iterable[Path], module: str) -> str:
    """What to do about files that need a module."""
    names = [str(path) for path in paths]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: to read such files {module} is needed, which is not installed: {_EXTRA}."


def _without_oddities(text: str) -> str:
    """What libraries leave in a text and no tokenizer takes: NULs, and halves of surrogate pairs."""
    text = text.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"\n{4,}", "\n\n\n", text)
