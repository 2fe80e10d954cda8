"""Deviation extrapolation: what recomputing changed in some tokens of a chunk is carried over to its other tokens.

Tokens of a chunk that resemble each other change alike when the text before the chunk changes. In each layer, right
after the recomputed tokens' K and V are known, the change of every other token of the chunk is predicted from theirs,
by a Gaussian process whose kernel compares the tokens' reused V and how far apart they lie. So the recomputed tokens
attend to repaired neighbours at once, and the question to a repaired chunk. See docs/blending.md for what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from lmcache_rag_kernels import rotate
from torch import Tensor

from lmcache_rag.blend.passes import Observer
from lmcache_rag.blend.workspace import Workspace
from lmcache_rag.plan.plan import PlannedSegment

_FIRST_LAYER = 4 / 15
"""Share of the depth in which nothing is carried over: what reused KV lacks there hardly matters. Tokens are compared
by their V in the layer behind it."""

_LENGTH_SCALE = 100.0
"""Distance in tokens at which the kernel falls to 1/e."""

_NOISE = 1.0
"""Variance of a change that its neighbours do not share, relative to that which they do."""

_WINDOW = 1024
"""A longer chunk is dealt with in windows of so many tokens at most, each by itself, so that the cost grows with its
length and not with the square or cube of that: at ten times the length scale tokens hardly bear on each other."""

_HEAD = 4
"""A chunk's first tokens have a part of their own (attention sinks): they neither teach nor learn."""


class Extrapolation:
    """Made before the pass that recomputes, while the workspace holds reused KV.

    Args:
        recomputed: bool `[end]`: tokens that the pass computes.
        segments: the reused segments; those whose KV is exact are left alone.
        layers: in how many layers, from the first one, the pass recomputes.
    """

    def __init__(
        self, workspace: Workspace, recomputed: Tensor, segments: Sequence[PlannedSegment], layers: int
    ) -> None:
        self._workspace = workspace
        self._first_layer = int(_FIRST_LAYER * len(workspace.layers))
        self._chunks: list[_Chunk] = []
        for segment in segments:
            if segment.exact:
                continue
            for rows in _windows(min(segment.start + _HEAD, segment.end), segment.end):
                span = torch.arange(rows.start, rows.stop, device=recomputed.device)
                taught = span[recomputed[span]]
                if 0 < len(taught) < len(span):
                    key, value = workspace.key[:layers, taught], workspace.value[:layers, taught]
                    self._chunks.append(_Chunk(rows, span, taught, self._weights(span, taught), key, value))

    @property
    def ends(self) -> list[int]:
        """Where what is carried over among ends: up to there, tokens that are recomputed belong in one pass."""
        return [chunk.rows.stop for chunk in self._chunks]

    def after(self, positions: Tensor) -> Observer:
        """What is done in each layer of the pass of the recomputed tokens at `positions`. A long pass comes in parts: a
        chunk's turn is the part in which all that teaches it is known."""
        first, last = int(positions[0]), int(positions[-1])
        chunks = [chunk for chunk in self._chunks if first <= int(chunk.taught[-1]) <= last]

        def carry_over(layer: int) -> None:
            if layer >= self._first_layer:
                for chunk in chunks:
                    self._carry_over(chunk, layer)

        return carry_over

    def _carry_over(self, chunk: _Chunk, layer: int) -> None:
        workspace, rotation = self._workspace, self._workspace.layers[layer].rotation
        key = workspace.key[layer, chunk.taught] - chunk.key[layer]
        value = workspace.value[layer, chunk.taught] - chunk.value[layer]
        if rotation is not None:
            rotate(key, rotation, chunk.taught, inverse=True, out=key)
        # Gathered and scattered is what few tokens change; what all the others get is added to whole rows.
        carried = (chunk.weights @ key.flatten(1).float()).to(key.dtype).unflatten(1, key.shape[1:])
        if rotation is not None:
            rotate(carried, rotation, chunk.span, out=carried)
        workspace.key[layer, chunk.rows] += carried
        carried = (chunk.weights @ value.flatten(1).float()).to(value.dtype).unflatten(1, value.shape[1:])
        workspace.value[layer, chunk.rows] += carried

    def _weights(self, span: Tensor, taught: Tensor) -> Tensor:
        """`[span, taught]`: how each token's change follows from the recomputed ones', zero for those themselves."""
        workspace, rows = self._workspace, taught - span[0]
        features = workspace.value[self._first_layer, span].float().flatten(1)
        features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
        apart = torch.cdist(features, features[rows]).square() / features.shape[1]
        apart += (span[:, None] - taught).abs() / _LENGTH_SCALE
        kernel = torch.exp(-apart)
        among = kernel[rows]
        among.diagonal().add_(_NOISE)
        kernel[rows] = 0.0
        return torch.linalg.solve(among, kernel.T).T.contiguous()


@dataclass(frozen=True)
class _Chunk:
    """A chunk, or a window of a long one, in part recomputed.

    Attributes:
        rows, span: positions of its tokens behind the chunk's head.
        taught: those of them that are recomputed.
        weights: see `Extrapolation._weights`.
        key, value: what was reused for `taught`: `[layers, taught, kv_heads, head_size]`.
    """

    rows: slice
    span: Tensor
    taught: Tensor
    weights: Tensor
    key: Tensor
    value: Tensor


def _windows(start: int, end: int) -> list[slice]:
    """The rows from `start` to `end` in as few windows as may be, of about the same length."""
    count = max(1, -(-(end - start) // _WINDOW))
    edges = [start + (end - start) * number // count for number in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]
