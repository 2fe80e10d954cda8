"""Who computes an index's KV: the engine in this process, or servers that store where the index looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from lmcache_rag.chunk_kv import variant_of
from lmcache_rag.engine.base import PrecomputeReport
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.remote import RemoteEngine
from lmcache_rag.errors import CorpusError
from lmcache_rag.library.chunks import ChunkStore

Tokens = Sequence[int]


class Computing(Protocol):
    """What an index needs where it changes."""

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token's KV takes in the store, about."""

    @property
    def capacity_bytes(self) -> int | None:
        """How much may be stored in the namespace."""

    def chunks(self) -> ChunkStore:
        """What is stored, as it is now. Raises `StoreError`."""

    def learn_codec(self, texts: Iterable[str], progress: Callable[[str], Any] | None) -> None:
        """Have the codec learned from texts, where that is not done yet."""

    def compute(
        self, preamble: Tokens, chunks: Sequence[Tokens], progress: Callable[[int], Any] | None, primer: Tokens
    ) -> PrecomputeReport:
        """See `Engine.precompute`. Raises `CorpusError` where what is computed does not get into the index's store."""


class LocalComputing:
    """By the engine in this process."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    @property
    def kv_bytes_per_token(self) -> int:
        return self._engine.kv_bytes_per_token

    @property
    def capacity_bytes(self) -> int | None:
        return self._engine.settings.capacity_bytes

    def chunks(self) -> ChunkStore:
        return self._engine.chunk_store()

    def learn_codec(self, texts: Iterable[str], progress: Callable[[str], Any] | None) -> None:
        self._engine.codec.ensure(texts, progress)

    def compute(
        self, preamble: Tokens, chunks: Sequence[Tokens], progress: Callable[[int], Any] | None, primer: Tokens
    ) -> PrecomputeReport:
        return self._engine.precompute(preamble, chunks, progress, primer=primer)


class ServedComputing:
    """By servers of one model, among which chunks are spread, each computed once.

    Args:
        chunks: of the store that servers and index share, as this process sees it.
        kv_bytes_per_token: as the servers say.
    """

    capacity_bytes = None
    """The servers see to it."""

    def __init__(self, engine: RemoteEngine, chunks: ChunkStore, kv_bytes_per_token: int) -> None:
        self._engine = engine
        self._chunks = chunks
        self.kv_bytes_per_token = kv_bytes_per_token

    def chunks(self) -> ChunkStore:
        self._chunks.refresh()
        return self._chunks

    def learn_codec(self, texts: Iterable[str], progress: Callable[[str], Any] | None) -> None:
        """The servers store with what tables they have."""

    def compute(
        self, preamble: Tokens, chunks: Sequence[Tokens], progress: Callable[[int], Any] | None, primer: Tokens
    ) -> PrecomputeReport:
        done = self._engine.precompute(
            preamble, chunks, progress, primer=primer, namespace=self._chunks.scope.namespace
        )
        stored = self.chunks()
        unseen = [
            number
            for number, chunk in enumerate(chunks)
            if number not in done.errors and stored.missing(chunk, variant_of(preamble))
        ]
        if unseen:
            raise CorpusError(
                f"The server has stored KV that {stored.store} does not have, so it has another store than this index: "
                "name the server's with --store, as it is seen from here."
            )
        return done
