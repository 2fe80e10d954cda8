"""What several parts of the records say together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lmcache_rag.errors import StoreError
from lmcache_rag.records.merge import Live, live
from lmcache_rag.records.part import Part, VariantRow, build


class View:
    """Chunks by key (16 bytes), with their tokens, stored objects and owners. Looking up reads memory only, and mapped
    files.

    Attributes:
        parts: the oldest first; what a later one says holds. Exchanged as a whole, never changed.
    """

    parts: tuple[Part, ...] = ()

    def live(self) -> Live:
        """All that is stored. Walks all that is known: for eviction, statistics and repair.

        Raises:
            StoreError: a file has rotted, and says what cannot be.
        """
        try:
            return live(self.parts or (build({}),))
        except (IndexError, ValueError) as error:
            raise StoreError(f"The records are damaged ({error}): run `lmcache-rag store rebuild`.") from error

    def tokens(self, key: bytes) -> np.ndarray | None:
        """int32 token ids of a chunk; None where it is not known."""
        for part in reversed(self.parts):
            row = part.row(key)
            if row >= 0 and len(found := part.tokens_of(row)):
                return found
        return None

    def variants(self, key: bytes) -> dict[str, VariantRow]:
        """A chunk's stored objects, by form."""
        found: dict[str, VariantRow] = {}
        for part in self.parts:
            row = part.row(key)
            for variant in part.variants_of(row) if row >= 0 else ():
                if variant.size_bytes:
                    found[variant.form] = variant
                else:
                    found.pop(variant.form, None)
        return found

    def owners(self, key: bytes) -> set[int]:
        """Who holds a chunk."""
        found: dict[int, bool] = {}
        for part in self.parts:
            row = part.row(key)
            found.update((row.owner, row.held) for row in (part.owners_of(row) if row >= 0 else ()))
        return {owner for owner, held in found.items() if held}

    def keys_of(self, owner: int) -> list[bytes]:
        """The chunks that an owner holds."""
        named = dict.fromkeys(key for part in self.parts for key in part.keys_of(owner))
        return [key for key in named if owner in self.owners(key)]

    def keys_beginning(self, start: bytes) -> list[bytes]:
        """The known chunks whose keys begin with these eight bytes."""
        high = np.uint64(int.from_bytes(start, "big"))
        found: dict[bytes, None] = {}
        for part in self.parts:
            rows = range(*(int(np.searchsorted(part.key_high, high, side=side)) for side in ("left", "right")))
            found.update((part.key(row), None) for row in rows)
        return list(found)

    def keys(self) -> Iterator[bytes]:
        """The chunks of which something is stored. Walks all that is known: for statistics and tests."""
        seen: set[bytes] = set()
        for part in self.parts:
            for row in range(len(part)):
                key = part.key(row)
                if key not in seen and self.variants(key):
                    seen.add(key)
                    yield key
