"""A store from which reading takes longer than computing, and a prompt for which a blend costs more than it saves: the
answer is right, and it says so."""

from __future__ import annotations

from pathlib import Path

import torch

from lmcache_rag.blobs.throttled import Throttle
from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.plan.cost import Rates
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, connector, ingest, noise, random_plan
from tests.models import make_tiny

REPAIR = BlendOptions(ratio=0.2)


def settings_in(folder: Path) -> EngineSettings:
    return EngineSettings(
        model=str(make_tiny("llama", folder / "tiny")),
        store=folder / "kv",
        dtype="float32",
        kv_cache_bytes=64 << 20,
        primed=False,
        never_slower=True,
    )


def test_a_slow_store_is_plain_prefill(no_engine: None, tmp_path: Path) -> None:
    plan = random_plan(80, chunks=(200, 200, 200))
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        ingest(engine, plan)
    with LocalEngine(settings.model_copy(update={"throttle": Throttle(200_000)})) as engine:
        expected, _ = answer(engine, plan, OFF)
        # A tiny model computes as fast as it blends: as if it did not, until the store's rate is measured.
        connector(engine).scheduler._planner.cost.learn(Rates(prefill_tokens_per_s=1000, pass_s=0.001))
        given_up, first = answer(engine, plan, REPAIR)
        assert first.reuse.misses["too slow"] >= 400
        refused, second = answer(engine, plan, REPAIR)
        assert (second.reuse.mode, second.reuse.reason) == ("plain", "plain prefill is faster")
        assert second.reuse.misses == {"cheaper to compute": 600} and second.reuse.bytes_loaded == 0
        torch.testing.assert_close(given_up, expected, atol=20 * noise(engine, plan), rtol=0)
        assert torch.equal(refused, expected)


def test_where_a_blend_costs_more_than_it_saves_plain_prefill_is_what_happens(no_engine: None, tmp_path: Path) -> None:
    plan = random_plan(81)
    with LocalEngine(settings_in(tmp_path)) as engine:
        ingest(engine, plan)
        expected, _ = answer(engine, plan, OFF)
        cost = connector(engine).scheduler._planner.cost
        cost.learn(Rates(prefill_tokens_per_s=1000, pass_s=1.0))
        found, done = answer(engine, plan, REPAIR)
        assert (done.reuse.mode, done.reuse.reason) == ("plain", "plain prefill is faster")
        assert done.reuse.misses == {"cheaper to compute": sum(segment.length for segment in plan.segments)}
        assert torch.equal(found, expected)
        cost.learn(Rates(prefill_tokens_per_s=1000, pass_s=0.001))
        _, done = answer(engine, plan, REPAIR)
        assert done.reuse.mode == "blend"
