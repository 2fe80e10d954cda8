"""Engines: what answers prompts. `LocalEngine` runs vLLM in this process."""

from typing import TYPE_CHECKING, Any

from lmcache_rag.engine.base import Completion, Delta, Engine, PrecomputeReport
from lmcache_rag.engine.settings import EngineSettings, Sampling
from lmcache_rag.engine.texts import failures, precompute_texts, prefetch_texts

if TYPE_CHECKING:
    from lmcache_rag.engine.local import LocalEngine, engine_of

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "PrecomputeReport",
    "Sampling",
    "engine_of",
    "failures",
    "precompute_texts",
    "prefetch_texts",
]


def __getattr__(name: str) -> Any:
    if name in ("LocalEngine", "engine_of"):
        from lmcache_rag.engine import local

        return getattr(local, name)
    raise AttributeError(f"module 'lmcache_rag.engine' has no attribute {name!r}")
