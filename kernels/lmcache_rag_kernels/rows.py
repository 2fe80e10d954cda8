"""Where K and V of a prompt's tokens are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lmcache_rag_kernels.rope import Rotation


@dataclass(frozen=True, eq=False)
class Rows:
    """Room for K and V of consecutive tokens in all layers.

    Attributes:
        key, value: `[layers, length, heads, head_size]`; strided, but a token's channels lie in a row.
        start: the first token's position in the prompt.
        rotations: RoPE of each layer's K; None where it has none.
        verdicts: where given, what a device decodes is not waited for: what is appended says, when it is asked, which
            layer does not fit, or None.
    """

    key: Tensor
    value: Tensor
    start: int
    rotations: Sequence[Rotation | None]
    verdicts: list[Callable[[], int | None]] | None = None

    @property
    def length(self) -> int:
        return int(self.key.shape[1])

    def part(self, layers: slice, tokens: slice) -> Rows:
        """Of some layers and tokens; `tokens` counts from the first row."""
        first = tokens.indices(self.length)[0]
        return Rows(
            self.key[layers, tokens],
            self.value[layers, tokens],
            self.start + first,
            self.rotations[layers],
            self.verdicts,
        )
