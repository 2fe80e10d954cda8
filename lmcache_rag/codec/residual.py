"""What a variant of a chunk differs by from another one: what was computed behind the preamble alone from what was
computed behind a primer too. It is a twentieth of their energy, so that it takes a fraction of the bytes; and what the
other variant's coding lost is in it, so that their sum has the errors of the residual's step and no more."""

from __future__ import annotations

import numpy as np
from lmcache_rag_kernels import CodedGroups, Rows

from lmcache_rag.codec.tables import CodecTables
from lmcache_rag.codec.transform import TransformCodec

_COARSER = 1.5
"""The residual's step, in steps of what it is added to."""

_SHARE = 0.22
"""Of a coordinate's size, by which variants differ."""


class ResidualCodec(TransformCodec):
    """In the coordinates of K and V, around 0. A coordinate's size follows from what it is in K and V: the variants
    differ by a share of that, and what coding the other one lost is a quarter of a step, or all of a smaller one.

    Args:
        base_step: of what residuals are added to.
    """

    def __init__(self, tables: CodecTables, base_step: float) -> None:
        lost = np.minimum(tables.size, base_step / 4)
        super().__init__(
            tables,
            _COARSER * base_step,
            mean=np.zeros_like(tables.mean),
            size=np.hypot(_SHARE * tables.size, lost).astype(np.float32),
        )

    def restore_onto(
        self, base: TransformCodec, base_coded: CodedGroups, coded: CodedGroups, offset: int, rows: Rows
    ) -> None:
        """Write the sum of the chunk's base and its residual; see `Codec.restore`."""
        base._restore(base_coded, offset, rows, (coded, self._all))
