"""Reading a plan's objects, from a fast store and from a slow one."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blend.loading import Loader
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.throttled import Throttle, ThrottledStore
from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope, KVShape
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.hot import HotChunks
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.tables import ModelCodecs
from lmcache_rag.plan.plan import PlannedSegment
from tests.helpers import chunk_store

SHAPE = KVShape(8, 4, 32, torch.float32)
TOKENS = 100


def stored(folder: Path, count: int) -> tuple[ChunkStore, list[PlannedSegment]]:
    chunks = chunk_store(DiskStore(folder), KVScope("default", "model"), SHAPE)
    segments = []
    for number in range(count):
        token_ids = np.arange(TOKENS, dtype=np.int32) + number
        chunks.save(ChunkKV(token_ids, torch.full((8, 2, TOKENS, 4, 32), float(number))), NO_CONTEXT)
        segments.append(PlannedSegment(number * TOKENS, TOKENS, name=chunks.name(token_ids, NO_CONTEXT)))
    return chunks, segments


def test_objects_come_in_order_with_what_is_wrong(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 6)
    chunks.store.delete([segments[3].name or ""])
    unplanned = PlannedSegment(600, TOKENS)
    loader = Loader(SHAPE, prefill_tokens_per_s=1.0)
    assert not loader.bytes_per_s
    found = list(loader.load(chunks, [*segments, unplanned], 700))
    assert [segment for segment, _ in found] == segments
    for number, (_, kv) in enumerate(found):
        if number == 3:
            assert kv == "absent"
        else:
            assert isinstance(kv, LoadedKV) and float(kv.kv()[1, 0, 5, 0, 0]) == number
    assert loader.bytes_per_s[""] > 0
    list(loader.load(chunks, [unplanned], 100))
    assert not loader.bytes_per_s


def test_a_read_that_hangs_holds_up_neither_the_next_plan_nor_the_end_of_the_process(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 6)
    hanging = chunk_store(ThrottledStore(chunks.store, Throttle(1.0)), chunks.scope, SHAPE)  # days
    found = [kv for _, kv in Loader(SHAPE, prefill_tokens_per_s=1e9).load(hanging, segments, TOKENS)]
    assert found == ["too slow"] * 6
    started = [thread for thread in threading.enumerate() if thread.name == "lmcache-rag-load"]
    assert 0 < len(started) <= 4 and all(thread.daemon for thread in started)
    assert all(isinstance(kv, LoadedKV) for _, kv in Loader(SHAPE, 0.0).load(chunks, segments, TOKENS))


def test_many_objects_are_not_in_memory_at_once(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 30)
    reads: list[str] = []

    class Counting(ChunkStore):
        def load(self, name: str, shape: KVShape, part: range | None = None) -> LoadedKV | str:
            reads.append(name)
            return super().load(name, shape, part)

    found = Loader(SHAPE, 0.0).load(
        Counting(chunks.store, chunks.scope, "raw", ModelCodecs(chunks.store, chunks.scope.model, SHAPE)),
        segments,
        TOKENS,
    )
    next(found)
    time.sleep(0.3)
    assert len(reads) <= 10
    assert len(list(found)) == 29 and len(reads) == 30


def test_a_slow_store_is_given_up_and_its_rate_is_not_overestimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_rag.blend.loading._PATIENCE_S", 1.0)
    chunks, segments = stored(tmp_path, 20)
    size = chunks.store.size(segments[0].name or "")
    assert size is not None
    slow = chunk_store(
        ThrottledStore(chunks.store, Throttle(size / 0.2)), chunks.scope, SHAPE
    )  # 0.2 s an object, 4 s all of them
    loader = Loader(SHAPE, prefill_tokens_per_s=1e9)
    found = [kv for _, kv in loader.load(slow, segments, TOKENS)]
    assert isinstance(found[0], LoadedKV) and found[-1] == "too slow"
    assert loader.bytes_per_s[""] < size / 0.2
    assert [kv for _, kv in loader.load(chunks, segments, TOKENS)] == ["too slow"] * 20  # nobody waits again
    patient = Loader(SHAPE, prefill_tokens_per_s=TOKENS / 100)  # computing would take 100 s
    assert all(isinstance(kv, LoadedKV) for _, kv in patient.load(slow, segments[:4], TOKENS))


class Pauses:
    """Of a caller that does something else for a while, and counts that."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def take(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.seconds += time.perf_counter() - start


def test_reads_that_are_waited_for_in_pauses_are_given_up_too(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 6)
    hanging = chunk_store(ThrottledStore(chunks.store, Throttle(1.0)), chunks.scope, SHAPE)  # days
    loader, pauses, found = Loader(SHAPE, prefill_tokens_per_s=1e9), Pauses(), []
    for each in loader.load(hanging, segments, TOKENS, may_wait=lambda: False, paused_s=pauses):
        if each is None:
            pauses.take(0.02)
        else:
            found.append(each[1])
    assert found == ["too slow"] * 6
    assert loader.bytes_per_s.keys() == {""}


def test_what_is_read_in_pauses_is_measured_and_not_blamed_for_them(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 8)
    loader, pauses, found = Loader(SHAPE, prefill_tokens_per_s=1e9), Pauses(), []
    for each in loader.load(chunks, segments, TOKENS, may_wait=lambda: False, paused_s=pauses):
        pauses.take(0.1)  # 0.8 s in all, more than what is waited for
        if each is not None:
            found.append(each[1])
    assert all(isinstance(kv, LoadedKV) for kv in found) and len(found) == 8
    size = chunks.store.size(segments[0].name or "")
    assert size is not None and loader.bytes_per_s[""] > 8 * size / 0.8  # read while the caller paused


