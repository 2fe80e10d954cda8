"""How fast a machine computes, by what was measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.sizing.formulas import blend_parts
from lmcache_rag.sizing.hardware import Hardware
from lmcache_rag.sizing.shapes import ModelShape

_QUESTION_TOKENS = 32
"""About what the question of `bench ttft` has."""


_FIELDS = {"mode", "selector", "ratio", "prompt_tokens", "ttft_median_s"}
"""Of `bench ttft`'s rows of TTFT; what ingest took is another."""


def measured_hardware(rows: Iterable[Mapping[str, Any]], model: ModelShape, kv_memory_bytes: float = 4e9) -> Hardware:
    """From the rows of `bench ttft` at two lengths of prompts.

    Raises:
        LmcacheRagError: they do not have full prefill and reuse at two lengths.
    """
    found = [row for row in rows if row.get("chunks") != "joined" and row.keys() >= _FIELDS]
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
    hardware = Hardware(
        name="as measured",
        weights_flops=2 * model.weights / per_token,
        attention_flops=model.attention_flops / 2 / per_square,
        restored_bytes=model.kv_bytes * longest["prompt_tokens"] / restoring_s,
        floor_s=floor_s,
        pass_s=0.0,
        kv_memory_bytes=kv_memory_bytes,
        measured=True,
    )
    nested_share, pass_s = _nested(model, hardware, found)
    return replace(hardware, nested_share=nested_share, pass_s=pass_s)


def _nested(model: ModelShape, hardware: Hardware, rows: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """What the two passes of a blend take, by the measured ones: a share of what prefill would take, and a constant."""
    computing_s, left_s = [], []
    for row in rows:
        if row["mode"] == "blend" and row["selector"] == "query":
            parts = blend_parts(model, hardware, row["prompt_tokens"], _QUESTION_TOKENS, row["ratio"], 0.0)
            computing_s.append(parts["probe"] + parts["repair"])
            left_s.append(row["ttft_median_s"] - parts["floor"] - parts["restore"])
    if len(set(computing_s)) < 2:
        return 1.0, 0.0
    share, constant_s = np.polyfit(computing_s, left_s, 1)
    return max(0.0, float(share)), max(0.0, float(constant_s) / 2)
