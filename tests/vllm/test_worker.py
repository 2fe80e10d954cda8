"""What would leave the engine with other weights than those that stored KV was computed with."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import ModelError
from lmcache_rag.vllm.metadata import Refined, RefineJob
from lmcache_rag.vllm.worker import bound_model
from tests.helpers import OFF, answer, random_plan, worker_half


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("reload_weights", ()),
        ("reset_weights", ()),
        ("init_weight_transfer_engine", ({},)),
        ("start_weight_update", ()),
        ("update_weights", ({},)),
        ("sleep", (2,)),
    ],
)
def test_new_weights_are_refused_in_words(llama: LocalEngine, method: str, arguments: tuple[Any, ...]) -> None:
    before, _ = answer(llama, random_plan(120), OFF)
    with pytest.raises(ModelError, match="restart vLLM with the new weights"):
        llama._loop.engine.collective_rpc(method, args=arguments)
    after, _ = answer(llama, random_plan(120), OFF)
    assert (before - after).abs().max() == 0


def test_sleeping_with_the_weights_kept_is_allowed(llama: LocalEngine) -> None:
    llama._loop.engine.collective_rpc("sleep", args=(1,))
    assert bound_model().asleep  # and nothing is computed while nobody asks
    job = RefineJob(tuple(range(50, 100)), "compute")
    worker_half().refine(job)
    assert worker_half().take_reports().refined == Refined(failure="asleep")
    llama._loop.engine.collective_rpc("wake_up", args=(["weights"],))
    assert bound_model().asleep
    llama._loop.engine.collective_rpc("wake_up")
    assert not bound_model().asleep
    answer(llama, random_plan(120), OFF)
