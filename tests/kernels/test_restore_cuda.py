"""The Triton version under Triton's interpreter, since there may be no GPU: it does what the reference does.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import Rotation, Rows
from lmcache_rag_kernels.restore import reference

from tests.kernels.interpreter import interpreted, not_interpreted, run_interpreted
from tests.kernels.test_restore import (
    GROUP,
    LAYERS,
    NOTHING,
    START,
    TOKENS,
    coded,
    coded_streams,
    in_groups,
    rotation,
    transform_of,
)

pytest.importorskip("triton")


@not_interpreted
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(
    ("heads", "size", "head_groups", "offset", "length", "interleaved"),
    [
        (2, 8, 1, 0, TOKENS, False),
        (1, 20, 1, 3, 30, True),
        (4, 16, 2, 3, 30, False),
        (3, 8, 3, 36, 1, False),
        (2, 8, 2, 16, 16, True),
        (2, 8, 2, 7, 0, False),
    ],
)
def test_as_the_reference(heads: int, size: int, head_groups: int, offset: int, length: int, interleaved: bool) -> None:
    from lmcache_rag_kernels.restore import cuda

    groups, transform = coded(heads, size, head_groups)
    whole = rotation(8)
    turned = Rotation(whole.cos, whole.sin, interleaved=interleaved)
    other = Rotation(whole.sin, whole.cos, interleaved=interleaved)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        expected, found = torch.zeros(2, 2, LAYERS, 64, heads, size, dtype=dtype)
        for run, into in ((reference.restore, expected), (cuda.restore, found)):
            key, value = into[:, :, 9 : 9 + length]
            assert run(groups, transform, offset, Rows(key, value, START, [turned, None, other])) is None
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-2)
        assert not found[:, :, :9].any() and not found[:, :, 9 + length :].any()


@interpreted
def test_a_stream_that_does_not_fit_is_named() -> None:
    from lmcache_rag_kernels.restore import cuda

    transform = transform_of(2, 8, 2)
    streams = coded_streams(transform)
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    right = streams[2][1]
    flipped = bytearray(right)
    flipped[3] ^= 0x40
    for wrong in (right[:-2], right[:-1], b"", bytes(flipped)):
        broken = [*streams[:2], [streams[2][0], wrong, streams[2][2]]]
        groups = in_groups(broken, TOKENS, GROUP)
        assert cuda.restore(groups, transform, 0, Rows(key, value, START, NOTHING)) == 1
