"""What the tokens of a chunk learn from some of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Lesson:
    """A chunk's tokens, of which some are taught.

    Attributes:
        rows: positions of its tokens.
        taught: int64 `[taught]`, ascending: those of them that changed.
        weights: float32 `[rows, taught]`: how each token's change follows from theirs; zero for those themselves.
    """

    rows: slice
    taught: Tensor
    weights: Tensor
