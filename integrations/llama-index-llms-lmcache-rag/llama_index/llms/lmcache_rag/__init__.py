"""LlamaIndex on lmcache-rag.

`LmcacheRag` is the language model; `KVPrecompute` is an ingestion step that computes the nodes' KV once;
`KeepOrder` keeps retrieved nodes in the order of earlier prompts; `KVPrefetch` has their KV brought nearer.
"""

from llama_index.llms.lmcache_rag.base import LmcacheRag
from llama_index.llms.lmcache_rag.order import KeepOrder
from llama_index.llms.lmcache_rag.precompute import KVPrecompute
from llama_index.llms.lmcache_rag.prefetch import KVPrefetch

__all__ = ["KVPrecompute", "KVPrefetch", "KeepOrder", "LmcacheRag"]
