"""A vector store that has the KV of what is put into it computed, and that of what is taken out deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.llms.lmcache_rag.copies import Copyable
from llama_index.llms.lmcache_rag.precompute import KVPrecompute

from lmcache_rag.engine import release_texts


class KVVectorStore(Copyable, BasePydanticVectorStore):
    """Wraps a vector store of any kind: the KV of added nodes is computed and stored, and that of deleted or changed
    ones is deleted, but for text that another document has too. All ways of an index and of a pipeline to add, update
    and delete go through it, so it takes the place of `KVPrecompute` among a pipeline's transformations.

    Args:
        vector_store: what is wrapped.
        precompute: how the nodes are prompted, and by which model.
        docstore: which texts' KV is kept for which documents, for this store alone: LlamaIndex's vector stores do not
            all know what they hold. One that lasts as long as the vector store does; by default it is in memory.
        name: tells several of these on the same KV store apart, so that none deletes what another needs.

    Raises:
        StoreError: when changed: the KV store cannot be read or written to; the vector store is changed already.
    """

    _store: BasePydanticVectorStore = PrivateAttr()
    _precompute: KVPrecompute = PrivateAttr()
    _docstore: BaseDocumentStore = PrivateAttr()
    _name: str = PrivateAttr()

    def __init__(
        self,
        vector_store: BasePydanticVectorStore,
        precompute: KVPrecompute,
        docstore: BaseDocumentStore | None = None,
        name: str = "index",
    ) -> None:
        super().__init__(stores_text=vector_store.stores_text, is_embedding_query=vector_store.is_embedding_query)
        self._store, self._precompute, self._name = vector_store, precompute, name
        self._docstore = docstore if docstore is not None else SimpleDocumentStore()

    @classmethod
    def class_name(cls) -> str:
        return "KVVectorStore"

    @property
    def client(self) -> Any:
        """The wrapped store's."""
        return self._store.client

    @property
    def vector_store(self) -> BasePydanticVectorStore:
        """What is wrapped."""
        return self._store

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """See `BasePydanticVectorStore.add`."""
        ids = self._store.add(nodes, **kwargs)
        self._keep(nodes)
        return ids

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        ids = await self._store.async_add(nodes, **kwargs)
        await asyncio.to_thread(self._keep, nodes)
        return ids

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """See `BasePydanticVectorStore.delete`."""
        self._store.delete(ref_doc_id, **delete_kwargs)
        self._forget(self._nodes_of(ref_doc_id))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await self._store.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(lambda: self._forget(self._nodes_of(ref_doc_id)))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """See `BasePydanticVectorStore.delete_nodes`. With `filters`, the wrapped store has to be able to say which
        nodes they are (`get_nodes`).

        Raises:
            NotImplementedError: it is not.
        """
        found = node_ids if filters is None else [node.node_id for node in self._store.get_nodes(node_ids, filters)]
        self._store.delete_nodes(node_ids, filters, **delete_kwargs)
        self._forget(self._nodes(found or ()))

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        found = node_ids
        if filters is not None:
            found = [node.node_id for node in await self._store.aget_nodes(node_ids, filters)]
        await self._store.adelete_nodes(node_ids, filters, **delete_kwargs)
        await asyncio.to_thread(lambda: self._forget(self._nodes(found or ())))

    def clear(self) -> None:
        """See `BasePydanticVectorStore.clear`."""
        self._store.clear()
        self._forget(self._all())

    async def aclear(self) -> None:
        await self._store.aclear()
        await asyncio.to_thread(lambda: self._forget(self._all()))

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The wrapped store's."""
        return self._store.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return await self._store.aget_nodes(node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The wrapped store's."""
        return self._store.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await self._store.aquery(query, **kwargs)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Persist the wrapped store; the `docstore` is its owner's to persist."""
        self._store.persist(persist_path, fs=fs)

    def _keep(self, nodes: Sequence[BaseNode]) -> None:
        """Have the nodes' KV stored, and let go of what they held before."""
        kept = [self._kept(node) for node in nodes]
        texts = {node.node_id: node.text for node in kept}
        self._forget([old for old in self._nodes(texts) if old.get_content() != texts[old.node_id]])
        for document, its in _by_document(zip(kept, nodes, strict=True)).items():
            self._precompute.compute([node for _, node in its], owner=self._owner(document))
        self._docstore.add_documents(kept, allow_update=True)

    def _forget(self, nodes: Sequence[BaseNode]) -> None:
        """Let go of nodes' KV; text that another node of the same document has stays."""
        gone_ids = {node.node_id for node in nodes}
        for document, its in _by_document((node, node) for node in nodes).items():
            still = {node.get_content() for node in self._nodes_of(document) if node.node_id not in gone_ids}
            gone = [node.get_content() for node, _ in its if node.get_content() not in still]
            release_texts(self._precompute.llm.engine, gone, self._owner(document))
            for node, _ in its:
                self._docstore.delete_document(node.node_id, raise_error=False)

    def _owner(self, document: str) -> str:
        return f"llama-index {self._name} {document}"

    def _kept(self, node: BaseNode) -> TextNode:
        """What is to be known of a node when it goes."""
        document = RelatedNodeInfo(node_id=node.ref_doc_id or node.node_id)
        text = self._precompute.text_of(node)
        return TextNode(id_=node.node_id, text=text, relationships={NodeRelationship.SOURCE: document})

    def _nodes(self, node_ids: Iterable[str]) -> list[BaseNode]:
        return self._docstore.get_nodes(list(node_ids), raise_error=False)

    def _nodes_of(self, document: str) -> list[BaseNode]:
        known = self._docstore.get_ref_doc_info(document)
        return self._nodes(known.node_ids) if known is not None else []

    def _all(self) -> list[BaseNode]:
        return list(self._docstore.docs.values())


def _by_document(nodes: Iterable[tuple[BaseNode, BaseNode]]) -> dict[str, list[tuple[BaseNode, BaseNode]]]:
    """Pairs whose first node says to which document they belong, by document."""
    grouped: dict[str, list[tuple[BaseNode, BaseNode]]] = {}
    for pair in nodes:
        assert pair[0].ref_doc_id is not None
        grouped.setdefault(pair[0].ref_doc_id, []).append(pair)
    return grouped
