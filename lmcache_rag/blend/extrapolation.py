"""Deviation extrapolation: what recomputing changed in some tokens of a chunk is carried over to its other tokens.

Tokens of a chunk that resemble each other change alike when the text before the chunk changes. In each layer, right
after the recomputed tokens' K and V are known, the change of every other token of the chunk is predicted from theirs,
by a Gaussian process whose kernel compares the tokens' reused V and how far apart they lie. So the recomputed tokens
attend to repaired neighbours at once, and the question to a repaired chunk. See docs/blending.md for what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from lmcache_rag_kernels import Lesson, carrier
from torch import Tensor

from lmcache_rag.blend.passes import Observer
from lmcache_rag.blend.workspace import Workspace, on_device
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
        recomputed: bool `[end]`, in main memory: tokens that the pass computes.
        segments: the reused segments; those whose KV is exact are left alone.
        layers: in how many layers, from the first one, the pass recomputes.
    """

    def __init__(
        self, workspace: Workspace, recomputed: Tensor, segments: Sequence[PlannedSegment], layers: int
    ) -> None:
        self._workspace = workspace
        self._first_layer = int(_FIRST_LAYER * len(workspace.layers))
        self._taught: list[Tensor] = []  # positions in main memory, window by window
        self._lessons: list[Lesson] = []
        for segment in segments:
            if segment.exact:
                continue
            for rows in _windows(min(segment.start + _HEAD, segment.end), segment.end):
                taught = rows.start + recomputed[rows].nonzero().flatten()
                if 0 < len(taught) < rows.stop - rows.start:
                    self._taught.append(taught)
                    there = on_device(taught, workspace.device)
                    self._lessons.append(Lesson(rows, there, self._weights(rows, there)))
        if self._lessons:
            every = torch.cat([lesson.taught for lesson in self._lessons])
            self._key, self._value = workspace.key[:layers, every], workspace.value[:layers, every]

    @property
    def ends(self) -> list[int]:
        """Where what is carried over among ends: up to there, tokens that are recomputed belong in one pass."""
        return [lesson.rows.stop for lesson in self._lessons]

    def after(self, positions: Tensor) -> Observer:
        """What is done in each layer of the pass of the recomputed tokens at `positions`, in main memory. A long pass
        comes in parts: a chunk's turn is the part in which all that teaches it is known."""
        first, last = int(positions[0]), int(positions[-1])
        turns = [number for number, taught in enumerate(self._taught) if first <= int(taught[-1]) <= last]
        if not turns:
            return lambda _: None
        carry = carrier([self._lessons[number] for number in turns])
        start = sum(len(taught) for taught in self._taught[: turns[0]])
        before = slice(start, start + sum(len(self._taught[number]) for number in turns))  # turns follow each other

        def carry_over(layer: int) -> None:
            if layer >= self._first_layer:
                workspace, rotation = self._workspace, self._workspace.layers[layer].rotation
                key, value = self._key[layer, before], self._value[layer, before]
                carry(workspace.key[layer], workspace.value[layer], key, value, rotation)

        return carry_over

    def _weights(self, rows: slice, taught: Tensor) -> Tensor:
        """`[rows, taught]`: how each token's change follows from the recomputed ones', zero for those themselves."""
        workspace, own = self._workspace, taught - rows.start
        span = torch.arange(rows.start, rows.stop, device=taught.device)
        features = workspace.value[self._first_layer, rows].float().flatten(1)
        features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
        apart = torch.cdist(features, features[own]).square() / features.shape[1]
        apart += (span[:, None] - taught).abs() / _LENGTH_SCALE
        kernel = torch.exp(-apart)
        among = kernel[own]
        among.diagonal().add_(_NOISE)
        kernel[own] = 0.0
        # Never singular, so that nobody waits to hear whether it is.
        return torch.linalg.solve_ex(among, kernel.T)[0].T.contiguous()


def _windows(start: int, end: int) -> list[slice]:
    """The rows from `start` to `end` in as few windows as may be, of about the same length."""
    count = max(1, -(-(end - start) // _WINDOW))
    edges = [start + (end - start) * number // count for number in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]
