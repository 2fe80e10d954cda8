"""How near blending comes to full prefill: real questions through the whole path inside vLLM.

For each question the gold answer is forced on the model, once after full prefill and once after each way of blending,
and the distributions of its tokens are compared (KL divergence, top-1 agreement, negative log-likelihood). Then it
answers greedily, and the answers are compared with full prefill's (ROUGE-L) and with the gold answer (F1).
"""

from __future__ import annotations

import random
import statistics
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_rag.bench.questions import Question
from lmcache_rag.bench.scores import kl_divergence, log_probs, mean_interval, rouge_l, token_f1
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.learn.primer import default_primer, own_primer, primer_ids
from lmcache_rag.plan.budget import ratio_of_foreign
from lmcache_rag.prompt import MarkedPrompt, PromptFormat
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

_OFF = BlendOptions(mode="off")
_ANSWER_TOKENS = 24
_ALONE = "alone"


@dataclass(frozen=True)
class Tried:
    """One way of blending, and the share of the chunks' tokens that it recomputes."""

    options: BlendOptions
    ratio: float

    @property
    def alone(self) -> bool:
        """Whether it takes chunks that were computed behind nothing, as CacheBlend's authors do."""
        return self.options.namespace == _ALONE


@dataclass
class _Scores:
    """Of one way, per question."""

    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    rouge: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def ways(selectors: Sequence[str], ratios: Sequence[float]) -> list[Tried]:
    """Plain reuse, each selector at each ratio, and CacheBlend over chunks computed alone, where it is among them."""
    tried = [Tried(BlendOptions(selector="none", ratio=0.0), 0.0)]
    repairing = [name for name in selectors if name != "none"]
    tried += [Tried(BlendOptions.checked(selector=name, ratio=ratio), ratio) for name in repairing for ratio in ratios]
    if "cacheblend" in selectors:
        tried += [
            Tried(BlendOptions(selector="cacheblend", ratio=ratio_of_foreign(ratio), namespace=_ALONE), ratio)
            for ratio in ratios
        ]
    return tried


def bench_fidelity(
    engine: LocalEngine,
    prompt: PromptFormat,
    questions: Sequence[Question],
    tried: Sequence[Tried],
    *,
    seed: int,
    progress: Callable[[str], Any],
) -> list[Row]:
    """The rows that `lmcache-rag bench fidelity` writes: full prefill's first, then one for each way.

    Raises:
        EngineError: for some question not all chunks were reused, so that there is nothing to measure.
    """
    plans = [prompt.plan(engine.tokenizer, question.passages, question.text) for question in questions]
    primer = own_primer([text for question in questions for text in question.passages], prompt) or default_primer()
    primer_tokens = primer_ids(engine.tokenizer, primer, engine.max_model_len // 2)
    _ingest(engine, plans, primer_tokens, seed=seed, alone=any(way.alone for way in tried), progress=progress)
    full, scores = _Scores(), [_Scores() for _ in tried]
    for number, (question, plan) in enumerate(zip(questions, plans, strict=True), start=1):
        progress(f"question {number} of {len(questions)}")
        gold = engine.tokenizer.encode(question.answer, add_special_tokens=False)
        forced = Sampling(max_tokens=len(gold), ignore_eos=True, logprobs=-1, forced_token_ids=tuple(gold))
        greedy = Sampling(max_tokens=_ANSWER_TOKENS, stop=prompt.stop)
        salt = uuid.uuid4().hex
        expected = log_probs(engine.generate(plan, forced, _OFF, cache_salt=salt).logprobs)
        reference = engine.generate(plan, greedy, _OFF, cache_salt=salt).text
        _score(full, expected, expected, gold, reference, reference, question.answer)
        for way, own in zip(tried, scores, strict=True):
            done = engine.generate(plan, forced, way.options, cache_salt=uuid.uuid4().hex)
            if not done.reuse.bytes_loaded or done.reuse.missed_tokens:
                why = done.reuse.reason or done.reuse.misses
                raise EngineError(f"Not all was reused for {question.text!r} ({why}): there is nothing to measure.")
            answer = engine.generate(plan, greedy, way.options, cache_salt=uuid.uuid4().hex).text
            _score(own, expected, log_probs(done.logprobs), gold, answer, reference, question.answer)
            own.flops.append(done.reuse.token_layers / (engine.layers * len(plan.token_ids)))
            for name in ("reused_tokens", "recomputed_tokens"):
                own.tokens[name].append(getattr(done.reuse, name))
    rows = [_row("full", 1.0, full, preamble=True)]
    return rows + [
        _row(way.options.selector, way.ratio, own, preamble=not way.alone)
        for way, own in zip(tried, scores, strict=True)
    ]


def _ingest(
    engine: LocalEngine,
    plans: Sequence[MarkedPrompt],
    primer: Sequence[int],
    *,
    seed: int,
    alone: bool,
    progress: Callable[[str], Any],
) -> None:
    """Store the KV of all chunks of all questions, in a shuffled order, before any question is asked."""
    preamble = plans[0].token_ids[: plans[0].preamble_length]
    chunks = sorted({plan.token_ids[part.start : part.end] for plan in plans for part in plan.segments})
    random.Random(seed).shuffle(chunks)  # noqa: S311
    for number, chunk in enumerate(chunks, start=1):
        progress(f"ingest: chunk {number} of {len(chunks)}")
        engine.precompute(preamble, [chunk], primer=primer).check()
        if alone:
            engine.precompute([], [chunk], primer=(), namespace=_ALONE).check()


def _score(
    scores: _Scores,
    expected: np.ndarray,
    found: np.ndarray,
    gold: Sequence[int],
    answer: str,
    reference: str,
    gold_answer: str,
) -> None:
    scores.kl.append(float(kl_divergence(expected, found).mean()))
    scores.top1.append(float((expected.argmax(1) == found.argmax(1)).mean()))
    scores.nll.append(float(-found[np.arange(len(gold)), list(gold)].mean()))
    scores.rouge.append(rouge_l(answer, reference))
    scores.f1.append(token_f1(answer, gold_answer))


def _row(selector: str, ratio: float, scores: _Scores, *, preamble: bool) -> Row:
    low, high = mean_interval(scores.kl)
    return {
        "selector": selector,
        "ratio": ratio,
        "preamble": preamble,
        "kl_mean": round(statistics.mean(scores.kl), 4),
        "kl_ci95": [round(low, 4), round(high, 4)],
        "kl_median": round(statistics.median(scores.kl), 4),
        "kl_p90": round(float(np.quantile(scores.kl, 0.9)), 4),
        "top1": round(statistics.mean(scores.top1), 3),
        "rougeL_vs_full": round(statistics.mean(scores.rouge), 3),
        "f1": round(statistics.mean(scores.f1), 3),
        "nll": round(statistics.mean(scores.nll), 3),
        "flops_share": round(statistics.mean(scores.flops), 3) if scores.flops else 1.0,
        "reused_tokens": round(statistics.mean(scores.tokens["reused_tokens"])) if scores.tokens else 0,
        "recomputed_tokens": round(statistics.mean(scores.tokens["recomputed_tokens"])) if scores.tokens else 0,
        "n": len(scores.kl),
    }
