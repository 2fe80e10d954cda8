"""What makes blends better does: the K and V over which real questions are answered, against full prefill's.

Of a few questions, how far answers diverge is too noisy to tell (docs/blending.md has it of forty). The distance of K
and V, over all tokens and layers, is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache_rag.bench.questions import read_questions
from lmcache_rag.blend.selectors import QuerySelector
from lmcache_rag.engine import LocalEngine
from lmcache_rag.learn.primer import default_primer, primer_ids
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions
from tests.helpers import answer, parts

QUESTIONS = Path(__file__).parents[1] / "data" / "questions.json"
FORM = completion_format()


def blended(engine: LocalEngine, plan: MarkedPrompt, ratio: float) -> torch.Tensor:
    """K and V of the chunks behind the first one, `[2, layers, tokens, kv_heads, head_size]`."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    _, done = answer(engine, plan, BlendOptions(ratio=ratio), tokens=1)
    assert done.reuse.mode == "blend" and not done.reuse.missed_tokens
    workspace = get_kv_transfer_group()._worker._blender.workspace  # type: ignore[attr-defined]
    rows = slice(plan.segments[1].start, plan.segments[-1].end)
    return torch.stack([workspace.key[:, rows], workspace.value[:, rows]])


def distance(engine: LocalEngine, plans: list[MarkedPrompt], ratio: float) -> float:
    """From full prefill's K and V, squared, against their own square; the mean over questions and layers."""
    distances = []
    for plan in plans:
        exact = blended(engine, plan, 1.0)
        wrong = (blended(engine, plan, ratio) - exact).square().sum((2, 3, 4)) / exact.square().sum((2, 3, 4))
        distances.append(float(wrong.mean()))
    return sum(distances) / len(distances)


@pytest.fixture
def plans(smollm: LocalEngine) -> list[MarkedPrompt]:
    questions = read_questions(QUESTIONS, passages=4, words=100, limit=3)
    return [FORM.plan(smollm.tokenizer, question.passages, question.text) for question in questions]


def test_the_primer_and_extrapolation_bring_kv_nearer(
    smollm: LocalEngine, plans: list[MarkedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain reuse, and repair at r=0.15: 0.033 and 0.0226. Without the primer 0.047 and 0.031, and without
    extrapolation 0.0237."""

    def stored(primer: list[int]) -> None:
        smollm.chunk_store().clear()
        for plan in plans:
            preamble, chunks, _ = parts(plan)
            smollm.precompute(preamble, chunks, primer=primer).check()

    stored(primer_ids(smollm.tokenizer, default_primer(), 1024))
    reused, repaired = distance(smollm, plans, 0.0), distance(smollm, plans, 0.15)
    monkeypatch.setattr(QuerySelector, "extrapolates", False)
    selected_only = distance(smollm, plans, 0.15)
    monkeypatch.undo()
    stored([])
    assert repaired < 0.75 * reused
    assert repaired < 0.98 * selected_only
    assert reused < 0.8 * distance(smollm, plans, 0.0)
    assert repaired < 0.8 * distance(smollm, plans, 0.15)
