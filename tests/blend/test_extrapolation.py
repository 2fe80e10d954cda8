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


def extrapolated(tokens: int, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[Extrapolation, torch.Tensor]:
    """What every seventh token of a long chunk changes in all the others' V; in one window where monkeypatched."""
    if monkeypatch is not None:
        monkeypatch.setattr("lmcache_rag.blend.extrapolation._WINDOW", tokens)
    draw = torch.Generator().manual_seed(4)
    workspace = Workspace([LayerSpec(1.0)] * 2, kv_heads=1, head_size=8, max_tokens=tokens, dtype=torch.float32)
    workspace.key.normal_(generator=draw)
    workspace.value.copy_(torch.randn(2, 1, 1, 8, generator=draw).expand(-1, tokens, -1, -1))
    workspace.value[:, ::2] += 3.0
    recomputed = torch.zeros(tokens, dtype=torch.bool)
    recomputed[4::7] = True
    extrapolation = Extrapolation(workspace, recomputed, [PlannedSegment(0, tokens)], 2)
    before, positions = workspace.value.clone(), recomputed.nonzero().flatten()
    workspace.value[1, positions] += (positions / 1000).sin()[:, None, None]
    extrapolation.after(positions)(1)
    return extrapolation, (workspace.value - before)[1, ~recomputed]


def test_the_cost_of_a_long_chunk_grows_with_its_length_only() -> None:
    extrapolation, _ = extrapolated(1 << 15)
    windows = [lesson.weights.shape for lesson in extrapolation._lessons]
    assert len(windows) == 32
    assert max(span for span, _ in windows) <= 1024 and max(taught for _, taught in windows) <= 1024 // 7 + 1


def test_short_chunks_are_one_window_and_long_ones_come_near_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens, closest in ((1028, 1e-9), (1500, 0.03)):
        with monkeypatch.context() as whole:
            _, expected = extrapolated(tokens, whole)
        _, found = extrapolated(tokens)
        assert float((found - expected).norm() / expected.norm()) <= closest
    assert not torch.equal(found, expected)
