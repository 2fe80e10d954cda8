"""Lossy codecs inside vLLM: near the truth, kept apart from exact KV, and never garbage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.throttled import Throttle
from lmcache_rag.chunk_kv import base_of, codec_in, key_of, variant_of
from lmcache_rag.codec import unpack
from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.library.names import parsed
from lmcache_rag.request import BlendOptions
from tests.conftest import Engines
from tests.helpers import OFF, answer, ingest, noise, parts, random_plan
from tests.models import make_tiny

pytestmark = pytest.mark.usefixtures("no_engine")

REUSE = BlendOptions(selector="none", ratio=0.0)
GOAL = BlendOptions(selector="none", ratio=0.0, ttft_goal_s=0.6)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = tmp_path_factory.mktemp("codec")
    return EngineSettings(
        model=str(make_tiny("llama", folder / "llama")),
        store=folder / "kv",
        codec="balanced",
        extra_codecs=("small", "raw"),
        dtype="float32",
        kv_cache_bytes=64 << 20,
        primed=False,
    )


@pytest.fixture(scope="module")
def engine(
    engines: Engines, settings: EngineSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEngine]:
    engines.close()
    with pytest.MonkeyPatch.context() as patch, LocalEngine(settings) as started:
        patch.setenv("LMCACHE_RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        started.codec.keep(started.codec.learn([random_plan(seed, chunks=(200, 200)) for seed in range(8)]))
        yield started


@contextmanager
def without_tables(store: Path) -> Iterator[None]:
    tables = store / ".tables"
    tables.rename(store / ".away")
    try:
        yield
    finally:
        shutil.rmtree(tables, ignore_errors=True)
        (store / ".away").rename(tables)


def test_where_there_are_no_tables_they_are_learned_once(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path))
    monkeypatch.setattr("lmcache_rag.learn.codec.mixed", lambda own, built_in: [random_plan(1), *own[:1]])
    with without_tables(engine.store.root):
        engine.codec.ensure(["w20 w30 w40 " * 300])
        assert "once for this model" in capsys.readouterr().err
        learned = engine.codec.tables.last()
        engine.codec.ensure()
        again = engine.codec.tables.last()
        assert learned is not None and again is not None and again.digest == learned.digest
        assert not capsys.readouterr().err


def test_a_chunk_is_stored_once_and_as_a_residual_and_reused_as_their_sum(engine: LocalEngine) -> None:
    plan = random_plan(77)
    preamble, chunks, _ = parts(plan)
    assert not engine.precompute(preamble, chunks, primer=list(range(100, 155))).errors
    stored = [engine.chunk_store().records.variants(key_of(chunk)) for chunk in chunks]
    assert all({codec_in(form) for form in forms if base_of(form)} == {"balanced", "small"} for forms in stored)
    assert engine.precompute(preamble, chunks, primer=list(range(100, 155))).present == len(chunks)
    _, done = answer(engine, plan, REUSE, tokens=1)
    first = engine.chunk_store().variants(key_of(chunks[0]))[variant_of(preamble)]
    assert (done.reuse.mode, done.reuse.missed_tokens) == ("blend", 0)
    assert done.reuse.exact_tokens == len(preamble) + len(chunks[0])
    assert base_of(parsed(first.name)[1]) and done.reuse.bytes_loaded > first.size_bytes


def test_what_is_stored_is_small_and_near_the_truth(engine: LocalEngine) -> None:
    plan = random_plan(70, chunks=(200,))
    ingest(engine, plan)
    _, chunks, _ = parts(plan)
    stored = engine.chunk_store()
    [name] = (form.name for form in stored.variants(key_of(chunks[0])).values())
    sizes = {form.name.split(".")[-2]: form.size_bytes for form in stored.forms(name)}
    assert list(sizes) == ["raw", "balanced", "small"]
    assert sizes["raw"] > 5 * sizes["balanced"] > 5 * sizes["small"]
    expected, _ = answer(engine, plan, OFF, tokens=1)
    reused, done = answer(engine, plan, REUSE, tokens=1)
    assert done.reuse.codecs == {"balanced": sum(map(len, chunks))}  # the preamble is in memory
    assert float((reused - expected).abs().max()) < 0.7
    elsewhere, _ = answer(engine, random_plan(75, chunks=(200,)), OFF, tokens=1)
    assert float((elsewhere - expected).abs().max()) > 2.0


def test_ratio_1_is_full_prefill_all_the_same(engine: LocalEngine) -> None:
    plan = random_plan(74)
    ingest(engine, plan)
    expected, _ = answer(engine, plan, OFF)
    for options in (BlendOptions(ratio=1.0), BlendOptions(selector="all")):
        found, done = answer(engine, plan, options)
        assert done.reuse.mode == "blend" and "balanced" in done.reuse.codecs
        torch.testing.assert_close(found, expected, atol=20 * noise(engine, plan), rtol=0)


def test_lossy_kv_is_never_found_by_exact_requests(engine: LocalEngine) -> None:
    plan = random_plan(71, preamble=64, chunks=(200, 50))
    ingest(engine, plan)
    _, blended = answer(engine, plan, REUSE, salt="shared")
    assert blended.reuse.exact_tokens == 264  # in place, but for what the codec lost
    _, exact = answer(engine, plan, OFF, salt="shared")
    assert exact.reuse.local_tokens == 64  # the preamble, which is stored lossless
    again, third = answer(engine, plan, REUSE, salt="shared")
    assert third.reuse.local_tokens >= 300 and "blended" in third.reuse.reason
    assert torch.isfinite(again).all()


def test_a_preamble_is_never_made_from_lossy_kv(engine: LocalEngine) -> None:
    """A chunk that was computed alone has the name of a preamble, but for its codec."""
    plan = random_plan(76, preamble=150, chunks=(60,))
    preamble, chunks, _ = parts(plan)
    assert not engine.precompute([], [preamble]).errors
    stored = engine.chunk_store()
    stored.refresh()
    form = stored.preamble(preamble)
    assert form is not None
    computed = engine.store.read(form.name)
    assert computed is not None
    before = unpack(computed).coded
    engine.store.delete([form.name])
    assert not engine.precompute(preamble, chunks).errors
    again = engine.store.read(form.name)
    assert again is not None
    for group, layer in np.ndindex(*before.places.shape[:2]):
        streams = (stored.stream(group, layer) for stored in (before, unpack(again).coded))
        numbers = (torch.frombuffer(bytearray(stream), dtype=torch.float32) for stream in streams)
        torch.testing.assert_close(*numbers, atol=1e-4, rtol=1e-4)


def test_requests_with_different_goals_do_not_share_blends(engine: LocalEngine) -> None:
    plan = random_plan(77, chunks=(200, 200))
    ingest(engine, plan)
    answer(engine, plan, REUSE, salt="goals")
    _, same = answer(engine, plan, REUSE, salt="goals")
    assert same.reuse.local_tokens >= 400
    _, other = answer(engine, plan, GOAL, salt="goals")
    assert other.reuse.local_tokens <= plan.preamble_length


def test_missing_tables_are_a_miss_with_a_reason(
    engine: LocalEngine, settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path))
    plan = random_plan(72)
    ingest(engine, plan)
    for segment in plan.segments:
        [form] = engine.chunk_store().variants(key_of(plan.token_ids[segment.start : segment.end])).values()
        engine.store.delete([form.name.replace(".balanced.", f".{codec}.") for codec in ("raw", "small")])
    engine.close()
    with without_tables(Path(settings.store)), LocalEngine(settings) as other:
        expected, _ = answer(other, plan, OFF)
        found, done = answer(other, plan, REUSE)
        assert done.reuse.misses == {"coded with tables that are missing": 257}
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("throttle", "codec"),
    [(None, "raw"), (Throttle(6e5), "balanced"), (Throttle(1e5), "small")],
    ids=["fast", "slower", "slow"],
)
def test_a_goal_takes_the_codec_that_is_in_time(
    settings: EngineSettings, throttle: Throttle | None, codec: str
) -> None:
    changes = {"throttle": throttle, "max_num_batched_tokens": 256, "never_slower": False}
    with LocalEngine(settings.model_copy(update=changes)) as other:
        plan = random_plan(73, chunks=(150,) * 5)
        ingest(other, plan)
        _, done = answer(other, plan, GOAL)
        assert done.reuse.codecs[codec] >= 300, done.reuse
        assert done.reuse.missed_tokens == 0
