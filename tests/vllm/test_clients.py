"""What clients of a server may do, and what comes of options that are none."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.metrics.stats import PrefillStats

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.planner import Planner
from lmcache_rag.records.part import VariantRow
from lmcache_rag.request import INGEST_KEY, PARAMS_KEY, ReuseReport, grant_of
from lmcache_rag.vllm.admission import namespace_of_salt
from lmcache_rag.vllm.choosing import Choice, Held
from lmcache_rag.vllm.config import ConnectorConfig
from lmcache_rag.vllm.connector import _warn_of_failures
from lmcache_rag.vllm.metadata import StepReports
from lmcache_rag.vllm.scheduler_half import SchedulerHalf, _count_cached


def half_of(folder: Path, **settings: Any) -> SchedulerHalf:
    """Over an empty store."""
    config = ConnectorConfig(store=folder, **settings)
    planner = Planner(
        ChunkStores(DiskStore(folder), "model", config.codec),
        ASSUMED,
        namespace=config.namespace,
        matcher=Matcher(config.min_match_tokens, config.match_unit_tokens),
        max_tokens=1024,
        never_slower=config.never_slower,
    )
    return SchedulerHalf(planner, config, unsupported="", block_tokens=16, max_tokens=1024, step_tokens=2048)


def request_of(params: Any, cache_salt: str | None = None) -> Any:
    """A request of 64 tokens."""
    return SimpleNamespace(
        request_id="1", kv_transfer_params=params, prompt_token_ids=list(range(64)), num_prompt_tokens=64,
        lora_request=None, mm_features=[], prompt_embeds=None, pooling_params=None, resumable=False,
        skip_reading_prefix_cache=False, cache_salt=cache_salt, prefill_stats=None, block_hashes=[],
        update_block_hashes=lambda: None,
    )  # fmt: skip


def report_of(folder: Path, params: Any, **settings: Any) -> dict[str, Any]:
    """The report of a request with these `kv_transfer_params`."""
    half = half_of(folder, **settings)
    half.add(request_of(params))
    return half.report_of("1").model_dump()


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"namespace": "other"}, "clients_choose_namespace"),
        ({"namespace": "other", "segments": [[8, 16]]}, "clients_choose_namespace"),
        ({"mode": "precompute", "segments": [[8, 56]]}, "clients_precompute"),
        ({"mode": "precompute", "segments": [[8, 56]], "primer_tokens": 4}, "clients_precompute"),
    ],
)
def test_what_the_operator_has_to_allow(tmp_path: Path, options: dict[str, Any], setting: str) -> None:
    report = report_of(tmp_path, {PARAMS_KEY: options})
    assert report["mode"] == "plain" and setting in report["reason"]
    allowed = report_of(tmp_path, {PARAMS_KEY: options}, **{setting: True})
    assert setting not in allowed["reason"]


@pytest.mark.parametrize(
    ("key", "grant", "is_granted"),
    [
        ("key", grant_of("key"), True),
        ("key", grant_of("other"), False),
        ("key", "key", False),
        ("key", "schlüssel", False),
        ("key", None, False),
        ("", "", False),  # one is asked for, and none is known
        ("", grant_of(""), False),
    ],
)
def test_storing_takes_what_the_middleware_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, grant: str | None, is_granted: bool
) -> None:
    monkeypatch.setenv(INGEST_KEY, key)
    params = {PARAMS_KEY: {"mode": "precompute", "segments": [[8, 56]], "grant": grant}}
    report = report_of(tmp_path, params, clients_precompute=True, ingest_key=True)
    assert ("ingest key" not in report["reason"]) is is_granted
    assert not report["failure"]
    assert "ingest key" not in report_of(tmp_path, params, clients_precompute=True)["reason"], "a client's own engine"


@pytest.mark.parametrize(("salt", "mode"), [("one", "blend"), ("another", "plain"), (None, "plain"), ("", "plain")])
def test_each_cache_salt_has_a_namespace_of_its_own(tmp_path: Path, salt: str | None, mode: str) -> None:
    half = half_of(tmp_path, namespace_per_salt=True, never_slower=False)
    tokens = np.arange(8, 60, dtype=np.int32)
    chunks = ChunkStores(DiskStore(tmp_path), "model", "raw").of(namespace_of_salt("one"))
    chunks.records.add({key_of(tokens): tokens}, [VariantRow(key_of(tokens), f"{0:016}.raw", 1000, 1)])
    half.add(request_of(None, salt))
    plan = half._tracked["1"].plan
    assert (plan is not None) == (mode == "blend")
    assert "cache_salt" in half.report_of("1").reason or salt


def test_where_salts_have_namespaces_no_other_may_be_named(tmp_path: Path) -> None:
    settings = {"namespace_per_salt": True, "clients_choose_namespace": True}
    half = half_of(tmp_path, **settings)
    half.add(request_of({PARAMS_KEY: {"namespace": namespace_of_salt("one")}}, "another"))
    assert "may not choose a namespace" in half.report_of("1").reason


def test_the_engines_own_namespace_may_be_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, {PARAMS_KEY: {"namespace": "mine"}}, namespace="mine")
    assert report["reason"] == "no stored chunk in the prompt"


@pytest.mark.parametrize(
    "params",
    [
        "text",
        [1, 2],
        7,
        {PARAMS_KEY: "text"},
        {PARAMS_KEY: [["mode", "off"]]},
        {PARAMS_KEY: 7},
        {PARAMS_KEY: {1: 2}},
        {PARAMS_KEY: {"unknown": 1}},
        {PARAMS_KEY: {"ratio": float("nan")}},
        {PARAMS_KEY: {"ratio": 7}},
        {PARAMS_KEY: {"target_kl": float("nan")}},
        {PARAMS_KEY: {"target_kl": -1}},
        {PARAMS_KEY: {"ttft_goal_s": float("nan")}},
        {PARAMS_KEY: {"segments": [[-5, 10]]}},
        {PARAMS_KEY: {"segments": [[0, 2**80]]}},
        {PARAMS_KEY: {"segments": [[2**80, 1]]}},
        {PARAMS_KEY: {"segments": [[0, 10], [5, 10]]}},
        {PARAMS_KEY: {"segments": [[0, 0]]}},
        {PARAMS_KEY: {"segments": [[at, 1] for at in range(5000)]}},
        {PARAMS_KEY: {"namespace": "../other"}},
        {PARAMS_KEY: {"namespace": ".tables"}},
    ],
)
def test_options_that_are_none_give_plain_prefill(tmp_path: Path, params: Any) -> None:
    report = report_of(tmp_path, params, clients_choose_namespace=True, clients_precompute=True)
    assert report["mode"] == "plain" and not report["failure"]
    assert "invalid options" in report["reason"] or "behind the prompt" in report["reason"]
    assert report["vllm_tokens"] == 64


def test_a_policy_that_fails_requests_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for policy in ("recompute", "fail"):
        with caplog.at_level(logging.WARNING, "lmcache_rag"):
            _warn_of_failures(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy)))  # type: ignore[arg-type]
        assert ("kv_load_failure_policy" in caplog.text) == (policy == "fail")


def test_refinement_can_be_switched_off(tmp_path: Path) -> None:
    manager: Any = SimpleNamespace(enable_caching=True, block_pool=None)
    for refine, kept in (("idle", True), ("off", False)):
        half = half_of(tmp_path, refine=refine, learn="off")
        half.bind(manager)
        assert (half._refinements is not None) is kept and not half.has_idle_work()


def test_without_a_prefix_cache_nothing_is_refined(tmp_path: Path) -> None:
    half = half_of(tmp_path, refine="idle", learn="idle")
    half.bind(SimpleNamespace(enable_caching=False))  # type: ignore[arg-type]
    assert half._refinements is not None and half._chooser.prefixes is None
    half = half_of(tmp_path, refine="off", learn="off")
    half.bind(SimpleNamespace(enable_caching=False))  # type: ignore[arg-type]
    assert half._refinements is None


def test_the_misses_of_a_blend_that_was_preempted_are_not_counted_twice(tmp_path: Path) -> None:
    half = half_of(tmp_path)
    half.add(request_of(None))
    blended = ReuseReport(mode="blend", prompt_tokens=64, reused_tokens=24)
    blended.miss("absent", 30)
    for _ in range(2):
        half.receive(StepReports({"1": blended.model_dump()}))
        report = half.report_of("1")
        assert (report.missed_tokens, report.misses, report.vllm_tokens) == (30, {"absent": 30}, 10)


def test_a_blend_that_is_chosen_while_another_is_under_way_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exact in the prefix cache when a request came was evicted while it waited."""
    half, request = half_of(tmp_path), request_of(None)
    half.add(request)
    tracked = half._tracked["1"]
    plan = BlendPlan("prefix", "default", tuple(range(64)), PlannedSegment(0, 0), (), 60, "none", 0.0)
    held = Held(0, None, 0, tracked.names)

    def chosen_anew(*_: Any) -> bool:
        tracked.choice = Choice(plan, held, tracked.names)
        return False  # its blocks have the names that they had

    monkeypatch.setattr(half, "_chosen_anew", chosen_anew)
    half._blending = "another"
    assert half.matched_tokens(request, 0) is None
    half._blending = None
    assert half.matched_tokens(request, 0) == 60


