"""Documents from files and folders. Formats that are not read here come through LlamaIndex' and LangChain's readers."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lmcache_rag.corpus.formats import SUFFIXES, format_of, text_of
from lmcache_rag.errors import CorpusError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One file's text."""

    path: str
    text: str
    digest: str

    @property
    def is_markdown(self) -> bool:
        return format_of(self.path).is_markdown


@dataclass(frozen=True)
class File:
    """What is in a file, and its digest."""

    path: str
    content: bytes
    digest: str

    def document(self) -> Document:
        """Its text. Raises `UnusableDocumentError` where it has none."""
        return Document(self.path, text_of(self.path, self.content), self.digest)


def find_files(paths: Iterable[Path], known: Iterable[str] = ()) -> list[Path]:
    """The files in `paths` (files, or folders and all below them) that are documents, hidden ones left out.

    Args:
        known: paths of documents indexed before; where one lies in a path, that path may be gone or empty by now.

    Raises:
        CorpusError: a path is not there or cannot be looked into, or none of them holds such a file.
    """
    named = [absolute(path) for path in paths]
    emptied = {path for path in named for document in known if Path(document).is_relative_to(path)}
    found: set[Path] = set()
    for path in named:
        if _looked(path, Path.is_file):
            if path.suffix.lower() not in SUFFIXES:
                raise CorpusError(f"{path} is of no format that is read ({', '.join(SUFFIXES)}): convert it first.")
            found.add(path)
        elif _looked(path, Path.is_dir):
            found.update(_below(path))
        elif path not in emptied:
            raise CorpusError(f"{path} is not there: name a file or a folder.")
    if not found and not emptied:
        folders = ", ".join(map(str, named))
        raise CorpusError(f"No documents ({', '.join(SUFFIXES)}) in {folders}: name a folder that has some.")
    return sorted(found)


def may_exist(path: Path | str) -> bool:
    """Whether a file is there, or nobody can tell."""
    try:
        return Path(path).exists()
    except OSError:
        return True


def _looked(path: Path, at: Callable[[Path], bool]) -> bool:
    try:
        return at(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be looked into ({error.strerror}): change its permissions.") from error


def read_file(path: Path) -> File:
    """What is in a file.

    Raises:
        CorpusError: it cannot be read, or has a name that cannot be written down.
    """
    if printed(path) != str(path):
        raise CorpusError(f"{printed(path)} has a name that is not UTF-8: rename it, or move it away.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror}): change its permissions, or move it away."
        ) from error
    return File(str(path), content, hashlib.blake2b(content, digest_size=16).hexdigest())


def read_document(path: Path) -> Document:
    """A file's text.

    Raises:
        CorpusError: as `read_file`, and `UnusableDocumentError` where what is in it cannot be used.
    """
    return read_file(path).document()


def printed(path: Path | str) -> str:
    """A path as text, with the bytes of a name that is not UTF-8 as escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def absolute(path: Path) -> Path:
    """The path from the root, links left as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  # resolve() would follow links


def _below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"{error.filename} cannot be looked into ({error.strerror}): change its permissions."
        ) from error

    files, links = [], []
    for name, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [folder_name for folder_name in folders if not folder_name.startswith(".")]
        links += [path for folder_name in folders if (path := Path(name) / folder_name).is_symlink()]
        files += [Path(name) / file for file in names if not file.startswith(".") and file.lower().endswith(SUFFIXES)]
    if links:
        _log.warning(
            "Links to folders are not followed (%s%s): name them as well where they lead to documents.",
            printed(links[0]),
            f" and {len(links) - 1} more" if links[1:] else "",
        )
    return files
