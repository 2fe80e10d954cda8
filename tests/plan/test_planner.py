"""From prompts to plans, over records only: no object is looked at."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.bench.store import Counting
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, KVScope, context_digest, key_of, variant_of
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.plan import BlendPlan
from lmcache_rag.plan.planner import Planner
from lmcache_rag.records.fingerprints import SHORTEST
from lmcache_rag.records.part import VariantRow
from lmcache_rag.request import BlendOptions, ReuseReport

MODEL = "f" * 32
PRIMER, OLD_PRIMER = [9] * 30, [8] * 30


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


PREAMBLE, OTHER_PREAMBLE = tokens(1, 20), tokens(2, 25)
CHUNKS = [tokens(seed, 100) for seed in (3, 4, 5)]


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(DiskStore(tmp_path))


@pytest.fixture
def chunks(store: Counting) -> ChunkStores:
    return ChunkStores(store, MODEL, "raw")  # type: ignore[arg-type]


def planner(chunks: ChunkStores, max_tokens: int = 4096) -> Planner:
    return Planner(
        chunks,
        ASSUMED,
        namespace="default",
        min_match_tokens=SHORTEST,
        max_tokens=max_tokens,
        never_slower=False,
    )


def record(chunks: ChunkStores, token_ids: list[int], *variants: str, used_s: int = 1) -> None:
    key = key_of(token_ids)
    rows = [VariantRow(key, f"{variant}.raw", 1000, used_s) for variant in variants]
    chunks.of("default").records.add({key: np.array(token_ids, np.int32)}, rows)


def ingest(chunks: ChunkStores, preamble: list[int], *, primer: list[int] = PRIMER, used_s: int = 1) -> None:
    """Record what an index of `CHUNKS` stores."""
    record(chunks, preamble, NO_CONTEXT)
    for chunk in CHUNKS:
        record(chunks, chunk, variant_of(preamble), variant_of(preamble, primer), used_s=used_s)


def planned(
    planner: Planner, prompt: list[int], options: BlendOptions | None = None
) -> tuple[BlendPlan | None, ReuseReport]:
    report = ReuseReport(prompt_tokens=len(prompt))
    return planner.plan(prompt, options or BlendOptions(), report), report


def variants(plan: BlendPlan | None) -> list[str]:
    assert plan is not None
    return [(segment.name or "").rpartition("/")[2].partition(".")[0] for segment in plan.segments]


def test_the_first_chunk_is_exact_and_the_others_are_primed(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    plan, _ = planned(planner(chunks), [*PREAMBLE, *CHUNKS[1], *CHUNKS[0], 7, 7])
    assert variants(plan) == [variant_of(PREAMBLE), variant_of(PREAMBLE, PRIMER)]
    assert plan is not None and [segment.exact for segment in plan.segments] == [True, False]
    assert plan.preamble.name is not None and plan.preamble.length == len(PREAMBLE)
    assert [segment.size_bytes for segment in plan.segments] == [1000, 1000]


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_preamble_whose_end_merged_with_the_first_chunk_is_its_own_all_the_same(
    chunks: ChunkStores, cut: int
) -> None:
    ingest(chunks, PREAMBLE)
    ingest(chunks, OTHER_PREAMBLE)
    prompt = [*PREAMBLE[:-cut], 1001, *CHUNKS[1][1:], *CHUNKS[0], 7]
    plan, _ = planned(planner(chunks), prompt)
    assert plan is not None and not any(segment.foreign for segment in plan.segments)
    assert variants(plan) == [variant_of(PREAMBLE), variant_of(PREAMBLE, PRIMER)]
    assert not plan.segments[0].exact
    assert (plan.preamble.length, plan.preamble.name is not None) == (len(PREAMBLE) - cut, True)


def test_of_a_small_part_of_a_chunk_only_that_is_read(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    plan, _ = planned(planner(chunks), [*PREAMBLE, *CHUNKS[1][30:80], *CHUNKS[0][:-5], 7])
    assert plan is not None and [segment.part for segment in plan.segments] == [range(30, 80), None]


def test_another_preamble_makes_chunks_foreign(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    plan, _ = planned(planner(chunks), [*OTHER_PREAMBLE, *CHUNKS[1], *CHUNKS[0], 7])
    assert plan is not None and all(segment.foreign for segment in plan.segments)
    assert variants(plan) == [variant_of(PREAMBLE, PRIMER)] * 2


@pytest.mark.parametrize("first", [PRIMER, OLD_PRIMER])
def test_of_several_primers_the_callers_own_comes_first_and_else_the_last_one(
    chunks: ChunkStores, first: list[int]
) -> None:
    """Not whichever has the smallest digest."""
    second = OLD_PRIMER if first is PRIMER else PRIMER
    ingest(chunks, PREAMBLE, primer=first, used_s=1)
    ingest(chunks, PREAMBLE, primer=second, used_s=2)
    prompt = [*PREAMBLE, *CHUNKS[1], *CHUNKS[0], 7]
    plan, _ = planned(planner(chunks), prompt)
    assert variants(plan)[1] == variant_of(PREAMBLE, second)
    plan, _ = planned(planner(chunks), prompt, BlendOptions(primer=context_digest(first)))
    assert variants(plan)[1] == variant_of(PREAMBLE, first)


def test_a_prompt_longer_than_a_blend_may_be_is_blended_up_to_there(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    prompt = [*PREAMBLE, *CHUNKS[0], *CHUNKS[1], *CHUNKS[2], 7]
    plan, _ = planned(planner(chunks, max_tokens=180), prompt)
    assert plan is not None
    assert [(segment.start, segment.length) for segment in plan.segments] == [(20, 100), (120, 60)]
    assert plan.end == 180
    plan, _ = planned(planner(chunks, max_tokens=10), prompt)
    assert plan is None


def test_planning_asks_the_store_for_nothing_but_what_is_new(chunks: ChunkStores, store: Counting) -> None:
    ingest(chunks, PREAMBLE)
    plan = planner(chunks)
    prompt = [*PREAMBLE, *CHUNKS[1], *CHUNKS[0], *CHUNKS[2], 7]
    planned(plan, prompt)
    marked = BlendOptions(segments=((20, 100), (120, 100), (220, 100)), ttft_goal_s=1.0)
    for options in (None, marked):
        store.calls.clear()
        assert planned(plan, prompt, options)[0] is not None
        assert store.calls == {"read": 1}  # whether there is a next segment


def test_namespaces_know_nothing_of_each_other(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    plan, report = planned(planner(chunks), [*PREAMBLE, *CHUNKS[1], 7], BlendOptions(namespace="other"))
    assert plan is None and report.reason == "no stored chunk in the prompt"
    assert not chunks.of("other").records.parts
    assert KVScope("other", MODEL).prefix.startswith("other/")
