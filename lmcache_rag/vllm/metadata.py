"""What the connector's two halves tell each other, once a step; nothing else is shared between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmcache_rag.plan.cost import Rates
from lmcache_rag.plan.plan import BlendPlan


@dataclass(frozen=True)
class BlendJob:
    """A blend that the worker half is to do before this step's forward."""

    request_id: str
    plan: BlendPlan
    block_ids: tuple[int, ...]


@dataclass
class StepJobs(KVConnectorMetadata):
    """From the scheduler half to the worker half."""

    jobs: list[BlendJob] = field(default_factory=list)


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """From the worker half back: request id -> `ReuseReport` as a dict, and how fast it computes and loads."""

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: Rates | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        assert isinstance(other, StepReports)
        return StepReports({**self.reports, **other.reports}, other.rates or self.rates)
