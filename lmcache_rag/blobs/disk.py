"""Objects as files below one folder, on a local or shared disk."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import numpy as np

from lmcache_rag.blobs.base import Untiered
from lmcache_rag.errors import StoreError

_UNFINISHED = ".unfinished"
_ABANDONED_AFTER_S = 24 * 3600
_TRIES = 5


class DiskStore(Untiered):
    """One file an object.

    A file is written under another name in `.unfinished`, flushed to the disk and then renamed, so that a crash at any
    moment leaves either the whole object or none. What crashed writers left behind is removed a day later.

    A folder that may only be read is read; writing to it is an error then.

    Raises:
        StoreError: the folder cannot be made.
    """

    remote = False

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()
        self._unfinished = self.root / _UNFINISHED
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not self.root.is_dir():
                raise _unwritable(self.root, error) from error
            return
        self._remove_abandoned()

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        return self._write(name, parts, os.replace)

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        try:
            self._write(name, parts, os.link)
        except FileExistsError:
            return False
        return True

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        with self._opened(name) as file:
            if file is None:
                return None
            rest = max(0, os.fstat(file.fileno()).st_size - start)
            data = np.empty(rest if length is None else min(rest, length), dtype=np.uint8)
            view = memoryview(data)  # type: ignore[arg-type]  # numpy's arrays are buffers from Python 3.12 on
            return view[: _read_all(file, start, view)]

    def map(self, name: str) -> memoryview | None:
        with self._opened(name) as file:
            if file is None:
                return None
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def size(self, name: str) -> int | None:
        try:
            return self._path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failed(f"{name} could not be looked up in {self.root}", error) from error

    def exists(self, name: str) -> bool:
        try:
            return self._path(name).is_file()
        except OSError as error:
            raise _failed(f"{name} could not be looked up in {self.root}", error) from error

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                path.unlink(missing_ok=True)
                path.parent.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                    raise _failed(f"{name} could not be deleted from {self.root}", error) from error

    def list(self, prefix: str) -> Iterator[str]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise _failed(f"{prefix} could not be listed in {self.root}", error) from error

        return self._below(prefix, refuse)

    def _below(self, prefix: str, failed: Callable[[OSError], None] | None = None) -> Iterator[str]:
        for folder, _, files in os.walk(self._path(prefix), onerror=failed):
            relative = Path(folder).relative_to(self.root).as_posix()
            for file in sorted(files):
                yield f"{relative}/{file}".removeprefix("./")

    def folders(self, prefix: str) -> Sequence[str]:
        try:
            return sorted(path.name for path in self._path(prefix).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _failed(f"{prefix} could not be listed in {self.root}", error) from error

    def free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.root).free
        except OSError as error:
            raise _failed(f"The free space of {self.root} could not be read", error) from error

    def entries(self) -> Iterator[tuple[str, int, float]]:
        for name in self._below(""):  # a folder that cannot be entered is somebody else's
            if not name.startswith(f"{_UNFINISHED}/"):
                with suppress(OSError):  # another process deleted it meanwhile
                    found = self._path(name).stat()
                    yield name, found.st_size, found.st_mtime

    def touch(self, name: str) -> None:
        with suppress(OSError):
            os.utime(self._path(name))

    def _path(self, name: str) -> Path:
        """Where a blob, or what has a prefix, is. Raises `StoreError` where that would be outside the store."""
        folders = name.split("/")
        if ".." in folders or name.startswith("/"):
            raise StoreError(f"{name!r} is no name of anything in {self.root}.")
        return self.root.joinpath(*folders)

    def _write(self, name: str, parts: Sequence[bytes | memoryview], publish: Callable[[Path, Path], None]) -> int:
        """Write the parts into a file of their own, onto the disk, and have `publish` give it its name; its length."""
        path = self._path(name)
        part = self._unfinished / uuid.uuid4().hex
        try:
            with part.open("wb", buffering=0) as file:
                length = sum(_write_all(file.fileno(), content) for content in parts)
                os.fsync(file.fileno())
            _in_folder(path, lambda: publish(part, path))
            for folder in (path.parent, path.parent.parent):
                _flush_folder(folder)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise _unwritable(self.root, error) from error
            raise _failed(f"{name} could not be stored in {self.root}", error) from error
        finally:
            with suppress(OSError):  # what is left there is removed as abandoned
                part.unlink(missing_ok=True)
        return length

    @contextmanager
    def _opened(self, name: str) -> Iterator[FileIO | None]:
        try:
            with self._path(name).open("rb", buffering=0) as file:
                yield file
        except (FileNotFoundError, NotADirectoryError):
            yield None
        except OSError as error:
            raise _failed(f"{name} could not be read from {self.root}", error) from error

    def _remove_abandoned(self) -> None:
        oldest = time.time() - _ABANDONED_AFTER_S
        for path in self._unfinished.iterdir():
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except OSError:
                continue  # another process removed it, or is about to


def _read_all(file: FileIO, start: int, view: memoryview) -> int:
    file.seek(start)
    at = 0
    while at < len(view):
        count = file.readinto(view[at:])
        if not count:
            break
        at += count
    return at


def _write_all(descriptor: int, content: bytes | memoryview) -> int:
    view = memoryview(content)
    at = 0
    while at < len(view):
        at += os.write(descriptor, view[at:])
    return at


def _in_folder(path: Path, publish: Callable[[], None]) -> None:
    """Make the folder of `path` and publish there. Who deletes the last file of a folder removes it, which may be in
    between: then it is tried again."""
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish()
        except FileNotFoundError:
            if not left:
                raise
        else:
            return


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(root: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The store folder {root} cannot be written to ({error.strerror}): "
        "change its permissions, or name another folder with --store."
    )


def _failed(what: str, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{what}: the disk is full. Free some space, or name another folder with --store.")
    return StoreError(f"{what} ({error.strerror}).")
