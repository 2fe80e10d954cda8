"""Embeddings by a small model on this machine, so that nothing else has to be installed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from lmcache_rag.corpus.embedder import SentenceEmbedder


class LocalEmbeddings(Embeddings):
    """The embedding model that `lmcache-rag index` uses. Takes `lmcache-rag[local]`; any embeddings of LangChain do
    as well.
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return [[float(value) for value in vector] for vector in self._embedder.embed(texts)]

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text."""
        return self.embed_documents([text])[0]

    @cached_property
    def _embedder(self) -> SentenceEmbedder:
        from lmcache_rag.corpus.embedder import SentenceEmbedder  # imports torch, which clients of servers do without

        return SentenceEmbedder()
