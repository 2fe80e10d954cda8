"""vLLM's paged KV cache: rows go in through each attention layer's own update, and come back out by what was learned
of its layout."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_rag.blend.workspace import Workspace, on_device
from lmcache_rag.chunk_kv import KVShape

_log = logging.getLogger(__name__)

_DIGIT_BITS = 7
"""Numbers up to 128 are exact in every compute type."""

_TIMED_TOKENS = 2048
"""So many that a device's launches do not count for much."""


@dataclass(frozen=True)
class _Strided:
    """Where K or V of a block lies in it: at `offset`, with a stride for each of `digits`. Those are the prime factors
    of the block's tokens, its heads, and the prime factors of the head size: so whatever is transposed, tiled or packed
    in pairs is a matter of strides."""

    digits: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, blocks: Tensor) -> Tensor:
        """`[blocks, *digits]` of whole blocks, `[blocks, ...]`, contiguous: a view."""
        stride = blocks[0].numel()
        return blocks.as_strided((len(blocks), *self.digits), (stride, *self.strides), self.offset)


@dataclass(frozen=True)
class _Layout:
    """How one layer's cache lays out a block.

    Attributes:
        tokens: of a block of the attention backend's, of which vLLM's own may hold several.
    """

    tokens: int
    key: _Strided
    value: _Strided


class PagedCache:
    """The paged cache of all attention layers.

    A backend lays out the elements of a block as its kernels like them (K transposed on CPUs, packed in pairs for AMX),
    and its layout is its own affair. So where they lie is learned, once: rows whose elements say which ones they are go
    through the layer's own update into a small cache of the same form. A cache that holds anything but the elements
    themselves, as one in fp8 does, is not read.

    Args:
        layers: vLLM's attention layers, whose caches are allocated.
        block_tokens: tokens of one of vLLM's blocks.
    """

    def __init__(self, layers: Sequence[Any], shape: KVShape, device: torch.device, block_tokens: int) -> None:
        self._layers = layers
        self._shape = shape
        self._device = device
        self._block_tokens = block_tokens

    @torch.inference_mode()
    def write(self, workspace: Workspace, block_ids: Sequence[int], start: int, end: int) -> None:
        """Copy rows `start` to `end` of the workspace to their places in a request's blocks (its block table)."""
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_ids, dtype=torch.int64)
        slots = blocks[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens
        slots = on_device(slots, self._device)
        for index, layer in enumerate(self._layers):
            key, value = workspace.key[index, start:end], workspace.value[index, start:end]
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    @torch.inference_mode()
    def read(self, workspace: Workspace, block_ids: Sequence[int], blocks: range) -> None:
        """Copy some whole blocks of a request, by their number in its block table, to their rows of the workspace."""
        layouts = self._layouts
        assert layouts is not None, "a cache that cannot be read"
        if not blocks:
            return
        split = self._block_tokens // layouts[0].tokens
        ids = torch.tensor([block_ids[number] for number in blocks], dtype=torch.int64)
        ids = on_device((ids[:, None] * split + torch.arange(split)).flatten(), self._device)
        rows = slice(blocks.start * self._block_tokens, blocks.stop * self._block_tokens)
        for index, (layer, layout) in enumerate(zip(self._layers, layouts, strict=True)):
            found = layer.kv_cache.index_select(0, ids)
            for part, own in ((layout.key, workspace.key), (layout.value, workspace.value)):
                own[index, rows].view(len(ids), *part.digits).copy_(part.of(found))

    def token_s(self, workspace: Workspace) -> float | None:
        """Seconds that reading takes a token, measured; None where it cannot be read."""
        there = len(self._layers[0].kv_cache) * (self._layouts[0].tokens if self._layouts else 0) // self._block_tokens
        count = min(there, min(_TIMED_TOKENS, workspace.max_tokens) // self._block_tokens)
        if not count:
            return None
        seconds = []
        for _ in range(3):  # the first one pays for what is only done once
            start = time.perf_counter()
            self.read(workspace, range(count), range(count))
            float(workspace.value[-1, 0, 0, 0])  # waits for a device that runs behind
            seconds.append(time.perf_counter() - start)
        return min(seconds) / (count * self._block_tokens)

    @functools.cached_property
    def _layouts(self) -> list[_Layout] | None:
        """Of each layer; None where one of them cannot be read."""
        layouts = []
        try:
            for layer in self._layers:
                layout = _learned(layer, self._shape)
                if layout is None or self._block_tokens % layout.tokens:
                    _log.warning("vLLM's paged cache cannot be read: its layout is no matter of strides")
                    return None
                layouts.append(layout)
        except Exception as error:  # noqa: BLE001  # a backend may take nothing but what it expects; the engine goes on
            _log.warning("vLLM's paged cache cannot be read (%s: %s)", type(error).__name__, error)
            return None
        return layouts


@torch.inference_mode()
def _learned(layer: Any, shape: KVShape) -> _Layout | None:
    """How a layer's cache lays out a block; None where that is not a matter of strides."""
    cache, row = layer.kv_cache, shape.kv_heads * shape.head_size
    if not isinstance(cache, Tensor) or cache.dtype != shape.dtype or cache.ndim < 2:
        return None
    tokens = cache[0].numel() // (2 * row)
    numbers = torch.arange(2 * 2 * tokens * row, device=cache.device).view(2, 2, tokens, row)  # block, K or V
    blocks = torch.zeros((2, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    found = torch.zeros(2, cache[0].numel(), dtype=torch.int64, device=cache.device)
    slots = torch.arange(2 * tokens, device=cache.device)
    for shift in range(0, int(numbers[-1, -1, -1, -1]).bit_length(), _DIGIT_BITS):
        digits = ((numbers >> shift) & ((1 << _DIGIT_BITS) - 1)).to(shape.dtype)
        key, value = digits.transpose(0, 1).reshape(2, 2 * tokens, shape.kv_heads, shape.head_size)
        layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), blocks, slots)
        found += blocks.reshape(2, -1).long() << shift
    places = found.cpu().argsort(dim=1)
    if not torch.equal(found.cpu().gather(1, places), numbers.cpu().flatten(1)) or not torch.equal(*places):
        return None
    key, value = (_strided(part, tokens, shape) for part in places[0].view(2, -1))
    return None if key is None or value is None else _Layout(tokens, key, value)


def _strided(places: Tensor, tokens: int, shape: KVShape) -> _Strided | None:
    """Places of elements `[tokens * kv_heads * head_size]` as strides; None where they are none."""
    digits = (*_factors(tokens), shape.kv_heads, *_factors(shape.head_size))
    numbers = torch.arange(len(places)).view(digits)
    offset, strides, expected = int(places[0]), [], torch.zeros_like(numbers)
    for axis, size in enumerate(digits):
        following = numbers.select(axis, min(1, size - 1)).flatten()[0]
        strides.append(int(places[following]) - offset)
        expected += strides[-1] * torch.arange(size).view([-1 if at == axis else 1 for at in range(len(digits))])
    if not torch.equal(expected.flatten() + offset, places) or min(strides) < 0:
        return None
    return _Strided(digits, tuple(strides), offset)


def _factors(number: int) -> list[int]:
    """Prime factors, ascending."""
    for factor in range(2, math.isqrt(number) + 1):
        if number % factor == 0:
            return [factor, *_factors(number // factor)]
    return [number]
