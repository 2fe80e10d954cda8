"""Documents own chunks: what an index lets go of, and what others or a limit make of it. No model computes anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of, variant_of
from lmcache_rag.corpus import Corpus, Manifest, UpdateReport, updating
from lmcache_rag.corpus.corpus import OWN_STORE
from lmcache_rag.engine.base import PrecomputeReport
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.rebuild import rebuild
from lmcache_rag.library.room import Limits, Rooms
from lmcache_rag.library.tables import ModelCodecs
from lmcache_rag.prompt import PromptFormat
from tests.stores import FailingStore, MemoryStore

SHAPE = KVShape(layers=1, kv_heads=1, head_size=8, dtype=torch.float32)
MODEL = "f" * 32
FORM = PromptFormat(preamble="read this ", chunk=" {text} ", question=" {question} ")


class Words:
    """A tokenizer: a token a word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [int.from_bytes(word.encode()[:3], "big") for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(token.to_bytes(3, "big").decode(errors="replace") for token in token_ids)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        places, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            places.append((start, at))
        return {"input_ids": self.encode(text), "offset_mapping": places}


class MadeUp:
    """An engine that stores KV which no model computed."""

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self.store = store
        self.tokenizer = Words()
        self.max_model_len = 4096
        self.kv_bytes_per_token = 64
        self.settings = SimpleNamespace(capacity_bytes=None if limits is None else limits.capacity_bytes)
        self.codec = SimpleNamespace(ensure=lambda *_: None)
        self._rooms = None if limits is None else Rooms(store, limits)

    def chunk_store(self) -> ChunkStore:
        codecs = ModelCodecs(self.store, MODEL, SHAPE)
        chunks = ChunkStore(self.store, KVScope("default", MODEL), "raw", codecs, rooms=self._rooms)
        chunks.refresh()
        return chunks

    def precompute(
        self, preamble: Sequence[int], chunks: Sequence[Sequence[int]], *_: Any, primer: Sequence[int] = ()
    ) -> PrecomputeReport:
        report, stored = PrecomputeReport(), self.chunk_store()
        if stored.lacks_preamble(preamble):
            stored.save_preamble(made_up(preamble))
        for chunk in chunks:
            new = bool(stored.missing(chunk, variant_of(preamble)))
            report.bytes_stored += stored.save(made_up(chunk), variant_of(preamble)) if new else 0
            report.computed += new
            report.present += not new
        if self._rooms is not None:
            report.evicted_objects = self._rooms.take_evicted().objects
        return report


def made_up(tokens: Sequence[int]) -> ChunkKV:
    return ChunkKV(np.array(tokens, dtype=np.int32), torch.zeros(1, 2, len(tokens), 1, 8))


def corpus(folder: Path, engine: MadeUp) -> Corpus:
    manifest = Manifest(
        model="made-up",
        model_fingerprint=MODEL,
        dtype="float32",
        tokenizer_fingerprint="0" * 32,
        namespace="default",
        store=OWN_STORE,
        codec="raw",
        prompt=FORM,
        primer="",
        primer_tokens=0,
        chunk_tokens=40,
        overlap_tokens=0,
        embedding_model="none",
    )
    embedder = SimpleNamespace(name="none", embed=lambda texts: np.zeros((len(texts), 4), np.float32))
    return Corpus(folder, engine, embedder, manifest)  # type: ignore[arg-type]


def text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.randrange(100, 1000)}" for _ in range(words))


def update(corpus: Corpus, folder: Path) -> UpdateReport:
    with updating(corpus.folder):
        return corpus.update(corpus.plan_update([folder]))


def stored(engine: MadeUp) -> int:
    """Chunks, the preamble not counted."""
    return len(list(engine.chunk_store().records.keys())) - 1


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(text(number))
    return folder


