"""The invariants of blending in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, ingest, noise, random_plan
from tests.models import make_tiny

BFLOAT16_ROUNDING = 0.0625
"""Two steps of bfloat16 between 4 and 8, where the logits lie. vLLM's CPU attention adds up in the same order whole and
in parts, so its own difference may be zero, while another kernel's cannot."""

pytestmark = pytest.mark.usefixtures("no_engine")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    folder = tmp_path_factory.mktemp(f"half-{request.param}")
    settings = EngineSettings(
        model=str(make_tiny(request.param, folder / "model")),
        store=folder / "kv",
        dtype="bfloat16",
        kv_cache_bytes=64 << 20,
        max_num_batched_tokens=256,
        primed=False,
    )
    with LocalEngine(settings) as engine:
        yield engine


def test_recomputing_everything_is_full_prefill(half: LocalEngine) -> None:
    plan = random_plan(1)
    ingest(half, plan)
    expected, _ = answer(half, plan, OFF)
    reused, _ = answer(half, plan, BlendOptions(selector="none", ratio=0.0))
    tolerance = max(2 * noise(half, plan), BFLOAT16_ROUNDING)
    for options in (BlendOptions(selector="all"), BlendOptions(ratio=1.0)):
        found, done = answer(half, plan, options)
        assert done.reuse.mode == "blend" and done.reuse.missed_tokens == 0
        assert float((found[0] - expected[0]).abs().max()) <= tolerance
    assert float((reused[0] - expected[0]).abs().max()) > tolerance  # which is not so wide that anything would pass


def test_the_first_chunk_is_exact(half: LocalEngine) -> None:
    plan = random_plan(6, chunks=(150,))
    ingest(half, plan)
    expected, _ = answer(half, plan, OFF)
    found, done = answer(half, plan, BlendOptions(selector="none", ratio=0.0))
    assert done.reuse.exact_tokens == done.reuse.reused_tokens == 171
    assert float((found[0] - expected[0]).abs().max()) <= max(2 * noise(half, plan), BFLOAT16_ROUNDING)
