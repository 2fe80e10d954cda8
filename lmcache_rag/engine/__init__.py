"""Engines: what answers prompts. `LocalEngine` runs vLLM in this process."""

from typing import TYPE_CHECKING, Any

from lmcache_rag.engine.base import Completion, Delta, Engine, PrecomputeReport
from lmcache_rag.engine.settings import EngineSettings, Sampling

if TYPE_CHECKING:
    from lmcache_rag.engine.local import LocalEngine

__all__ = ["Completion", "Delta", "Engine", "EngineSettings", "LocalEngine", "PrecomputeReport", "Sampling"]


def __getattr__(name: str) -> Any:
    if name == "LocalEngine":
        from lmcache_rag.engine.local import LocalEngine

        return LocalEngine
    raise AttributeError(f"module 'lmcache_rag.engine' has no attribute {name!r}")
