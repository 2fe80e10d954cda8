"""The load generator on a tiny model: every question is answered, in each mode, and failures come through."""

from __future__ import annotations

import pytest

from lmcache_rag.bench.throughput import bench_throughput
from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import PromptError

LOAD = {"requests": 5, "pool": 6, "passages": 3, "passage_tokens": 60, "answer_tokens": 3, "seed": 0}


def test_rows(llama: LocalEngine) -> None:
    rows = bench_throughput(llama, concurrency=[1, 3], progress=lambda _: None, **LOAD)
    assert [(row["mode"], row["concurrency"]) for row in rows] == [
        (mode, callers) for callers in (1, 3) for mode in ("full", "prefix_cache", "blend")
    ]
    assert all(row["requests_per_s"] > 0 and 0 < row["ttft_p50_s"] <= row["ttft_p95_s"] for row in rows)
    assert all(row["tpot_p50_s"] > 0 for row in rows)


def test_a_failing_request_ends_it(llama: LocalEngine) -> None:
    with pytest.raises(PromptError, match="takes 1023 at most"):
        bench_throughput(llama, concurrency=[2], progress=lambda _: None, **{**LOAD, "passage_tokens": 400})
