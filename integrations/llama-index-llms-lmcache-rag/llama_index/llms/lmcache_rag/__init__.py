"""LlamaIndex on lmcache-rag.

`LmcacheRag` is the language model, and `KVReuseEvent` reports each of its answers; `KVPrecompute` is an ingestion step
that computes the nodes' KV once, `KVVectorStore` a vector store that does so and deletes it with the nodes;
`StructuredProgram` has objects written by a grammar; `KeepOrder` keeps retrieved nodes in the order of earlier prompts;
`KVPrefetch` has their KV brought nearer.
"""

from llama_index.llms.lmcache_rag.base import LmcacheRag
from llama_index.llms.lmcache_rag.events import KVReuseEvent
from llama_index.llms.lmcache_rag.order import KeepOrder
from llama_index.llms.lmcache_rag.precompute import KVPrecompute
from llama_index.llms.lmcache_rag.prefetch import KVPrefetch
from llama_index.llms.lmcache_rag.structured import StructuredProgram
from llama_index.llms.lmcache_rag.vector_store import KVVectorStore

__all__ = [
    "KVPrecompute",
    "KVPrefetch",
    "KVReuseEvent",
    "KVVectorStore",
    "KeepOrder",
    "LmcacheRag",
    "StructuredProgram",
]
