"""Finding and reading files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_rag.corpus import find_files, read_document
from lmcache_rag.corpus.documents import may_exist
from lmcache_rag.errors import CorpusError


def test_text_and_markdown_files_below_folders(tmp_path: Path) -> None:
    for name in ("a.md", "sub/b.txt", "sub/C.MD", "sub/d.png", ".hidden/e.md", "sub/.f.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found = find_files([tmp_path, tmp_path / "a.md"])
    assert [path.relative_to(tmp_path.resolve()).as_posix() for path in found] == ["a.md", "sub/C.MD", "sub/b.txt"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.mkdir(), "No documents"),
        (lambda path: None, "is not there"),
        (lambda path: path.write_bytes(b"x"), "is of no format that is read"),
    ],
    ids=["empty folder", "not there", "other format"],
)
def test_nothing_to_find(tmp_path: Path, make, problem: str) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(CorpusError, match=problem):
        find_files([path])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (bytes(range(256)), "is a binary file: convert it"),
        (b"text\0text", "binary"),
        (b"\xff\xfea", "is no utf-16 text"),
        (b" \n\t ", "has no text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "file.md"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=problem):
        read_document(path)


def test_links_to_folders_are_named_and_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes, corpus = tmp_path / "notes", tmp_path / "corpus"
    notes.mkdir()
    corpus.mkdir()
    (notes / "may.md").write_text("In May.")
    (corpus / "guide.md").write_text("How to.")
    (corpus / "notes").symlink_to(notes)
    assert find_files([corpus]) == [corpus / "guide.md"]
    assert f"not followed ({corpus / 'notes'})" in caplog.text
    assert find_files([corpus, corpus / "notes"]) == [corpus / "guide.md", corpus / "notes" / "may.md"]


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    for look in ("is_file", "exists"):
        monkeypatch.setattr(Path, look, denied)
    with pytest.raises(CorpusError, match=r"a\.txt cannot be looked into \(Permission denied\)"):
        find_files([tmp_path / "a.txt"])
    assert may_exist(tmp_path / "a.txt")  # what is known of it is kept


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        read_document(tmp_path / "gone.md")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_document(path).text == "hello"
