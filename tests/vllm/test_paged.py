"""Rows go into vLLM's paged cache and come back, however its backend lays them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcache_rag.blend.workspace import LayerSpec, Workspace
from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.vllm.paged import PagedCache
from tests.helpers import OFF, worker_half

TOKENS = 8

Written = Callable[[Tensor, Tensor, Tensor], None]
"""Writes K and V `[tokens, heads, head_size]` of one block, `[2 * heads * tokens * head_size]`."""


def rows(block: Tensor, key: Tensor, value: Tensor) -> None:
    block.copy_(torch.cat([key, value], dim=-1).flatten())


def transposed(block: Tensor, key: Tensor, value: Tensor) -> None:
    block.copy_(torch.cat([key.permute(1, 2, 0).flatten(), value.transpose(0, 1).flatten()]))


def in_pairs(block: Tensor, key: Tensor, value: Tensor) -> None:
    tokens, heads, size = key.shape
    pairs = [part.view(tokens // 2, 2, heads, size).permute(2, 0, 3, 1) for part in (value, key)]
    block.copy_(torch.stack(pairs).flatten())


def shuffled(block: Tensor, key: Tensor, value: Tensor) -> None:
    everything = torch.cat([key, value]).flatten()
    block.copy_(everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(3))])


def summed(block: Tensor, key: Tensor, value: Tensor) -> None:
    rows(block, key, value + key)


@dataclass
class _Impl:
    """An attention backend's update of its cache, whole blocks at a time.

    Attributes:
        tokens: of a block of its own.
    """

    written: Written
    tokens: int = TOKENS

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        for start in range(0, len(slots), self.tokens):
            part = slice(start, start + self.tokens)
            self.written(cache[int(slots[start]) // self.tokens].view(-1), key[part], value[part])


def paged(
    written: Written, heads: int, size: int, dtype: torch.dtype, cached: torch.dtype | None = None, split: int = 1
) -> tuple[PagedCache, Callable[[], Workspace]]:
    """A cache of three layers and twelve of vLLM's blocks, each `split` of the backend's; and workspaces."""
    layers = [
        SimpleNamespace(
            impl=_Impl(written, TOKENS // split),
            kv_cache=torch.zeros(12 * split, heads, TOKENS // split, 2 * size).to(cached or dtype),
        )
        for _ in range(3)
    ]
    shape = KVShape(3, heads, size, dtype)
    specs = [LayerSpec(1.0)] * 3
    return PagedCache(layers, shape, torch.device("cpu"), TOKENS), lambda: Workspace(
        specs, kv_heads=heads, head_size=size, max_tokens=64, dtype=dtype
    )


def random_workspace(made: Callable[[], Workspace]) -> Workspace:
    workspace = made()
    workspace.key.copy_(torch.randn(workspace.key.shape))
    workspace.value.copy_(torch.randn(workspace.value.shape))
    return workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (1, 12), (2, 80)])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("written", [rows, transposed, in_pairs])
def test_what_was_written_is_read(written: Written, split: int, heads: int, size: int, dtype: torch.dtype) -> None:
    cache, made = paged(written, heads, size, dtype, split=split)
    before, after = random_workspace(made), random_workspace(made)
    kept = after.key.clone()
    cache.write(before, [7, 2, 9, 4], 0, 4 * TOKENS)
    cache.read(after, [7, 2, 9, 4], range(1, 4))
    found = slice(TOKENS, 4 * TOKENS)
    torch.testing.assert_close(after.key[:, found], before.key[:, found], rtol=0, atol=0)
    torch.testing.assert_close(after.value[:, found], before.value[:, found], rtol=0, atol=0)
    torch.testing.assert_close(after.key[:, :TOKENS], kept[:, :TOKENS], rtol=0, atol=0)
    torch.testing.assert_close(after.key[:, 4 * TOKENS :], kept[:, 4 * TOKENS :], rtol=0, atol=0)
    assert (cache.token_s(after) or 0) > 0


def refused(block: Tensor, key: Tensor, value: Tensor) -> None:
    raise RuntimeError("not so")


@pytest.mark.parametrize("written", [shuffled, summed, refused])
def test_what_cannot_be_told_is_not_read(written: Written) -> None:
    cache, made = paged(written, 2, 16, torch.float32)
    assert cache.token_s(made()) is None


def test_a_cache_of_another_type_is_not_read() -> None:
    cache, made = paged(rows, 2, 16, torch.float32, cached=torch.float8_e4m3fn)
    assert cache.token_s(made()) is None


def test_learning_leaves_the_cache_alone() -> None:
    cache, made = paged(transposed, 2, 16, torch.float32)
    before = random_workspace(made)
    cache.write(before, [3], 0, TOKENS)
    kept = [layer.kv_cache.clone() for layer in cache._layers]
    assert cache.token_s(made())
    assert all(torch.equal(layer.kv_cache, then) for layer, then in zip(cache._layers, kept, strict=True))


def test_vllms_own_cache_is_read(llama: LocalEngine) -> None:
    """Whatever backend this machine's vLLM takes."""
    llama.generate(list(range(50, 90)), Sampling(max_tokens=1), OFF)
    cache, workspace = worker_half()._paged, worker_half()._blender.workspace
    block_tokens, blocks = cache._block_tokens, [5, 3, 8]
    end = len(blocks) * block_tokens
    for own in (workspace.key, workspace.value):
        own[:, :end] = torch.randn(own[:, :end].shape)
    expected = workspace.key[:, :end].clone(), workspace.value[:, :end].clone()
    with torch.inference_mode():
        saved = [layer.kv_cache[blocks].clone() for layer in cache._layers]
        cache.write(workspace, blocks, 0, end)
        workspace.clear(end)
        cache.read(workspace, blocks, range(len(blocks)))
        for layer, then in zip(cache._layers, saved, strict=True):
            layer.kv_cache[blocks] = then
    assert torch.equal(workspace.key[:, :end], expected[0])
    assert torch.equal(workspace.value[:, :end], expected[1])
