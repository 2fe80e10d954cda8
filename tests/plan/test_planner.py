"""From prompts to plans, over records only: no object is looked at."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.bench.store import Counting
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, KVScope, context_digest, key_of, variant_of
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import History, Matcher
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.planner import Planner
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


def planner(chunks: ChunkStores, max_tokens: int = 4096, unit_tokens: int = 1) -> Planner:
    return Planner(
        chunks,
        ASSUMED,
        namespace="default",
        matcher=Matcher(unit_tokens=unit_tokens),
        max_tokens=max_tokens,
        never_slower=False,
    )


def record(chunks: ChunkStores, token_ids: list[int], *variants: str, used_s: int = 1, codec: str = "raw") -> None:
    key = key_of(token_ids)
    rows = [VariantRow(key, f"{variant}.{codec}", 1000, used_s) for variant in variants]
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
    assert variants(plan) == [variant_of(PREAMBLE), variant_of(PREAMBLE, PRIMER)]


def test_the_first_tokens_of_a_prompt_are_computed(chunks: ChunkStores) -> None:
    """A chunk's own first tokens were no attention sinks."""
    ingest(chunks, PREAMBLE)
    prompt = [*CHUNKS[1], *CHUNKS[0], 7]
    plan, _ = planned(planner(chunks), prompt)
    assert plan is not None and plan.preamble.length == 0
    assert [(segment.start, segment.offset, segment.end) for segment in plan.segments] == [(4, 4, 100), (100, 0, 200)]
    assert [segment.part for segment in plan.segments] == [None, None]
    for chunk in CHUNKS:
        record(chunks, chunk, variant_of([]), variant_of([], PRIMER), codec="balanced")
    plan, _ = planned(planner(chunks), prompt)
    assert plan is not None and [(segment.start, segment.exact) for segment in plan.segments] == [
        (0, True),
        (100, False),
    ]


def test_a_marked_chunk_shorter_than_the_sinks_is_computed(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    marks = ((0, 3), (3, 100))
    plan, _ = planned(planner(chunks), [1, 2, 3, *CHUNKS[0], 7], BlendOptions(segments=marks))
    assert plan is not None and [(segment.start, segment.offset, segment.end) for segment in plan.segments] == [
        (4, 1, 103)
    ]


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


SAID = [tokens(seed, 64) for seed in (20, 21, 22)]


@pytest.fixture
def said(chunks: ChunkStores, tmp_path: Path) -> ChunkStore:
    """What was said in a conversation, beside the chunks."""
    history = ChunkStores(DiskStore(tmp_path), MODEL, "raw").of("default.chats")
    for piece in SAID:
        key = key_of(piece)
        history.records.add({key: np.array(piece, np.int32)}, [VariantRow(key, f"{variant_of([1])}.raw", 500, 1)])
    return history


def begun(count: int) -> tuple[PlannedSegment, ...]:
    return tuple(PlannedSegment(64 * i, 64, name=f"default.chats/piece{i}", exact=True) for i in range(count))


def test_what_was_said_before_is_reused_where_the_passages_before_it_are_new(
    chunks: ChunkStores, said: ChunkStore
) -> None:
    ingest(chunks, PREAMBLE)
    prompt = [*PREAMBLE, *CHUNKS[1], *SAID[0], *SAID[1][5:], 7, 7]
    report = ReuseReport(prompt_tokens=len(prompt))
    plan = planner(chunks).plan(prompt, BlendOptions(), report, history=History(said))
    assert plan is not None and plan.preamble.name is not None
    places = [(segment.start, segment.offset, segment.length) for segment in plan.segments]
    assert places == [(20, 0, 100), (120, 0, 64), (184, 5, 59)]
    assert [(segment.name or "").partition("/")[0] for segment in plan.segments] == ["default", *["default.chats"] * 2]
    assert not any(segment.exact or segment.foreign for segment in plan.segments[1:])
    marked = BlendOptions(segments=((20, 100),))
    assert planner(chunks).plan(prompt, marked, report, history=History(said)) == plan
    alone = planner(chunks).plan(prompt, BlendOptions(), report)
    assert alone is not None and alone.segments == plan.segments[:1]


def test_a_blend_begins_behind_exact_kv(chunks: ChunkStores, said: ChunkStore) -> None:
    """What the store has of the prompt's beginning is exact, chunks in it included; what is behind is blended."""
    ingest(chunks, PREAMBLE)
    prompt = [*PREAMBLE, *CHUNKS[1], *tokens(30, 72), *CHUNKS[0], *CHUNKS[2], 7]
    report = ReuseReport(prompt_tokens=len(prompt))
    plan = planner(chunks).plan(prompt, BlendOptions(), report, history=History(said, begun(3)))
    assert plan is not None and plan.begun == begun(3) and not plan.preamble.length
    assert [(segment.start, segment.length) for segment in plan.segments] == [(192, 100), (292, 100)]
    assert not any(segment.foreign for segment in plan.segments)  # the prompt begins with their preamble
    cut = planner(chunks).plan(prompt, BlendOptions(), report, history=History(said, begun(4)))
    assert cut is not None and [(part.start, part.offset) for part in cut.segments] == [(256, 64), (292, 0)]
    short = planner(chunks).plan([*PREAMBLE, *CHUNKS[1], 7], BlendOptions(), report, history=History(said, begun(3)))
    assert short is None  # nothing is left to blend


def test_exact_kv_that_ends_before_the_first_chunk_gives_way_to_the_preamble(
    chunks: ChunkStores, said: ChunkStore
) -> None:
    long = tokens(40, 150)
    ingest(chunks, long)
    report = ReuseReport()
    plan = planner(chunks).plan([*long, *CHUNKS[0], 7], BlendOptions(), report, history=History(said, begun(2)))
    assert plan is not None and not plan.begun and plan.preamble.length == 150


def test_chunks_behind_a_history_are_not_foreign(chunks: ChunkStores) -> None:
    ingest(chunks, PREAMBLE)
    prompt = [*PREAMBLE, *tokens(50, 60), *CHUNKS[0], *CHUNKS[1], 7]
    plan, _ = planned(planner(chunks), prompt)
    assert plan is not None and not any(segment.foreign or segment.exact for segment in plan.segments)
    assert variants(plan) == [variant_of(PREAMBLE, PRIMER)] * 2
    assert (plan.preamble.length, plan.preamble.name is not None) == (len(PREAMBLE), True)


def test_exact_kv_of_a_conversation_without_passages_is_used_as_it_is(chunks: ChunkStores, said: ChunkStore) -> None:
    ingest(chunks, PREAMBLE)
    prompt = [*PREAMBLE, *tokens(60, 200), *CHUNKS[0], *CHUNKS[1], 7]
    plan = planner(chunks).plan(prompt, BlendOptions(), ReuseReport(), history=History(said, begun(3)))
    assert plan is not None and plan.begun == begun(3)
    assert [(segment.start, segment.length) for segment in plan.segments] == [(220, 100), (320, 100)]
