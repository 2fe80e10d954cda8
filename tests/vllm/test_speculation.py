"""n-gram speculation: prompts are blended as without it, and the drafts change no answer."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from lmcache_rag.engine import Completion, EngineSettings, LocalEngine, Sampling
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from tests.conftest import Engines
from tests.helpers import OFF, connector, fix_rates, ingest, random_plan
from tests.models import make_tiny

EVERYTHING = BlendOptions(selector="all")
REPAIR = BlendOptions(ratio=0.2)
_TOKENS = 60
"""So long an answer repeats itself, since the model is tiny, and its drafts are right."""


@pytest.fixture(scope="module")
def engine(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    engines.close()
    folder = tmp_path_factory.mktemp("speculation")
    settings = EngineSettings(
        model=str(make_tiny("llama", folder / "tiny")),
        store=folder / "kv",
        dtype="float32",
        kv_cache_bytes=64 << 20,
        max_num_batched_tokens=256,
        primed=False,
        refine="idle",
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
    )
    with LocalEngine(settings) as engine:
        yield engine


def ask(engine: LocalEngine, prompt: MarkedPrompt | list[int], options: BlendOptions, salt: str = "") -> Completion:
    sampling = Sampling(max_tokens=_TOKENS, ignore_eos=True)
    return engine.generate(prompt, sampling, options, cache_salt=salt or uuid.uuid4().hex)


def accepted_drafts() -> float:
    from prometheus_client import REGISTRY

    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return sum(s.value for s in samples if s.name == "vllm:spec_decode_num_accepted_tokens_total")


@pytest.mark.parametrize("rest", [13, 0])
def test_recomputing_everything_is_full_prefill(engine: LocalEngine, rest: int) -> None:
    """Also where the prompt ends in a chunk, so that vLLM has one token left, and pads it to a step with drafts."""
    plan = random_plan(920, rest=rest)
    ingest(engine, plan)
    before = accepted_drafts()
    expected = ask(engine, plan, OFF)
    found = ask(engine, plan, EVERYTHING)
    assert found.reuse.mode == "blend" and not found.reuse.missed_tokens
    assert found.token_ids == expected.token_ids
    engine.generate([5, 6, 7], Sampling(max_tokens=2), OFF)  # flushes what the step before has counted
    assert accepted_drafts() > before


def test_several_at_once(engine: LocalEngine) -> None:
    import asyncio

    plans = [random_plan(930 + number, chunks=(60, 80)) for number in range(4)]
    for plan in plans:
        ingest(engine, plan)
    alone = [ask(engine, plan, EVERYTHING).token_ids for plan in plans]

    async def together() -> list[Completion]:
        sampling = Sampling(max_tokens=_TOKENS, ignore_eos=True)
        salts = (uuid.uuid4().hex for _ in plans)
        answers = (
            engine.agenerate(plan, sampling, EVERYTHING, cache_salt=salt)
            for plan, salt in zip(plans, salts, strict=True)
        )
        return await asyncio.gather(*answers)

    assert [done.token_ids for done in asyncio.run(together())] == alone


def test_an_answer_is_continued_and_made_exact(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that were refused are not among the tokens whose KV is kept."""
    scheduler = connector(engine).scheduler
    for choosing in (scheduler._chooser, scheduler._planner):
        monkeypatch.setattr(choosing, "_never_slower", True)
    fix_rates(engine)
    plan = random_plan(940, chunks=(200, 200, 200))
    ingest(engine, plan)
    first = ask(engine, plan, REPAIR, "chat")
    assert first.reuse.mode == "blend"
    prompt = [*plan.token_ids, *first.token_ids, *range(50, 150)]
    second = ask(engine, prompt, REPAIR, "chat")
    assert second.reuse.mode == "continued" and second.reuse.local_tokens > len(plan.token_ids)
    engine.settle()
    exact = ask(engine, prompt, REPAIR, "chat")
    assert exact.reuse.mode == "plain" and exact.reuse.local_tokens > len(plan.token_ids)
    assert exact.token_ids == ask(engine, prompt, OFF).token_ids
