"""LangChain on lmcache-rag.

`ChatLmcacheRag` is the language model; `KVRetriever` wraps a retriever and computes its documents' KV once;
`KVVectorStore` wraps a vector store and keeps its documents' KV in step.
"""

from langchain_lmcache_rag.chat_models import ChatLmcacheRag
from langchain_lmcache_rag.embeddings import LocalEmbeddings
from langchain_lmcache_rag.retrievers import KVRetriever
from langchain_lmcache_rag.vector_stores import KVVectorStore

__all__ = ["ChatLmcacheRag", "KVRetriever", "KVVectorStore", "LocalEmbeddings"]
