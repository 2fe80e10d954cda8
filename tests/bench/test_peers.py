"""Peers side by side on a tiny model."""

from __future__ import annotations

import pytest

from lmcache_rag.bench.peers import WORKLOADS, Blending, KVBoost, PrefixCache, bench_peers
from lmcache_rag.engine import LocalEngine


def test_rows(llama: LocalEngine) -> None:
    pytest.importorskip("kvboost")
    peers = [PrefixCache(llama, 1.0), Blending(llama, 2.0), KVBoost(llama, "selective", 3.0)]
    rows = bench_peers(llama, peers, passages=3, passage_tokens=100, questions=1, progress=lambda _: None)
    assert [(row["peer"], row["workload"]) for row in rows] == [
        (peer.name, work) for peer in peers for work in WORKLOADS
    ]
    found = {(row["peer"], row["workload"]): row for row in rows}
    plain, ours = found["vLLM, prefix cache", "first"], found["lmcache-rag", "first"]
    assert plain["kl_first_token"] == pytest.approx(0, abs=1e-4) and plain["reused_share"] == 0
    assert ours["reused_share"] > 0.5
    assert found["vLLM, prefix cache", "same"]["reused_share"] > 0.5
    assert found["kvboost, selective", "first"]["reused_share"] == 0