def test_chunks_that_wait_to_be_stored_hold_up_those_only_that_would_too(tmp_path: Path) -> None:
    half = half_of(tmp_path, clients_precompute=True, never_slower=False)
    chunk = np.arange(8, 56, dtype=np.int32)
    chunks = ChunkStores(DiskStore(tmp_path), "model", "raw").of("default")
    chunks.records.add({key_of(chunk): chunk}, [VariantRow(key_of(chunk), f"{0:016}.raw", 1000, 1)])
    asked, storing = request_of(None), request_of({PARAMS_KEY: {"mode": "precompute", "segments": [[8, 56]]}})
    asked.request_id = "asked"
    for request in (asked, storing):
        half.add(request)
        assert half.matched_tokens(request, 0)
    half.receive(StepReports(placed={"a", "b", "c", "d"}))
    assert half.matched_tokens(storing, 0) is None and half.matched_tokens(asked, 0)
    half.receive(StepReports({"b": ReuseReport(mode="precompute").model_dump()}))
    assert half.matched_tokens(storing, 0)


def test_what_was_reused_before_a_preemption_and_after_it_is_no_more_than_the_prompt() -> None:
    """vLLM keeps the statistics of the first time, and asserts that they fit the prompt."""
    stats = PrefillStats()
    stats.set(64, 32, 0)
    request = request_of(None)
    request.prefill_stats = stats
    _count_cached(request, 48)
    assert (stats.num_local_cached_tokens, stats.num_external_cached_tokens) == (32, 32)


def test_while_a_request_is_there_nothing_else_keeps_the_engine_stepping(tmp_path: Path) -> None:
    half = half_of(tmp_path)
    half._refinements = [None]  # type: ignore[assignment]
    assert half.has_idle_work()
    half.add(request_of(None))
    assert not half.has_idle_work()


def test_a_blend_comes_to_an_end_however_busy_the_engine_is(tmp_path: Path) -> None:
    half = half_of(tmp_path)
    assert [half.take_jobs(scheduled).tokens for scheduled in (0, 8, 2040, 2048)] == [math.inf, 2040, 512, 512]
