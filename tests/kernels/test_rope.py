"""The RoPE reference against its algebra and against complex numbers."""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import Rotation, rotate
from torch import Tensor

MAX_POSITION = 512


def _angles(rotary_dim: int) -> Tensor:
    """float64 `[MAX_POSITION, rotary_dim / 2]`."""
    frequency = 10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(MAX_POSITION, dtype=torch.float64)[:, None] * frequency


def _rotation(rotary_dim: int, *, interleaved: bool = False, scale: float = 1.0) -> Rotation:
    angles = _angles(rotary_dim)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
    return Rotation.from_cache(cache.float(), interleaved=interleaved)


def _keys(tokens: int, head_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, 3, head_size, dtype=dtype)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


styles = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@styles
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 2e-7), (torch.float32, 4e-7), (torch.bfloat16, 5e-3)],
    ids=["f64", "f32", "bf16"],
)
def test_inverse_gives_the_input_back(interleaved: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, positions = _keys(70, 64, dtype), torch.randperm(MAX_POSITION)[:70]
    rotation = _rotation(64, interleaved=interleaved)
    there = rotate(x, rotation, positions)
    assert there.dtype == dtype
    assert _error(there, x) > 0.1
    assert _error(rotate(there, rotation, positions, inverse=True), x) < tolerance


@styles
def test_rotations_add(interleaved: bool) -> None:
    x, rotation = _keys(50, 64), _rotation(64, interleaved=interleaved)
    a, b = torch.randint(0, MAX_POSITION // 2, (2, 50))
    assert _error(rotate(rotate(x, rotation, a), rotation, b), rotate(x, rotation, a + b)) < 1e-5


@styles
def test_against_complex_numbers(interleaved: bool) -> None:
    x, positions = _keys(33, 64, torch.float64), torch.randperm(MAX_POSITION)[:33]
    pairs = x.unflatten(-1, (32, 2)) if interleaved else torch.stack(x.chunk(2, dim=-1), dim=-1)
    turn = torch.polar(torch.ones(33, 32, dtype=torch.float64), _angles(64)[positions])
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    # The rotation holds its angles in float32.
    assert _error(rotate(x, _rotation(64, interleaved=interleaved), positions), expected) < 1e-6


@styles
def test_partial_rotary_copies_the_rest(interleaved: bool) -> None:
    x, positions = _keys(20, 80), torch.randperm(MAX_POSITION)[:20]
    rotation = _rotation(32, interleaved=interleaved)
    assert rotation.rotary_dim == 32
    rotated = rotate(x, rotation, positions)
    assert torch.equal(rotated[..., 32:], x[..., 32:])
    assert torch.equal(rotated[..., :32], rotate(x[..., :32].contiguous(), rotation, positions))


@styles
def test_in_place_and_with_leading_dimensions(interleaved: bool) -> None:
    x, positions = torch.stack([_keys(20, 64), _keys(20, 64) + 1]), torch.randperm(MAX_POSITION)[:20]
    rotation = _rotation(64, interleaved=interleaved)
    expected = torch.stack([rotate(layer, rotation, positions) for layer in x])
    assert rotate(x, rotation, positions, out=x) is x
    assert torch.equal(x, expected)


def test_scaled_cache_is_normalised() -> None:
    plain, scaled = _rotation(64), _rotation(64, scale=1.37)
    assert torch.allclose(scaled.cos.square() + scaled.sin.square(), torch.ones(MAX_POSITION, 32))
    assert torch.allclose(scaled.cos, plain.cos, atol=1e-6)
    assert torch.allclose(scaled.sin, plain.sin, atol=1e-6)


def test_position_outside_of_the_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        rotate(_keys(1, 64), _rotation(64), torch.tensor([MAX_POSITION]))
