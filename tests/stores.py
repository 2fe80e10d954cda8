"""Stores for tests: in memory, and ones that fail or may only be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lmcache_rag.blobs.base import Store, Untiered
from lmcache_rag.errors import StoreError


class MemoryStore(Untiered):
    """Blobs in a dict."""

    remote = False

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        self.blobs[name] = b"".join(parts)
        return len(self.blobs[name])

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        if name in self.blobs:
            return False
        self.write(name, parts)
        return True

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        data = self.blobs.get(name)
        end = None if length is None else start + length
        return None if data is None else memoryview(bytearray(data[start:end]))

    def map(self, name: str) -> memoryview | None:
        return self.read(name)

    def exists(self, name: str) -> bool:
        return name in self.blobs

    def size(self, name: str) -> int | None:
        return len(self.blobs[name]) if name in self.blobs else None

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.blobs.pop(name, None)

    def list(self, prefix: str) -> Iterator[str]:
        yield from sorted(name for name in self.blobs if name.startswith(prefix))

    def folders(self, prefix: str) -> Sequence[str]:
        return sorted({name[len(prefix) :].partition("/")[0] for name in self.blobs if name.startswith(prefix)})

    def free_bytes(self) -> int | None:
        return None


class FailingStore:
    """Another store of which every change fails but for the first so many: a full disk, or one that may only be read.

    Attributes:
        left: so many changes are made yet.
        changes: so many were asked for.
    """

    def __init__(self, store: Store, left: int = 0) -> None:
        self.store = store
        self.left = left
        self.changes = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name not in ("write", "write_if_absent", "delete"):
            return method

        def change(*arguments: Any) -> Any:
            self.changes += 1
            if self.left < 1:
                raise StoreError("The disk is full.")
            self.left -= 1
            return method(*arguments)

        return change
