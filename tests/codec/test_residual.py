"""Residuals: few bytes, and with what they are added to no larger errors than their own step's."""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import CodedGroups

from lmcache_rag.codec.residual import ResidualCodec
from lmcache_rag.codec.tables import CodecTables, head_groups, learn_tables
from lmcache_rag.codec.transform import TransformCodec
from lmcache_rag.errors import CorruptObjectError
from tests.codec.coding import coded_groups

LAYERS, STEP = 2, 0.26
SHAPES = [(2, 8), (3, 64), (4, 128)]
"""Heads and their sizes: those of the last one are in groups."""


def kv_of(tokens: int, heads: int, size: int, seed: int = 0) -> torch.Tensor:
    """Of few degrees of freedom, around a mean."""
    mixing = torch.randn(LAYERS, 2, 8, heads * size, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(LAYERS, 2, tokens, 8, generator=draw)
    kv = 3 + hidden @ mixing + 0.05 * torch.randn(LAYERS, 2, tokens, heads * size, generator=draw)
    return kv.unflatten(3, (heads, size))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def tables(shape: tuple[int, int]) -> CodecTables:
    groups, width = head_groups(*shape), shape[0] * shape[1]
    fisher = torch.eye(width // groups).expand(LAYERS, 2, groups, -1, -1)
    return learn_tables(kv_of(2000, *shape).flatten(3), fisher)


def stored(codec: TransformCodec, kv: torch.Tensor) -> tuple[torch.Tensor, CodedGroups]:
    """What comes back, and as what it was kept."""
    coded = coded_groups(codec, kv)
    return codec.decode(coded, *kv.shape[3:], torch.float32), coded


def both(tables: CodecTables, tokens: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A variant, and another one as it comes back."""
    primed = kv_of(tokens, *shape, seed=1)
    plain = primed + 0.2 * (kv_of(tokens, *shape, seed=2) - 3)
    return plain, stored(TransformCodec(tables, STEP), primed)[0]


@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 150])
def test_errors_are_within_the_residuals_step_whatever_the_base_lost(
    tables: CodecTables, shape: tuple[int, int], tokens: int
) -> None:
    plain, base = both(tables, tokens, shape)
    codec = ResidualCodec(tables, STEP)
    error = plain - base - stored(codec, plain - base)[0]
    width = tables.directions.shape[-1]
    by_group = error.flatten(3).unflatten(3, (-1, width))
    coordinates = torch.einsum("lptgw,lpgwv->lpgtv", by_group, tables.forward)
    kept = codec._all.counts
    for place in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        own = coordinates[tuple(place)][:, : kept[tuple(place)]]
        assert not own.numel() or own.abs().max() <= codec._step / 2 * 1.001 + 1e-3


def test_it_takes_a_fraction_of_the_bytes(tables: CodecTables, shape: tuple[int, int]) -> None:
    plain, base = both(tables, 256, shape)
    whole, residual = (
        int(stored(codec, kv)[1].places[..., 1].sum())
        for codec, kv in ((TransformCodec(tables, STEP), plain), (ResidualCodec(tables, STEP), plain - base))
    )
    assert residual < 0.6 * whole


def test_what_differs_more_than_usual_comes_back_too(tables: CodecTables, shape: tuple[int, int]) -> None:
    residual = 50 * (kv_of(3, *shape) - 3)
    decoded, _ = stored(ResidualCodec(tables, STEP), residual)
    assert (decoded - residual).norm() < 0.05 * residual.norm()


def test_no_difference_is_no_difference(tables: CodecTables, shape: tuple[int, int]) -> None:
    nothing = torch.zeros(LAYERS, 2, 70, *shape)
    assert not stored(ResidualCodec(tables, STEP), nothing)[0].any()


def test_cut_streams_are_refused(tables: CodecTables, shape: tuple[int, int]) -> None:
    plain, base = both(tables, 40, shape)
    codec = ResidualCodec(tables, STEP)
    coded = coded_groups(codec, plain - base)
    coded.places[0, 0, 1] -= 2
    with pytest.raises(CorruptObjectError, match="layer 0"):
        codec.decode(coded, *shape, torch.float32)
