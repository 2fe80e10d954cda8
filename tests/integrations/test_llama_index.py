"""The LlamaIndex integration on a real engine: ingestion, query engines, streaming, asyncio."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

import llama_index.llms.lmcache_rag as package
from llama_index.core import PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT_TMPL
from llama_index.core.schema import BaseNode, Document, MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.lmcache_rag import KeepOrder, KVPrecompute, KVVectorStore, LmcacheRag
from pydantic import ValidationError

from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.request import ReuseReport
from tests.integrations.words import word_vector


class WordEmbedding(BaseEmbedding):
    """See `word_vector`."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return word_vector(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return word_vector(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return word_vector(query)


@pytest.fixture
def documents(corpus_texts: dict[str, str]) -> list[Document]:
    return [Document(text=text, metadata={"file": name}) for name, text in corpus_texts.items()]


@pytest.fixture
def llm(smollm: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> LmcacheRag:
    """The model, also as LlamaIndex's own setting."""
    llm = LmcacheRag(engine=smollm, max_tokens=12)
    monkeypatch.setattr(Settings, "_llm", None)
    Settings.llm = llm
    return llm


def ingest(precompute: KVPrecompute, documents: list[Document]) -> list[BaseNode]:
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=0)
    return list(IngestionPipeline(transformations=[splitter, precompute]).run(documents=documents))


def index_of(nodes: list[BaseNode]) -> VectorStoreIndex:
    return VectorStoreIndex(nodes, embed_model=WordEmbedding())


def assert_mostly_reused(reuse: ReuseReport | None) -> None:
    assert reuse is not None
    assert reuse.mode == "blend"
    assert reuse.reused_tokens > reuse.prompt_tokens / 2


def test_all() -> None:
    assert sorted(package.__all__) == [
        "KVPrecompute", "KVPrefetch", "KVReuseEvent", "KVVectorStore", "KeepOrder", "LmcacheRag", "StructuredProgram",
    ]  # fmt: skip
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_query_engine_reuses_ingested_nodes(
    smollm: LocalEngine, llm: LmcacheRag, documents: list[Document], question: str, chat_template: bool
) -> None:
    Settings.llm = llm = LmcacheRag(engine=smollm, max_tokens=12, chat_template=chat_template)
    precompute = KVPrecompute(llm)
    nodes = ingest(precompute, documents)
    assert precompute.last_report is not None
    assert precompute.last_report.computed == len(nodes)
    assert not precompute.last_report.errors
    response = index_of(nodes).as_query_engine(similarity_top_k=3).query(question)
    assert str(response).strip()
    assert_mostly_reused(llm.last_reuse)
    assert llm.last_reuse is not None
    assert llm.last_reuse.foreign_tokens == 0


def test_nodes_behind_a_long_preamble_are_its_own(smollm: LocalEngine, documents: list[Document]) -> None:
    llm = LmcacheRag(engine=smollm, max_tokens=1, chat_template=True)
    nodes = ingest(KVPrecompute(llm), documents[:1])
    template = DEFAULT_TEXT_QA_PROMPT_SEL
    llm.predict(template, context_str=nodes[0].get_content(metadata_mode=MetadataMode.LLM), query_str="What is it?")
    assert llm.last_reuse is not None
    assert llm.last_reuse.foreign_tokens == 0


def test_streaming_and_asynchronous_answers_are_the_same(llm: LmcacheRag, documents: list[Document]) -> None:
    question = "What does the rain gauge measure?"
    index = index_of(ingest(KVPrecompute(llm), documents))
    answer = str(index.as_query_engine(similarity_top_k=3).query(question))
    assert_mostly_reused(llm.last_reuse)

    streamed = index.as_query_engine(similarity_top_k=3, streaming=True).query(question)
    assert isinstance(streamed, StreamingResponse)
    pieces = list(streamed.response_gen)
    assert len(pieces) > 3
    assert "".join(pieces) == answer

    async def asked() -> tuple[str, list[str]]:
        whole = str(await index.as_query_engine(similarity_top_k=3).aquery(question))
        streamed = await index.as_query_engine(similarity_top_k=3, streaming=True).aquery(question)
        assert isinstance(streamed, AsyncStreamingResponse)
        return whole, [piece async for piece in streamed.async_response_gen()]

    whole, pieces = asyncio.run(asked())
    assert whole == "".join(pieces) == answer
    assert len(pieces) > 3


