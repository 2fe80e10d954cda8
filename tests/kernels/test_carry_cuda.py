"""The Triton version under Triton's interpreter, since there may be no GPU: it does what the reference does."""

from __future__ import annotations

import pytest
import torch
from lmcache_rag_kernels import Lesson, Rotation
from lmcache_rag_kernels.carry import reference

from tests.kernels.interpreter import interpreted, not_interpreted, run_interpreted
from tests.kernels.test_restore import rotation

pytest.importorskip("triton")


@not_interpreted
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def lesson(start: int, stop: int, taught: list[int]) -> Lesson:
    at = torch.tensor(taught)
    weights = torch.randn(stop - start, len(taught))
    weights[at - start] = 0.0
    return Lesson(slice(start, stop), at, weights)


@interpreted
@pytest.mark.parametrize(
    ("heads", "size", "rotary_dim", "interleaved"),
    [(2, 64, 64, False), (1, 20, 8, True), (3, 16, 16, False), (2, 37, 8, False), (2, 16, 0, False)],
)
def test_as_the_reference(heads: int, size: int, rotary_dim: int, interleaved: bool) -> None:
    from lmcache_rag_kernels.carry import cuda

    torch.manual_seed(0)
    lessons = [lesson(3, 50, [4, 9, 10, 49]), lesson(50, 52, [51]), lesson(57, 130, list(range(60, 125, 2)))]
    whole = rotation(rotary_dim or 2)
    turns = torch.cat([whole.cos, whole.cos, whole.cos]), torch.cat([whole.sin, whole.sin, whole.sin])
    turned = Rotation(*turns, interleaved=interleaved) if rotary_dim else None
    before = torch.randn(2, 150, heads, size)
    every = torch.cat([one.taught for one in lessons])
    expected = before.clone()
    expected[:, every] += torch.randn(2, len(every), heads, size)
    found = expected.clone()
    for version, into in ((reference, expected), (cuda, found)):
        version.Carrier(lessons)(into[0], into[1], before[0, every], before[1, every], turned)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(found[:, 20], before[:, 20])
    for still in (slice(0, 3), slice(52, 57), slice(130, 150)):
        assert torch.equal(found[:, still], before[:, still])
