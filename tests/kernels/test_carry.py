"""Carrying over: the C++ versions do what the reference does, and refuse what does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lmcache_rag_kernels import Lesson, Rotation, carrier
from lmcache_rag_kernels.carry import cpu, reference
from torch import Tensor

from tests.kernels.test_restore import rotation

VERSIONS = cpu.instruction_sets() if cpu.compiled() else []
SHAPES = [(2, 64, 64), (1, 20, 8), (3, 16, 16), (2, 37, 8), (2, 16, 0)]
"""Heads, their size, and how many of a head's dimensions are rotated."""

needs_cpp = pytest.mark.skipif(not cpu.compiled(), reason="the C++ extension is not compiled")


def lesson(start: int, stop: int, taught: list[int]) -> Lesson:
    at = torch.tensor(taught, dtype=torch.int64)
    weights = torch.randn(stop - start, len(taught))
    weights[at - start] = 0.0
    return Lesson(slice(start, stop), at, weights)


def some_lessons() -> list[Lesson]:
    torch.manual_seed(0)
    return [lesson(3, 50, [4, 9, 10, 49]), lesson(50, 52, [51]), lesson(57, 130, list(range(60, 125, 2)))]


def turns(rotary_dim: int, *, interleaved: bool = False) -> Rotation | None:
    """Of 192 positions."""
    whole = rotation(rotary_dim or 2)
    angles = torch.cat([whole.cos] * 3), torch.cat([whole.sin] * 3)
    return Rotation(*angles, interleaved=interleaved) if rotary_dim else None


def changed(lessons: list[Lesson], heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of 150 tokens before, and after the taught ones changed."""
    before = torch.randn(2, 150, heads, size).to(dtype)
    after = before.clone()
    every = torch.cat([one.taught for one in lessons])
    after[:, every] += torch.randn(2, len(every), heads, size).to(dtype)
    return before, after


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize(("heads", "size", "rotary_dim"), SHAPES)
@pytest.mark.parametrize("isa", VERSIONS)
def test_as_the_reference(isa: str, heads: int, size: int, rotary_dim: int, dtype: torch.dtype) -> None:
    lessons = some_lessons()
    before, expected = changed(lessons, heads, size, dtype)
    every, found = torch.cat([one.taught for one in lessons]), expected.clone()
    for run, into in ((reference.Carrier(lessons), expected), (cpu.Carrier(lessons, isa=isa), found)):
        run(into[0], into[1], before[0, every], before[1, every], turns(rotary_dim))
    # The reference rounds what changed and what is carried to bfloat16 too.
    assert error(found, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert not torch.equal(found[:, 20], before[:, 20])
    for still in (slice(0, 3), slice(52, 57), slice(130, 150)):
        assert torch.equal(found[:, still], before[:, still])


@pytest.mark.parametrize("how", ["float16", "interleaved", "views"])
def test_any_tensors(how: str) -> None:
    lessons = some_lessons()
    dtype = torch.float16 if how == "float16" else torch.float32
    before, expected = changed(lessons, 2, 16, dtype)
    every = torch.cat([one.taught for one in lessons])
    found = torch.zeros(3, 150, 4, 16, dtype=dtype)[1:, :, 1:3] if how == "views" else torch.zeros_like(expected)
    found.copy_(expected)
    for run, into in ((reference.Carrier(lessons), expected), (carrier(lessons), found)):
        run(into[0], into[1], before[0, every], before[1, every], turns(8, interleaved=how == "interleaved"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_cpp
def test_arguments_that_do_not_fit_are_refused() -> None:
    lessons = some_lessons()
    before, after = changed(lessons, 2, 16, torch.float32)
    every = torch.cat([one.taught for one in lessons])
    own = before[0, every], before[1, every]
    cases = [
        (lessons, (*after[:, :128], *own), turns(8), "a chunk must have rows"),
        (lessons, (*after[:, :120], *own), turns(8), "taught tokens must have a row"),
        (lessons, (*after, own[0][:-1], own[1]), turns(8), "from before for each"),
        (lessons, (after[0], after[1, :, :1], *own), turns(8), "of one type"),
        (lessons, (*after, *own), rotation(8), "an angle"),
        (lessons, (*after, *own), turns(32), "no more than a head's dimensions"),
        ([dataclasses.replace(lessons[0], weights=lessons[0].weights[:-1])], (*after, *own), None, "from before"),
    ]
    for taught, tensors, turned, message in cases:
        with pytest.raises(ValueError, match=message):
            cpu.Carrier(taught)(*tensors, turned)
    short = dataclasses.replace(lessons[0], weights=lessons[0].weights[:-1])
    with pytest.raises(ValueError, match="as many weights"):
        cpu.Carrier([short])(*after, own[0][:4], own[1][:4], None)