def test_off_reuses_nothing(llm: LmcacheRag, documents: list[Document], question: str) -> None:
    index = index_of(ingest(KVPrecompute(llm), documents))
    llm.mode = "off"
    index.as_query_engine(similarity_top_k=3).query(question)
    assert llm.last_reuse is not None
    assert (llm.last_reuse.mode, llm.last_reuse.reused_tokens, llm.last_reuse.bytes_loaded) == ("off", 0, 0)


def test_second_run_computes_nothing(llm: LmcacheRag, documents: list[Document]) -> None:
    precompute = KVPrecompute(llm)
    nodes = ingest(precompute, documents)
    ingest(precompute, documents)
    assert precompute.last_report is not None
    assert (precompute.last_report.computed, precompute.last_report.present) == (0, len(nodes))


def test_nodes_that_cannot_be_stored_are_named_and_the_others_are_stored(
    llm: LmcacheRag, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    precompute = KVPrecompute(llm)
    nodes = [
        Document(text="word " * 5000, id_="long"),
        documents[0],
        Document(text="half \ud800", id_="half"),
        Document(text=" "),
        documents[1],
    ]
    assert precompute(nodes) == nodes
    report = precompute.last_report
    assert report is not None
    assert (report.computed, sorted(report.errors)) == (2, [0, 2])
    (warning,) = caplog.messages
    assert "node long: It has" in warning and "node half: " in warning


def test_pipeline_cache_does_not_hide_a_lost_store(llm: LmcacheRag, documents: list[Document]) -> None:
    precompute = KVPrecompute(llm)
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(chunk_size=256), precompute])
    nodes = pipeline.run(documents=documents)
    pipeline.run(documents=documents)  # the store has changed since the cache was asked
    report = precompute.last_report
    assert report is not None
    assert report.computed == 0
    assert pipeline.run(documents=documents) == nodes
    assert precompute.last_report is report  # the cache answered
    llm.engine.chunk_store().clear()
    pipeline.run(documents=documents)
    assert precompute.last_report is not None
    assert precompute.last_report.computed == len(nodes)


def test_asynchronous_pipeline(llm: LmcacheRag, documents: list[Document]) -> None:
    precompute = KVPrecompute(llm)
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(chunk_size=256), precompute])
    nodes = asyncio.run(pipeline.arun(documents=documents))
    assert precompute.last_report is not None
    assert precompute.last_report.computed == len(nodes) > 0


def test_preamble_is_the_librarys_own(llm: LmcacheRag) -> None:
    assert KVPrecompute(llm).preamble == DEFAULT_TEXT_QA_PROMPT_TMPL.partition("{context_str}")[0]
    own = PromptTemplate("{manner} Use this.\n{context_str}\nAsked: {query_str}\n").partial_format(manner="Be brief.")
    assert KVPrecompute(llm, own).preamble == "Be brief. Use this.\n"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [("No place for nodes: {query_str}", "no variable {context_str}"), ("{query_str} {context_str}", "move it behind")],
)
def test_unusable_templates_are_refused(llm: LmcacheRag, template: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=re.escape(complaint)):
        KVPrecompute(llm, PromptTemplate(template))


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_an_engine_stays_in_its_process(llm: LmcacheRag, copied: Any) -> None:
    for whole in (llm, KVPrecompute(llm), KVVectorStore(SimpleVectorStore(), KVPrecompute(llm))):
        with pytest.raises(EngineError, match="base_url="):
            copied(whole)


