"""Prompts over chunks of a namespace and text that was learned from a caller's prompts."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, key_of, variant_of
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.names import learned_of
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.plan import BlendPlan
from lmcache_rag.plan.planner import Planner
from lmcache_rag.records.part import VariantRow
from lmcache_rag.request import BlendOptions, ReuseReport

LEARNED = learned_of("default", "own")


def tokens(seed: int, count: int = 100) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


PREAMBLE = tokens(1, 40)
A, B, C = (tokens(seed) for seed in (2, 3, 4))
PROMPT = [*PREAMBLE, *A, *B, *C, 7, 7]
PRIMED = variant_of(PREAMBLE, A)


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStores:
    return ChunkStores(DiskStore(tmp_path), "f" * 32, "raw")


def record(chunks: ChunkStores, namespace: str, token_ids: list[int], *variants: str) -> None:
    key = key_of(token_ids)
    rows = [VariantRow(key, f"{variant}.raw", 1000, 1) for variant in variants]
    chunks.of(namespace).records.add({key: np.array(token_ids, np.int32)}, rows)


def planner(chunks: ChunkStores, unit_tokens: int = 1) -> Planner:
    matcher = Matcher(unit_tokens=unit_tokens)
    return Planner(chunks, ASSUMED, namespace="default", matcher=matcher, max_tokens=4096, never_slower=False)


def planned(chunks: ChunkStores, learned: str = LEARNED, options: BlendOptions | None = None) -> BlendPlan | None:
    report = ReuseReport(prompt_tokens=len(PROMPT))
    return planner(chunks).plan(PROMPT, options or BlendOptions(), report, learned=learned)


def sources(plan: BlendPlan | None) -> list[str]:
    assert plan is not None
    return [(segment.name or "").partition("/")[0] for segment in plan.segments]


def test_learned_text_is_reused_where_no_chunk_is_stored(chunks: ChunkStores) -> None:
    record(chunks, LEARNED, PREAMBLE, NO_CONTEXT)
    record(chunks, LEARNED, A, variant_of(PREAMBLE))
    record(chunks, LEARNED, B, PRIMED)
    record(chunks, "default", A, variant_of(PREAMBLE))
    record(chunks, "default", C, variant_of(PREAMBLE))
    plan = planned(chunks)
    assert sources(plan) == ["default", LEARNED, "default"]
    assert plan is not None and (plan.preamble.length, plan.preamble.name is not None) == (len(PREAMBLE), True)
    assert [(segment.exact, segment.foreign) for segment in plan.segments] == [
        (True, False),
        (False, False),
        (False, False),
    ]


@pytest.mark.parametrize("learned", ["", learned_of("default", "another"), learned_of("default", None)])
def test_nobody_elses_prompts_are_matched(chunks: ChunkStores, learned: str) -> None:
    for chunk in (A, B, C):
        record(chunks, LEARNED, chunk, variant_of(PREAMBLE))
    assert planned(chunks) is not None
    assert planned(chunks, learned) is None


def test_a_marked_chunk_that_is_not_stored_may_have_been_learned(chunks: ChunkStores) -> None:
    record(chunks, LEARNED, [*A, *B], variant_of(PREAMBLE))
    record(chunks, "default", C, variant_of(PREAMBLE))
    marked = BlendOptions(segments=((40, 100), (140, 100), (240, 100)))
    plan = planned(chunks, options=marked)
    assert sources(plan) == [LEARNED, "default"]
    assert plan is not None and [segment.length for segment in plan.segments] == [200, 100]


def test_a_part_of_a_run_may_come_first(chunks: ChunkStores) -> None:
    record(chunks, LEARNED, PREAMBLE, NO_CONTEXT)
    record(chunks, LEARNED, [*tokens(9), *A], PRIMED)
    record(chunks, LEARNED, B, PRIMED)
    plan = planned(chunks)
    assert plan is not None and [segment.offset for segment in plan.segments] == [100, 0]
    assert plan.preamble.length == len(PREAMBLE) and not any(segment.foreign for segment in plan.segments)


def test_all_forms_of_learned_text_are_known(chunks: ChunkStores) -> None:
    record(chunks, LEARNED, A, variant_of(PREAMBLE))
    record(chunks, LEARNED, B, PRIMED)
    plan = planned(chunks, options=BlendOptions(ttft_goal_s=9.0))
    assert plan is not None and [len(segment.forms) for segment in plan.segments] == [1, 1]


def test_what_is_stored_of_a_prompt(chunks: ChunkStores) -> None:
    record(chunks, LEARNED, B, PRIMED)
    record(chunks, "default", C, variant_of(PREAMBLE))
    stored = planner(chunks).is_stored(PROMPT, "default", LEARNED)
    assert np.flatnonzero(stored).tolist() == list(range(140, 340))
    assert not planner(chunks).is_stored(PROMPT, "another", "").any()


def test_what_is_learned_does_not_tell_whether_a_guess_was_right(chunks: ChunkStores) -> None:
    """A client that knows the beginning of a chunk, and guesses its next token."""
    record(chunks, "default", [*A, *B], variant_of(PREAMBLE))
    known = A[:70]
    free = [
        planner(chunks, unit_tokens=64).is_stored([*PREAMBLE, *known, token, *C], "default", LEARNED).tolist()
        for token in (A[70], 7777)
    ]
    assert free[0] == free[1] and sum(free[0]) == 64
