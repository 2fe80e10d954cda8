"""Exceptions at every stage of a blend: the request is answered by plain prefill, says so, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache_rag.blend.extrapolation import Extrapolation
from lmcache_rag.blend.passes import Pass
from lmcache_rag.blend.selectors import QuerySelector
from lmcache_rag.blend.workspace import Workspace
from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.plan.planner import Planner
from lmcache_rag.request import BlendOptions
from lmcache_rag.vllm.paged import PagedCache
from tests.helpers import OFF, answer, ingest, noise, parts, random_plan

QUERY = BlendOptions(selector="query", ratio=0.2)
HEAD = BlendOptions(selector="head", ratio=0.2)
_STORM = 210
"""Requests at once."""

STAGES: dict[str, tuple[type, str, BlendOptions, Exception]] = {
    "plan": (Planner, "plan", QUERY, ValueError("not planned")),
    "load": (ChunkStore, "load", QUERY, RuntimeError("not loaded")),
    "place": (Workspace, "place", QUERY, torch.OutOfMemoryError("no room")),
    "select": (QuerySelector, "select", QUERY, MemoryError()),
    "recompute": (Pass, "attention", HEAD, RuntimeError("not computed")),
    "extrapolate": (Extrapolation, "_weights", QUERY, torch.OutOfMemoryError("no room")),
    "write": (PagedCache, "write", QUERY, RuntimeError("not written")),
}


def fail_at(stage: str, patch: pytest.MonkeyPatch, when: Callable[[], bool] = lambda: True) -> None:
    """Have one stage of each blend raise, when asked to."""
    owner, name, _, error = STAGES[stage]
    whole = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if when():
            raise type(error)(*error.args)
        return whole(*args, **kwargs)

    patch.setattr(owner, name, failing)


def worker_half() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker


def scheduler_half(engine: LocalEngine) -> Any:
    return engine._loop.engine.engine_core.engine_core.scheduler.connector.scheduler


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_blend_is_plain_prefill_of_that_request(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    plan = random_plan(100)
    ingest(llama, plan)
    _, _, options, error = STAGES[stage]
    kind, tolerance = type(error).__name__, 20 * noise(llama, plan)
    expected, _ = answer(llama, plan, OFF)
    blended, _ = answer(llama, plan, options)
    with monkeypatch.context() as patch:
        fail_at(stage, patch)
        found, done = answer(llama, plan, options, stage)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    reuse = done.reuse
    assert (reuse.mode, reuse.reason, reuse.failure) == ("plain", f"failed: {kind}", kind)
    assert reuse.reused_tokens == reuse.recomputed_tokens == 0
    assert reuse.missed_tokens + reuse.vllm_tokens == reuse.prompt_tokens
    if stage != "plan":
        reusable = plan.segments[-1].end
        assert reuse.misses == {f"failed: {kind}": reusable}
    # What was not written is not found by an exact request, nor by the same one, and blending goes on.
    found, _ = answer(llama, plan, OFF, stage)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    found, done = answer(llama, plan, options)
    assert done.reuse.mode == "blend" and not done.reuse.failure
    torch.testing.assert_close(found, blended, atol=tolerance, rtol=0)


def test_failures_are_counted_and_each_kind_is_logged_once(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prometheus_client import REGISTRY

    def counted() -> dict[str, float]:
        samples = [sample for family in REGISTRY.collect() for sample in family.samples]
        return {
            sample.labels["kind"]: sample.value
            for sample in samples
            if sample.name == "vllm:lmcache_rag_failures_total"
        }

    plan = random_plan(101)
    ingest(llama, plan)
    worker_half()._failures._logged.clear()
    before = counted()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "lmcache_rag"):
        fail_at("select", patch)
        for _ in range(5):
            answer(llama, plan, QUERY)
    llama.generate([5, 6, 7], Sampling(max_tokens=2), OFF)  # flushes what the step before has counted
    assert counted()["MemoryError"] - before.get("MemoryError", 0.0) == 5
    (logged,) = [record for record in caplog.records if record.name.startswith("lmcache_rag")]
    assert logged.exc_info is not None and "MemoryError" in str(logged.exc_text or caplog.text)


def test_a_precompute_that_cannot_be_stored_says_so(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(102)
    preamble, chunks, _ = parts(plan)
    with monkeypatch.context() as patch:
        patch.setattr(ChunkStore, "save", lambda *_: 1 // 0)
        report = llama.precompute(preamble, chunks)
    assert (report.computed, report.errors) == (0, dict.fromkeys(range(3), "failed: ZeroDivisionError"))
    assert not llama.precompute(preamble, chunks).errors


def test_a_request_aborted_behind_a_failed_blend_leaves_nothing(
    llama: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were allocated and neither written nor computed."""
    plan = random_plan(103)
    ingest(llama, plan)
    expected, _ = answer(llama, plan, QUERY)
    with monkeypatch.context() as patch:

        def abort() -> bool:
            llama._loop.abort(next(iter(llama._loop._requests)))
            return True

        fail_at("write", patch, abort)
        sampling = Sampling(max_tokens=50, ignore_eos=True)
        llama._submit(plan, sampling, QUERY, "aborted", lambda _: None)
        llama.settle()
    found, done = answer(llama, plan, QUERY, "aborted")
    assert done.reuse.mode == "blend" and done.reuse.local_tokens == 0
    torch.testing.assert_close(found, expected, atol=20 * noise(llama, plan), rtol=0)


