"""The KV connector that vLLM loads: one class, of which each process uses one half."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.tier import TierStats
from lmcache_rag.codec import LOSSLESS_CODEC
from lmcache_rag.learn.shipped import shipped_tables
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.scopes import fingerprints_in
from lmcache_rag.model import cache_folder
from lmcache_rag.plan.budget import Calibration
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.planner import Planner
from lmcache_rag.request import ReuseReport
from lmcache_rag.vllm.config import ConnectorConfig, fingerprint_of, model_folder, unsupported_engine
from lmcache_rag.vllm.metadata import StepJobs, StepReports
from lmcache_rag.vllm.metrics import ReusePromMetrics, ReuseStats
from lmcache_rag.vllm.scheduler_half import SchedulerHalf
from lmcache_rag.vllm.worker_half import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


_log = logging.getLogger(__name__)
_server_log = init_logger("vllm.lmcache_rag")
"""Notes among those of vLLM, which shows them where it shows its own."""


class BlendConnector(KVConnectorBase_V1):
    """Use it with `kv_connector="BlendConnector"`, `kv_connector_module_path="lmcache_rag.vllm.connector"`,
    `kv_role="kv_both"` and `ConnectorConfig`'s fields as `kv_connector_extra_config`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._config = ConnectorConfig.of(vllm_config)
        self._unsupported = unsupported_engine(vllm_config, len(kv_cache_config.kv_cache_groups))
        self._worker: WorkerHalf | None = None
        self._scheduler: SchedulerHalf | None = None
        self._tiers: dict[str, TierStats] = {}  # what was last told of each
        self._store = self._config.open_store()
        self._fingerprint = fingerprint_of(vllm_config)
        self._workspace_tokens = self._config.workspace_tokens(vllm_config.model_config.max_model_len)
        if role is KVConnectorRole.SCHEDULER:
            _warn_of_failures(vllm_config)
            _warn_of_others(self._store, self._config.namespace, self._fingerprint)
            stored = self._config.conversations == "stored"
            chunks = ChunkStores(self._store, self._fingerprint, self._config.codec, extra=self._config.extra_codecs)
            served = chunks.of(self._config.namespace)
            served.refresh()  # which requests will not wait for, over a network
            _server_log.info("Found KV of %d chunks in the store.", len(np.unique(served.records.live().chunk)))
            self._scheduler = SchedulerHalf(
                Planner(
                    chunks,
                    Calibration.read(cache_folder(), self._fingerprint, self._config.codec),
                    namespace=self._config.namespace,
                    matcher=Matcher(self._config.min_match_tokens, self._config.match_unit_tokens),
                    max_tokens=self._workspace_tokens,
                    never_slower=self._config.never_slower,
                ),
                self._config,
                unsupported=self._unsupported,
                block_tokens=kv_cache_config.hash_block_size or vllm_config.cache_config.block_size,
                max_tokens=self._workspace_tokens,
                step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                chats=ChunkStores(self._store, self._fingerprint, LOSSLESS_CODEC) if stored else None,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._unsupported:
            return
        from lmcache_rag.vllm.worker import bound_model

        model = bound_model()
        self._worker = WorkerHalf(
            model,
            self._store,
            self._fingerprint,
            self._config.codec,
            self._config.extra_codecs,
            self._config.limits,
            functools.partial(shipped_tables, model_folder(self._vllm_config)),
            workspace_tokens=self._workspace_tokens,
            max_pass_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens,
            hot_bytes=self._config.hot_bytes,
            never_slower=self._config.never_slower,
            trace=self._config.trace,
            block_tokens=self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        )

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, StepJobs)
        worker = self._worker
        if worker is None:
            return
        for request_id in step.dropped:
            worker.drop(request_id)
        if step.begun is not None:
            worker.begin(step.begun)
        worker.go_on(step.tokens)
        if step.refine is not None:
            worker.refine(step.refine)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self._worker.take_done() or None) if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.take_reports() if self._worker is not None else None

    # Scheduler half

    @property
    def scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None, "this is the worker's half"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        if not self._unsupported:
            self.scheduler.bind(kv_cache_manager)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_idle_work()

    def on_new_request(self, request: Request) -> None:
        self.scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        matched = self.scheduler.matched_tokens(request, num_computed_tokens)
        return matched, bool(matched)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.take_jobs(scheduler_output.total_num_scheduled_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        if isinstance(reports, StepReports):
            self.scheduler.receive(reports)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.finish(request) or None

    def report_of(self, request_id: str) -> ReuseReport:
        """The report of a running or lately finished request; its response may lack it where a stop string ended it."""
        return self.scheduler.report_of(request_id)

    # Metrics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is None or self._scheduler.stats.is_empty():
            return None
        tiers: dict[str, TierStats] = getattr(self._store, "stats", dict)()
        self._scheduler.stats.tiers(self._tiers, tiers)
        self._tiers = tiers
        return self._scheduler.stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return ReuseStats(dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        return ReusePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _warn_of_failures(vllm_config: VllmConfig) -> None:
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_load_failure_policy != "recompute":
        _log.warning(
            "vLLM is set to fail a request whose stored KV cannot be loaded: set kv_load_failure_policy to "
            "'recompute' in the --kv-transfer-config, and it is answered by plain prefill instead."
        )


def _warn_of_others(store: Store, namespace: str, fingerprint: str) -> None:
    found = fingerprints_in(store, namespace)
    if found and fingerprint not in found:
        _log.warning(
            "The store holds KV of %d other models or compute types and none of this one, so nothing will be reused: "
            "start vLLM with the model and --dtype that the documents were indexed with, or index them with this one.",
            len(found),
        )
