"""Reuse figures summed over requests, on vLLM's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmcache_rag.blobs.tier import TierStats
from lmcache_rag.vllm.metadata import Refined
from lmcache_rag.vllm.reports import note

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
    "learned",
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
_PREFIX = "vllm:lmcache_rag_"
_REPORTS, _ENDED = "reports", "ended"
_SHARES = (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_COUNTED = (*(f"{kind}_tokens" for kind in _TOKENS), "bytes_loaded", "bytes_stored", *_EVICTED)


@dataclass
class ReuseStats(KVConnectorStats):
    """Sums since they were last taken. Flat: counter name -> value; `requests:MODE`, `failures:KIND`,
    `phase_seconds:PHASE`. Besides, reports by request, and which of these have ended."""

    data: dict[str, Any] = field(default_factory=dict)

    def add(self, report: dict[str, Any]) -> None:
        """Add one request's report."""
        added = {name: report[name] for name in _COUNTED}
        added[f"requests:{report['mode']}"] = 1
        if report["failure"]:
            added[f"failures:{report['failure']}"] = 1
        added |= {f"phase_seconds:{phase}": seconds for phase, seconds in report["phases_s"].items()}
        self._sum(added)

    def tell(self, request_id: str, report: dict[str, Any], *, ended: bool = False) -> None:
        """Have the API server know a request's report as it is now."""
        self._sum({_REPORTS: {request_id: dict(report)}} | ({_ENDED: [request_id]} if ended else {}))

    def refined(self, tokens: int, refined: Refined) -> None:
        """Add what was done while the engine was idle: tokens whose exact KV is in the prefix cache now, bytes stored
        and deleted, and what went wrong, if anything."""
        added = {
            "refined_tokens": tokens,
            "learned_stored_tokens": refined.learned_tokens,
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
        return {name: value for name, value in self.data.items() if name not in (_REPORTS, _ENDED)}

    def is_empty(self) -> bool:
        return not self.data

    def _sum(self, added: dict[str, Any]) -> None:
        for name, value in added.items():
            if name == _REPORTS:
                self.data[name] = self.data.get(name, {}) | value
            elif name == _ENDED:
                self.data[name] = self.data.get(name, []) + value
            else:
                self.data[name] = self.data.get(name, 0) + value


class ReusePromMetrics(KVConnectorPromMetrics):
    """`vllm:lmcache_rag_{prompt,reused,...}_tokens_total`, `vllm:lmcache_rag_requests_total{mode}`, and so on."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._make(labelnames)

    def _make(self, labelnames: list[str]) -> None:
        counter = self._counter_cls
        self._plain: dict[str, Any] = {
            name: counter(name=f"{_PREFIX}{name}", documentation=f"Sum of {name} over requests.", labelnames=labelnames)
            for name in (*_COUNTED, "refined_tokens", "learned_stored_tokens")
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

        self._share = self._histogram_cls(
            name="vllm:lmcache_rag_request_reused_share",
            documentation="Share of a prompt's tokens that was neither computed nor recomputed.",
            buckets=_SHARES,
            labelnames=labelnames,
        )
        self._ratio = self._histogram_cls(
            name="vllm:lmcache_rag_request_recompute_ratio",
            documentation="Share of the tokens taken from the store that was recomputed, of requests that took some.",
            buckets=_SHARES,
            labelnames=labelnames,
        )
        self._phases = self._histogram_cls(
            name="vllm:lmcache_rag_request_phase_seconds",
            documentation="Seconds that a request spent in a phase of blending.",
            buckets=_SECONDS,
            labelnames=[*labelnames, "phase"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        reports: dict[str, dict[str, Any]] = transfer_stats_data.get(_REPORTS, {})
        note(reports)
        for request_id in transfer_stats_data.get(_ENDED, ()):
            self._observe_report(engine, reports[request_id])
        for name, value in transfer_stats_data.items():
            family, _, label = name.partition(":")
            if family in self._by_label:
                self._by_label[family].labels(*engine, label).inc(value)
            elif name in self._plain:
                self._plain[name].labels(*engine).inc(value)

    def _observe_report(self, engine: list[object], report: dict[str, Any]) -> None:
        known = report["reused_tokens"] + report["local_tokens"]
        self._share.labels(*engine).observe(known / max(1, report["prompt_tokens"]))
        taken = report["reused_tokens"] + report["recomputed_tokens"]
        if taken:
            self._ratio.labels(*engine).observe(report["recomputed_tokens"] / taken)
        for phase, seconds in report["phases_s"].items():
            self._phases.labels(*engine, phase).observe(seconds)


def totals(registry: CollectorRegistry) -> dict[str, int]:
    """What was summed over all requests so far, as `ReuseReport` names it; nothing before the first."""
    found: dict[str, int] = {}
    for sample in (each for family in registry.collect() for each in family.samples):
        name = sample.name.removeprefix(_PREFIX).removesuffix("_total")
        if sample.name == f"{_PREFIX}{name}_total" and name in _COUNTED:
            found[name] = found.get(name, 0) + int(sample.value)
    return found