def test_blends_that_fail_among_ordinary_requests(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of seven blends raise, at each stage in turn: all requests are answered, and answered right."""
    plans = [random_plan(seed, chunks=(60, 80)) for seed in range(110, 118)]
    for plan in plans:
        ingest(llama, plan)
    tolerance = 20 * noise(llama, plans[0], tokens=2)
    exact = [answer(llama, plan, OFF, tokens=2)[0] for plan in plans]
    blended = [answer(llama, plan, QUERY, tokens=2)[0] for plan in plans]
    stages = ["", *(stage for stage in STAGES if stage != "plan")]
    worker, under_way, failed = worker_half(), itertools.count(), 0
    begin, stage = worker.begin, [""]

    def counted(job: Any) -> None:
        nonlocal failed
        stage[0] = stages[next(under_way) % len(stages)]
        failed += bool(stage[0])
        begin(job)

    monkeypatch.setattr(worker, "begin", counted)
    monkeypatch.setattr(worker._blender.loader, "_prefill_tokens_per_s", 0.0)  # nothing is given up on a busy machine
    for name in stages[1:]:
        fail_at(name, monkeypatch, lambda name=name: stage[0] == name)

    async def one(number: int) -> tuple[int, Completion]:
        which, options = number % len(plans), OFF if number % 3 == 2 else QUERY
        sampling = Sampling(max_tokens=2, ignore_eos=True, logprobs=-1)
        return which, await llama.agenerate(plans[which], sampling, options, cache_salt=f"storm {number}")

    async def all_of_them() -> list[tuple[int, Completion]]:
        return await asyncio.gather(*(one(number) for number in range(_STORM)))

    answers = asyncio.run(all_of_them())
    assert sum(bool(done.reuse.failure) for _, done in answers) == failed > _STORM / 2
    for which, done in answers:
        found = torch.stack([torch.tensor([row[token] for token in sorted(row)]) for row in done.logprobs])
        expected = blended if done.reuse.mode == "blend" else exact
        torch.testing.assert_close(found, expected[which], atol=tolerance, rtol=0)


def test_nothing_but_its_report_is_kept_of_a_request(llama: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished one, one whose blend failed, and one that was aborted."""
    plan = random_plan(104)
    ingest(llama, plan)
    plans: list[weakref.ref[Any]] = []
    planned = Planner.plan

    def noted(*args: Any, **named: Any) -> Any:
        made = planned(*args, **named)
        plans.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Planner, "plan", noted)
    answer(llama, plan, QUERY)
    with monkeypatch.context() as patch:
        fail_at("select", patch)
        answer(llama, plan, QUERY)
    stream = llama.stream(plan, Sampling(max_tokens=500, ignore_eos=True), QUERY, cache_salt="aborted")
    next(stream)
    stream.close()
    llama.generate([5, 6, 7], Sampling(max_tokens=1), OFF)
    gc.collect()
    assert [made() for made in plans] == [None] * 3
    half = scheduler_half(llama)
    assert not half._tracked and all(type(report) is dict for report in half._finished.values())
