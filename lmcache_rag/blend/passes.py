"""A nested forward: any tokens of a prompt at any positions, over the workspace's K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lmcache_rag_kernels import attend
from torch import Tensor

from lmcache_rag.blend.workspace import Workspace

Observer = Callable[[int, Tensor, Tensor], None]
"""(layer, positions, query), called when the pass's K and V of that layer are in the workspace."""


class Pass:
    """One nested forward, seen from the attention layers: takes its K and V into the workspace and attends over it.

    Args:
        positions: int64 `[tokens]`, ascending.
        observe: called in every layer, before its attention.
        stop_after: the pass ends when this layer's K and V are in the workspace.
    """

    def __init__(
        self, workspace: Workspace, positions: Tensor, observe: Observer | None = None, stop_after: int | None = None
    ) -> None:
        self.positions = positions
        self._workspace = workspace
        self._observe = observe
        self._stop_after = stop_after

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> bool:
        """Compute one layer's attention: query and out `[tokens, heads, head_size]`, key and value with kv_heads.

        Returns False where the pass is to end here (`out` is not written then).
        """
        workspace = self._workspace
        workspace.key[layer, self.positions] = key
        workspace.value[layer, self.positions] = value
        if self._observe is not None:
            self._observe(layer, self.positions, query)
        if layer == self._stop_after:
            return False
        spec = workspace.layers[layer]
        attend(
            query,
            workspace.key[layer],
            workspace.value[layer],
            self.positions,
            scale=spec.scale,
            window=spec.window,
            out=out,
        )
        return True


class PassRunner(Protocol):
    """Runs the model: `token_ids` (int64) at `nested.positions`, each attention layer through `nested.attention`."""

    def __call__(self, token_ids: Tensor, nested: Pass) -> None: ...
