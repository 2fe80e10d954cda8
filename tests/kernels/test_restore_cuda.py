"""The Triton version under Triton's interpreter, since there may be no GPU: it does what the reference does.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from lmcache_rag_kernels import Rotation
from lmcache_rag_kernels.restore import reference

from tests.kernels.test_restore import LAYERS, START, TOKENS, coded, rotation

pytest.importorskip("triton")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not _INTERPRETED, reason="run by test_under_the_interpreter")


@pytest.mark.skipif(_INTERPRETED, reason="this is that process")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@interpreted
@pytest.mark.parametrize(("heads", "size"), [(2, 8), (1, 64), (3, 20)])
@pytest.mark.parametrize(("offset", "length"), [(0, TOKENS), (3, 30), (36, 1)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_as_the_reference(heads: int, size: int, offset: int, length: int, interleaved: bool) -> None:
    from lmcache_rag_kernels.restore import cuda

    streams, transform = coded(heads, size)
    whole = rotation(8)
    turned = Rotation(whole.cos, whole.sin, interleaved=interleaved)
    other = Rotation(whole.sin, whole.cos, interleaved=interleaved)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        expected, found = torch.zeros(2, 2, LAYERS, 64, heads, size, dtype=dtype)
        for run, into in ((reference.restore, expected), (cuda.restore, found)):
            key, value = into[:, :, 9 : 9 + length]
            assert run(streams, transform, TOKENS, offset, [turned, None, other], START, key, value) is None
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-2)
        assert not found[:, :, :9].any() and not found[:, :, 9 + length :].any()


@interpreted
def test_a_stream_that_does_not_fit_is_named() -> None:
    from lmcache_rag_kernels.restore import cuda

    streams, transform = coded(2, 8)
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    flipped = bytearray(streams[1])
    flipped[100] ^= 1
    for wrong in (streams[1][:-2], memoryview(b""), streams[0], memoryview(flipped)):
        broken = [streams[0], wrong, streams[2]]
        assert cuda.restore(broken, transform, TOKENS, 0, [None] * LAYERS, START, key, value) == 1
