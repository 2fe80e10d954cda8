"""Which variants prompts would rather have."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.library.names import object_name
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.wanted import WantedVariants

ONE, OTHER = [3] * 40, [4] * 50


def plan(
    preamble: Sequence[int], *chunks: Sequence[int], foreign: bool = True, namespace: str = "default"
) -> BlendPlan:
    segments, prompt = [], list(preamble)
    for chunk in chunks:
        name = object_name(KVScope(namespace, "f" * 32), key_of(chunk), f"{0:016}.raw")
        segments.append(PlannedSegment(len(prompt), len(chunk), name=name, foreign=foreign))
        prompt += chunk
    return BlendPlan(
        mode="blend",
        namespace=namespace,
        token_ids=(*prompt, 7),
        preamble=PlannedSegment(0, len(preamble), exact=True),
        segments=tuple(segments),
        end=len(prompt),
        selector="query",
        ratio=0.1,
    )


def test_chunks_are_wanted_behind_a_preamble_that_begins_several_prompts() -> None:
    wanted = WantedVariants()
    assert wanted.note(plan([1, 2], ONE, OTHER)) == ()
    assert wanted.note(plan([1, 2], OTHER)) == ((2, 50),)
    assert wanted.note(plan([1, 2, 3], ONE)) == ()
    assert wanted.asked(plan([1, 2]), key_of(OTHER)) == 2
    assert wanted.asked(plan([1, 2]), key_of(ONE)) == wanted.asked(plan([1, 2, 3]), key_of(ONE)) == 1
    assert wanted.asked(plan([9]), key_of(ONE)) == 0


def test_what_is_computed_behind_the_prompts_own_preamble_is_not_wanted() -> None:
    wanted = WantedVariants()
    for _ in range(3):
        assert wanted.note(plan([1, 2], ONE, foreign=False)) == ()


def test_namespaces_do_not_know_each_others_preambles() -> None:
    wanted = WantedVariants()
    wanted.note(plan([1, 2], ONE, namespace="a"))
    assert wanted.note(plan([1, 2], ONE, namespace="b")) == ()


def test_the_preambles_asked_for_last_are_remembered() -> None:
    wanted = WantedVariants(preambles=2)
    for question in range(10):
        wanted.note(plan([1, 2], ONE))
        wanted.note(plan([100, question], ONE))
    assert wanted.note(plan([1, 2], ONE)) == ((2, 40),)
    assert wanted.asked(plan([100, 0]), key_of(ONE)) == 0
