"""A vector store and its documents' KV, kept in step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("langchain_tests")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_lmcache_rag import ChatLmcacheRag, KVVectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from lmcache_rag.engine import LocalEngine
from tests.integrations.words import word_vector

WORDS = ("wind", "rain", "power", "battery", "mast", "relay")


class WordEmbeddings(Embeddings):
    """See `word_vector`."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [word_vector(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return word_vector(text)


class Forgetful(InMemoryVectorStore):
    """A store that does not tell what it holds."""

    get_by_ids = VectorStore.get_by_ids
    aget_by_ids = VectorStore.aget_by_ids


class Nameless(InMemoryVectorStore):
    """A store whose documents do not say which they are, as Qdrant's."""

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [Document(each.page_content, metadata=each.metadata) for each in super().get_by_ids(ids)]

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return self.get_by_ids(ids)


def text_of(number: int) -> str:
    """Long enough to be found in a prompt."""
    return " ".join(f"{WORDS[number % len(WORDS)]} w{4 + (7 * number + place) % 300}" for place in range(40))


def documents(*numbers: int) -> list[Document]:
    return [Document(text_of(number), metadata={"source": f"file-{number}"}) for number in numbers]


def stored(engine: LocalEngine) -> int:
    """How many chunks are stored."""
    return len(set(engine.chunk_store().records.live().chunk.tolist()))


@pytest.fixture
def llm(llama: LocalEngine) -> ChatLmcacheRag:
    return ChatLmcacheRag(engine=llama, max_tokens=2)


@pytest.fixture(params=[InMemoryVectorStore, Forgetful, Nameless], ids=["tells", "forgets", "nameless"])
def vectors(request: pytest.FixtureRequest, llm: ChatLmcacheRag) -> KVVectorStore:
    return KVVectorStore(request.param(WordEmbeddings()), llm)


def holds(vectors: KVVectorStore, numbers: Sequence[int]) -> None:
    """The KV of these texts is stored, and no other."""
    engine = vectors._kv.llm.engine
    report = engine.precompute(
        vectors._kv.llm.get_token_ids(vectors.preamble),
        [engine.tokenizer.encode(text_of(number), add_special_tokens=False) for number in numbers],
    )
    assert (report.computed, stored(engine)) == (0, len(numbers))


def test_what_is_added_is_computed_and_what_is_deleted_is_let_go_of(vectors: KVVectorStore) -> None:
    ids = vectors.add_documents(documents(0, 1))
    ids += vectors.add_texts([text_of(2)], [{"source": "file-2"}])
    holds(vectors, [0, 1, 2])
    vectors.delete(ids[:1])
    holds(vectors, [1, 2])

    async def changed() -> None:
        more = await vectors.aadd_documents(documents(3))
        more += await vectors.aadd_texts([text_of(4)])
        await vectors.adelete([ids[1], more[0]])

    asyncio.run(changed())
    holds(vectors, [2, 4])
    assert [each.page_content for each in vectors.as_retriever(search_kwargs={"k": 1}).invoke("mast")] == [text_of(4)]


def test_text_that_another_document_has_stays(vectors: KVVectorStore) -> None:
    first, second = vectors.add_documents([*documents(0), *documents(0)])
    vectors.delete([first])
    holds(vectors, [0])
    other = KVVectorStore(InMemoryVectorStore(WordEmbeddings()), vectors._kv.llm, name="other")
    other.add_texts([text_of(0)], ids=[second])
    vectors.delete([second])
    holds(vectors, [0])
    other.delete([second])
    assert stored(vectors._kv.llm.engine) == 0


def test_a_document_that_is_replaced_lets_go_of_its_text(vectors: KVVectorStore) -> None:
    vectors.add_documents(documents(0), ids=["a"])
    vectors.add_documents([Document(text_of(1), id="a")])
    holds(vectors, [1])
    asyncio.run(vectors.aadd_documents([Document(text_of(2), id="a")]))
    holds(vectors, [2])
    asyncio.run(vectors.aadd_documents([Document(text_of(2), id="a")]))
    holds(vectors, [2])


def test_what_another_process_added_is_let_go_of(llm: ChatLmcacheRag) -> None:
    """All that is known lies in the stores."""
    store = InMemoryVectorStore(WordEmbeddings())
    ids = KVVectorStore(store, llm).add_documents([*documents(0), *documents(0), *documents(1)])
    again = KVVectorStore(store, llm)
    again.delete(ids[1:])
    holds(again, [0])


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
def test_the_indexing_api(vectors: KVVectorStore, cleanup: Any) -> None:
    records = InMemoryRecordManager("test")
    records.create_schema()

    def indexed(given: list[Document]) -> dict[str, int]:
        return dict(index(given, records, vectors, cleanup=cleanup, source_id_key="source", key_encoder="sha256"))

    assert indexed(documents(0, 1, 2))["num_added"] == 3
    holds(vectors, [0, 1, 2])
    assert indexed(documents(0, 1, 2))["num_skipped"] == 3
    changed = documents(0, 1, 2)
    changed[1].page_content = text_of(5)
    found = indexed(changed)
    assert (found["num_added"], found["num_deleted"]) == (1, 1)
    holds(vectors, [0, 2, 5])
    if cleanup == "full":
        assert indexed(changed[1:])["num_deleted"] == 1
        holds(vectors, [2, 5])


def test_the_asynchronous_indexing_api(vectors: KVVectorStore) -> None:
    async def indexed() -> list[int]:
        records = InMemoryRecordManager("test")
        await records.acreate_schema()
        given: dict[str, Any] = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
        await aindex(documents(0, 1), records, vectors, **given)
        found = await aindex(documents(1, 2), records, vectors, **given)
        return [found["num_added"], found["num_deleted"]]

    assert asyncio.run(indexed()) == [1, 1]
    holds(vectors, [1, 2])


def test_documents_that_cannot_be_stored_are_named(vectors: KVVectorStore, caplog: pytest.LogCaptureFixture) -> None:
    ids = vectors.add_documents([*documents(0), Document("w5 " * 2000, metadata={"source": "long.txt"})])
    assert vectors.last_report is not None and list(vectors.last_report.errors) == [1]
    assert "long.txt" in caplog.messages[0]
    vectors.delete(ids)
    assert stored(vectors._kv.llm.engine) == 0


def test_what_is_not_known_is_refused(vectors: KVVectorStore) -> None:
    with pytest.raises(ValueError, match="Give the ids"):
        vectors.delete()
    with pytest.raises(NotImplementedError, match="wrap it"):
        KVVectorStore.from_texts(["x"], WordEmbeddings())


def test_progress(llm: ChatLmcacheRag) -> None:
    told: list[tuple[int, int]] = []
    store = InMemoryVectorStore(WordEmbeddings())
    vectors = KVVectorStore(store, llm, progress=lambda done, total: told.append((done, total)))
    vectors.add_documents(documents(0, 1))
    assert told == [(1, 2), (2, 2)]


class TestConformance(VectorStoreIntegrationTests):
    """LangChain's own suite."""

    @pytest.fixture
    def vectorstore(self, llm: ChatLmcacheRag) -> VectorStore:
        return KVVectorStore(InMemoryVectorStore(self.get_embeddings()), llm)
