"""What would leave the engine with other weights than those that stored KV was computed with."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import ModelError
from tests.helpers import OFF, answer, random_plan


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
    llama._loop.engine.collective_rpc("wake_up")
    answer(llama, random_plan(120), OFF)
