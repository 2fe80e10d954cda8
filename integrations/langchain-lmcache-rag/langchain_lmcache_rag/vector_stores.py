"""A vector store that has the KV of what is put into it computed, and that of what is taken out deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import BasePromptTemplate
from langchain_core.vectorstores import VectorStore

from langchain_lmcache_rag.chat_models import ChatLmcacheRag
from langchain_lmcache_rag.documents import DocumentKV, Progress
from lmcache_rag.engine import PrecomputeReport, release_texts
from lmcache_rag.engine.texts import own_texts


def _wrapped(name: str) -> Any:
    """The wrapped store's method of this name."""

    def method(self: KVVectorStore, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.store, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, f"See `VectorStore.{name}`."
    return method


class KVVectorStore(VectorStore):
    """Wraps a vector store of any kind: the KV of added documents is computed and stored, and that of deleted or
    changed ones is deleted, but for text that another document has too. LangChain's indexing API (`index`, `aindex`)
    can be pointed at it.

    Which text a document had is asked of the wrapped store, also in another process; where that has no `get_by_ids`,
    it is known of what was added by this object only.

    Args:
        store: what is wrapped.
        llm: the model that will answer.
        prompt: the chain's prompt; KV is computed behind its text before `{context}`. By default documents stand at
            the beginning of the user's message.
        context: name of the prompt's variable that stands for the documents.
        document_prompt: how the chain writes one document into the prompt: a template of `page_content` and metadata,
            or a function.
        name: tells several of these on the same KV store apart, so that none deletes what another needs.
        progress: gets how many documents are done, and how many there are.
        show_progress: a bar with an estimate.

    Attributes:
        store: what is wrapped.

    Raises:
        PromptError: no two prompts of the template begin alike.
        StoreError: when changed: the KV store cannot be read or written to; the vector store is changed already.
    """

    def __init__(
        self,
        store: VectorStore,
        llm: ChatLmcacheRag,
        prompt: BasePromptTemplate[Any] | str = "{context}",
        *,
        context: str = "context",
        document_prompt: str | Callable[[Document], str] = "{page_content}",
        name: str = "documents",
        progress: Progress | None = None,
        show_progress: bool = False,
    ) -> None:
        self.store = store
        self._kv = DocumentKV(llm, prompt, context, document_prompt)
        self._name = name
        self._progress: dict[str, Any] = {"progress": progress, "show_progress": show_progress}
        self._knows_documents = type(store).get_by_ids is not VectorStore.get_by_ids
        self._texts: dict[str, str] = {}

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `NotImplementedError`: which store would it be."""
        raise NotImplementedError("Make a vector store, and wrap it: KVVectorStore(store, llm, prompt).")

    @property
    def embeddings(self) -> Embeddings | None:
        """The wrapped store's."""
        return self.store.embeddings

    @property
    def preamble(self) -> str:
        """The text that KV is computed behind."""
        return self._kv.preamble

    @property
    def last_report(self) -> PrecomputeReport | None:
        """What became of the documents that were added last; None before the first."""
        return self._kv.last_report

    def text_of(self, document: Document) -> str:
        """A document as the chain prompts it; use it in the chain's `format_docs` too."""
        return self._kv.text_of(document)

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """See `VectorStore.add_documents`. A document that cannot be stored, as it is longer than the model's context,
        is named in a warning, and by its number in `last_report.errors`."""
        known = self._known(_given_ids(documents, kwargs))
        ids = self.store.add_documents(documents, **kwargs)
        self._keep(ids, documents, known)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        known = await self._aknown(_given_ids(documents, kwargs))
        ids = await self.store.aadd_documents(documents, **kwargs)
        await asyncio.to_thread(self._keep, ids, documents, known)
        return ids

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> list[str]:
        """See `VectorStore.add_texts`."""
        return self.add_documents(_documents(texts, metadatas), **kwargs)

    async def aadd_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> list[str]:
        return await self.aadd_documents(_documents(texts, metadatas), **kwargs)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """See `VectorStore.delete`.

        Raises:
            ValueError: no ids are given: it is not known whose KV is to be deleted.
        """
        known = self._known(_named(ids))
        deleted = self.store.delete(ids, **kwargs)
        self._release(known)
        return deleted

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        known = await self._aknown(_named(ids))
        deleted = await self.store.adelete(ids, **kwargs)
        await asyncio.to_thread(self._release, known)
        return deleted

    get_by_ids = _wrapped("get_by_ids")
    aget_by_ids = _wrapped("aget_by_ids")
    similarity_search = _wrapped("similarity_search")
    asimilarity_search = _wrapped("asimilarity_search")
    similarity_search_by_vector = _wrapped("similarity_search_by_vector")
    asimilarity_search_by_vector = _wrapped("asimilarity_search_by_vector")
    similarity_search_with_score = _wrapped("similarity_search_with_score")
    asimilarity_search_with_score = _wrapped("asimilarity_search_with_score")
    similarity_search_with_relevance_scores = _wrapped("similarity_search_with_relevance_scores")
    asimilarity_search_with_relevance_scores = _wrapped("asimilarity_search_with_relevance_scores")
    max_marginal_relevance_search = _wrapped("max_marginal_relevance_search")
    amax_marginal_relevance_search = _wrapped("amax_marginal_relevance_search")
    max_marginal_relevance_search_by_vector = _wrapped("max_marginal_relevance_search_by_vector")
    amax_marginal_relevance_search_by_vector = _wrapped("amax_marginal_relevance_search_by_vector")

    def _known(self, ids: Sequence[str]) -> dict[str, str]:
        """The texts that documents have now, as they are prompted."""
        if not self._knows_documents:
            return {each: self._texts[each] for each in ids if each in self._texts}
        found = self.store.get_by_ids(ids) if ids else []
        if all(document.id is not None for document in found):
            return self._texts_of(found)
        return self._named_texts({each: self.store.get_by_ids([each]) for each in ids})

    async def _aknown(self, ids: Sequence[str]) -> dict[str, str]:
        if not self._knows_documents:
            return self._known(ids)
        found = await self.store.aget_by_ids(ids) if ids else []
        if all(document.id is not None for document in found):
            return self._texts_of(found)
        return self._named_texts({each: await self.store.aget_by_ids([each]) for each in ids})

    def _named_texts(self, asked: Mapping[str, Sequence[Document]]) -> dict[str, str]:
        """Of documents that do not say which they are, as Qdrant's, and so were asked for one by one."""
        return {each: self.text_of(documents[0]) for each, documents in asked.items() if documents}

    def _texts_of(self, documents: Iterable[Document]) -> dict[str, str]:
        return {document.id: self.text_of(document) for document in documents if document.id is not None}

    def _keep(self, ids: Sequence[str], documents: Sequence[Document], known: Mapping[str, str]) -> None:
        """Have documents' KV stored, and let go of what they had before."""
        texts = {each: self.text_of(document) for each, document in zip(ids, documents, strict=True)}
        report = self._kv.precompute(documents, owner=self._owner, **self._progress)
        failed = {ids[number] for number in report.errors}
        for each, text in texts.items():
            if each not in failed:
                own_texts(self._kv.llm.engine, [text], self._owner_of(each))
        self._release({each: text for each, text in known.items() if texts.get(each, text) != text})
        if not self._knows_documents:
            self._texts |= texts

    def _release(self, texts: Mapping[str, str]) -> None:
        """Let go of documents' texts. Who owns a text is recorded for each document, and for all, who keep it until
        that is done."""
        engine = self._kv.llm.engine
        release_texts(engine, list(texts.values()), self._owner)
        for each, text in texts.items():
            release_texts(engine, [text], self._owner_of(each))
            self._texts.pop(each, None)

    @property
    def _owner(self) -> str:
        return f"langchain {self._name}"

    def _owner_of(self, document_id: str) -> str:
        return f"{self._owner} {document_id}"


def _given_ids(documents: Sequence[Document], kwargs: Mapping[str, Any]) -> list[str]:
    """The ids that documents bring along: some may be in the store already."""
    ids = kwargs.get("ids") or [document.id for document in documents]
    return [each for each in ids if each is not None]


def _documents(texts: Iterable[str], metadatas: Sequence[dict[str, Any]] | None) -> list[Document]:
    texts = list(texts)
    return [
        Document(page_content=text, metadata=metadata)
        for text, metadata in zip(texts, metadatas or [{} for _ in texts], strict=True)
    ]


def _named(ids: list[str] | None) -> list[str]:
    if ids is None:
        raise ValueError("Give the ids of the documents to delete: of others it is not known whose KV is to go.")
    return ids
