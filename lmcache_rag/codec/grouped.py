"""Fixed width: each value is one of 256 or 16 steps between the smallest and the largest of its range.

K's channels differ much and each is much the same for all tokens, so a range of K is one channel of all the tokens that
are coded together; of V it is a token's channels of one head (Liu et al. 2024, "KIVI", https://arxiv.org/abs/2402.02750).
"""

from __future__ import annotations

import torch
from lmcache_rag_kernels import CodedGroups
from torch import Tensor

from lmcache_rag.codec.base import GroupCodec
from lmcache_rag.codec.fixed import from_streams, to_streams


class GroupedCodec(GroupCodec):
    """A stream is each range's smallest value and step (float16), K's before V's, and then the steps, K's before V's.

    Args:
        bits: 8 or 4; with 4, the second half of K's tokens shares bytes with the first, and of V's channels.
    """

    def __init__(self, bits: int) -> None:
        self._levels = (1 << bits) - 1
        self._bits = bits

    def encode_group(self, kv: Tensor) -> list[bytes | memoryview]:
        key, value = kv.detach().float().cpu().unbind(1)
        key_ranges, key_steps = self._quantised(key.flatten(2), dim=1)
        value_ranges, value_steps = self._quantised(value, dim=3)
        steps = (self._narrow(key_steps.mT.contiguous()), self._narrow(value_steps))
        parts = [ranges.view(torch.uint8) for ranges in (key_ranges, value_ranges)] + list(steps)
        return to_streams(torch.cat([part.flatten(1) for part in parts], dim=1))

    def decode_group(self, coded: CodedGroups, group: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        begin, end = coded.span(group)
        tokens, channels = end - begin, heads * size
        lengths = [4 * channels, 4 * tokens * heads, channels * self._bytes(tokens), tokens * heads * self._bytes(size)]
        key_ranges, value_ranges, key_steps, value_steps = from_streams(coded, group, sum(lengths)).split(lengths, 1)
        kv = torch.empty(coded.layers, 2, tokens, channels, dtype=dtype)
        low, step = _low_and_step(key_ranges, (1, channels))
        steps = self._wide(key_steps.unflatten(1, (channels, -1)), tokens).mT.contiguous()
        torch.addcmul(low, steps.float(), step, out=kv[:, 0])
        low, step = _low_and_step(value_ranges, (tokens, heads, 1))
        steps = self._wide(value_steps.unflatten(1, (tokens, heads, -1)), size)
        kv = kv.unflatten(3, (heads, size))
        torch.addcmul(low, steps.float(), step, out=kv[:, 1])
        return kv

    def _quantised(self, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Of the ranges along `dim` the smallest value and the step (float16 `[..., 2]`), and the steps (uint8)."""
        low, high = values.aminmax(dim=dim, keepdim=True)
        ranges = torch.stack([low, (high - low) / self._levels], dim=-1).clamp(-65504, 65504).half()
        low, step = ranges.float().unbind(-1)
        steps = (values - low).div_(step.clamp_min(1e-7)).round_().clamp_(0, self._levels)
        return ranges, steps.to(torch.uint8)

    def _bytes(self, steps: int) -> int:
        return steps if self._bits == 8 else (steps + 1) // 2

    def _narrow(self, steps: Tensor) -> Tensor:
        """uint8 steps as bytes: two in one where they have four bits, the range's second half in the upper."""
        if self._bits == 8:
            return steps
        half = self._bytes(steps.shape[-1])
        packed = steps[..., :half].clone()
        packed[..., : steps.shape[-1] - half] |= steps[..., half:] << 4
        return packed

    def _wide(self, packed: Tensor, steps: int) -> Tensor:
        if self._bits == 8:
            return packed
        return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :steps]


def _low_and_step(ranges: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """float32 `[layers, *shape]` each, from bytes."""
    return ranges.view(torch.float16).unflatten(1, (*shape, 2)).float().unbind(-1)
