"""A chunk's K and V as bytes: groups of tokens, in each a stream for every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class CodedGroups:
    """The groups of a chunk that hold some of its tokens, or all of them.

    Attributes:
        data: what the streams lie in.
        places: int64 `[groups, layers, 2]`: where in `data` each stream begins, and its length in bytes.
        tokens: how many the whole chunk has.
        group: tokens to a group; the chunk's last one may have fewer.
        first: which of the chunk's groups is the first one here.
    """

    data: memoryview
    places: np.ndarray
    tokens: int
    group: int
    first: int = 0

    @property
    def layers(self) -> int:
        return int(self.places.shape[1])

    def stream(self, group: int, layer: int) -> memoryview:
        """Of a layer, in one of the groups here."""
        start, length = self.places[group, layer].tolist()
        return self.data[start : start + length]

    def span(self, group: int) -> tuple[int, int]:
        """The tokens that one of the groups here holds: the first, and the end."""
        start = (self.first + group) * self.group
        return start, min(self.tokens, start + self.group)

    def holding(self, offset: int, length: int) -> range:
        """The groups here that hold so many tokens from `offset` on.

        Raises:
            ValueError: some of the tokens are in none of them.
        """
        end = offset + length
        if length < 0 or offset < self.first * self.group or end > self.span(len(self.places) - 1)[1]:
            raise ValueError("the tokens restored must be among those of the groups")
        last = (end - 1) // self.group if length else offset // self.group - 1
        return range(offset // self.group - self.first, last + 1 - self.first)
