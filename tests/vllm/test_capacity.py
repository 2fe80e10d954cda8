"""A limit of what is stored, in a real engine: it holds, what is evicted is reported and counted, uses are recorded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.library import room
from lmcache_rag.library.room import Evicted
from lmcache_rag.request import ReuseReport
from lmcache_rag.vllm.metadata import Refined
from lmcache_rag.vllm.metrics import ReuseStats
from tests.helpers import ingest, random_plan
from tests.models import make_tiny


def test_what_is_evicted_is_counted() -> None:
    stats = ReuseStats()
    stats.add(ReuseReport(evicted_objects=3, evicted_bytes=9).model_dump())
    stats.refined(0, Refined(evicted=Evicted(1, 2)))
    assert (stats.data["evicted_objects"], stats.data["evicted_bytes"]) == (4, 11)


def test_a_limit(tmp_path: Path, no_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "INTERVAL_S", 0.0)
    make_tiny("llama", tmp_path / "model")
    settings = EngineSettings(
        model=str(tmp_path / "model"),
        store=tmp_path / "kv",
        dtype="float32",
        kv_cache_bytes=64 << 20,
        primed=False,
        capacity_bytes="1MiB",  # type: ignore[arg-type]
    )
    draw, limit = random.Random(1), 1 << 20
    with LocalEngine(settings) as engine:
        count = 2 * limit // (100 * engine.kv_bytes_per_token) + 1
        chunks = [[draw.randrange(4, 380) for _ in range(100)] for _ in range(count)]
        report = engine.precompute(range(4, 20), chunks)
        assert not report.errors and report.evicted_objects > 0
        assert limit / 2 < engine.chunk_store().records.size_bytes <= limit
        plan = random_plan(3)
        for _ in range(5):  # of what was stored in the same second, any may have to make room
            ingest(engine, plan)
            before = engine.chunk_store().records.position
            missed = engine.generate(plan).reuse.missed_tokens
            if not missed:
                break
        assert not missed
        records = engine.chunk_store().records
        engine.close()
        records.refresh()
        assert records.position != before
