"""What is summed for /metrics, and told of single requests."""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.request import ReuseReport
from lmcache_rag.vllm import reports
from lmcache_rag.vllm.metrics import ReusePromMetrics, ReuseStats, totals

NAME = "default/model/ab/abcd/0000.raw.v3"


def test_each_tier_is_counted_since_it_was_last_told(tmp_path: Path) -> None:
    store = TieredStore([Cache("cache", DiskStore(tmp_path / "cache"))], DiskStore(tmp_path / "origin"), "s3://bucket")
    store.origin.write(NAME, [b"12345"])
    stats, before = ReuseStats(), store.stats()
    assert bytes(store.read(NAME) or b"") == b"12345"  # from the origin, and into the cache
    store.flush()
    now = store.stats()
    stats.tiers(before, now)
    told = stats.take().data
    assert told["tier_read_bytes:s3://bucket"] == 5 and told["tier_read_bytes:cache"] == 0
    store.read(NAME)
    stats.tiers(now, store.stats())
    told = stats.take().data
    assert told["tier_read_bytes:s3://bucket"] == 0 and told["tier_read_bytes:cache"] == 5

    registry = CollectorRegistry()
    observe(registry, told)
    labels = {"engine": "0", "tier": "cache"}
    assert registry.get_sample_value("vllm:lmcache_rag_tier_read_bytes_total", labels) == 5
    assert registry.get_sample_value("vllm:lmcache_rag_tier_hits_total", {**labels, "tier": "s3://bucket"}) is not None


def observe(registry: CollectorRegistry, told: dict[str, Any]) -> None:
    kinds = {kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = type("Config", (), {"kv_transfer_config": None})
    ReusePromMetrics(config, kinds, ["engine"], {0: ["0"]}).observe(told)


def test_a_report_is_told_as_it_is_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string may end the answer before vLLM says that it has ended."""
    known: OrderedDict[str, dict[str, Any]] = OrderedDict()
    monkeypatch.setattr(reports, "_reports", known)
    registry, stats = CollectorRegistry(), ReuseStats()
    early = ReuseReport(prompt_tokens=100).model_dump()
    late = ReuseReport(
        prompt_tokens=100, reused_tokens=60, recomputed_tokens=20, local_tokens=20, phases_s={"load": 0.02}
    ).model_dump()
    stats.tell("cmpl-1-0-0123abcd", early)
    stats.tell("cmpl-1-0-0123abcd", late)
    assert stats.reduce() == {}, "the log shows reports"
    stats.tell("cmpl-2-0-0123abcd", late, ended=True)
    observe(registry, stats.take().data)
    assert reports.report_of("cmpl-1") == late
    assert reports.report_of("cmpl-3") is None
    share = "vllm:lmcache_rag_request_reused_share"
    assert registry.get_sample_value(f"{share}_count", {"engine": "0"}) == 1
    assert registry.get_sample_value(f"{share}_sum", {"engine": "0"}) == 0.8
    ratio = "vllm:lmcache_rag_request_recompute_ratio"
    assert registry.get_sample_value(f"{ratio}_sum", {"engine": "0"}) == 0.25
    assert (
        registry.get_sample_value("vllm:lmcache_rag_request_phase_seconds_sum", {"engine": "0", "phase": "load"})
        == 0.02
    )


def test_totals_are_over_all_requests() -> None:
    registry, stats = CollectorRegistry(), ReuseStats()
    for reused in (60, 5):
        stats.add(ReuseReport(prompt_tokens=100, reused_tokens=reused, phases_s={"load": 0.02}).model_dump())
    observe(registry, stats.take().data)
    found = totals(registry)
    assert (found["prompt_tokens"], found["reused_tokens"], found["bytes_loaded"]) == (200, 65, 0)
    assert all(isinstance(value, int) for value in found.values())


def test_the_oldest_reports_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_reports", OrderedDict())
    monkeypatch.setattr(reports, "_KEPT", 2)
    for number in range(3):
        reports.note({f"cmpl-{number}-0-0123abcd": {"number": number}})
    assert [reports.report_of(f"cmpl-{number}") for number in range(3)] == [None, {"number": 1}, {"number": 2}]
