"""The Triton version under Triton's interpreter, since there may be no GPU: it does what the reference does.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own. Half precision
is float16 here: the interpreter multiplies the bits of bfloat16 as if they were integers.
"""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels.attend import reference
from torch import Tensor

from tests.kernels.interpreter import interpreted, not_interpreted, run_interpreted

pytest.importorskip("triton")


TOKENS = 150
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3}


@not_interpreted
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def _inputs(
    queries: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(queries, heads, size).to(dtype)
    key, value = torch.randn(2, TOKENS, kv_heads, size).to(dtype)
    return query, key, value, torch.randperm(TOKENS)[:queries].sort().values


def _check(inputs: tuple[Tensor, Tensor, Tensor, Tensor], window: int | None, out: Tensor | None = None) -> None:
    """Of the output and of the mass of keys, against the reference in float32."""
    from lmcache_rag_kernels.attend import cuda

    query, key, value, positions = inputs
    scale = query.shape[-1] ** -0.5
    expected = torch.full(query.shape, torch.nan)
    mass = reference.attend_weighing(
        query.float(), key.float(), value.float(), positions, scale=scale, window=window, out=expected
    )
    out = torch.empty_like(query) if out is None else out
    tolerance = TOLERANCE[query.dtype]
    out.fill_(torch.nan)
    found = cuda.attend_weighing(*inputs, scale=scale, window=window, out=out)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mass, atol=tolerance, rtol=tolerance)


@interpreted
@pytest.mark.parametrize("size, window", [(16, None), (24, None), (24, 7), (64, 7)], ids=str)
@pytest.mark.parametrize("queries", [1, 5, 33])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (9, 3), (7, 1), (2, 2)], ids=str)
def test_as_the_reference(heads: int, kv_heads: int, size: int, queries: int, window: int | None) -> None:
    _check(_inputs(queries, heads, kv_heads, size), window)


@interpreted
@pytest.mark.parametrize("window", [None, 7], ids=lambda w: f"window-{w}")
def test_half_precision(window: int | None) -> None:
    _check(_inputs(33, 9, 3, 24, torch.float16), window)
    _check(_inputs(5, 4, 2, 64, torch.float16), window)


@interpreted
@pytest.mark.parametrize("window", [None, 7], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_weighing_too(dtype: torch.dtype, window: int | None) -> None:
    from lmcache_rag_kernels.attend import cuda

    inputs = _inputs(5, 9, 3, 24, dtype)
    weighed, alone = torch.full((2, 5, 9, 24), torch.nan, dtype=dtype)
    cuda.attend_weighing(*inputs, scale=0.2, window=window, out=weighed)
    cuda.attend(*inputs, scale=0.2, window=window, out=alone)
    assert alone.isfinite().all()
    assert torch.equal(alone, weighed)


@interpreted
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_rag_kernels.attend import cuda

    monkeypatch.setattr(cuda, "_rows", lambda *_: rows)
    _check(_inputs(33, 6, 2, 16), None)
    _check(_inputs(33, 6, 2, 16), 7)


@interpreted
@pytest.mark.parametrize("window", [None, 7], ids=lambda w: f"window-{w}")
def test_strided_views(window: int | None) -> None:
    query, _, _, positions = _inputs(33, 6, 2, 24)
    together = torch.randn(TOKENS, 6, 24)
    by_head = torch.randn(2, 2, TOKENS, 32)
    out = torch.zeros(33, 7, 32)
    _check((query, together[:, 2:4], together[:, 4:], positions), window, out[:, 1:, 8:])
    turned = by_head.transpose(1, 2)
    _check((query, turned[0, ..., 8:], turned[1, ..., :-8], positions), window, out[:, 1:, 8:])
    assert not out[:, 0].any() and not out[..., :8].any(), "wrote outside of the view"


@interpreted
def test_repeated_positions() -> None:
    query, key, value, _ = _inputs(4, 4, 2, 16)
    _check((query, key, value, torch.tensor([0, 3, 3, 149])), None)


@interpreted
def test_keys_that_no_query_sees_are_not_read() -> None:
    from lmcache_rag_kernels.attend import cuda

    query, key, value, _ = _inputs(3, 4, 2, 16)
    positions = torch.tensor([80, 84, 86])
    whole, out = torch.empty_like(query), torch.full_like(query, torch.nan)
    reference.attend(query, key, value, positions, scale=0.25, window=7, out=whole)
    for unseen in (slice(0, 74), slice(87, None)):
        key[unseen] = value[unseen] = torch.nan
    mass = cuda.attend_weighing(query, key, value, positions, scale=0.25, window=7, out=out)
    torch.testing.assert_close(out, whole, atol=1e-4, rtol=1e-4)
    assert not mass[:74].any() and not mass[87:].any()
    assert float(mass.sum()) == pytest.approx(12, rel=1e-4)


@interpreted
def test_large_and_growing_logits() -> None:
    """The highest logit of a row rises many times, and most weights underflow."""
    query, key, value, positions = _inputs(33, 4, 2, 16)
    key *= torch.arange(1, TOKENS + 1)[:, None, None] * 0.5
    _check((query, key, value, positions), None)


@interpreted
def test_no_queries() -> None:
    from lmcache_rag_kernels.attend import cuda

    query, key, value, positions = _inputs(0, 4, 2, 16)
    cuda.attend(query, key, value, positions, scale=0.25, window=None, out=torch.empty_like(query))
    mass = cuda.attend_weighing(query, key, value, positions, scale=0.25, window=7, out=torch.empty_like(query))
    assert torch.equal(mass, torch.zeros(TOKENS))


@interpreted
def test_few_queries_take_small_blocks() -> None:
    from lmcache_rag_kernels.attend import cuda

    assert cuda._rows(1, 8, 4, 128) == 16
    assert cuda._rows(1, 1, 7, 128) == 16
    assert cuda._rows(1, 1, 64, 16) == 64
    assert cuda._rows(200, 8, 4, 128) == 32
    assert cuda._rows(4000, 8, 4, 128) == 128
    assert cuda._rows(4000, 8, 4, 64) == 64


@interpreted
def test_tensors_on_a_cpu_do_not_fit() -> None:
    from lmcache_rag_kernels.attend import cuda

    inputs = _inputs(5, 4, 2, 16)
    assert not cuda.fits(*inputs, torch.empty_like(inputs[0]))
