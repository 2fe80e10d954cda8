"""The LangChain integration on a real engine: a retrieval chain, streaming, asyncio, errors."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("langchain_core")

import langchain_lmcache_rag as package
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_lmcache_rag import ChatLmcacheRag, KVRetriever
from langchain_lmcache_rag.prompts import plain_text
from pydantic import ValidationError

from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import EngineError, PromptError
from tests.integrations.words import word_vector

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the question from the passages."),
        ("human", "Passages:\n{context}\n\nQuestion: {question}\nAnswer:"),
    ]
)


class WordEmbeddings(Embeddings):
    """See `word_vector`."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [word_vector(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return word_vector(text)


@pytest.fixture
def documents(corpus_texts: dict[str, str]) -> list[Document]:
    """A document per section."""
    return [
        Document(page_content=section.strip(), metadata={"file": name})
        for name, text in corpus_texts.items()
        for section in re.split(r"\n(?=## )", text)
    ]


@pytest.fixture
def llm(smollm: LocalEngine) -> ChatLmcacheRag:
    return ChatLmcacheRag(engine=smollm, max_tokens=12)


def retriever_of(documents: list[Document], llm: ChatLmcacheRag, **values: Any) -> KVRetriever:
    store = InMemoryVectorStore.from_documents(documents, WordEmbeddings())
    found = store.as_retriever(search_kwargs={"k": 3})
    return KVRetriever(**{"retriever": found, "llm": llm, "prompt": PROMPT, **values})


