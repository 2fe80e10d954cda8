"""Engines: what answers prompts. `LocalEngine` runs vLLM in this process, `RemoteEngine` asks servers."""

from typing import TYPE_CHECKING, Any

from lmcache_rag.engine.base import Completion, Delta, Engine, PrecomputeReport, Prompt
from lmcache_rag.engine.chat import Chat, ToolCall
from lmcache_rag.engine.settings import EngineSettings, RemoteSettings, Sampling
from lmcache_rag.engine.texts import failures, precompute_texts, prefetch_texts, release_texts

if TYPE_CHECKING:
    from lmcache_rag.engine.local import LocalEngine
    from lmcache_rag.engine.opening import engine_of
    from lmcache_rag.engine.remote import RemoteEngine

__all__ = [
    "Chat",
    "Completion",
    "Delta",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "PrecomputeReport",
    "Prompt",
    "RemoteEngine",
    "RemoteSettings",
    "Sampling",
    "ToolCall",
    "engine_of",
    "failures",
    "precompute_texts",
    "prefetch_texts",
    "release_texts",
]

_LAZY = {"LocalEngine": "local", "RemoteEngine": "remote", "engine_of": "opening"}
"""What needs vllm, or a client for servers."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"lmcache_rag.engine.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lmcache_rag.engine' has no attribute {name!r}")
