"""How fast a machine computes: of GPUs, by their data sheets and by what one H100 gave (docs/sizing.md)."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.sizing.shapes import ModelShape

_UTILISED = 0.75
"""Of a GPU's peak, what matrix products of a prefill reach."""

_UTILISED_ATTENTION = 0.4
_RESTORED_SHARE = 0.005
"""Of a GPU's memory bandwidth: float16 KV that is decoded, rotated and written in a second."""

_LAYER_S = 0.0008
"""What a blend's pass takes for each layer at least, since the host launches its operations one by one."""

_NESTED_SHARE = 2.0
"""A blend's passes also carry changes over, and are too short to fill a GPU."""

_FLOOR_S = 0.02
"""What an answer takes on a GPU beyond computing: scheduling, launches, sampling."""


@dataclass(frozen=True)
class Hardware:
    """Rates of a machine.

    Attributes:
        weights_flops: per second, of products with weights.
        attention_flops: per second, of attention.
        restored_bytes: of float16 KV that is decoded and put in place, per second.
        floor_s: TTFT of a prompt that vLLM's prefix cache holds: a pass and what an answer takes besides.
        pass_s: what a pass over the model takes beyond its tokens.
        nested_share: seconds of a blend's own passes, of those that prefill of as many FLOPs takes.
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
    nested_share: float = 1.0
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
    weights_s = weights_bytes / (count * gpu.bandwidth)
    return Hardware(
        name=f"{count} {name.upper()}",
        weights_flops=_UTILISED * count * gpu.flops,
        attention_flops=_UTILISED_ATTENTION * count * gpu.flops,
        restored_bytes=_RESTORED_SHARE * count * gpu.bandwidth,
        floor_s=_FLOOR_S + weights_s,
        pass_s=max(weights_s, _LAYER_S * model.layers),
        kv_memory_bytes=free,
        nested_share=_NESTED_SHARE,
    )
