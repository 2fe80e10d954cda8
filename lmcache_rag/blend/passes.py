"""Nested forwards: any tokens of a prompt at any positions, over the workspace's K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from lmcache_rag_kernels import attend, attend_weighing
from torch import Tensor

from lmcache_rag.blend.workspace import Workspace, on_device

Observer = Callable[[int], None]
"""Called with each layer when the pass's K and V of it are in the workspace, before its attention."""


class Pass:
    """One nested forward, seen from the attention layers: takes its K and V into the workspace and attends over it.

    Args:
        positions: int64 `[tokens]`, ascending; from main memory they go to the device.
        observe: called in every layer, before its attention.
        stop_after: the pass ends when this layer's K and V are in the workspace.
    """

    def __init__(
        self, workspace: Workspace, positions: Tensor, observe: Observer | None = None, stop_after: int | None = None
    ) -> None:
        self.positions = on_device(positions, workspace.device)
        self._workspace = workspace
        self._observe = observe
        self._stop_after = stop_after

    @property
    def token_layers(self) -> int:
        """What it costs: its tokens times the layers that they go through."""
        layers = len(self._workspace.layers) if self._stop_after is None else self._stop_after + 1
        return len(self.positions) * layers

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> bool:
        """Compute one layer's attention: query and out `[tokens, heads, head_size]`, key and value with kv_heads.

        Returns False where the pass is to end here (`out` is not written then).
        """
        workspace = self._workspace
        workspace.key[layer, self.positions] = key
        workspace.value[layer, self.positions] = value
        if self._observe is not None:
            self._observe(layer)
        if layer == self._stop_after:
            return False
        self._attend(layer, query, out)
        return True

    def _attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        workspace, spec = self._workspace, self._workspace.layers[layer]
        key, value = workspace.key[layer], workspace.value[layer]
        attend(query, key, value, self.positions, scale=spec.scale, window=spec.window, out=out)


class ProbePass(Pass):
    """A pass of which the last tokens, those at `end` and behind, are the question: weighs what it attends to.

    Args:
        first_layer: attention is counted from this layer on.
        mass: float32 `[end]`, to which the attention of each token is added.
    """

    def __init__(self, workspace: Workspace, positions: Tensor, end: int, first_layer: int, mass: Tensor) -> None:
        super().__init__(workspace, positions)
        self._end = end
        self._asking = int(torch.searchsorted(positions, end))  # in main memory
        self._first_layer = first_layer
        self._mass = mass

    def _attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        if layer < self._first_layer or self._asking == len(self.positions):
            super()._attend(layer, query, out)
            return
        workspace, spec, asking = self._workspace, self._workspace.layers[layer], self._asking
        key, value = workspace.key[layer], workspace.value[layer]
        if asking:
            positions = self.positions[:asking]
            attend(query[:asking], key, value, positions, scale=spec.scale, window=spec.window, out=out[:asking])
        positions = self.positions[asking:]
        mass = attend_weighing(
            query[asking:], key, value, positions, scale=spec.scale, window=spec.window, out=out[asking:]
        )
        self._mass += mass[: self._end]


class PassRunner(Protocol):
    """Runs the model: `token_ids` (int64) at `nested.positions`, each attention layer through `nested.attention`."""

    def __call__(self, token_ids: Tensor, nested: Pass) -> None: ...
