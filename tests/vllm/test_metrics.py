"""What is summed for /metrics of the tiers of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.vllm.metrics import ReusePromMetrics, ReuseStats

NAME = "default/model/ab/abcd/0000.raw.v3"


class Counter:
    """One of Prometheus' counters, as far as it is used."""

    def __init__(self, sums: dict[tuple[str, ...], float], name: str, **_: Any) -> None:
        self.sums, self.name, self.own = sums, name, ()

    def labels(self, *labels: str) -> Counter:
        labelled = Counter(self.sums, self.name)
        labelled.own = labels
        return labelled

    def inc(self, value: float) -> None:
        self.sums[self.name, *self.own] = self.sums.get((self.name, *self.own), 0) + value


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

    sums: dict[tuple[str, ...], float] = {}
    metrics = ReusePromMetrics.__new__(ReusePromMetrics)
    metrics._counter_cls = lambda **fields: Counter(sums, **fields)  # type: ignore[assignment]
    metrics.per_engine_labelvalues = {0: ["model"]}
    metrics._make(["model_name"])
    metrics.observe(told)
    assert sums["vllm:lmcache_rag_tier_read_bytes", "model", "cache"] == 5
    assert ("vllm:lmcache_rag_tier_hits", "model", "s3://bucket") in sums