def format_docs(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def chain_of(retriever: KVRetriever, llm: Runnable[Any, AIMessage]) -> Runnable[str, AIMessage]:
    return {"context": retriever | format_docs, "question": RunnablePassthrough()} | PROMPT | llm


def assert_mostly_reused(answer: AIMessage) -> None:
    reuse = answer.response_metadata["reuse"]
    assert reuse["mode"] == "blend"
    assert reuse["reused_tokens"] > reuse["prompt_tokens"] / 2
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == reuse["prompt_tokens"]
    assert answer.response_metadata["ttft_s"] > 0


def test_all() -> None:
    assert sorted(package.__all__) == ["ChatLmcacheRag", "KVRetriever", "KVVectorStore", "LocalEmbeddings"]
    assert all(hasattr(package, name) for name in package.__all__)


def test_what_is_asked_of_the_retriever_with_a_call_is_asked_of_the_wrapped_one(
    llm: ChatLmcacheRag, documents: list[Document]
) -> None:
    """Else a tenant's filter would be lost."""
    retriever, own = retriever_of(documents, llm), documents[0].metadata["file"]
    asked: dict[str, Any] = {"k": 2, "filter": lambda document: document.metadata["file"] == own}
    expected = retriever.retriever.invoke("wind", **asked)
    assert len(expected) == 2 and {document.metadata["file"] for document in expected} == {own}
    assert retriever.invoke("wind", **asked) == expected
    assert asyncio.run(retriever.ainvoke("wind", **asked)) == expected


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_chain_reuses_found_documents(
    llm: ChatLmcacheRag, documents: list[Document], question: str, chat_template: bool
) -> None:
    llm.chat_template = chat_template
    retriever = retriever_of(documents, llm)
    answer = chain_of(retriever, llm).invoke(question)
    assert retriever.last_report is not None
    assert retriever.last_report.computed == 3
    assert answer.text.strip()
    assert_mostly_reused(answer)
    assert answer.response_metadata["reuse"]["foreign_tokens"] == 0
    chain_of(retriever, llm).invoke(question)
    assert (retriever.last_report.computed, retriever.last_report.present) == (0, 3)


def test_streaming_and_asynchronous_answers_are_the_same(
    llm: ChatLmcacheRag, documents: list[Document], question: str
) -> None:
    retriever = retriever_of(documents, llm)
    report = retriever.precompute(documents)
    assert (report.computed, report.errors) == (len(documents), {})
    chain = chain_of(retriever, llm) | StrOutputParser()
    answer = chain.invoke(question)
    pieces = list(chain.stream(question))

    async def asked() -> tuple[str, list[str]]:
        return await chain.ainvoke(question), [piece async for piece in chain.astream(question)]

    whole, later_pieces = asyncio.run(asked())
    assert answer == "".join(pieces) == whole == "".join(later_pieces)
    assert len([piece for piece in pieces if piece]) > 3
    assert len([piece for piece in later_pieces if piece]) > 3
    assert retriever.last_report is not None
    assert retriever.last_report.computed == 0


def test_tokens_stream_while_others_are_computed(llm: ChatLmcacheRag) -> None:
    """The event loop runs on between tokens, and several requests share the engine."""

    log: list[str] = []

    async def streamed(prompt: str) -> None:
        async for piece in llm.astream(prompt):
            if piece.text:
                log.append(prompt)  # noqa: PERF401  # each as it comes: the other's stand in between

    async def both() -> None:
        await asyncio.gather(streamed("One, two, three,"), streamed("Monday, Tuesday,"))

    asyncio.run(both())
    turns = sum(before != after for before, after in itertools.pairwise(log))
    assert turns > 3


def test_off_reuses_nothing(llm: ChatLmcacheRag, documents: list[Document], question: str) -> None:
    answer = chain_of(retriever_of(documents, llm), llm.bind(mode="off")).invoke(question)
    reuse = answer.response_metadata["reuse"]
    assert (reuse["mode"], reuse["reused_tokens"], reuse["bytes_loaded"]) == ("off", 0, 0)


LONG, HALF = "word " * 5000, "half \ud800"


def test_documents_that_cannot_be_stored_are_named_and_the_others_are_stored(
    llm: ChatLmcacheRag, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    retriever = retriever_of(documents, llm)
    bad = [Document(LONG, metadata={"source": "long.txt"}), Document(HALF, id="half"), Document(" \n")]
    report = retriever.precompute([bad[0], documents[0], *bad[1:], documents[1]])
    assert (report.computed, list(report.errors)) == (2, [2, 0])
    assert "does not fit the model" in report.errors[0] and "half a surrogate pair" in report.errors[2]
    retriever.precompute([bad[0], documents[0], *bad[1:], documents[1]])
    (warning,) = caplog.messages  # once
    assert "document long.txt: It has" in warning and "document half: " in warning


def test_a_query_is_answered_where_storing_fails(
    llm: ChatLmcacheRag, documents: list[Document], question: str, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = retriever_of(documents, llm, document_prompt="From {absent}: {page_content}")
    found = retriever.invoke(question)
    assert len(found) == 3 and asyncio.run(retriever.ainvoke(question)) == found
    assert retriever.failed_queries == 2
    (warning,) = caplog.messages  # once
    assert "absent" in warning
    assert chain_of(retriever, llm).invoke(question).text.strip()
    with pytest.raises(ValueError, match="absent"):
        retriever.precompute(documents)  # not a query: whoever asked is told


def test_document_prompt(llm: ChatLmcacheRag, documents: list[Document]) -> None:
    text = f"From {documents[0].metadata['file']}: {documents[0].page_content}"
    by_template = retriever_of(documents, llm, document_prompt="From {file}: {page_content}")
    by_function = retriever_of(documents, llm, document_prompt=lambda d: f"From {d.metadata['file']}: {d.page_content}")
    assert by_template.text_of(documents[0]) == by_function.text_of(documents[0]) == text
    assert by_template.precompute(documents[:1]).computed == 1
    assert by_function.precompute(documents[:1]).present == 1


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_preamble_begins_the_prompt(llm: ChatLmcacheRag, chat_template: bool) -> None:
    llm.chat_template = chat_template
    retriever = retriever_of([Document("x")], llm)
    prompt = llm.prompt_text(PROMPT.invoke({"context": "FOUND", "question": "ASKED"}).to_messages())
    assert prompt.partition("FOUND")[0] == retriever.preamble
    assert "system" in retriever.preamble if chat_template else retriever.preamble.startswith("Answer the question")


def test_other_kinds_of_prompt(llm: ChatLmcacheRag) -> None:
    text = "Use this: {context}\nAnswer {question}"
    assert retriever_of([], llm, prompt=text).preamble == "Use this: "
    assert retriever_of([], llm, prompt=PromptTemplate.from_template(text)).preamble == "Use this: "
    partial = ChatPromptTemplate.from_template("{manner} {docs} {question}").partial(manner="Be brief:")
    assert retriever_of([], llm, prompt=partial, context="docs").preamble == "Be brief: "
    history = ChatPromptTemplate.from_messages(
        [("system", "Facts: {context}"), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    assert retriever_of([], llm, prompt=history).preamble == "Facts: "


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("No place for documents: {question}", "no variable {context}"),
        ("{question} {context}", "{question} stands before {context}"),
        (ChatPromptTemplate([MessagesPlaceholder("history"), ("human", "{context}")]), "{history} stands before"),
    ],
    ids=["missing", "behind", "history"],
)
def test_unusable_prompts_are_refused(llm: ChatLmcacheRag, prompt: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=re.escape(complaint)):
        retriever_of([], llm, prompt=prompt)


def test_plain_text() -> None:
    assert plain_text([SystemMessage("Be brief."), HumanMessage("Q?\nAnswer:")]) == "Be brief.\n\nQ?\nAnswer:"
    turns = [HumanMessage("Hello"), AIMessage("Hi."), HumanMessage([{"type": "text", "text": "Who?"}])]
    assert plain_text(turns) == "User: Hello\n\nAssistant: Hi.\n\nUser: Who?\n\nAssistant:"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (HumanMessage([{"type": "image", "url": "https://example.org/a.png"}]), "image"),
        (ToolMessage("4", tool_call_id="1"), "chat_template=True"),
        (AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "1"}]), "chat_template=True"),
        (RemoveMessage("1"), "not a RemoveMessage"),
    ],
    ids=["image", "result", "call", "other"],
)
def test_only_text_is_read(llm: ChatLmcacheRag, message: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        llm.invoke([message])


def test_stop(llm: ChatLmcacheRag) -> None:
    text = llm.invoke("Count: one, two, three, four,").text
    word = text.split()[2]
    answer = llm.invoke("Count: one, two, three, four,", stop=[word])
    assert answer.text == text[: text.index(word)]
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(piece.text for piece in llm.bind(stop=[word]).stream("Count: one, two, three, four,")) == answer.text


def test_tokens_are_the_engines_own(llm: ChatLmcacheRag) -> None:
    answer = llm.invoke("Hello")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == llm.get_num_tokens("Hello")


def test_configurable_fields(llm: ChatLmcacheRag) -> None:
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="longest"))
    answer = configurable.with_config(configurable={"longest": 2}).invoke("One, two,")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"max_tokens": 0}, "max_tokens"), ({"tool": "x"}, "tool"), ({"selector": "best"}, "selector")],
    ids=["value", "unknown", "blend"],
)
def test_wrong_arguments_name_the_field(llm: ChatLmcacheRag, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        llm.invoke("Hello", **arguments)


def test_wrong_fields_are_refused(smollm: LocalEngine) -> None:
    with pytest.raises(ValidationError, match="max_token"):
        ChatLmcacheRag(engine=smollm, max_token=5)
    with pytest.raises(EngineError, match="engine="):
        ChatLmcacheRag()


def test_what_runs_in_this_process_is_not_copied(llm: ChatLmcacheRag) -> None:
    for copied in (copy.deepcopy, pickle.dumps):
        for part in (llm, retriever_of([], llm)):
            with pytest.raises(EngineError, match="base_url="):
                copied(part)


def test_clients_of_servers_need_no_vllm_and_can_be_copied() -> None:
    code = """
import copy, pickle, sys
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_core.embeddings import FakeEmbeddings
from langchain_lmcache_rag import ChatLmcacheRag, KVRetriever, KVVectorStore

llm = ChatLmcacheRag(base_url="http://127.0.0.1:9", max_tokens=7)
vectors = KVVectorStore(InMemoryVectorStore(FakeEmbeddings(size=4)), llm)
retriever = KVRetriever(retriever=vectors.as_retriever(), llm=llm, prompt="Passages:\\n{context}", keep_order=True)
for copied in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
    again = copied(retriever)
    assert again.llm.max_tokens == 7 and again.preamble == retriever.preamble
    assert again.llm.engine is not llm.engine and again.llm.engine.settings == llm.engine.settings
    assert copied(llm).max_tokens == 7
llm.with_structured_output({"title": "x", "type": "object", "properties": {}})
print(sorted({"vllm", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_progress(llm: ChatLmcacheRag, documents: list[Document], capsys: pytest.CaptureFixture[str]) -> None:
    retriever, told = retriever_of([], llm), []
    given = [*documents[:2], Document(" ")]
    retriever.precompute(given, progress=lambda done, total: told.append((done, total)), show_progress=True)
    assert told == [(1, 3), (2, 3), (3, 3)]
    report = asyncio.run(retriever.aprecompute(given, progress=lambda done, total: told.append((done, total))))
    assert (report.present, told[3:]) == (2, [(1, 3), (2, 3), (3, 3)])


def test_too_long_a_prompt(llm: ChatLmcacheRag) -> None:
    with pytest.raises(PromptError, match="tokens"):
        llm.invoke("word " * 5000)


def test_documents_come_in_the_order_of_earlier_prompts_where_that_is_asked_for(
    documents: list[Document], llm: ChatLmcacheRag, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Document]] = []
    retriever = retriever_of(documents, llm, retriever=RunnableLambda(lambda _: found.pop(0)), keep_order=True)
    monkeypatch.setattr(KVRetriever, "precompute", lambda self, documents: None)
    first, second, third = documents[:3]
    for given, expected in (
        ([first, second, third], [first, second, third]),
        ([third, first, second], [first, second, third]),
    ):
        found.append(given)
        assert retriever.invoke("What?") == expected
    found.append([third, first])
    assert asyncio.run(retriever.ainvoke("What?")) == [first, third]
    plain = retriever_of(documents, llm, retriever=RunnableLambda(lambda _: [third, first]))
    assert plain.invoke("What?") == [third, first]
