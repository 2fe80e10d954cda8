"""Chunks computed behind a primer: what is stored, which variant is reused, and that the primer itself is not."""

from __future__ import annotations

import pytest
import torch

from lmcache_rag.chunk_kv import key_of, variant_of
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from tests.helpers import answer, noise, parts, random_plan
from tests.vllm.hf_reference import HFReference

PRIMER = list(range(100, 155))
REUSE = BlendOptions(selector="none", ratio=0.0)


def variants(engine: LocalEngine, chunk: list[int]) -> set[str]:
    return set(engine.chunk_store().variants(key_of(chunk)))


def test_reuse_takes_the_exact_variant_first_and_primed_ones_behind(tiny: LocalEngine) -> None:
    plan = random_plan(61)
    preamble, chunks, rest = parts(plan)
    tolerance = 20 * noise(tiny, plan)
    assert not tiny.precompute(preamble, chunks, primer=PRIMER).errors
    found, done = answer(tiny, plan, REUSE, tokens=1)
    assert done.reuse.exact_tokens == len(preamble) + len(chunks[0])
    assert done.reuse.foreign_tokens == 0
    expected = HFReference(tiny.model_folder).reuse(preamble, chunks, rest, PRIMER)
    torch.testing.assert_close(found[0], expected, atol=max(tolerance, 2e-4), rtol=0)


def test_both_variants_are_stored_once_and_the_primer_is_not(llama: LocalEngine) -> None:
    preamble, chunks, _ = parts(random_plan(62))
    report = llama.precompute(preamble, chunks, primer=PRIMER)
    assert (report.computed, report.present) == (3, 0)
    assert report.tokens == len(preamble) + 2 * sum(map(len, chunks))
    for chunk in chunks:
        assert variants(llama, chunk) == {variant_of(preamble), variant_of(preamble, PRIMER)}
    assert not variants(llama, PRIMER) and not variants(llama, [*preamble, *PRIMER])
    again = llama.precompute(preamble, chunks, primer=PRIMER)
    assert (again.computed, again.present, again.tokens) == (0, 3, 0)
    other = llama.precompute(preamble, chunks, primer=PRIMER[:20])
    assert (other.computed, other.tokens) == (3, sum(map(len, chunks)))


def test_what_is_computed_before_chunks_is_kept_for_the_next_one_only_where_it_is_the_same(llama: LocalEngine) -> None:
    """Chunks of two primers and a blend in turn give what each gives alone."""
    plan = random_plan(63)
    preamble, chunks, _ = parts(plan)
    other = list(range(200, 240))

    def stored(chunk: list[int], primer: list[int]) -> torch.Tensor:
        name = llama.chunk_store().name(chunk, variant_of(preamble, primer))
        data = llama.store.read(name)
        assert data is not None
        llama.store.delete([name])
        return torch.frombuffer(bytearray(data[-4096:]), dtype=torch.float32)

    alone = []
    for chunk in chunks:
        for primer in (PRIMER, other):
            llama.precompute(preamble, [[7] * 40], primer=[9] * 30)  # another context in between
            llama.precompute(preamble, [chunk], primer=primer)
            alone.append(stored(chunk, primer))
            llama.store.delete([llama.chunk_store().name([7] * 40, variant_of(preamble, [9] * 30))])
    for number, primer in enumerate((PRIMER, other)):
        for turn, chunk in enumerate(chunks):
            llama.precompute(preamble, [chunk], primer=primer)
            answer(llama, plan, REUSE, tokens=1)
            torch.testing.assert_close(stored(chunk, primer), alone[2 * turn + number], atol=1e-5, rtol=0)


def test_behind_another_preamble_the_first_chunk_is_unprimed_and_the_others_are_primed(llama: LocalEngine) -> None:
    plan = random_plan(64)
    preamble, chunks, rest = parts(plan)
    llama.precompute(preamble, chunks, primer=PRIMER)
    elsewhere = MarkedPrompt.assemble(list(range(50, 80)), chunks, rest)
    before = llama.generate(elsewhere, options=REUSE, cache_salt="before").reuse
    assert before.foreign_tokens == sum(map(len, chunks))
    store = llama.chunk_store()
    first, *others = chunks
    unused = [
        store.name(first, variant_of(preamble, PRIMER)),
        *(store.name(chunk, variant_of(preamble)) for chunk in others),
    ]
    llama.store.delete(unused)
    after = llama.generate(elsewhere, options=REUSE, cache_salt="after").reuse
    assert (after.mode, after.missed_tokens, after.bytes_loaded) == ("blend", 0, before.bytes_loaded)


def test_primed_chunks_are_found_without_being_marked(llama: LocalEngine) -> None:
    plan = random_plan(65, preamble=40)
    preamble, chunks, _ = parts(plan)
    llama.precompute(preamble, chunks, primer=PRIMER)
    marked, _ = answer(llama, plan, REUSE, tokens=1)
    found, done = answer(
        llama,
        MarkedPrompt(plan.token_ids, plan.preamble_length, ()),
        BlendOptions(selector="none", ratio=0.0),
        tokens=1,
    )
    assert done.reuse.foreign_tokens == 0
    assert torch.equal(found, marked)


def test_a_chunk_that_does_not_fit_behind_the_primer_is_stored_without(llama: LocalEngine) -> None:
    chunk = [5] * 900
    report = llama.precompute([6] * 20, [chunk], primer=[8] * 200)
    assert (report.computed, report.unprimed, report.errors) == (1, 1, {})
    assert variants(llama, chunk) == {variant_of([6] * 20)}
    assert llama.precompute([6] * 20, [chunk], primer=[8] * 200).present == 1


def test_a_primer_longer_than_what_is_before_the_chunk_is_refused(llama: LocalEngine) -> None:
    options = BlendOptions(mode="precompute", segments=((10, 40),), primer_tokens=11)
    done = llama.generate([5] * 50, Sampling(max_tokens=1), options)
    assert done.reuse.mode == "plain" and "primer" in done.reuse.reason


@pytest.mark.parametrize("preamble", [0, 20])
def test_the_primer_is_computed_once_for_many_chunks(llama: LocalEngine, preamble: int) -> None:
    context = [*range(50, 50 + preamble), *PRIMER]

    def cost(chunk: list[int], primer_tokens: int) -> int:
        tokens = [*context[: preamble + primer_tokens], *chunk]
        segments = ((len(tokens) - len(chunk), len(chunk)),)
        options = BlendOptions(mode="precompute", segments=segments, primer_tokens=primer_tokens)
        return llama.generate(tokens, Sampling(max_tokens=1), options).reuse.token_layers // llama.layers

    assert cost([7] * 40, len(PRIMER)) == len(context) + 40
    cost([8] * 40, 0)  # the variant behind the preamble alone, as ingest makes it in between
    assert cost([8] * 40, len(PRIMER)) == 40
