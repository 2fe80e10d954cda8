"""What a forked child process may not use: each says so at once, where a wait would never end."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmcache_rag.blend.loading import Loader
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, KVShape
from lmcache_rag.corpus.database import Database
from lmcache_rag.engine import EngineSettings, LocalEngine, Sampling
from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.plan.plan import PlannedSegment
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, chunk_store


def in_a_fork(use: Callable[[], Any]) -> str:
    """The error that `use` raises in a forked child; nothing where it raises none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            use()
            sender.send("")
        except LmcacheRagError as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    answered = receiver.poll(30)
    process.kill()
    process.join()
    assert answered, "the child hangs"
    return receiver.recv()


def test_an_engine(llama: LocalEngine) -> None:
    sampling = Sampling(max_tokens=1)
    stream = llama.stream([5, 6, 7], Sampling(max_tokens=4, ignore_eos=True), OFF)
    next(stream)
    uses: list[Callable[[], Any]] = [
        lambda: llama.generate([5, 6, 7], sampling, OFF),
        lambda: next(stream),
        lambda: asyncio.run(llama.agenerate([5, 6, 7], sampling, BlendOptions())),
        lambda: llama.precompute([5], [[6, 7]]),
        llama.codec.ensure,
        lambda: LocalEngine(llama.settings),
    ]
    for use in uses:
        found = in_a_fork(use)
        assert found.startswith("EngineError: The engine belongs to the process") and "spawn" in found
    assert in_a_fork(llama.close) == ""  # there is nothing to close
    assert llama.generate([5, 6, 7], sampling, OFF).token_ids  # and the parent's goes on


def test_a_lock_that_was_held_when_the_process_was_forked(no_engine: None) -> None:
    """By another thread that starts an engine; the child's own start goes on, and says that there is no such model."""
    with LocalEngine._start_lock:
        settings = EngineSettings(model="/nowhere/at/all", store=Path("/dev/null/kv"))
        assert in_a_fork(lambda: LocalEngine(settings)).startswith("ModelError")


def test_an_open_index(tmp_path: Path) -> None:
    database = Database(tmp_path / "index.db")
    assert in_a_fork(database.documents).startswith("CorpusError: The open index belongs to the process")
    assert in_a_fork(database.close) == ""
    assert database.documents() == {}


def test_a_loader(tmp_path: Path) -> None:
    shape = KVShape(1, 1, 8, torch.float32)
    loader, chunks = Loader(shape, 0.0), chunk_store(DiskStore(tmp_path), KVScope("default", "model"), shape)
    segments = [PlannedSegment(0, 4, name="default/model/aa/aa/0.raw.v2")]
    assert [kv for _, kv in loader.load(chunks, segments, 4)] == ["absent"]
    assert "of stored KV belongs to the process" in in_a_fork(lambda: list(loader.load(chunks, segments, 4)))