def test_a_slow_tier_does_not_keep_others_from_being_read(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 6)
    hanging = chunk_store(ThrottledStore(chunks.store, Throttle(1.0)), chunks.scope, SHAPE)
    loader = Loader(SHAPE, prefill_tokens_per_s=1e9)
    slow = [replace(segment, tier="bucket") for segment in segments]
    assert [kv for _, kv in loader.load(hanging, slow, TOKENS)] == ["too slow"] * 6
    assert loader.bytes_per_s.keys() == {"bucket"}
    mixed = [slow[0], *segments[1:3], slow[3]]
    found = list(loader.load(chunks, mixed, TOKENS))
    assert [segment for segment, _ in found] == mixed
    assert [isinstance(kv, LoadedKV) for _, kv in found] == [False, True, True, False]
    hot = HotChunks(ChunkStores(chunks.store, "model", "raw", ModelCodecs(chunks.store, "model", SHAPE)), 1 << 30)
    for _ in range(2):
        hot.load(slow[3].name or "", SHAPE)
    found = list(loader.load(hot, mixed, TOKENS))
    assert [not isinstance(kv, str) for _, kv in found] == [False, True, True, True]  # it is in memory


def test_a_tier_whose_objects_waited_behind_a_slow_one_is_not_blamed(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 6)
    hanging = chunk_store(ThrottledStore(chunks.store, Throttle(1.0)), chunks.scope, SHAPE)
    loader = Loader(SHAPE, prefill_tokens_per_s=1e9)
    mixed = [replace(segment, tier="bucket") for segment in segments[:4]] + [
        replace(segment, tier="disk") for segment in segments[4:]
    ]
    assert [kv for _, kv in loader.load(hanging, mixed, TOKENS)] == ["too slow"] * 6
    assert loader.bytes_per_s.keys() == {"bucket"}
    found = [kv for _, kv in loader.load(chunks, mixed, TOKENS)]
    assert [isinstance(kv, LoadedKV) for kv in found] == [False] * 4 + [True] * 2


def test_a_goal_is_cut_to_the_patience_so_that_nothing_is_given_up(tmp_path: Path) -> None:
    codecs = ModelCodecs(DiskStore(tmp_path), "model", SHAPE)
    chunks = ChunkStore(DiskStore(tmp_path), KVScope("default", "model"), "q4", codecs, extra=("raw",))
    segments = []
    for number in range(10):
        token_ids = np.arange(TOKENS, dtype=np.int32) + number
        chunks.save(ChunkKV(token_ids, torch.randn(8, 2, TOKENS, 4, 32)), NO_CONTEXT)
        name = chunks.name(token_ids, NO_CONTEXT)
        forms = tuple(chunks.forms(name))
        segments.append(PlannedSegment(number * TOKENS, TOKENS, name=name, forms=forms))
    raw, q4 = (form.size_bytes for form in segments[0].forms)
    tokens = 10 * TOKENS
    loader = Loader(SHAPE, prefill_tokens_per_s=tokens / 2.0)  # loading is given up after half of 2 s
    slow = ThrottledStore(chunks.store, Throttle(10 * raw / 2.0))  # all of `raw` takes 2 s
    throttled = ChunkStore(slow, chunks.scope, "q4", codecs, extra=("raw",))
    found = [kv for _, kv in loader.load(throttled, segments, tokens, seconds=1.9)]
    assert all(isinstance(kv, LoadedKV) for kv in found)
    codecs = [kv.codec for kv in found if isinstance(kv, LoadedKV)]
    assert "q4" in codecs and raw > 3 * q4


def test_an_error_in_choosing_reaches_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, segments = stored(tmp_path, 1)
    monkeypatch.setattr("lmcache_rag.blend.streaming.Stream.choose", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(Loader(SHAPE, 0.0).load(chunks, segments, TOKENS, seconds=1.0))


class HangingStore(DiskStore):
    """Reads nothing until it is released."""

    released = threading.Event()

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        self.released.wait()
        return super().read(name, start, length)


def load_threads() -> int:
    return sum(thread.name == "lmcache-rag-load" for thread in threading.enumerate())


def test_reads_that_hang_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.blend.loading.REMEMBERED_S", -1.0)  # each plan tries again
    monkeypatch.setattr("lmcache_rag.blend.loading._PATIENCE_S", 0.01)
    chunks, segments = stored(tmp_path, 6)
    hanging = chunk_store(HangingStore(tmp_path), chunks.scope, SHAPE)
    loader, before = Loader(SHAPE, prefill_tokens_per_s=1e9), load_threads()
    for _ in range(50):
        assert [kv for _, kv in loader.load(hanging, segments, TOKENS)] == ["too slow"] * 6
        assert load_threads() - before <= 8
    monkeypatch.setattr("lmcache_rag.blend.loading._PATIENCE_S", 10.0)
    HangingStore.released.set()
    found: list[LoadedKV | str] = ["too slow"]
    while "too slow" in found:  # until the threads are back
        found = [kv for _, kv in loader.load(hanging, segments, TOKENS)]
    assert all(isinstance(kv, LoadedKV) for kv in found)


def test_a_plan_that_is_given_up_begins_no_further_reads(tmp_path: Path) -> None:
    chunks, segments = stored(tmp_path, 30)
    loader, before = Loader(SHAPE, 0.0), load_threads()
    plan = loader.load(chunks, segments, TOKENS)
    next(plan)
    plan.close()  # type: ignore[attr-defined]
    while load_threads() > before:  # none is left waiting for somebody to take what it has read
        continue
    assert len(list(loader.load(chunks, segments, TOKENS))) == 30
