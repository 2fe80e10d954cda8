"""Fixed width: each value is one of 256 or 16 steps between the smallest and the largest of its group.

K's channels differ much and each is much the same for all tokens, so a group of K is one channel of all the tokens that
are coded together; of V it is a token's channels of one head (Liu et al. 2024, "KIVI", https://arxiv.org/abs/2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmcache_rag.codec.base import Codec
from lmcache_rag.errors import CorruptObjectError


class GroupedCodec(Codec):
    """A stream is each group's smallest value and step (float16), K's before V's, and then the steps, K's before V's.

    Args:
        bits: 8 or 4; with 4, the second half of K's tokens shares bytes with the first, and of V's channels.
    """

    def __init__(self, bits: int) -> None:
        self._levels = (1 << bits) - 1
        self._bits = bits

    def encode_group(self, layer: int, kv: Tensor) -> memoryview:
        key, value = kv.detach().float().cpu()
        coded = [self._quantised(group) for group in (key.flatten(1).mT, value)]
        parts = [ranges for ranges, _ in coded] + [self._narrow(steps) for _, steps in coded]
        return memoryview(bytearray().join(part.contiguous().numpy().tobytes() for part in parts))

    def decode_group(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        tokens, heads, size = shape
        of_key, of_value = (1, heads * size, tokens), (tokens, heads, size)
        lengths = [4 * heads * size, 4 * tokens * heads]
        lengths += [self._bytes(groups) for groups in (of_key, of_value)]
        if len(stream) != sum(lengths):
            raise CorruptObjectError(f"a q{self._bits} layer of shape {shape} cannot have {len(stream)} bytes")
        key_range, value_range, key, value = torch.frombuffer(stream, dtype=torch.uint8).split(lengths)
        decoded = torch.empty(2, *shape, dtype=dtype)
        decoded[0] = self._values(key, key_range, of_key)[0].mT.unflatten(1, (heads, size))
        decoded[1] = self._values(value, value_range, of_value)
        return decoded

    def _quantised(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Per group, along the last axis, its range (float16 `[..., 2]`), and the steps (uint8)."""
        low, high = groups.aminmax(dim=-1, keepdim=True)
        ranges = torch.cat([low, (high - low) / self._levels], dim=-1).clamp(-65504, 65504).half()
        low, step = ranges.float().split(1, dim=-1)
        steps = ((groups - low) / step.clamp_min(1e-7)).round().clamp(0, self._levels)
        return ranges, steps.to(torch.uint8)

    def _values(self, narrow: Tensor, ranges: Tensor, groups: tuple[int, int, int]) -> Tensor:
        low, step = ranges.view(torch.float16).view(*groups[:-1], 2).float().split(1, dim=-1)
        return torch.addcmul(low, self._wide(narrow, groups).float(), step)

    def _bytes(self, groups: tuple[int, int, int]) -> int:
        return groups[0] * groups[1] * (groups[2] if self._bits == 8 else (groups[2] + 1) // 2)

    def _narrow(self, steps: Tensor) -> Tensor:
        """uint8 steps as bytes: two in one where they have four bits, the group's second half in the upper."""
        if self._bits == 8:
            return steps
        half = (steps.shape[-1] + 1) // 2
        packed = steps[..., :half].clone()
        packed[..., : steps.shape[-1] - half] |= steps[..., half:] << 4
        return packed

    def _wide(self, narrow: Tensor, groups: tuple[int, int, int]) -> Tensor:
        if self._bits == 8:
            return narrow.view(groups)
        packed = narrow.view(*groups[:-1], -1)
        return torch.cat([packed & 15, packed >> 4], dim=-1)[..., : groups[2]]
