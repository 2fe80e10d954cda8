"""The invariants of blending, against plain vLLM and Hugging Face's models, on tiny models of each architecture."""

from __future__ import annotations

import pytest
import torch

from lmcache_rag.blend import SELECTORS
from lmcache_rag.engine import LocalEngine
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, ingest, noise, parts, random_plan
from tests.vllm.hf_reference import HFReference

PROMPTS = [
    pytest.param({"seed": 1}, id="three chunks"),
    pytest.param({"seed": 2, "chunks": (200,)}, id="one chunk"),
    pytest.param({"seed": 3, "preamble": 1, "chunks": (33, 64, 1, 40), "rest": 1}, id="odd lengths"),
    pytest.param({"seed": 4, "chunks": (300, 250), "rest": 40}, id="longer than a step"),
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "options",
    [BlendOptions(selector="all"), BlendOptions(ratio=1.0), BlendOptions(selector="cacheblend", ratio=1.0)],
    ids=["all", "query r=1", "cacheblend r=1"],
)
def test_recomputing_everything_is_full_prefill(tiny: LocalEngine, prompt: dict, options: BlendOptions) -> None:
    plan = random_plan(**prompt)
    tolerance = 20 * noise(tiny, plan)
    ingest(tiny, plan)
    expected, _ = answer(tiny, plan, OFF)
    found, done = answer(tiny, plan, options)
    assert done.reuse.mode == "blend"
    assert done.reuse.recomputed_tokens + done.reuse.exact_tokens >= sum(segment.length for segment in plan.segments)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_reuse_is_attention_over_the_stored_caches(tiny: LocalEngine, prompt: dict) -> None:
    plan = random_plan(**prompt)
    tolerance = 20 * noise(tiny, plan)
    ingest(tiny, plan)
    found, done = answer(tiny, plan, BlendOptions(selector="none", ratio=0.0), tokens=1)
    assert done.reuse.recomputed_tokens == 0
    expected = HFReference(tiny.model_folder).reuse(*parts(plan))
    torch.testing.assert_close(found[0], expected, atol=max(tolerance, 2e-4), rtol=0)


@pytest.mark.parametrize("selector", list(SELECTORS))
def test_every_selector_recomputes_what_it_may(tiny: LocalEngine, selector: str) -> None:
    plan = random_plan(5)
    ingest(tiny, plan)
    _, done = answer(tiny, plan, BlendOptions(selector=selector, ratio=0.2))
    reuse = done.reuse
    total = sum(segment.length for segment in plan.segments)
    expected = {"none": 0, "all": total - plan.segments[0].length}.get(selector, -(-total // 5))
    assert reuse.recomputed_tokens == expected
    counted = reuse.reused_tokens + reuse.recomputed_tokens + reuse.missed_tokens + reuse.unknown_tokens
    assert counted + reuse.local_tokens + reuse.vllm_tokens == reuse.prompt_tokens == len(plan.token_ids)


def test_first_chunk_behind_its_own_preamble_is_exact(tiny: LocalEngine) -> None:
    plan = random_plan(6, chunks=(150,))
    tolerance = 20 * noise(tiny, plan)
    ingest(tiny, plan)
    expected, _ = answer(tiny, plan, OFF)
    found, done = answer(tiny, plan, BlendOptions(selector="none", ratio=0.0))
    assert done.reuse.exact_tokens == done.reuse.reused_tokens == 171
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
