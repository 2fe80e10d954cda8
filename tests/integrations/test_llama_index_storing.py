"""What LlamaIndex's pipelines and indexes have stored and deleted, whatever the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.llms.lmcache_rag import KVPrecompute, KVPrefetch, KVVectorStore, LmcacheRag

from tests.integrations.stub import StubEngine, StubServer, Tokens, WordTokenizer
from tests.integrations.test_llama_index import WordEmbedding


def words(name: str, count: int = 40) -> str:
    """A passage that is long enough to be stored."""
    return " ".join(f"{name}{number}" for number in range(count))


def tokens(text: str) -> Tokens:
    return tuple(WordTokenizer().encode(text))


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def llm(engine: StubEngine) -> LmcacheRag:
    return LmcacheRag(engine=engine)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


def node(name: str, document: str = "doc", node_id: str | None = None) -> TextNode:
    made = Document(id_=document, text="").as_related_node_info()
    return TextNode(id_=node_id or f"{document}-{name}", text=words(name), relationships={"1": made}, embedding=[1.0])


def stored(engine: StubEngine) -> set[Tokens]:
    return set(engine.stored)


def passages(*names: str) -> set[Tokens]:
    return {tokens(words(name)) for name in names}


@pytest.fixture
def store(llm: LmcacheRag) -> KVVectorStore:
    return KVVectorStore(SimpleVectorStore(), KVPrecompute(llm))


def test_kv_comes_and_goes_with_documents_and_nodes(engine: StubEngine, store: KVVectorStore) -> None:
    store.add([node("a"), node("b"), node("shared"), node("shared", "other"), node("c", "other")])
    assert stored(engine) == passages("a", "b", "c", "shared")
    store.delete_nodes(["doc-a"])
    assert stored(engine) == passages("b", "c", "shared")
    store.delete("doc")
    assert stored(engine) == passages("c", "shared")
    store.delete("doc")
    store.delete("unknown")
    store.delete_nodes(["unknown"])
    assert stored(engine) == passages("c", "shared")
    store.clear()
    assert not engine.stored


def test_text_that_a_document_has_twice_stays(engine: StubEngine, store: KVVectorStore) -> None:
    store.add([node("a", node_id="1"), node("a", node_id="2")])
    store.delete_nodes(["1"])
    assert stored(engine) == passages("a")
    store.delete_nodes(["2"])
    assert not engine.stored


def test_a_node_that_changes_takes_its_kv_with_it(engine: StubEngine, store: KVVectorStore) -> None:
    store.add([node("a", node_id="1"), node("b", node_id="2")])
    store.add([node("c", node_id="1"), node("b", node_id="2")])
    assert stored(engine) == passages("b", "c")
    store.delete("doc")
    assert not engine.stored


def test_the_asynchronous_twins_do_the_same(engine: StubEngine, store: KVVectorStore) -> None:
    async def all_of_them() -> list[set[Tokens]]:
        seen = []
        await store.async_add([node("a"), node("b"), node("c", "other")])
        seen.append(stored(engine))
        await store.adelete_nodes(["doc-a"])
        seen.append(stored(engine))
        await store.adelete("doc")
        seen.append(stored(engine))
        await store.aclear()
        return [*seen, stored(engine)]

    assert asyncio.run(all_of_them()) == [passages("a", "b", "c"), passages("b", "c"), passages("c"), set()]


def test_stores_of_other_names_keep_what_they_need(engine: StubEngine, llm: LmcacheRag) -> None:
    first, second = (KVVectorStore(SimpleVectorStore(), KVPrecompute(llm), name=name) for name in ("one", "two"))
    for store in (first, second):
        store.add([node("a")])
    first.delete("doc")
    assert stored(engine) == passages("a")
    second.delete("doc")
    assert not engine.stored


def test_what_is_kept_outlives_the_wrapper(engine: StubEngine, llm: LmcacheRag) -> None:
    vectors, known = SimpleVectorStore(), SimpleDocumentStore()
    KVVectorStore(vectors, KVPrecompute(llm), known).add([node("a")])
    again = SimpleDocumentStore.from_dict(known.to_dict())
    KVVectorStore(vectors, KVPrecompute(llm), again).delete("doc")
    assert not engine.stored


def test_deleting_by_a_filter_takes_a_store_that_knows_its_nodes(engine: StubEngine, store: KVVectorStore) -> None:
    store.add([node("a")])
    filters = MetadataFilters(filters=[MetadataFilter(key="file", value="x")])
    with pytest.raises(NotImplementedError):
        store.delete_nodes(filters=filters)
    assert stored(engine) == passages("a")
    assert store.vector_store.data.embedding_dict  # type: ignore[attr-defined]


def index_over(store: KVVectorStore, *documents: Document) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex.from_documents(
        list(documents), context, embed_model=WordEmbedding(), transformations=[SentenceSplitter(chunk_size=1024)]
    )


def test_an_index_adds_updates_refreshes_and_deletes(engine: StubEngine, store: KVVectorStore) -> None:
    index = index_over(store, Document(id_="1", text=words("a")), Document(id_="2", text=words("b")))
    assert stored(engine) == passages("a", "b")
    index.update_ref_doc(Document(id_="1", text=words("c")))
    assert stored(engine) == passages("b", "c")
    index.insert(Document(id_="3", text=words("d")))
    changed = index.refresh_ref_docs([Document(id_="2", text=words("b")), Document(id_="3", text=words("e"))])
    assert changed == [False, True]
    assert stored(engine) == passages("b", "c", "e")
    index.delete_ref_doc("2", delete_from_docstore=True)
    assert stored(engine) == passages("c", "e")
    asyncio.run(index.adelete_ref_doc("3"))
    assert stored(engine) == passages("c")
    index.delete_nodes(list(index.index_struct.nodes_dict.values()))
    assert not engine.stored


@pytest.mark.parametrize("strategy", [DocstoreStrategy.UPSERTS, DocstoreStrategy.UPSERTS_AND_DELETE])
def test_a_pipelines_upserts_delete_stale_kv(
    engine: StubEngine, store: KVVectorStore, strategy: DocstoreStrategy
) -> None:
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=1024), WordEmbedding()],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
    )
    first, second = Document(id_="1", text=words("a")), Document(id_="2", text=words("b"))
    pipeline.run(documents=[first, second])
    pipeline.run(documents=[Document(id_="1", text=words("c")), second])
    assert stored(engine) == passages("b", "c")
    pipeline.run(documents=[first, second])  # as at first: the cache has the nodes, and the store gets their KV again
    assert stored(engine) == passages("a", "b")
    if strategy == DocstoreStrategy.UPSERTS_AND_DELETE:
        asyncio.run(pipeline.arun(documents=[first]))
        assert stored(engine) == passages("a")


def test_retrieved_nodes_come_through_the_wrapper(engine: StubEngine, store: KVVectorStore) -> None:
    index = index_over(store, Document(id_="1", text=words("alpha")), Document(id_="2", text=words("beta")))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("beta3 beta4")
    assert found.node.ref_doc_id == "2"
    (found,) = asyncio.run(index.as_retriever(similarity_top_k=1).aretrieve("alpha3"))
    assert found.node.ref_doc_id == "1"


def test_progress_counts_all_nodes(llm: LmcacheRag, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("a"), TextNode(text="short"), node("b")]
    KVPrecompute(llm)(nodes)
    assert "node" not in capsys.readouterr().err
    KVPrecompute(llm, show_progress=True)(nodes)
    assert "3/3" in capsys.readouterr().err
    KVPrecompute(llm)(nodes, show_progress=True)
    assert "3/3" in capsys.readouterr().err
    assert KVPrecompute(llm, show_progress=True).to_dict() == KVPrecompute(llm).to_dict()


def test_what_is_too_short_to_be_found_is_not_stored(engine: StubEngine, llm: LmcacheRag) -> None:
    short = TextNode(text="So short a text is found in no prompt.")
    precompute = KVPrecompute(llm)
    assert precompute([short]) == [short]
    assert not engine.computed
    assert precompute.last_report is not None
    assert not precompute.last_report.errors


@pytest.mark.parametrize("make", [TextNode, Document])
def test_windows_are_stored_where_they_are_prompted(engine: StubEngine, llm: LmcacheRag, make: Any) -> None:
    sentences = [words(name) + "." for name in "abcde"]
    parser = SentenceWindowNodeParser.from_defaults(window_size=1, sentence_splitter=lambda text: sentences)
    nodes = parser.get_nodes_from_documents([Document(text=" ".join(sentences), metadata={"file": "x"})])
    nodes.append(make(text=words("whole")))  # without a window
    before = [each.model_dump() for each in nodes]
    KVPrecompute(llm, target_metadata_key="window")(nodes)
    assert [each.model_dump() for each in nodes] == before
    found = [NodeWithScore(node=each) for each in nodes]
    replaced = MetadataReplacementPostProcessor(target_metadata_key="window").postprocess_nodes(found)
    prompted = {tokens(each.node.get_content(MetadataMode.LLM)) for each in replaced}
    assert stored(engine) == prompted
    assert tokens("file: x " + " ".join(sentences[:3])) in prompted
    assert KVPrecompute(llm).to_dict() != KVPrecompute(llm, target_metadata_key="window").to_dict()


def test_a_pipeline_with_workers_stores_over_a_server(server: StubServer) -> None:
    precompute = KVPrecompute(LmcacheRag(base_url=server.url))
    pipeline = IngestionPipeline(transformations=[precompute])
    nodes = [node(name) for name in "abcd"]
    assert pipeline.run(nodes=nodes, num_workers=2) == nodes
    owned = {tuple(chunk) for body in server.bodies("/lmcache-rag/own") for chunk in body["chunks"]}
    assert owned == passages(*"abcd")
    computed = [tuple(body["prompt"][-40:]) for body in server.bodies("/v1/completions")]
    assert set(computed) == owned
    posts = len(server.bodies("/v1/completions"))
    pipeline.run(nodes=nodes[:2])  # a worker's share: its cache has come back
    assert len(server.bodies("/v1/completions")) == posts


def test_a_server_brings_nothing_nearer_and_is_not_asked(server: StubServer) -> None:
    prefetch = KVPrefetch(LmcacheRag(base_url=server.url))
    found = [NodeWithScore(node=node("a"))]
    assert prefetch.postprocess_nodes(found) == found
    assert asyncio.run(prefetch.apostprocess_nodes(found)) == found
    assert not server.posted
