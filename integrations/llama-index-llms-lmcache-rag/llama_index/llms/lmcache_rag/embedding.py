"""lmcache-rag's own embedding model for LlamaIndex."""

from __future__ import annotations

import asyncio

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from lmcache_rag.corpus.embedder import SentenceEmbedder


class LocalEmbedding(BaseEmbedding):
    """A small sentence embedding model on the CPU that comes as a package and fetches nothing. Any other embedding of
    LlamaIndex does as well.

    Raises:
        ImportError: when called: the package's extra `local` is missing.
    """

    _embedder: SentenceEmbedder = PrivateAttr(default_factory=SentenceEmbedder)

    @classmethod
    def class_name(cls) -> str:
        return "LocalEmbedding"

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [vector.tolist() for vector in self._embedder.embed(texts)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._aget_text_embedding(query)
