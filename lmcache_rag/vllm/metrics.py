"""Reuse figures summed over requests, on vLLM's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmcache_rag.blobs.tier import TierStats
from lmcache_rag.vllm.metadata import Refined

_TOKENS = (
    "prompt",
    "local",
    "reused",
    "recomputed",
    "missed",
    "unknown",
    "vllm",
    "exact",
    "foreign",
    "hot",
    "stored",
    "continued",
)
_EVICTED = ("evicted_objects", "evicted_bytes")
_OF_TIERS = {
    "reads": "Reads of a tier of the store.",
    "read_bytes": "Bytes that a tier of the store gave.",
    "seconds": "Seconds that reading a tier of the store took, of all threads together.",
    "hits": "Reads that found what they were for in a tier of the store.",
    "evictions": "Objects that had to make room in a cache.",
    "failures": "What a tier of the store could not do.",
}
_COUNTED = (*(f"{kind}_tokens" for kind in _TOKENS), "bytes_loaded", "bytes_stored", *_EVICTED)


@dataclass
class ReuseStats(KVConnectorStats):
    """Sums since they were last taken. Flat: counter name -> value; `requests:MODE`, `failures:KIND`,
    `phase_seconds:PHASE`."""

    data: dict[str, Any] = field(default_factory=dict)

    def add(self, report: dict[str, Any]) -> None:
        """Add one request's report."""
        added = {name: report[name] for name in _COUNTED}
        added[f"requests:{report['mode']}"] = 1
        if report["failure"]:
            added[f"failures:{report['failure']}"] = 1
        added |= {f"phase_seconds:{phase}": seconds for phase, seconds in report["phases_s"].items()}
        self._sum(added)

    def refined(self, tokens: int, refined: Refined) -> None:
        """Add what was done while the engine was idle: tokens whose exact KV is in the prefix cache now, bytes stored
        and deleted, and what went wrong, if anything."""
        added = {
            "refined_tokens": tokens,
            "bytes_stored": refined.stored_bytes,
            "evicted_objects": refined.evicted.objects,
            "evicted_bytes": refined.evicted.size_bytes,
            f"failures:{refined.failure}": int(bool(refined.failure)),
        }
        self._sum({name: value for name, value in added.items() if value})

    def tiers(self, before: Mapping[str, TierStats], now: Mapping[str, TierStats]) -> None:
        """Add what was done with each tier of the store in between."""
        for label, stats in now.items():
            old = before.get(label, TierStats())
            self._sum({f"tier_{name}:{label}": getattr(stats, name) - getattr(old, name) for name in _OF_TIERS})

    def take(self) -> ReuseStats:
        """The sums so far, which start again from zero."""
        taken = ReuseStats(self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self._sum(other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data

    def _sum(self, added: dict[str, Any]) -> None:
        for name, value in added.items():
            self.data[name] = self.data.get(name, 0) + value


class ReusePromMetrics(KVConnectorPromMetrics):
    """`vllm:lmcache_rag_{prompt,reused,...}_tokens_total`, `vllm:lmcache_rag_requests_total{mode}`, and so on."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._make(labelnames)

    def _make(self, labelnames: list[str]) -> None:
        counter = self._counter_cls
        self._plain: dict[str, Any] = {
            name: counter(
                name=f"vllm:lmcache_rag_{name}", documentation=f"Sum of {name} over requests.", labelnames=labelnames
            )
            for name in (*_COUNTED, "refined_tokens")
        }
        self._by_label: dict[str, Any] = {
            "requests": counter(
                name="vllm:lmcache_rag_requests",
                documentation="Requests by what was done.",
                labelnames=[*labelnames, "mode"],
            ),
            "failures": counter(
                name="vllm:lmcache_rag_failures",
                documentation="Requests that an exception kept from being blended or stored, by its type.",
                labelnames=[*labelnames, "kind"],
            ),
            "phase_seconds": counter(
                name="vllm:lmcache_rag_phase_seconds",
                documentation="Seconds spent per phase of blending.",
                labelnames=[*labelnames, "phase"],
            ),
        } | {
            f"tier_{name}": counter(
                name=f"vllm:lmcache_rag_tier_{name}", documentation=said, labelnames=[*labelnames, "tier"]
            )
            for name, said in _OF_TIERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            family, _, label = name.partition(":")
            if family in self._by_label:
                self._by_label[family].labels(*engine, label).inc(value)
            elif name in self._plain:
                self._plain[name].labels(*engine).inc(value)
