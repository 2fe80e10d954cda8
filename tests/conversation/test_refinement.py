"""How much is computed at once of what is refined."""

from __future__ import annotations

import torch

from lmcache_rag.blend import LayerSpec, Workspace
from lmcache_rag.blend.passes import Pass
from lmcache_rag.conversation.refinement import Refiner
from lmcache_rag.plan.cost import Rates


def test_pieces_take_as_long_however_much_lies_before_them() -> None:
    workspace = Workspace([LayerSpec(scale=1.0)], kv_heads=1, head_size=8, max_tokens=2000, dtype=torch.float32)
    passes = list[int]()

    def run(token_ids: torch.Tensor, nested: Pass) -> None:
        passes.append(len(token_ids))

    refiner = Refiner(workspace, run, Rates(prefill_tokens_per_s=500, pass_s=0.1, key_s=5e-6))
    refiner.take_up(range(600))
    while refiner.advance() < 600:
        pass
    assert passes[0] == 99  # 0.2 s of 2 ms each, and what they attend to
    assert passes == sorted(passes, reverse=True) and passes[-2] < 50
    assert sum(passes) == 600
