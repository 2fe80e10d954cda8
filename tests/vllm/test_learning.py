"""Text that recurs in prompts is learned while nothing is asked, with no call of ours in the application."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_rag.engine import Completion, EngineSettings, LocalEngine, Sampling
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.names import learned_of
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from lmcache_rag.vllm.metadata import Refined
from tests.conftest import Engines
from tests.helpers import OFF, answer, connector, fix_rates, ingest, noise, parts, random_plan, worker_half
from tests.models import make_tiny

REPAIR = BlendOptions(ratio=0.2)
ORDERS = ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0))


def settings_in(folder: Path, **given: Any) -> EngineSettings:
    return EngineSettings(
        **{
            "model": str(make_tiny("llama", folder / "tiny")),
            "store": folder / "kv",
            "dtype": "float32",
            "kv_cache_bytes": 64 << 20,
            "never_slower": True,
            "refine": "idle",
            "learn": "idle",
            **given,
        }
    )


@pytest.fixture(scope="module")
def engine(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    engines.close()
    with LocalEngine(settings_in(tmp_path_factory.mktemp("learning"))) as engine:
        fix_rates(engine)
        yield engine


class App:
    """Asks questions over the same documents, found in another order each time; knows nothing of chunks."""

    def __init__(self, seed: int, lengths: tuple[int, ...] = (150, 170, 190)) -> None:
        self.preamble, self.passages, _ = parts(random_plan(seed, chunks=lengths))
        self._draw = random.Random(seed)

    @property
    def context_tokens(self) -> int:
        return sum(map(len, self.passages))

    def prompt(self, number: int) -> list[int]:
        context = [token for place in ORDERS[number] for token in self.passages[place]]
        return [*self.preamble, *context, *(self._draw.randrange(4, 380) for _ in range(15))]


def ask(
    engine: LocalEngine, prompt: list[int], salt: str | None = None, options: BlendOptions | None = REPAIR
) -> Completion:
    return engine.generate(prompt, Sampling(max_tokens=4, ignore_eos=True), options, cache_salt=salt)


def reused(done: Completion) -> int:
    return done.reuse.reused_tokens + done.reuse.recomputed_tokens + done.reuse.local_tokens


@pytest.mark.parametrize("salt", [None, "own"])
def test_from_the_third_question_on_the_documents_are_reused(engine: LocalEngine, salt: str | None) -> None:
    app = App(300)
    for number in (0, 1):
        assert reused(ask(engine, app.prompt(number), salt)) < 0.4 * app.context_tokens
        engine.settle()
    for number in (2, 3):
        done = ask(engine, app.prompt(number), salt)
        assert done.reuse.mode == "blend"
        assert done.reuse.learned_tokens > 0 and reused(done) >= 0.8 * app.context_tokens
        engine.settle()
