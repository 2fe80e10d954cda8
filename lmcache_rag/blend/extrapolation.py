"""Deviation extrapolation: what recomputing changed in some tokens of a chunk is carried over to its other tokens.

Tokens of a chunk that resemble each other change alike when the text before the chunk changes. In each layer, right
after the recomputed tokens' K and V are known, the change of every other token of the chunk is predicted from theirs,
by a Gaussian process whose kernel compares the tokens' reused V and how far apart they lie. So the recomputed tokens
attend to repaired neighbours at once, and the question to a repaired chunk. See docs/blending.md for what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lmcache_rag_kernels import rotate
from torch import Tensor

from lmcache_rag.blend.plan import PlannedSegment
from lmcache_rag.blend.workspace import Workspace

_FIRST_LAYER = 4 / 15
"""Share of the depth in which nothing is carried over: what reused KV lacks there hardly matters."""

_FEATURE_LAYERS = (4 / 15, 2 / 5, 8 / 15, 2 / 3)
"""Whose V tokens are compared by, as shares of the depth."""

_LENGTH_SCALE = 100.0
"""Distance in tokens at which the kernel falls to 1/e."""

_NOISE = 1.0
"""Variance of a change that its neighbours do not share, relative to that which they do."""

_HEAD = 4
"""A chunk's first tokens have a part of their own (attention sinks): they neither teach nor learn."""


class Extrapolation:
    """An observer of the pass that recomputes (`passes.Observer`); made before it, while the workspace holds reused KV.

    Args:
        recomputed: bool `[end]`: tokens that the pass computes.
        segments: the reused segments; those whose KV is exact are left alone.
        layers: in how many layers, from the first one, the pass recomputes.
    """

    def __init__(
        self, workspace: Workspace, recomputed: Tensor, segments: Sequence[PlannedSegment], layers: int
    ) -> None:
        self._workspace = workspace
        self._chunks: list[_Chunk] = []
        self._active: list[_Chunk] = []
        self._first_layer = int(_FIRST_LAYER * len(workspace.layers))
        for segment in segments:
            span = torch.arange(min(segment.start + _HEAD, segment.end), segment.end, device=recomputed.device)
            taught, rest = span[recomputed[span]], span[~recomputed[span]]
            if not segment.exact and len(taught) and len(rest):
                key, value = workspace.key[:layers, taught], workspace.value[:layers, taught]
                self._chunks.append(_Chunk(taught, rest, self._weights(taught, rest), key, value))

    def __call__(self, layer: int, positions: Tensor, query: Tensor) -> None:
        if layer == 0:  # a long pass comes in parts: a chunk's turn is the part in which all that teaches it is known
            first, last = int(positions[0]), int(positions[-1])
            self._active = [chunk for chunk in self._chunks if first <= chunk.last <= last]
        if layer >= self._first_layer:
            for chunk in self._active:
                self._carry_over(chunk, layer)

    def _carry_over(self, chunk: _Chunk, layer: int) -> None:
        workspace, rotation = self._workspace, self._workspace.layers[layer].rotation
        key = workspace.key[layer, chunk.taught] - chunk.key[layer]
        value = workspace.value[layer, chunk.taught] - chunk.value[layer]
        if rotation is not None:
            key = rotate(key, rotation, chunk.taught, inverse=True)
        change = torch.cat([key.flatten(1), value.flatten(1)], dim=1).float()
        carried = (chunk.weights @ change).to(key.dtype).unflatten(1, (2, *key.shape[1:]))
        key, value = carried[:, 0], carried[:, 1]
        if rotation is not None:
            key = rotate(key, rotation, chunk.rest)
        workspace.key[layer, chunk.rest] += key
        workspace.value[layer, chunk.rest] += value

    def _weights(self, taught: Tensor, rest: Tensor) -> Tensor:
        """`[rest, taught]`: how the change of each token follows from the recomputed ones'."""
        workspace = self._workspace
        span, depth = torch.cat([taught, rest]), len(workspace.layers)
        layers = torch.tensor([int(share * depth) for share in _FEATURE_LAYERS], device=span.device)
        features = workspace.value[layers[:, None], span].float().transpose(0, 1).flatten(1)
        features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
        apart = torch.cdist(features, features[: len(taught)]).square() / features.shape[1]
        apart += (span[:, None] - taught).abs() / _LENGTH_SCALE
        kernel = torch.exp(-apart)
        among = kernel[: len(taught)]
        among.diagonal().add_(_NOISE)
        return torch.linalg.solve(among, kernel[len(taught) :].T).T.contiguous()


@dataclass(frozen=True)
class _Chunk:
    """A chunk in part recomputed.

    Attributes:
        taught: positions of its recomputed tokens.
        rest: positions of the others.
        weights: see `Extrapolation._weights`.
        key, value: what was reused for `taught`: `[layers, taught, kv_heads, head_size]`.
    """

    taught: Tensor
    rest: Tensor
    weights: Tensor
    key: Tensor
    value: Tensor

    @property
    def last(self) -> int:
        return int(self.taught[-1])
