"""What a store does: whole objects by name."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Protocol


class Store(Protocol):
    """Named byte objects. An object appears whole or not at all and never changes; names are `/`-separated.

    Every method raises `StoreError` where the storage itself fails.
    """

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        """Store the concatenation of `parts`, durably; returns its length in bytes."""
        ...

    def read(self, name: str, limit_bytes: int | None = None) -> memoryview | None:
        """The object's bytes (its first `limit_bytes`), or None where there is none."""
        ...

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int | None:
        """The object's length in bytes, or None where there is none."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete; a name that is not there is no error."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Names below `prefix`, which ends with `/`."""
        ...

    def generation(self, prefix: str) -> Hashable:
        """A value that changes when chunks appear or vanish below `prefix`; cheap compared with `list`."""
        ...

    def free_bytes(self) -> int | None:
        """How much can still be written; None where there is no limit."""
        ...
