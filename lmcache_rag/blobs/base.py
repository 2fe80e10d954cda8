"""What holds blobs: named immutable bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol


class Store(Protocol):
    """Blobs by name. A blob appears whole or not at all; names are `/`-separated.

    Every method raises `StoreError` where the storage itself fails.

    Attributes:
        remote: whether asking it may take longer than a step of vLLM has time for, as over a network.
    """

    @property
    def remote(self) -> bool: ...

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        """Store the concatenation of `parts`, durably; returns its length in bytes."""
        ...

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        """The same, where there is no blob of this name: of several writers one gets True."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        """The blob's bytes from `start` on, `length` of them at most; None where there is none."""
        ...

    def map(self, name: str) -> memoryview | None:
        """The blob's bytes, read when they are looked at; None where there is none."""
        ...

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int | None:
        """The blob's length in bytes, or None where there is none."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete; a name that is not there is no error."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Names below `prefix`, which ends with `/`. Walks what is there, so it is for repair only."""
        ...

    def folders(self, prefix: str) -> Sequence[str]:
        """The names right below `prefix`, which ends with `/`, up to their next `/`."""
        ...

    def free_bytes(self) -> int | None:
        """How much can still be written; None where there is no limit."""
        ...

    def tier_of(self, name: str) -> str | None:
        """The cache that is known to hold a blob, from memory only; None where it is read from where everything is."""
        ...

    def prefetch(self, names: Iterable[str]) -> int:
        """Have blobs brought nearer in the background, since they will be read. How many are taken up."""
        ...

    def heal(self, name: str) -> Store | None:
        """What was read of a blob is damaged: forget the copies of it that are in front of a slower store. The store to
        read it from again; None where it came from where everything is kept, and so is damaged itself."""
        ...


class CacheStore(Store, Protocol):
    """A store that can be kept within a capacity."""

    def entries(self) -> Iterator[tuple[str, int, float]]:
        """Name, length in bytes, and when it was last used (seconds since 1970, 0 where nobody knows) of all blobs."""
        ...

    def touch(self, name: str) -> None:
        """Note that a blob is used now, so that others who look at the store know. Fails silently: it is a hint."""
        ...


class Untiered:
    """What a store without others before or behind it says of tiers."""

    def tier_of(self, name: str) -> str | None:
        return None

    def prefetch(self, names: Iterable[str]) -> int:
        return 0

    def heal(self, name: str) -> Store | None:
        return None
