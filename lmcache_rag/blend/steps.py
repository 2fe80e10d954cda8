"""Work that pauses: a blend goes on over several of vLLM's steps, and other requests need not wait for all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Steps = Generator[None, None, Result]
"""Yields wherever it pauses, and returns its result."""

LEAST_TOKENS = 16
"""Fewer are not computed at a time: a pass costs something however few its tokens."""


class Allowance:
    """How much may be done before the next pause.

    Attributes:
        tokens: how many may still be computed; infinite where nobody else waits.
        paused_s: seconds spent paused, in all.
    """

    def __init__(self) -> None:
        self.tokens = math.inf
        self.paused_s = 0.0

    @property
    def alone(self) -> bool:
        """Whether nobody else waits."""
        return math.isinf(self.tokens)

    def pause(self) -> Steps[None]:
        """Let others go first."""
        start = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - start

    def take(self, wanted: int) -> Steps[int]:
        """How many of the wanted tokens are computed now, after a pause where no more may be."""
        while self.tokens < min(wanted, LEAST_TOKENS):
            yield from self.pause()
        taken = int(min(wanted, self.tokens))
        self.tokens -= taken
        return taken


def done(result: Result) -> Steps[Result]:
    """A result that takes no pause."""
    return result
    yield


def next_of(steps: Steps[Result]) -> Result | None:
    """Go on to the next pause; the result, or None where there is none yet."""
    try:
        next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result
    return None


def finished(steps: Steps[Result]) -> Result:
    """The result, without pauses. It is not None."""
    while True:
        result = next_of(steps)
        if result is not None:
            return result