def test_the_pipelines_cache_does_not_mind_what_is_used(
    llm: LmcacheRag, documents: list[Document], question: str
) -> None:
    precompute = KVPrecompute(llm)
    index = index_of(ingest(precompute, documents))
    known = precompute.to_dict()
    stored = llm.engine.chunk_store()  # type: ignore[attr-defined]
    position = stored.records.position
    for key in stored.records.keys():  # noqa: SIM118  # no mapping
        stored.records.use({(key, form): int(row.used_s) + 1000 for form, row in stored.records.variants(key).items()})
    index.as_query_engine(similarity_top_k=3).query(question)
    assert llm.engine.chunk_store().records.position != position  # type: ignore[attr-defined]
    assert precompute.to_dict() == known


def test_responses_carry_the_report(llm: LmcacheRag) -> None:
    response = llm.complete("The capital of France is", max_tokens=4)
    assert isinstance(response.raw, dict)
    assert response.raw["ttft_s"] > 0
    assert response.raw["reuse"]["mode"] == "plain"
    assert response.raw["usage"]["completion_tokens"] <= 4
    *_, last = llm.stream_chat([ChatMessage(role=MessageRole.USER, content="Hello")], max_tokens=4)
    assert isinstance(last.raw, dict)
    assert llm.last_reuse == ReuseReport(**last.raw["reuse"])


def test_chat(smollm: LocalEngine) -> None:
    llm = LmcacheRag(engine=smollm, max_tokens=8, chat_template=True)
    assert llm.metadata.is_chat_model
    messages = [ChatMessage(role=MessageRole.USER, content="What is the capital of France?")]

    async def asked() -> tuple[str | None, list[str]]:
        whole = (await llm.achat(messages)).message.content
        return whole, [response.delta or "" async for response in await llm.astream_chat(messages)]

    whole, pieces = asyncio.run(asked())
    answer = llm.chat(messages).message.content
    assert answer
    assert answer == whole == "".join(pieces) == "".join(r.delta or "" for r in llm.stream_chat(messages))
    assert answer == llm.complete("What is the capital of France?").text


def test_asynchronous_requests_run_together(llm: LmcacheRag) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,"]

    async def asked() -> list[str]:
        return [response.text for response in await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))]

    assert asyncio.run(asked()) == [llm.complete(prompt).text for prompt in prompts]


def test_stop(llm: LmcacheRag) -> None:
    text = llm.complete("Count: one, two, three, four,").text
    word = text.split()[2]
    assert llm.complete("Count: one, two, three, four,", stop=(word,)).text == text[: text.index(word)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"max_tokens": 0}, "max_tokens"), ({"tools": []}, "tools"), ({"selector": "best"}, "selector")],
    ids=["value", "unknown", "blend"],
)
def test_wrong_arguments_name_the_field(llm: LmcacheRag, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        llm.complete("Hello", **arguments)


def test_wrong_fields_are_refused(smollm: LocalEngine) -> None:
    with pytest.raises(ValidationError, match="max_token"):
        LmcacheRag(engine=smollm, max_token=5)
    with pytest.raises(EngineError, match="engine="):
        LmcacheRag()


def test_too_long_a_prompt(llm: LmcacheRag) -> None:
    with pytest.raises(PromptError, match="tokens"):
        llm.complete("word " * 5000)


def test_only_text_is_read(llm: LmcacheRag) -> None:
    image = ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="What is it?"), ImageBlock(image=b"\x89PNG")])
    with pytest.raises(PromptError, match="ImageBlock"):
        llm.chat([image])


def test_retrieved_nodes_come_in_the_order_of_earlier_prompts() -> None:
    def found(texts: str) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text), score=1.0 / rank) for rank, text in enumerate(texts, start=1)]

    keep = KeepOrder()
    for texts, expected in (("abcd", "abcd"), ("dbca", "abcd"), ("xa", "ax")):
        kept = keep.postprocess_nodes(found(texts), query_str="What?")
        assert "".join(one.node.get_content() for one in kept) == expected
    strict = KeepOrder(most_moved=0)
    strict.postprocess_nodes(found("ab"))
    assert [one.node.get_content() for one in strict.postprocess_nodes(found("ba"))] == ["b", "a"]
