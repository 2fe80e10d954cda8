"""The workspace: what is placed at a position and taken from there is what was stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rotation, rotate

from lmcache_rag.blend import LayerSpec, Workspace
from lmcache_rag.chunk_kv import ChunkKV


def stored(kv: torch.Tensor) -> ChunkKV:
    return ChunkKV(np.arange(kv.shape[2], dtype=np.int32), kv)


def rotation(tokens: int, dim: int) -> Rotation:
    angles = torch.outer(torch.arange(tokens).float(), 100.0 ** (-torch.arange(0, dim, 2).float() / dim))
    return Rotation.from_cache(torch.cat([angles.cos(), angles.sin()], dim=-1))


@pytest.fixture
def workspace() -> Workspace:
    layers = [LayerSpec(1.0, None, rotation(64, 8)), LayerSpec(1.0, 16, None), LayerSpec(1.0, None, rotation(64, 4))]
    return Workspace(layers, kv_heads=2, head_size=8, max_tokens=64, dtype=torch.float32)


def test_placed_keys_are_rotated_to_their_positions(workspace: Workspace) -> None:
    kv = torch.randn(3, 2, 12, 2, 8)
    workspace.place(stored(kv), start=20, offset=2, length=9)
    positions = torch.arange(20, 29)
    for index, spec in enumerate(workspace.layers):
        key = kv[index, 0, 2:11]
        expected = key if spec.rotation is None else rotate(key, spec.rotation, positions)
        assert torch.equal(workspace.key[index, 20:29], expected)
        assert torch.equal(workspace.value[index, 20:29], kv[index, 1, 2:11])


def test_what_is_taken_is_what_was_placed(workspace: Workspace) -> None:
    kv = torch.randn(3, 2, 12, 2, 8)
    workspace.place(stored(kv), start=30, offset=0, length=12)
    torch.testing.assert_close(workspace.take(30, 12), kv, atol=1e-6, rtol=1e-6)
