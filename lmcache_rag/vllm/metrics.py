"""Reuse figures summed over requests, on vLLM's Prometheus endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

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
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            family, _, label = name.partition(":")
            if family in self._by_label:
                self._by_label[family].labels(*engine, label).inc(value)
            elif name in self._plain:
                self._plain[name].labels(*engine).inc(value)