def test_what_two_indexes_share_stays_until_both_let_go(tmp_path: Path, documents: Path) -> None:
    engine = MadeUp(MemoryStore())
    one, two = corpus(tmp_path / "one", engine), corpus(tmp_path / "two", engine)
    update(one, documents)
    before = stored(engine)
    assert update(two, documents).chunks_present == before
    (documents / "0.txt").unlink()
    (documents / "1.txt").write_text(text(9))
    update(one, documents)
    new = stored(engine)
    assert new > before  # the other still has the former documents
    update(two, documents)
    assert stored(engine) < new
    kept = {bytes.fromhex(key) for index in (one, two) for key in index._database.chunk_keys()}
    assert len(kept) == stored(engine)
    for path in documents.iterdir():
        path.unlink()
    for index in (one, two):
        update(index, documents)
    assert stored(engine) == 0
    assert len(list(engine.store.list("default/"))) == 1


def test_who_owned_what_comes_back_with_any_update(tmp_path: Path, documents: Path) -> None:
    """A rebuilt store knows no owners: also what an index need not compute again is its own."""
    engine = MadeUp(MemoryStore())
    one, two = corpus(tmp_path / "one", engine), corpus(tmp_path / "two", engine)
    for index in (one, two):
        update(index, documents)
    rebuild(engine.store, engine.chunk_store().scope)
    (documents / "new.txt").write_text(text(11))
    update(one, documents)
    (documents / "0.txt").unlink()
    update(two, documents)
    owned = {bytes.fromhex(key) for key in one._database.chunk_keys()}
    assert owned <= set(engine.chunk_store().records.keys())


def test_what_is_pinned_outlives_its_documents(tmp_path: Path, documents: Path) -> None:
    engine = MadeUp(MemoryStore())
    index = corpus(tmp_path / "one", engine)
    update(index, documents)
    pinned = bytes.fromhex(index._database.chunk_keys(str(documents / "0.txt"))[0])
    engine.chunk_store().pin([pinned])
    for path in documents.iterdir():
        path.unlink()
    update(index, documents)
    assert engine.chunk_store().records.variants(pinned) and stored(engine) == 1


def test_what_an_update_that_was_killed_owned_is_let_go_of(tmp_path: Path, documents: Path) -> None:
    engine = MadeUp(MemoryStore())
    index = corpus(tmp_path / "one", engine)
    update(index, documents)
    before = stored(engine)
    stray = list(range(1000, 1040))  # stored and owned, and not yet in the index
    engine.precompute([], [stray])
    engine.chunk_store().own(index.manifest.owner, [key_of(stray)])
    assert stored(engine) == before + 1
    update(index, documents)
    assert not engine.chunk_store().records.variants(key_of(stray)) and stored(engine) == before


def test_a_corpus_of_twice_the_limit(tmp_path: Path, documents: Path) -> None:
    store = MemoryStore()
    whole = MadeUp(store)
    for number in range(3, 20):
        (documents / f"{number}.txt").write_text(text(number))
    update(corpus(tmp_path / "whole", whole), documents)
    size = whole.chunk_store().records.size_bytes
    store.blobs.clear()
    engine = MadeUp(store, Limits(capacity_bytes=size // 2))
    index = corpus(tmp_path / "one", engine)
    assert index.plan_update([documents]).needed_bytes == size // 2
    report = update(index, documents)
    assert report.evicted > 0 and report.added == 20
    assert engine.chunk_store().records.size_bytes <= size // 2
    again = update(index, documents)
    assert again.restored > 0 and again.chunks_computed > 0  # what was evicted is computed again
    assert engine.chunk_store().records.size_bytes <= size // 2
    kept = set(engine.chunk_store().records.keys())
    owned = set(engine.chunk_store().owned(index.manifest.owner))
    assert len(kept & owned) == stored(engine)


def test_a_store_that_may_only_be_read_is_refused_before_anything_is_read(tmp_path: Path, documents: Path) -> None:
    store = MemoryStore()
    index = corpus(tmp_path / "one", MadeUp(store))
    update(index, documents)
    index._engine.store = FailingStore(store)  # type: ignore[assignment]
    with updating(index.folder), pytest.raises(StoreError):
        index.plan_update([documents])
