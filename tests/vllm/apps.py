"""An application that knows nothing of chunks: only its language model was changed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lmcache_rag.engine import Completion, EngineSettings, LocalEngine, Sampling
from lmcache_rag.request import BlendOptions
from tests.helpers import parts, random_plan
from tests.models import make_tiny

_REPAIR = BlendOptions(ratio=0.2)
_ORDERS = ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0))


class App:
    """Asks questions over the same documents, found in another order each time."""

    def __init__(self, seed: int, lengths: tuple[int, ...] = (150, 170, 190)) -> None:
        self.preamble, self.passages, _ = parts(random_plan(seed, chunks=lengths))
        self._draw = random.Random(seed)

    @property
    def context_tokens(self) -> int:
        return sum(map(len, self.passages))

    def prompt(self, number: int) -> list[int]:
        context = [token for place in _ORDERS[number] for token in self.passages[place]]
        return [*self.preamble, *context, *(self._draw.randrange(4, 380) for _ in range(15))]


def ask(
    engine: LocalEngine, prompt: list[int], salt: str | None = None, options: BlendOptions | None = _REPAIR
) -> Completion:
    return engine.generate(prompt, Sampling(max_tokens=4, ignore_eos=True), options, cache_salt=salt)


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
