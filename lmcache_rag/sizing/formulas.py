"""Seconds to the first token. `docs/sizing.md` derives the formulas."""

from __future__ import annotations

from lmcache_rag.plan.cost import PROBE_TOKENS
from lmcache_rag.sizing.hardware import Hardware
from lmcache_rag.sizing.shapes import ModelShape

_REPAIRED_LAYERS = 5 / 6
"""Recomputing ends a sixth of the layers before the last."""


def full_prefill_s(model: ModelShape, hardware: Hardware, tokens: int) -> float:
    """TTFT of plain vLLM: the floor, and the FLOPs of weights and of attention at their rates."""
    weights, attention = model.flops(tokens)
    return hardware.floor_s + weights / hardware.weights_flops + attention / hardware.attention_flops


def blend_parts(
    model: ModelShape, hardware: Hardware, tokens: int, question_tokens: int, ratio: float, read_s_per_token: float
) -> dict[str, float]:
    """TTFT of a blend by what it is spent on: `read`, of the store; `restore`, decoding into the paged cache; `probe`,
    the question's last tokens over all of it; `repair`, r * n tokens in five sixths of the layers, which attend to half
    of it on average; `question`, vLLM's own work, where it is not part of the floor."""
    per_token = 2.0 * model.weights / hardware.weights_flops

    def computing_s(queries: float, keys: float) -> float:
        return queries * (per_token + keys * model.attention_flops / hardware.attention_flops)

    own = hardware.nested_share
    probed = min(PROBE_TOKENS, question_tokens)
    return {
        "floor": hardware.floor_s,
        "read": tokens * read_s_per_token,
        "restore": tokens * model.kv_bytes / hardware.restored_bytes,
        "probe": hardware.pass_s + own * computing_s(probed, tokens) if ratio else 0.0,
        "repair": hardware.pass_s + own * _REPAIRED_LAYERS * computing_s(ratio * tokens, tokens / 2) if ratio else 0.0,
        "question": 0.0 if hardware.measured else computing_s(question_tokens, tokens),
    }
