"""Where the chunks of a prompt come from: its namespace, and text that was learned from its caller's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import StoredForm
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.plan.matching import NO_TOKEN, Matcher
from lmcache_rag.records.catalog import Match
from lmcache_rag.records.part import VariantRow


class Sources:
    """Chunk stores as one: what is in the first is taken from there.

    Args:
        learned: None where there is none.
    """

    def __init__(self, chunks: ChunkStore, learned: ChunkStore | None = None) -> None:
        self._chunks = chunks
        self._learned = learned if learned is not None and learned.records.parts else None
        self._both = [each for each in (chunks, self._learned) if each is not None]

    @property
    def store(self) -> Store:
        return self._chunks.store

    def matches(self, prompt: np.ndarray, matches: Sequence[Match], matcher: Matcher) -> list[Match]:
        """The chunks of a prompt (`matches`), and where none of them is stored, what was learned; ascending."""
        if self._learned is None:
            return list(matches)
        free = prompt.copy()
        for match in matches:
            if match.stored:
                free[match.start : match.end] = NO_TOKEN
        found = matcher.find(free, self._learned).matches
        kept = [match for match in matches if match.stored or not any(_overlap(match, other) for other in found)]
        return sorted([*kept, *found], key=lambda match: match.start)

    def taken(self, prompt: np.ndarray, matcher: Matcher) -> np.ndarray:
        """Which tokens of a prompt are stored ones: bool."""
        taken = np.zeros(len(prompt), bool)
        for match in [match for chunks in self._both for match in matcher.find(prompt, chunks).matches]:
            taken[match.start : match.end] = True
        return taken

    def variants(self, key: bytes, recorded: Mapping[str, VariantRow] | None = None) -> dict[str, StoredForm]:
        """See `ChunkStore.variants`."""
        if self._learned is None:
            return self._chunks.variants(key, recorded)
        return self._learned.variants(key) | self._chunks.variants(key)

    def preamble(self, token_ids: Sequence[int] | np.ndarray) -> StoredForm | None:
        """See `ChunkStore.preamble`."""
        return next((form for each in self._both if (form := each.preamble(token_ids)) is not None), None)

    def preamble_named(self, digest: str) -> np.ndarray | None:
        """See `ChunkStore.preamble_named`."""
        return next((tokens for each in self._both if (tokens := each.preamble_named(digest)) is not None), None)

    def forms(self, name: str) -> list[StoredForm]:
        """See `ChunkStore.forms`."""
        namespace = name.partition("/")[0]
        return next(each for each in self._both if each.scope.namespace == namespace).forms(name)


def _overlap(one: Match, other: Match) -> bool:
    return one.start < other.end and other.start < one.end
