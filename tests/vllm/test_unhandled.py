"""What passes through untouched, and why: requests and engines that blending does not handle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rag.vllm.admission import _unhandled
from lmcache_rag.vllm.config import unsupported_engine


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"mm_features": [object()]}, "multimodal input"),
        ({"prompt_embeds": object()}, "prompt embeddings"),
        ({"prompt_token_ids": None}, "prompt embeddings"),
        ({"pooling_params": object()}, "pooling"),
        ({"resumable": True}, "streaming input"),
        ({"skip_reading_prefix_cache": True}, "prompt logprobs"),
    ],
)
def test_requests(fields: dict[str, Any], reason: str) -> None:
    request = {
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": [1, 2],
        "pooling_params": None,
        "resumable": False,
        "skip_reading_prefix_cache": False,
    }
    found = _unhandled(SimpleNamespace(**{**request, **fields}))  # type: ignore[arg-type]
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.tensor_parallel_size", 2, "tensor parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.data_parallel_size", 2, ""),
        ("parallel_config.enable_expert_parallel", True, ""),
        ("parallel_config.enable_eplb", True, "expert load balancing"),
        ("parallel_config.enable_elastic_ep", True, "elastic expert parallelism"),
        ("parallel_config.enable_dbo", True, "dual batch overlap"),
        ("parallel_config.ubatch_size", 2, "dual batch overlap"),
        ("speculative_config", SimpleNamespace(method="eagle3"), "speculative decoding other than by n-grams"),
        ("speculative_config", SimpleNamespace(method="ngram"), ""),
        ("cache_config.cache_dtype", "fp8", "a quantised KV cache"),
        ("cache_config.cache_dtype", "float32", ""),
        ("model_config.uses_mrope", True, "multimodal RoPE"),
        ("speculative_config", None, ""),
        ("lora_config", SimpleNamespace(), "LoRA"),
    ],
)
def test_engines(place: str, value: object, reason: str) -> None:
    config = vllm_config()
    target: Any = config
    *path, last = place.split(".")
    for name in path:
        target = getattr(target, name)
    assert hasattr(target, last), "vLLM has no such setting"
    object.__setattr__(target, last, value)
    assert unsupported_engine(config) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_of_several_engines(*, moe: bool, expert_parallel: bool) -> None:
    """A pass of one engine would wait for the others at every layer with experts."""
    config = vllm_config(moe=moe)
    config.parallel_config.data_parallel_size = 2
    config.parallel_config.enable_expert_parallel = expert_parallel
    expected = "data parallelism of experts" if moe or expert_parallel else ""
    assert unsupported_engine(config) == expected  # type: ignore[arg-type]


def vllm_config(*, moe: bool = False) -> SimpleNamespace:
    """An engine's configuration, its parallelism vLLM's own."""
    from vllm.config import ParallelConfig

    return SimpleNamespace(
        parallel_config=ParallelConfig(),
        speculative_config=None,
        lora_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype="torch.float32", uses_mrope=False, is_moe=moe),
    )


def test_hybrid_models() -> None:
    assert unsupported_engine(vllm_config(), kv_cache_groups=2) == "several KV cache groups"  # type: ignore[arg-type]
