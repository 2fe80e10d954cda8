"""What several tests need: prompts of random tokens, and log-probabilities as tensors."""

from __future__ import annotations

import random
import uuid
from typing import Any

import torch

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope, KVShape
from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.tables import ModelCodecs
from lmcache_rag.plan.cost import Rates
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions

OFF = BlendOptions(mode="off")

FLOAT32_ROUNDING = 5e-6
"""Of log-probabilities of about -20. vLLM's CPU attention adds up in the same order whole and in parts, so its own
difference may be zero, while another kernel's cannot."""


def connector(engine: LocalEngine) -> Any:
    """The connector's scheduler half of an engine in this process."""
    return engine._loop.engine.engine_core.engine_core.scheduler.connector  # type: ignore[attr-defined]


def worker_half() -> Any:
    """The connector's worker half of this process' engine."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker  # type: ignore[attr-defined]


def fix_rates(engine: LocalEngine) -> None:
    """Have an engine choose what is fastest at fixed rates: a tiny model's own say that everything is cheap."""
    cost = connector(engine).scheduler._planner.cost
    cost.learn(Rates(prefill_tokens_per_s=1000, pass_s=0.001, held_s=1e-5))
    cost.learn = lambda rates: None


def chunk_store(store: Store, scope: KVScope, shape: KVShape, codec: str = "raw") -> ChunkStore:
    """Chunks of a model of this shape."""
    return ChunkStore(store, scope, codec, ModelCodecs(store, scope.model, shape))


def random_plan(
    seed: int, *, preamble: int = 21, chunks: tuple[int, ...] = (90, 47, 120), rest: int = 13
) -> MarkedPrompt:
    """A prompt of random tokens of a tiny model."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(4, 380) for _ in range(count)]

    return MarkedPrompt.assemble(tokens(preamble), [tokens(count) for count in chunks], tokens(rest))


def parts(plan: MarkedPrompt) -> tuple[list[int], list[list[int]], list[int]]:
    """Preamble, chunks and rest of a plan, as token ids."""
    ids = list(plan.token_ids)
    chunks = [ids[segment.start : segment.end] for segment in plan.segments]
    return ids[: plan.preamble_length], chunks, ids[plan.segments[-1].end :]


def ingest(engine: LocalEngine, plan: MarkedPrompt) -> None:
    """Precompute all chunks of a plan behind its preamble."""
    preamble, chunks, _ = parts(plan)
    assert not engine.precompute(preamble, chunks).errors


def answer(
    engine: LocalEngine, plan: MarkedPrompt, options: BlendOptions, salt: str | None = None, tokens: int = 4
) -> tuple[torch.Tensor, Completion]:
    """Log-probabilities `[tokens, vocabulary]` of a greedy answer, and all of it; by default with a fresh salt."""
    salt = salt or uuid.uuid4().hex
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, logprobs=-1)
    done = engine.generate(plan, sampling, options, cache_salt=salt)
    rows = [torch.tensor([row[token] for token in sorted(row)]) for row in done.logprobs]
    return torch.stack(rows), done


def noise(engine: LocalEngine, plan: MarkedPrompt, tokens: int = 4) -> float:
    """vLLM's own difference between computing a prompt whole and in two parts."""
    salt = uuid.uuid4().hex
    cold, _ = answer(engine, plan, OFF, tokens=tokens)
    engine.generate(plan.token_ids[: len(plan.token_ids) // 2], Sampling(max_tokens=1), OFF, cache_salt=salt)
    warm, _ = answer(engine, plan, OFF, salt, tokens)
    return max(float((cold - warm).abs().max()), FLOAT32_ROUNDING)
