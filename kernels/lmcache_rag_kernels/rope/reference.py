"""RoPE as a readable PyTorch reference (Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864).

A rotation by the angles of position p is orthogonal, so taking RoPE off a key is the rotation by the negated
angles, and moving a key from p to p' is R(p' - p) = R(p') R(p)^-1. Keys with RoPE taken off are *position-free*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The angles of one rotary embedding, for every position that the model knows.

    Attributes:
        cos, sin: float tensors `[max_position, rotary_dim / 2]`, of unit length per pair: scaled variants such as
            YaRN multiply q and k by a constant, which is divided out here and stays in the keys.
        interleaved: False where pair i is (i, i + rotary_dim / 2) (GPT-NeoX, Llama), True where it is (2i, 2i + 1)
            (GPT-J).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def from_cache(cls, cos_sin: Tensor, *, interleaved: bool = False) -> Rotation:
        """From the usual cache `[max_position, rotary_dim]`, cosines then sines, possibly scaled by a constant."""
        cos, sin = cos_sin.float().chunk(2, dim=-1)
        length = torch.sqrt(cos * cos + sin * sin).clamp_min(1e-12)
        return cls(cos / length, sin / length, interleaved)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's leading dimensions are rotated."""
        return 2 * self.cos.shape[-1]


def rotate(
    x: Tensor, rotation: Rotation, positions: Tensor, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotate keys to `positions`, or (inverse) take the rotation of `positions` off.

    Args:
        x: keys `[..., tokens, heads, head_size]`, any float dtype. Dimensions past `rotary_dim` are copied.
        positions: int64 `[tokens]`.
        out: written and returned when given; same shape as x, and may be x itself.

    Raises:
        IndexError: a position is outside the rotation's range.
    """
    dim, half = rotation.rotary_dim, rotation.rotary_dim // 2
    shape, axis = ((half, 2), -1) if rotation.interleaved else ((2, half), -2)
    cos = rotation.cos[positions].unsqueeze(1).unsqueeze(axis)
    sin = rotation.sin[positions].unsqueeze(1).unsqueeze(axis)
    if inverse:
        sin = -sin
    pairs = x[..., :dim].unflatten(-1, shape)
    pairs = pairs if x.dtype == torch.float64 else pairs.float()
    # In full, not broadcast, so that a head is one run of numbers to PyTorch.
    cos, sin = torch.cat([cos, cos], axis).to(pairs.dtype), torch.cat([-sin, sin], axis).to(pairs.dtype)
    partners = pairs.flip(axis)
    if out is None:
        out = torch.empty_like(x)
    rotated = out[..., :dim].unflatten(-1, shape)
    if out.dtype == pairs.dtype:
        torch.mul(pairs, cos, out=rotated).addcmul_(partners, sin)
    else:
        rotated.copy_((pairs * cos).addcmul_(partners, sin))
    if out is not x and dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]
    return out
