"""What a chunk's tokens that are not recomputed take over from those that are."""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import rotate

from lmcache_rag.blend import LayerSpec, Workspace
from lmcache_rag.blend.extrapolation import Extrapolation
from lmcache_rag.plan.plan import PlannedSegment
from tests.blend.test_workspace import rotation

LAYERS, TOKENS = 6, 64
EXACT, FIRST, SECOND = PlannedSegment(4, 12, exact=True), PlannedSegment(16, 24), PlannedSegment(40, 24)
ROTATION = rotation(TOKENS, 8)


@pytest.fixture
def workspace() -> Workspace:
    """K and V at random; V of every other token is the same."""
    draw = torch.Generator().manual_seed(2)
    specs = [LayerSpec(1.0, None, ROTATION if layer % 2 else None) for layer in range(LAYERS)]
    workspace = Workspace(specs, kv_heads=2, head_size=8, max_tokens=TOKENS, dtype=torch.float32)
    workspace.key.normal_(generator=draw)
    workspace.value.copy_(torch.randn(LAYERS, 1, 2, 8, generator=draw).expand(-1, TOKENS, -1, -1))
    workspace.value[:, ::2] += 3.0
    return workspace


def recompute(
    workspace: Workspace, taught: list[int], change: torch.Tensor, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `change` to position-free K, and twice it to V, of the taught tokens; returns how all K and V changed."""
    key, value = workspace.key.clone(), workspace.value.clone()
    positions = torch.tensor(taught)
    recomputed = torch.zeros(TOKENS, dtype=torch.bool)
    recomputed[positions] = True
    extrapolation = Extrapolation(workspace, recomputed, (EXACT, FIRST, SECOND), LAYERS)
    moved = change.expand(len(taught), 2, 8).contiguous()
    for part in positions.chunk(parts):
        rows, observe = torch.isin(positions, part), extrapolation.after(part)
        for layer in range(LAYERS):
            workspace.key[layer, part] += rotate(moved[rows], ROTATION, part) if layer % 2 else moved[rows]
            workspace.value[layer, part] += 2 * moved[rows]
            observe(layer)
    free = workspace.key - key
    for layer in range(1, LAYERS, 2):
        free[layer] = rotate(free[layer], ROTATION, torch.arange(TOKENS), inverse=True)
    return free, workspace.value - value


def test_tokens_alike_and_near_change_alike(workspace: Workspace) -> None:
    change = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    key, value = recompute(workspace, [24, 26, 28, 30], change)
    assert key[0, 32].abs().max() < 1e-6  # nothing in the lowest layers
    key, value = key[1:], value[1:]
    share = (key[:, 32] * change).sum((1, 2)) / change.square().sum()
    assert share.std() < 1e-4 and 0.5 < share[0] < 1.0  # the same in layers with and without RoPE
    torch.testing.assert_close(key[:, 32], share[:, None, None] * change, atol=1e-4, rtol=0)
    torch.testing.assert_close(value[:, 32], 2 * share[:, None, None] * change, atol=1e-4, rtol=0)
    assert key[:, 33].norm() < 0.3 * key[:, 32].norm()  # another kind of token
    assert 0 < key[:, 38].norm() < key[:, 32].norm()  # further away


def test_what_is_left_alone(workspace: Workspace) -> None:
    """The preamble, exact chunks, a chunk's first tokens, chunks without a recomputed token, and those recomputed."""
    change = torch.ones(2, 8)
    key, value = recompute(workspace, [8, 17, 24, 26], change)
    for changed in (key, value):
        still = [*range(8), *range(9, 17), 18, 19, *range(40, TOKENS)]
        assert not changed[:, still].abs().max() > 1e-6
    torch.testing.assert_close(key[:, [17, 24]], change.expand(LAYERS, 2, 2, 8), atol=1e-4, rtol=0)


def test_a_chunk_recomputed_in_two_passes_learns_once_from_all(workspace: Workspace) -> None:
    taught, change = [22, 24, 26, 46, 48, 50], torch.ones(2, 8)
    other = Workspace(workspace.layers, kv_heads=2, head_size=8, max_tokens=TOKENS, dtype=torch.float32)
    other.key.copy_(workspace.key)
    other.value.copy_(workspace.value)
    once = recompute(workspace, taught, change)
    in_parts = recompute(other, taught, change, parts=3)
    for found, expected in zip(in_parts, once, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
