"""How fast a machine computes: of GPUs by their data sheets, of this machine by what was measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.sizing.shapes import ModelShape

_UTILISED = 0.5
"""Of a GPU's peak, what matrix products of a prefill reach."""

_UTILISED_ATTENTION = 0.4
_RESTORED_SHARE = 0.05
"""Of a GPU's memory bandwidth: float16 KV that is decoded, rotated and written in a second. Assumed, not measured."""

_FLOOR_S = 0.02
"""What an answer takes on a GPU beyond computing: scheduling, launches, sampling."""


@dataclass(frozen=True)
class Hardware:
    """Rates of a machine.

    Attributes:
        weights_flops: per second, of products with weights.
        attention_flops: per second, of attention.
        restored_bytes: of float16 KV that is decoded and put in place, per second.
        floor_s: TTFT of a prompt that vLLM's prefix cache holds.
        pass_s: what a pass over the model takes however few its tokens.
        kv_memory_bytes: for KV, beside the weights.
        measured: or taken from data sheets and assumptions.
    """

    name: str
    weights_flops: float
    attention_flops: float
    restored_bytes: float
    floor_s: float
    pass_s: float
    kv_memory_bytes: float
    measured: bool = False


@dataclass(frozen=True)
class _Gpu:
    """Dense BF16 FLOPs and bytes per second, and bytes of memory, as its maker states them."""

    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "h100": _Gpu(989e12, 3.35e12, 80e9),
    "h200": _Gpu(989e12, 4.8e12, 141e9),
    "a100": _Gpu(312e12, 2.04e12, 80e9),
    "l40s": _Gpu(362e12, 0.864e12, 48e9),
    "l4": _Gpu(121e12, 0.3e12, 24e9),
}


def gpus(name: str, count: int, model: ModelShape) -> Hardware:
    """So many of one kind, that share a model's layers by tensor parallelism.

    Raises:
        LmcacheRagError: no such GPU is known, or the model's weights do not fit.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise LmcacheRagError(f"--gpu: there is no {name!r}; there are {', '.join(GPUS)}.")
    weights_bytes = 2 * (model.weights + 2 * model.vocabulary * model.hidden)
    free = 0.9 * count * gpu.memory - weights_bytes
    if free <= 0:
        raise LmcacheRagError(
            f"--gpus: {model.name} has {weights_bytes / 1e9:.0f} GB of weights, which {count} {name} cannot hold."
        )
    return Hardware(
        name=f"{count} {name.upper()}",
        weights_flops=_UTILISED * count * gpu.flops,
        attention_flops=_UTILISED_ATTENTION * count * gpu.flops,
        restored_bytes=_RESTORED_SHARE * count * gpu.bandwidth,
        floor_s=_FLOOR_S,
        pass_s=weights_bytes / (count * gpu.bandwidth),
        kv_memory_bytes=free,
    )


def measured_hardware(rows: Iterable[Mapping[str, Any]], model: ModelShape, kv_memory_bytes: float = 4e9) -> Hardware:
    """From the rows of `bench ttft` at two lengths of prompts.

    Raises:
        LmcacheRagError: they do not have full prefill and reuse at two lengths.
    """
    found = [row for row in rows if row.get("chunks") != "joined"]
    full = sorted((row["prompt_tokens"], row["ttft_median_s"]) for row in found if row["mode"] == "full")
    cached = [row["ttft_median_s"] for row in found if row["mode"] == "prefix_cache"]
    reuse = [row for row in found if row["mode"] == "reuse"]
    if len({tokens for tokens, _ in full}) < 2 or not cached or not reuse:
        raise LmcacheRagError("The rows must be those of `bench ttft` at two lengths of prompts.")
    floor_s = sum(cached) / len(cached)
    (few, few_s), (many, many_s) = full[0], full[-1]
    # Seconds are a * tokens + b * tokens^2: weights and attention.
    per_square = max(1e-12, ((many_s - floor_s) / many - (few_s - floor_s) / few) / (many - few))
    per_token = max(1e-12, (few_s - floor_s) / few - per_square * few)
    longest = max(reuse, key=lambda row: row["prompt_tokens"])
    restoring_s = max(1e-6, longest["ttft_median_s"] - floor_s)
    return Hardware(
        name="as measured",
        weights_flops=2 * model.weights / per_token,
        attention_flops=model.attention_flops / 2 / per_square,
        restored_bytes=model.kv_bytes * longest["prompt_tokens"] / restoring_s,
        floor_s=floor_s,
        pass_s=0.0,
        kv_memory_bytes=kv_memory_bytes,
        measured=True,
    )
