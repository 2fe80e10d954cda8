"""SmolLM2: exactness against plain vLLM, and that repair brings a blend closer to full prefill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, ingest, noise
from tests.vllm.hf_reference import HFReference

FORM = completion_format()


def prompt(engine: LocalEngine, chunks: int = 3, length: int = 200) -> MarkedPrompt:
    question = FORM.question_ids(engine.tokenizer, "What is a generator expression?")
    runs = token_runs(engine.tokenizer, chunks, length)
    return MarkedPrompt.assemble(FORM.preamble_ids(engine.tokenizer), runs, question)


def test_recomputing_everything_is_full_prefill(smollm: LocalEngine) -> None:
    plan = prompt(smollm)
    tolerance = 20 * noise(smollm, plan, tokens=2)
    ingest(smollm, plan)
    expected, _ = answer(smollm, plan, OFF, tokens=2)
    for options in (BlendOptions(selector="all"), BlendOptions(ratio=1.0)):
        found, done = answer(smollm, plan, options, tokens=2)
        assert done.reuse.recomputed_tokens == 400
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_plain_reuse_is_attention_over_the_stored_caches(smollm: LocalEngine) -> None:
    plan = prompt(smollm)
    ingest(smollm, plan)
    found, _ = answer(smollm, plan, BlendOptions(selector="none", ratio=0.0), tokens=1)
    preamble = list(plan.token_ids[: plan.preamble_length])
    chunks = [list(plan.token_ids[segment.start : segment.end]) for segment in plan.segments]
    expected = HFReference(smollm.model_folder).reuse(preamble, chunks, list(plan.token_ids[plan.segments[-1].end :]))
    assert float((found[0] - expected).abs().max()) < 2e-3


@pytest.mark.parametrize("selector", ["query", "cacheblend"])
def test_repair_brings_a_blend_closer_to_full_prefill(smollm: LocalEngine, data_folder: Path, selector: str) -> None:
    """Real questions; mean KL divergence of the first answer token's distribution from full prefill's."""
    examples = json.loads((data_folder / "musique_dev.json").read_text())[:6]
    divergence = {0.0: 0.0, 0.15: 0.0, 0.5: 0.0}
    for example in examples:
        texts = [" ".join(context["text"].split()[:120]) for context in example["ctxs"][:4]]
        plan = FORM.plan(smollm.tokenizer, texts, example["question"])
        ingest(smollm, plan)
        full, _ = answer(smollm, plan, OFF, tokens=1)
        for ratio in divergence:
            found, done = answer(smollm, plan, BlendOptions(selector=selector, ratio=ratio), tokens=1)
            assert done.reuse.reused_tokens > 100
            divergence[ratio] += float((full.exp() * (full - found)).sum()) / len(examples)
    assert divergence[0.5] < divergence[0.15] < divergence[0.0]


def test_a_stop_string_ends_the_answer_and_the_report_is_there(smollm: LocalEngine) -> None:
    plan = prompt(smollm)
    ingest(smollm, plan)
    whole = smollm.generate(plan, Sampling(max_tokens=12), cache_salt="whole")
    stop = whole.text[4:7]
    cut = smollm.generate(plan, Sampling(max_tokens=12, stop=(stop,)), cache_salt="cut")
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reuse.mode == "blend" and cut.reuse.reused_tokens > 400


def test_streaming_gives_the_same_answer_in_pieces(smollm: LocalEngine) -> None:
    plan = prompt(smollm)
    ingest(smollm, plan)
    whole = smollm.generate(plan, Sampling(max_tokens=12), cache_salt="whole")
    deltas = list(smollm.stream(plan, Sampling(max_tokens=12), cache_salt="pieces"))
    assert len(deltas) > 5
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].completion is not None and deltas[-1].completion.text == whole.text


def test_text_prompts_find_their_chunks(smollm: LocalEngine) -> None:
    plan = prompt(smollm)
    ingest(smollm, plan)
    text = smollm.tokenizer.decode(plan.token_ids)  # type: ignore[attr-defined]
    done = smollm.generate(text, Sampling(max_tokens=4))
    assert done.reuse.mode == "blend"
    assert done.reuse.reused_tokens + done.reuse.recomputed_tokens > 0.9 * len(plan.token_ids)


@pytest.mark.parametrize("joint", ["\n\n", "\n", " "], ids=["blank line", "line", "space"])
def test_a_prompt_tokenised_as_one_text_finds_its_chunks_and_none_is_foreign(smollm: LocalEngine, joint: str) -> None:
    """As frameworks write prompts: the end of the preamble, and the chunks' edges, merge with what is beside them."""
    examples = json.loads((Path(__file__).parents[1] / "data" / "questions.json").read_text())[:2]
    texts = [context["text"] for example in examples for context in example["ctxs"][:2]]
    opening = f"Answer the question with the words of the passages below.{joint}"
    encode = smollm.tokenizer.encode
    preamble, chunks = encode(opening), [encode(text) for text in texts]
    assert not smollm.precompute(preamble, chunks).errors
    prompt = opening + joint.join(texts) + f"{joint}Question: {examples[0]['question']}\nAnswer:"
    whole = encode(prompt)
    reuse = smollm.generate(prompt, Sampling(max_tokens=1), BlendOptions(ratio=0.1), cache_salt=joint).reuse
    assert reuse.foreign_tokens == 0
    assert reuse.reused_tokens + reuse.recomputed_tokens >= sum(map(len, chunks)) - 2 * len(chunks)
    assert reuse.prompt_tokens == len(whole)
    if joint == "\n\n":
        assert whole[: len(preamble)] != preamble
