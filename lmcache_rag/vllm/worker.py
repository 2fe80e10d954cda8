"""The worker class: vLLM's own, which in addition binds the loaded model for the connector's worker half."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from lmcache_rag.errors import ModelError
from lmcache_rag.vllm.config import ConnectorConfig, unsupported_engine
from lmcache_rag.vllm.model import BoundModel

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

_bound: BoundModel | None = None


class BlendWorker(Worker):
    """Use it as `worker_cls="lmcache_rag.vllm.worker.BlendWorker"`, together with the connector."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not unsupported_engine(self.vllm_config):
            global _bound  # noqa: PLW0603  # vLLM makes worker and connector, and gives neither the other
            _bound = BoundModel(self.get_model(), self.vllm_config)

    def determine_available_memory(self) -> int:
        """Memory for the paged cache, less what blending reserves; a size that the user set is kept."""
        available = super().determine_available_memory()
        if _bound is None or self.cache_config.kv_cache_memory_bytes is not None:
            return available
        tokens = ConnectorConfig.of(self.vllm_config).workspace_tokens(self.model_config.max_model_len)
        return available - tokens * _bound.shape.bytes_per_token

    def sleep(self, level: int = 1) -> None:
        """Level 1 keeps the weights; level 2 forgets them, so that others can be loaded."""
        if level > 1:
            _refuse_other_weights()
        if _bound is not None:
            _bound.asleep = True
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        if _bound is not None and (tags is None or "kv_cache" in tags):
            _bound.asleep = False


def _refuse_other_weights() -> None:
    if _bound is not None:
        raise ModelError(
            "The weights cannot be changed while stored KV is used, which was computed with those of the start: "
            "restart vLLM with the new weights, or run it without lmcache-rag."
        )


def _refusing(name: str) -> Callable[..., Any]:
    """The worker's method `name`, which would change the weights, refused where stored KV is used."""
    method = getattr(Worker, name)

    @functools.wraps(method)
    def refusing(self: BlendWorker, *args: Any, **kwargs: Any) -> Any:
        _refuse_other_weights()
        return method(self, *args, **kwargs)

    return refusing


for _name in (
    "reload_weights",
    "reset_weights",
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
):
    setattr(BlendWorker, _name, _refusing(_name))


def bound_model() -> BoundModel:
    """The model that this process has loaded.

    Raises:
        ModelError: the engine runs without our worker class.
    """
    if _bound is None:
        raise ModelError(
            "No model is bound: start vLLM with worker_cls='lmcache_rag.vllm.worker.BlendWorker' beside the connector."
        )
    return _bound
