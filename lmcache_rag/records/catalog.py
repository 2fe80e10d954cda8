"""Which stored chunks occur in a prompt, found by their tokens.

Winnowing (Schleimer, Wilkerson and Aiken 2003, "Winnowing: local algorithms for document fingerprinting"): of the
hashes of all runs of `GRAM` tokens, the smallest in each window of `window` is kept as a fingerprint. Two texts that
share `GRAM + window - 1` tokens share a fingerprint, wherever it lies, so a chunk is found although its first and last
tokens were merged with its neighbours, and a part of a chunk is found too. Every hit is verified token by token.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope
from lmcache_rag.codec import peek_tokens
from lmcache_rag.codec.container import FORMAT_VERSION
from lmcache_rag.errors import StoreError

GRAM = 16
_BASE = np.uint64(0x9E3779B97F4A7C15)
_PEEK_BYTES = 32 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """Tokens `start` to `start + length` of a prompt are tokens `offset` to `offset + length` of a stored chunk."""

    start: int
    length: int
    offset: int
    chunk: np.ndarray


class Catalog:
    """The token ids of every stored chunk of one scope, searchable; kept up to date with the store.

    Args:
        min_match: shortest run of tokens worth reusing, `GRAM` at least; every longer run is found.
    """

    def __init__(self, store: Store, scope: KVScope, min_match: int = 32) -> None:
        if min_match < GRAM:
            raise ValueError(f"min_match must be {GRAM} at least, got {min_match}")
        self._store = store
        self._scope = scope
        self._min_match = min_match
        self._generation: Hashable = None
        self._chunks: dict[str, np.ndarray] = {}
        self._places: dict[int, list[tuple[str, int]]] = {}

    def find(self, token_ids: Sequence[int] | np.ndarray) -> list[Match]:
        """Stored chunks, or parts of them, in a prompt: from the left, the longest at each place, not overlapping."""
        self.refresh()
        prompt = np.asarray(token_ids, dtype=np.int32)
        hashes = _gram_hashes(prompt)
        matches: list[Match] = []
        done = 0
        for position, gram in enumerate(hashes.tolist()):
            if position < done or gram not in self._places:
                continue
            best = max(
                (self._extend(prompt, position, key, offset, done) for key, offset in self._places[gram]),
                key=lambda match: match.length,
            )
            if best.length >= self._min_match:
                matches.append(best)
                done = best.start + best.length
        return matches

    def refresh(self) -> None:
        """Take over what was added to or removed from the store."""
        generation = self._store.generation(self._scope.prefix)
        if generation == self._generation:
            return
        names: dict[str, list[str]] = {}
        for name in self._store.list(self._scope.prefix):
            if name.endswith(f".v{FORMAT_VERSION}"):
                names.setdefault(name.rpartition("/")[0], []).append(name)
        for key in self._chunks.keys() - names.keys():
            self._remove(key)
        for key in names.keys() - self._chunks.keys():
            found = (self._peek(name) for name in names[key])
            token_ids = next((token_ids for token_ids in found if token_ids is not None), None)
            if token_ids is not None:
                self._add(key, token_ids)
        self._generation = generation

    def _extend(self, prompt: np.ndarray, position: int, key: str, offset: int, done: int) -> Match:
        """The longest run of equal tokens around prompt `position` and chunk `offset`, not before prompt `done`."""
        chunk = self._chunks[key]
        left = min(position - done, offset)
        right = min(len(prompt) - position, len(chunk) - offset)
        before = prompt[position - left : position][::-1] != chunk[offset - left : offset][::-1]
        after = prompt[position : position + right] != chunk[offset : offset + right]
        left = int(before.argmax()) if before.any() else left
        right = int(after.argmax()) if after.any() else right
        return Match(position - left, left + right, offset - left, chunk)

    def _add(self, key: str, chunk: np.ndarray) -> None:
        self._chunks[key] = chunk
        for position, gram in self._fingerprints(chunk):
            self._places.setdefault(gram, []).append((key, position))

    def _remove(self, key: str) -> None:
        for _, gram in self._fingerprints(self._chunks.pop(key)):
            places = [place for place in self._places.get(gram, []) if place[0] != key]
            if places:
                self._places[gram] = places
            else:
                self._places.pop(gram, None)

    def _fingerprints(self, chunk: np.ndarray) -> list[tuple[int, int]]:
        """(position, hash) of the chosen runs."""
        hashes = _gram_hashes(chunk)
        window = min(self._min_match - GRAM + 1, len(hashes))
        if not window:
            return []
        starts = np.arange(len(hashes) - window + 1)
        chosen = np.unique(starts + sliding_window_view(hashes, window).argmin(axis=1))
        return list(zip(chosen.tolist(), hashes[chosen].tolist(), strict=True))

    def _peek(self, name: str) -> np.ndarray | None:
        """A stored chunk's token ids; None where the object is gone or unusable (a blend would miss it anyway)."""
        limit = _PEEK_BYTES
        while True:
            try:
                start = self._store.read(name, limit)
                if start is None:
                    return None
                token_ids = peek_tokens(start)
            except StoreError as error:
                _log.warning("stored object %s cannot be used (%s)", name, error)
                return None
            if isinstance(token_ids, np.ndarray):
                return token_ids
            if token_ids <= limit or len(start) < limit:
                return None
            limit = token_ids


def _gram_hashes(token_ids: np.ndarray) -> np.ndarray:
    """uint64 hash of each run of `GRAM` tokens."""
    count = len(token_ids) - GRAM + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    values = token_ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, dtype=np.uint64)
    for shift in range(GRAM):
        hashes = hashes * _BASE + values[shift : shift + count]
    return hashes ^ (hashes >> np.uint64(29))
