"""Chunks are stored while vLLM steps on: nobody else waits, few are kept in memory, and requests are answered after."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_rag.chunk_kv import ChunkKV
from lmcache_rag.conversation.prefixes import PIECE_TOKENS
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.room import Evicted
from lmcache_rag.request import BlendOptions, ReuseReport
from lmcache_rag.vllm.failures import Failures
from lmcache_rag.vllm.metadata import RefineJob
from lmcache_rag.vllm.saving import MOST_SAVING, Saved, Saving, _done, save_in_order
from lmcache_rag.vllm.worker_half import WorkerHalf
from tests.helpers import OFF, answer, connector, ingest, noise, parts, random_plan, worker_half

REPAIR = BlendOptions(ratio=0.2)
WHAT = ("namespace", b"key", "variant")


class Gate:
    """Where every chunk waits that is to be stored, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._opened = threading.Event()

    def wait(self) -> None:
        self.reached.release()
        self._opened.wait()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self.reached = threading.Semaphore(0)
        self._opened.clear()


@pytest.fixture
def gate(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(worker_half(), "_stores_aside", True)  # as over a network, also where nobody else waits
    closed, save = Gate(), ChunkStore.save

    def waiting(*arguments: Any) -> int:
        closed.wait()
        return save(*arguments)

    monkeypatch.setattr(ChunkStore, "save", waiting)
    yield closed
    closed.open()


def precompute(preamble: list[int], chunk: list[int]) -> tuple[list[int], Sampling, BlendOptions]:
    """What asks for one chunk."""
    options = BlendOptions(mode="precompute", segments=((len(preamble), len(chunk)),))
    return [*preamble, *chunk], Sampling(max_tokens=1), options


def test_others_are_answered_while_chunks_are_stored(llama: LocalEngine, gate: Gate) -> None:
    asked, stored = random_plan(900), random_plan(901)
    gate.open()
    ingest(llama, asked)
    expected, _ = answer(llama, asked, REPAIR)
    gate.close()
    preamble, chunks, _ = parts(stored)
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(llama.precompute, preamble, chunks)
        gate.reached.acquire()
        found, done = answer(llama, asked, REPAIR)
        assert not storing.done()
        gate.open()
        report = storing.result()
    tolerance = 20 * noise(llama, asked)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert done.reuse.mode == "blend" and not done.reuse.missed_tokens
    assert (report.computed, report.tokens) == (3, len(preamble) + sum(map(len, chunks)))
    # What is stored is what was computed for the chunks, though another prompt was blended in between.
    undisturbed = llama.precompute(preamble, chunks, namespace="undisturbed")
    assert undisturbed.computed == 3
    expected, _ = answer(llama, stored, BlendOptions(ratio=0.0, namespace="undisturbed"))
    found, done = answer(llama, stored, BlendOptions(ratio=0.0))
    assert done.reuse.reused_tokens == report.tokens
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_only_some_chunks_wait_in_memory(llama: LocalEngine, gate: Gate) -> None:
    plan = random_plan(902, chunks=(40,) * (MOST_SAVING + 3))
    preamble, chunks, _ = parts(plan)
    worker, ended = worker_half(), queue.SimpleQueue[ReuseReport]()
    counts, begin = list[int](), worker._storing.begin

    def counted(*arguments: Any, **named: Any) -> None:
        begin(*arguments, **named)
        counts.append(len(worker._storing._under_way))
        if len(counts) == MOST_SAVING:
            threading.Timer(0.0, gate.open).start()

    def deliver(delta: Any) -> None:
        if delta.completion is not None:
            ended.put(delta.completion.reuse)

    worker._storing.begin = counted
    try:
        for chunk in chunks:
            llama._submit(*precompute(preamble, chunk), None, deliver)
        reports = [ended.get() for _ in chunks]
    finally:
        worker._storing.begin = begin
    assert max(counts) == MOST_SAVING
    assert sum(report.stored_tokens for report in reports) == len(preamble) + sum(map(len, chunks))
    assert all(report.phases_s["store"] > 0.0 for report in reports)


def test_a_request_aborted_while_its_chunk_is_stored_leaves_no_blocks(llama: LocalEngine, gate: Gate) -> None:
    llama.settle()
    pool = connector(llama).scheduler._chooser.prefixes._pool
    free, plan = pool.get_num_free_blocks(), random_plan(903)
    preamble, chunks, _ = parts(plan)
    asked = llama._submit(*precompute(preamble, chunks[0]), None, lambda _: None)
    gate.reached.acquire()
    llama._loop.abort(asked.request_id)
    # A later request's answer is behind the abortion.
    llama.generate([5, 6, 7], Sampling(max_tokens=1), OFF, cache_salt=uuid.uuid4().hex)
    gate.open()
    llama.settle()
    assert not worker_half()._storing._under_way and not connector(llama).scheduler._tracked
    assert pool.get_num_free_blocks() == free
    assert llama.precompute(preamble, chunks[:1]).present == 1  # what was computed was not thrown away


def test_of_several_who_want_the_same_chunk_stored_one_has_it_computed(
    llama: LocalEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    preamble, chunks, _ = parts(random_plan(904, chunks=(50, 60)))
    worker, blended, ended = worker_half(), list[int](), queue.SimpleQueue[ReuseReport]()
    blend = worker._blender.blend

    def counted(plan: Any, *arguments: Any) -> Any:
        blended.append(len(plan.token_ids))
        return blend(plan, *arguments)

    def deliver(delta: Any) -> None:
        if delta.completion is not None:
            ended.put(delta.completion.reuse)

    monkeypatch.setattr(worker._blender, "blend", counted)
    for chunk in (chunks[0], chunks[0], chunks[1], chunks[0]):
        llama._submit(*precompute(preamble, chunk), None, deliver)
    gate.reached.acquire()
    llama.generate([5, 6, 7], Sampling(max_tokens=8, ignore_eos=True), OFF, cache_salt=uuid.uuid4().hex)
    gate.open()
    reports = [ended.get() for _ in range(4)]
    assert blended == [len(preamble) + len(chunk) for chunk in chunks]
    assert sorted(report.stored_tokens for report in reports) == [0, 0, 60, len(preamble) + 50]
    assert all(report.mode == "precompute" and not report.reason for report in reports)
    # Nor is it computed where it is stored; the request's blocks hold nobody's KV then.
    llama._submit(*precompute(preamble, chunks[0]), None, deliver)
    again = ended.get()
    assert len(blended) == 2 and not again.stored_tokens
    assert again.reused_tokens == len(preamble) + 50 and not again.missed_tokens
    assert not worker._blender.workspace.key[:, : len(preamble) + 50].any()


def test_on_a_cpu_what_nobody_waits_for_is_stored_in_the_step(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a thread would slow down what is computed meanwhile."""
    threads, save = set[str](), ChunkStore.save

    def noted(*arguments: Any) -> int:
        threads.add(threading.current_thread().name)
        return save(*arguments)

    monkeypatch.setattr(ChunkStore, "save", noted)
    ingest(llama, random_plan(905))
    assert len(threads) == 1 and not threads.pop().startswith("lmcache-rag-save")


@pytest.mark.parametrize(("is_missing", "stored"), [(False, Saved(200, 60)), (True, Saved(100, 20, is_full=True))])
def test_what_another_engine_stored_meanwhile_is_no_lack_of_room(is_missing: bool, stored: Saved) -> None:
    """A piece of a conversation whose record came after what is missing was listed; the pieces behind it are stored."""
    others = np.arange(20, 40)

    class Chunks:
        def save(self, kv: ChunkKV, variant: str) -> int:
            return 0 if kv.token_ids is others else 100

        def missing(self, token_ids: np.ndarray, variant: str) -> bool:
            return is_missing

    wanted = [(ChunkKV(ids, torch.zeros(1, 2, len(ids), 1, 8)), "v") for ids in (np.arange(20), others, np.arange(40))]
    assert save_in_order(Chunks(), wanted) == stored  # type: ignore[arg-type]


def test_a_conversation_that_makes_room_for_itself_is_stored_once() -> None:
    """Where there is room for one piece, each that is stored evicts the one before it."""
    held, stored = list[bytes](), list[bytes]()

    class Chunks:
        def follow(self) -> None:
            return

        def missing(self, token_ids: np.ndarray, variant: str) -> bool:
            return token_ids.tobytes() not in held

        def save(self, kv: ChunkKV, variant: str) -> int:
            held[:] = [kv.token_ids.tobytes()]
            stored.append(held[0])
            return 100

    half: Any = object.__new__(WorkerHalf)
    half._saving, half._stored_to = None, 0
    half._chats = SimpleNamespace(of=lambda _: Chunks())
    half._refiner = SimpleNamespace(taken=lambda _, length: torch.zeros(1, 2, length, 1, 8))
    half._saver = SimpleNamespace(submit=lambda save, *arguments: _done(lambda: save(*arguments)))
    tokens = tuple(range(20 * PIECE_TOKENS))
    job = RefineJob(tokens, "store", (), 0, "chats", None, last=True)
    steps = 0
    while not half._store(job).done:
        steps += 1
        assert steps <= 20
    assert len(stored) <= 20


class _Rooms:
    def take_evicted(self) -> Evicted:
        return Evicted(2, 300)


def saving_here() -> Saving:
    """Without a thread."""
    return Saving(None, _Rooms(), Failures())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason", "failure"),
    [
        (StoreError("The disk is full."), "The disk is full.", ""),
        (ZeroDivisionError(), "failed: ZeroDivisionError", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_stored_is_reported(error: Exception, reason: str, failure: str) -> None:
    def save() -> Saved:
        raise error

    saving = saving_here()
    saving.begin("7", ReuseReport(mode="precompute"), WHAT, save, here=True)
    ((request_id, report),) = saving.take()
    assert (request_id, report.reason, report.failure) == ("7", reason, failure)
    assert (report.stored_tokens, report.evicted_objects, report.evicted_bytes) == (0, 2, 300)
    assert "7" not in saving and not list(saving.take())


def test_what_is_stored_is_counted() -> None:
    saving = saving_here()
    saving.begin("7", ReuseReport(mode="precompute"), WHAT, lambda: Saved(100, 40, 10), here=True)
    ((_, report),) = saving.take()
    assert (report.bytes_stored, report.stored_tokens, report.reason) == (100, 50, "")


def test_who_joins_another_shares_its_end_and_stored_nothing() -> None:
    saving = saving_here()
    assert not saving.join("8", ReuseReport(mode="precompute"), WHAT)
    saving.begin("7", ReuseReport(mode="precompute"), WHAT, lambda: Saved(100, 40, 10), here=True)
    assert saving.join("8", ReuseReport(mode="precompute"), WHAT)
    assert not saving.join("9", ReuseReport(mode="precompute"), ("namespace", b"key", "another variant"))
    assert {request_id: report.stored_tokens for request_id, report in saving.take()} == {"7": 50, "8": 0}
