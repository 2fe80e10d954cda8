"""LangChain on lmcache-rag.

`ChatLmcacheRag` is the language model; `KVRetriever` wraps a retriever and computes its documents' KV once.
"""

from langchain_lmcache_rag.chat_models import ChatLmcacheRag
from langchain_lmcache_rag.retrievers import KVRetriever

__all__ = ["ChatLmcacheRag", "KVRetriever"]
