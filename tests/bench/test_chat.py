"""The prompts that `bench chat` asks are those that the workload's name says, marked as an application marks them."""

from __future__ import annotations

import pytest

from lmcache_rag.bench.chat import WORKLOADS, Turn, prompts

PREAMBLE = (1, 2)
TURNS = [Turn(((10, 11), (12,)), (20,), (30, 31)), Turn(((13, 14), (15,)), (21,), (32,))]

EXPECTED = {
    "same_passages": ((10, 11), (12,), (21,)),
    "growing_chat": ((10, 11), (12,), (20,), (30, 31), (21,)),
    "second_engine": ((10, 11), (12,), (20,), (30, 31), (21,)),
    "new_passages": ((13, 14), (15,), (20,), (30, 31), (21,)),
    "more_passages": ((10, 11), (12,), (20,), (30, 31), (13, 14), (15,), (21,)),
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_second_turns_prompt(workload: str) -> None:
    first, second = prompts(PREAMBLE, TURNS, workload)
    assert first.token_ids == (*PREAMBLE, 10, 11, 12, 20)
    assert second.token_ids == (*PREAMBLE, *(token for part in EXPECTED[workload] for token in part))
    assert second.preamble_length == len(PREAMBLE)
    passages = {passage for turn in TURNS for passage in turn.passages}
    marked = [second.token_ids[segment.start : segment.end] for segment in second.segments]
    assert marked == [part for part in EXPECTED[workload] if part in passages]
