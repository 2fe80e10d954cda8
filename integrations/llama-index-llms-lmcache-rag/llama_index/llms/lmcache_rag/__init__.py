"""LlamaIndex on lmcache-rag.

`LmcacheRag` is the language model; `KVPrecompute` is an ingestion step that computes the nodes' KV once.
"""

from llama_index.llms.lmcache_rag.base import LmcacheRag
from llama_index.llms.lmcache_rag.precompute import KVPrecompute

__all__ = ["KVPrecompute", "LmcacheRag"]
