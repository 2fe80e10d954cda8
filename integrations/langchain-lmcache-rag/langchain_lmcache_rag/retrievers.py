"""A retriever that computes the KV of the documents it finds, once each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import BaseChatPromptTemplate, StringPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, PrivateAttr

from langchain_lmcache_rag.chat_models import ChatLmcacheRag
from langchain_lmcache_rag.documents import DocumentKV, Progress
from lmcache_rag.conversation.order import PassageOrder
from lmcache_rag.engine import PrecomputeReport, prefetch_texts


class KVRetriever(BaseRetriever):
    """Wraps a retriever: what it finds is returned, and the KV of documents not stored yet is computed.

    The first query that finds a document then pays for reading it, and no later one does. `precompute` pays at ingest
    instead. Where storing fails, queries are answered all the same.

    Attributes:
        retriever: any retriever, such as a vector store's `as_retriever()`.
        llm: the model that will answer.
        prompt: the chain's prompt; KV is computed behind its text before `{context}`. A string is a template too.
        context: name of the prompt's variable that stands for the documents.
        document_prompt: how the chain writes one document into the prompt: a template of `page_content` and metadata,
            or a function.
        keep_order: whether documents come in the order of earlier prompts, as far as they are the same from the first
            on, so that their KV is found in the prefix cache; else by relevance, as the retriever gives them. Off where
            the order means something.

    Raises:
        PromptError: no two prompts of the template begin alike.
    """

    model_config = ConfigDict(extra="forbid")

    retriever: Runnable[str, list[Document]]
    llm: ChatLmcacheRag
    prompt: StringPromptTemplate | BaseChatPromptTemplate | str
    context: str = "context"
    document_prompt: str | Callable[[Document], str] = "{page_content}"
    keep_order: bool = False

    _order: PassageOrder = PrivateAttr(default_factory=PassageOrder)
    _kv: DocumentKV = PrivateAttr()
    _failed_queries: int = PrivateAttr(default=0)

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._kv = DocumentKV(self.llm, self.prompt, self.context, self.document_prompt)

    @property
    def preamble(self) -> str:
        """The text that KV is computed behind."""
        return self._kv.preamble

    @property
    def last_report(self) -> PrecomputeReport | None:
        """What became of the documents of the last query or `precompute`; None before the first."""
        return self._kv.last_report

    @property
    def failed_queries(self) -> int:
        """How many queries found documents that could not be stored at all; the log says why."""
        return self._failed_queries

    def precompute(
        self, documents: Sequence[Document], *, progress: Progress | None = None, show_progress: bool = False
    ) -> PrecomputeReport:
        """Compute and store the KV of each document; one that is stored costs nothing. One that cannot be stored, as it
        is longer than the model's context, is named in a warning, once, and in the report's `errors`.

        Args:
            progress: gets how many documents are done, and how many there are.
            show_progress: a bar with an estimate.
        """
        return self._kv.precompute(documents, progress=progress, show_progress=show_progress)

    async def aprecompute(
        self, documents: Sequence[Document], *, progress: Progress | None = None, show_progress: bool = False
    ) -> PrecomputeReport:
        """See `precompute`; the event loop runs on meanwhile, and `progress` is called in another thread."""
        return await asyncio.to_thread(self.precompute, documents, progress=progress, show_progress=show_progress)

    def text_of(self, document: Document) -> str:
        """A document as the chain prompts it; use it in the chain's `format_docs` too."""
        return self._kv.text_of(document)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        documents = self.retriever.invoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        self._store(documents)
        return self._ordered(documents)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        documents = await self.retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        await asyncio.to_thread(self._store, documents)
        return self._ordered(documents)

    def _ordered(self, documents: list[Document]) -> list[Document]:
        return self._order.ordered(documents, key=self.text_of) if self.keep_order else documents

    def _store(self, documents: list[Document]) -> None:
        """`precompute`, but for a query, which is answered from the documents whether or not they can be stored. What
        is stored of them already is brought nearer meanwhile."""
        try:
            prefetch_texts(self.llm.engine, [self.text_of(document) for document in documents])
            self.precompute(documents)
        except Exception as error:  # noqa: BLE001  # whatever it is: it is not what was asked for
            self._failed_queries += 1
            self._kv.warn(
                f"What queries find cannot be stored, and is read each time ({type(error).__name__}: {error})."
            )
