"""Preemption: a blended request whose blocks are taken away is blended again and gives the same answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lmcache_rag.engine import Completion, EngineSettings, LocalEngine, Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.request import BlendOptions
from tests.helpers import ingest, random_plan
from tests.models import make_tiny


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_requests_are_blended_again(tmp_path: Path, *, prefix_caching: bool) -> None:
    settings = EngineSettings(
        model=str(make_tiny("llama", tmp_path / "model")),
        store=tmp_path / "kv",
        dtype="float32",
        max_model_len=512,
        kv_cache_bytes=2 << 20,
        max_num_batched_tokens=256,
        prefix_caching=prefix_caching,
    )
    options = BlendOptions(selector="query", ratio=0.3)
    sampling = Sampling(max_tokens=200, ignore_eos=True)
    with LocalEngine(settings) as engine:
        plans = [random_plan(seed, chunks=(120, 110)) for seed in range(8)]
        for plan in plans:
            ingest(engine, plan)
        alone = [engine.generate(plan, sampling, options) for plan in plans]

        async def together() -> list[Completion]:
            requests = (engine.agenerate(plan, sampling, options, cache_salt="crowded") for plan in plans)
            return await asyncio.gather(*requests)

        blends: list[str] = []
        _count_blends(blends)
        crowded = asyncio.run(together())
        if not prefix_caching:
            assert len(blends) > len(plans), "nothing was preempted, so this test shows nothing"
        for one, other in zip(alone, crowded, strict=True):
            assert other.reuse.mode == "blend"
            reuse = other.reuse
            counted = reuse.local_tokens + reuse.reused_tokens + reuse.recomputed_tokens + reuse.missed_tokens
            assert counted + reuse.unknown_tokens + reuse.vllm_tokens == reuse.prompt_tokens
            assert reuse.vllm_tokens >= 0
            same = sum(a == b for a, b in zip(one.token_ids[:50], other.token_ids[:50], strict=True))
            assert same >= 45, "greedy answers may part only where two tokens are nearly as likely"


def _count_blends(blends: list[str]) -> None:
    """Note the request id of every blend that the worker half does from now on."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group()._worker
    begin = worker.begin

    def counted(job) -> None:
        blends.append(job.request_id)
        begin(job)

    worker.begin = counted


def test_a_second_engine_in_one_process_is_refused_in_words(llama: LocalEngine) -> None:
    with pytest.raises(EngineError, match="close\\(\\) it first"):
        LocalEngine(llama.settings)


@pytest.mark.usefixtures("no_engine")
def test_models_that_cannot_be_blended_are_refused_in_words(tmp_path: Path) -> None:
    """Gemma 2 caps its attention logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from lmcache_rag.errors import ModelError

    folder = make_tiny("llama", tmp_path / "model")
    config = Gemma2Config(
        num_hidden_layers=2, vocab_size=384, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="caps its attention logits"):
        LocalEngine(EngineSettings(model=str(folder), store=tmp_path / "kv", dtype="float32", kv_cache_bytes=64 << 20))
    LocalEngine(
        EngineSettings(
            model=str(make_tiny("llama", tmp_path / "good")),
            store=tmp_path / "kv",
            dtype="float32",
            kv_cache_bytes=64 << 20,
        )
    ).close()
