"""Dense K and V of one prompt, all layers: where a blend is done before it goes to vLLM's paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from lmcache_rag_kernels import Rotation, Rows, rotate
from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """How one attention layer computes.

    Attributes:
        scale: factor of q·k before the softmax.
        window: a token sees its own position and the `window - 1` before it; None for all.
        rotation: RoPE of this layer; None where it has none.
    """

    scale: float
    window: int | None = None
    rotation: Rotation | None = None


class LayeredKV(Protocol):
    """Position-free K and V."""

    def place(self, offset: int, rows: Rows) -> None:
        """Write tokens from `offset` on to as many rows, K rotated to place."""
        ...


class Workspace:
    """K (RoPE applied) and V at positions 0 to `max_tokens`, allocated once and used by one blend at a time.

    Attributes:
        key, value: `[layers, max_tokens, kv_heads, head_size]`.
        holder: whose K and V these are; others fill it anew.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        kv_heads: int,
        head_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = tuple(layers)
        self._rotations = [spec.rotation for spec in self.layers]
        shape = (len(self.layers), max_tokens, kv_heads, head_size)
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.holder: object = None

    @property
    def max_tokens(self) -> int:
        return self.key.shape[1]

    @property
    def device(self) -> torch.device:
        return self.key.device

    def place(
        self,
        kv: LayeredKV,
        start: int,
        offset: int,
        length: int,
        verdicts: list[Callable[[], int | None]] | None = None,
    ) -> None:
        """Put tokens `offset` to `offset + length` of stored KV at positions from `start` on.

        Args:
            verdicts: see `Rows`.
        """
        rows = slice(start, start + length)
        kv.place(offset, Rows(self.key[:, rows], self.value[:, rows], start, self._rotations, verdicts))

    def clear(self, end: int) -> None:
        """Make K and V of the first `end` positions zero, so that nothing is left of who was there before."""
        self.key[:, :end] = 0
        self.value[:, :end] = 0
        self.holder = None

    def take(self, start: int, length: int) -> Tensor:
        """A position-free copy of rows in main memory: `[layers, 2, length, kv_heads, head_size]`."""
        positions = torch.arange(start, start + length, device=self.device)
        rows = slice(start, start + length)
        taken = torch.stack([self.key[:, rows], self.value[:, rows]], dim=1)
        for index, spec in enumerate(self.layers):
            if spec.rotation is not None:
                rotate(taken[index, 0], spec.rotation, positions, inverse=True, out=taken[index, 0])
        return taken.cpu()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory, on the device, which is not waited for: what it has to do before goes on."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
