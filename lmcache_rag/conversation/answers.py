"""Answered prompts whose KV is approximate, and which later prompts may continue: a chat's next turn, a chain's next
call."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_REMEMBERED = 64

_LEFT_OUT = 8
"""So many tokens at a prompt's end at most are not in the next turn's, such as Qwen3's empty thoughts."""

_ANSWER = 4
"""So many tokens of an answer tell that it follows."""


@dataclass(frozen=True)
class Terms:
    """Whose KV it is and how it was made: all of it is to be equal for one request to inherit another's.

    Attributes:
        cache_salt: the caller's own.
        hurried: codecs were chosen for a TTFT goal, so that fidelity may be low.
    """

    cache_salt: str | None
    namespace: str
    selector: str
    hurried: bool


class Salt(NamedTuple):
    """What the names of a blend's blocks are mixed with; see `vllm.isolation`.

    Attributes:
        kept_blocks: so many of the prompt's first blocks keep the names that they had: before the first blend those are
            of exact KV.
        digest: of all that has shaped the KV of the others, hexadecimal digits.
    """

    kept_blocks: int
    digest: str


@dataclass(frozen=True, eq=False)
class Answered:
    """A prompt and its answer, over KV that was blended or continues a blend.

    Attributes:
        token_ids: of prompt and answer, int32.
        prompt_tokens: so many of them are the prompt.
        ratio: the recompute ratio of the blend, the least where one was done behind another.
        salts: of each blend, the first one first.
        turns: answers since the last blend, its own included.
    """

    token_ids: np.ndarray
    prompt_tokens: int
    terms: Terms
    ratio: float
    salts: tuple[Salt, ...]
    turns: int = 1

    def is_continued_by(self, token_ids: Sequence[int] | np.ndarray) -> bool:
        """Whether a prompt begins with this one, and does not only ask something else about the same passages. What
        templates end a prompt with, and leave out of the history, may be missing where the answer follows all the same.
        """
        prompt = np.asarray(token_ids, dtype=np.int32)
        common, answer = _common(self.token_ids, prompt), self.token_ids[self.prompt_tokens :][:_ANSWER]
        if common >= self.prompt_tokens:
            return True
        follows = np.array_equal(prompt[common : common + len(answer)], answer)
        return len(answer) > 0 and follows and self.prompt_tokens - common <= _LEFT_OUT


class Answers:
    """The answers given last.

    Attributes:
        added: how many there were.
    """

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self.added = 0
        self._answers: deque[Answered] = deque(maxlen=remembered)

    def add(self, answered: Answered) -> None:
        """Remember an answer; what it continues need not be remembered any more."""
        self.added += 1
        for earlier in list(self._answers):
            same = answered.salts[: len(earlier.salts)] == earlier.salts
            if same and _common(earlier.token_ids, answered.token_ids) == len(earlier.token_ids):
                self._answers.remove(earlier)
        self._answers.append(answered)

    def continued_by(
        self, token_ids: Sequence[int] | np.ndarray, terms: Terms, ratio: float, least: int = 0
    ) -> list[Answered]:
        """Those that a prompt begins like for more than `least` tokens, the longest common beginning first. None of
        them has recomputed less than is wanted now."""
        prompt = np.asarray(token_ids, dtype=np.int32)
        begun = [
            (_common(answered.token_ids, prompt), answered)
            for answered in self._answers
            if answered.terms == terms and answered.ratio >= ratio
        ]
        return [answered for common, answered in sorted(begun, key=lambda pair: -pair[0]) if common > least]


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two runs have in common from the start."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
