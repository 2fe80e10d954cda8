"""lmcache-rag: a language model reads each document once.

Chunk KV caches are computed at ingest, stored, and blended into the prompt inside vLLM at query time.
Importing this package imports neither torch nor vllm; `LocalEngine` does when it is first used.
"""

import os
from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, Segment
from lmcache_rag.request import BlendOptions, ReuseReport

if TYPE_CHECKING:
    from lmcache_rag.corpus import Corpus
    from lmcache_rag.engine import EngineSettings, LocalEngine, Sampling

# PyTorch reads this when it is loaded. vLLM prints a warning of NUMA binding through it that nothing else can stop.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
__all__ = [
    "BlendOptions",
    "Corpus",
    "EngineSettings",
    "LmcacheRagError",
    "LocalEngine",
    "MarkedPrompt",
    "PromptFormat",
    "ReuseReport",
    "Sampling",
    "Segment",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in ("LocalEngine", "EngineSettings", "Sampling"):
        from lmcache_rag import engine

        return getattr(engine, name)
    if name == "Corpus":
        from lmcache_rag.corpus import Corpus

        return Corpus
    raise AttributeError(f"module 'lmcache_rag' has no attribute {name!r}")
