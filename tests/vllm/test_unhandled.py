"""What passes through untouched, and why: requests and engines that blending does not handle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rag.vllm.config import unsupported_engine
from lmcache_rag.vllm.scheduler_half import _unhandled


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"lora_request": object()}, "LoRA"),
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
        "lora_request": None,
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
        ("speculative_config", object(), "speculative decoding"),
        ("cache_config.cache_dtype", "fp8", "a quantised KV cache"),
        ("cache_config.cache_dtype", "float32", ""),
        ("model_config.uses_mrope", True, "multimodal RoPE"),
        ("speculative_config", None, ""),
    ],
)
def test_engines(place: str, value: object, reason: str) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1, decode_context_parallel_size=1
        ),
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype="torch.float32", uses_mrope=False),
    )
    target: Any = config
    *path, last = place.split(".")
    for name in path:
        target = getattr(target, name)
    setattr(target, last, value)
    assert unsupported_engine(config) == reason  # type: ignore[arg-type]
