"""`off` against an engine that knows nothing of us: the same log-probabilities to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.engine.start import bear_numba
from tests.helpers import OFF, answer, ingest, random_plan
from tests.models import make_tiny


@pytest.mark.usefixtures("no_engine")
def test_off_is_vllm_without_our_worker_and_connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder = make_tiny("llama", tmp_path / "model")
    plan = random_plan(60)
    set_num_threads = torch.set_num_threads
    bear_numba()  # earlier tests may have imported it
    plain = LLM(
        str(folder), dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=64 << 20,
        max_logprobs=-1, max_num_batched_tokens=256,
    )  # fmt: skip
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=-1)
    rows = plain.generate({"prompt_token_ids": list(plan.token_ids)}, params, use_tqdm=False)[0].outputs[0].logprobs
    expected = torch.stack([torch.tensor([row[token].logprob for token in sorted(row)]) for row in rows])
    plain.llm_engine.engine_core.shutdown()
    torch.set_num_threads = set_num_threads
    settings = EngineSettings(
        model=str(folder), store=tmp_path / "kv", dtype="float32", kv_cache_bytes=64 << 20, max_num_batched_tokens=256
    )
    with LocalEngine(settings) as engine:
        ingest(engine, plan)
        found, _ = answer(engine, plan, OFF)
    assert torch.equal(found, expected)
