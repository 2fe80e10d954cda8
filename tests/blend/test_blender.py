"""How deep a blend recomputes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blend import Blender, LayerSpec, Workspace
from lmcache_rag.blend.passes import Pass
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope, KVShape
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from tests.helpers import chunk_store

LAYERS, TOKENS, QUESTION = 12, 40, 3
SHAPE = KVShape(LAYERS, 1, 8, torch.float32)


class Recorder:
    """Runs a pass over arbitrary K and V, and notes how many tokens went through how many layers."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []

    def __call__(self, token_ids: torch.Tensor, nested: Pass) -> None:
        rows = torch.ones(len(token_ids), 1, 8)
        for layer in range(LAYERS):
            if not nested.attention(layer, rows, rows, rows, torch.empty_like(rows)):
                break
        self.passes.append((len(token_ids), layer + 1))


@pytest.mark.parametrize(
    ("selector", "ratio", "stored", "expected"),
    [
        ("query", 0.25, TOKENS, (10, 10)),  # five sixths of 12 layers
        ("query", 1.0, TOKENS, (40, 12)),  # full prefill's KV, so all layers
        ("head", 0.25, TOKENS, (10, 12)),
        ("query", 0.25, TOKENS - 20, (25, 12)),  # 20 tokens that are not stored need all layers
    ],
)
def test_depth_of_the_recompute_pass(
    selector: str, ratio: float, stored: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    token_ids = np.arange(stored, dtype=np.int32)
    chunks = chunk_store(DiskStore(tmp_path), KVScope("default", "model"), SHAPE)
    chunks.save(ChunkKV(token_ids, torch.zeros(LAYERS, 2, stored, 1, 8)), NO_CONTEXT)
    segment = PlannedSegment(TOKENS - stored, stored, name=chunks.name(token_ids, NO_CONTEXT))
    plan = BlendPlan(
        mode="blend",
        namespace="default",
        token_ids=tuple(range(TOKENS + QUESTION)),
        preamble=PlannedSegment(0, TOKENS - stored, exact=True),
        segments=(segment,),
        end=TOKENS,
        selector=selector,
        ratio=ratio,
    )
    workspace = Workspace(
        [LayerSpec(scale=1.0)] * LAYERS, kv_heads=1, head_size=8, max_tokens=TOKENS + QUESTION, dtype=torch.float32
    )
    recorder = Recorder()
    report = Blender(workspace, recorder, SHAPE, max_pass_tokens=1000).blend(plan, chunks)
    assert recorder.passes[-1] == expected
    assert report.recomputed_tokens == int(ratio * stored)
