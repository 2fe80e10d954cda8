"""Applications in the form of the frameworks' tutorials, for `bench frameworks`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_lmcache_rag import ChatLmcacheRag, KVRetriever
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.prompts import ChatPromptTemplate as LlamaChatTemplate
from llama_index.core.prompts import PromptTemplate as LlamaTemplate
from llama_index.core.prompts.default_prompt_selectors import (
    DEFAULT_TEXT_QA_PROMPT_SEL,
    DEFAULT_TREE_SUMMARIZE_PROMPT_SEL,
)
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.lmcache_rag import KVPrecompute, LmcacheRag

from lmcache_rag.engine.chat import Chat
from lmcache_rag.errors import PromptError

Mode = Literal["off", "blend"]
Ask = Callable[[Mode, str, Sequence[str]], Any]
"""Asks a question over passages."""


@dataclass(frozen=True)
class App:
    """An application.

    Attributes:
        precompute: has passages computed as the application prompts them.
    """

    framework: str
    name: str
    precompute: Callable[[Sequence[str]], Any]
    ask: Ask


_CONTEXT = LlamaChatTemplate(
    [
        ChatMessage(role=MessageRole.SYSTEM, content=DEFAULT_CONTEXT_TEMPLATE),
        ChatMessage(role=MessageRole.USER, content="{query_str}"),
    ]
)
_SYSTEM = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context.{gap}{{context}}"
)


def apps(engine: Any, answer_tokens: int) -> Iterator[App]:
    """All of them; those with a chat template where the model has one.

    Args:
        engine: which answers.
        answer_tokens: longest answer.
    """
    try:
        engine.render(Chat([{"role": "user", "content": "Hello"}]))
        forms: tuple[bool, ...] = (False, True)
    except PromptError:
        forms = (False,)
    for chat_template in forms:
        llm = LmcacheRag(engine=engine, max_tokens=answer_tokens, chat_template=chat_template)
        yield from _of_llama_index(llm, " (chat template)" if chat_template else "")
    for chat_template in forms:
        model = ChatLmcacheRag(engine=engine, max_tokens=answer_tokens, chat_template=chat_template)
        yield from _of_langchain(model, " (chat template)" if chat_template else "")


class _Given(BaseRetriever):
    """Retrieves what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: Sequence[str] = ()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in self.texts]


def _of_llama_index(llm: LmcacheRag, form: str) -> Iterator[App]:
    retriever = _Given()

    def queried(engine: BaseQueryEngine, mode: Mode, question: str, texts: Sequence[str]) -> None:
        llm.mode, retriever.texts = mode, texts
        str(engine.query(question))

    engines: dict[str, BaseQueryEngine] = {
        mode.value: RetrieverQueryEngine.from_args(retriever, llm=llm, response_mode=mode)
        for mode in (
            ResponseMode.COMPACT,
            ResponseMode.REFINE,
            ResponseMode.TREE_SUMMARIZE,
            ResponseMode.SIMPLE_SUMMARIZE,
        )
    }
    templates: dict[str, Any] = dict.fromkeys(engines, DEFAULT_TEXT_QA_PROMPT_SEL)
    templates["tree_summarize"] = DEFAULT_TREE_SUMMARIZE_PROMPT_SEL
    engines["citation"] = CitationQueryEngine(retriever=retriever, llm=llm)
    templates["citation"] = LlamaTemplate(CITATION_QA_TEMPLATE.template)
    for name, engine in engines.items():
        yield App(
            "llama_index",
            f"{name}{form}",
            _computed(llm, templates[name]),
            functools.partial(queried, engine),
        )

    def chatted(mode: Mode, question: str, texts: Sequence[str]) -> None:
        llm.mode, retriever.texts = mode, texts
        ContextChatEngine.from_defaults(retriever=retriever, llm=llm).chat(question)

    yield App("llama_index", f"context chat{form}", _computed(llm, _CONTEXT), chatted)


def _computed(llm: LmcacheRag, template: Any) -> Any:
    return lambda texts: KVPrecompute(llm, prompt=template)([TextNode(text=text) for text in texts])


def _of_langchain(llm: ChatLmcacheRag, form: str) -> Iterator[App]:
    for name, gap in (("blank line before the context", "\n\n"), ("line", "\n")):
        template = ChatPromptTemplate.from_messages([("system", _SYSTEM.format(gap=gap)), ("human", "{question}")])
        yield _chain(llm, f"{name}{form}", template)
    if not form:
        question = "\n\nQuestion: {question}\nAnswer:"
        yield _chain(
            llm, "prompt template", PromptTemplate.from_template(f"Answer by this only:\n\n{{context}}{question}")
        )


def _chain(llm: ChatLmcacheRag, name: str, template: ChatPromptTemplate | PromptTemplate) -> App:
    """LangChain's usual chain: retrieved documents, joined by blank lines, in a prompt."""
    found: list[Document] = []
    retriever = KVRetriever(retriever=RunnableLambda(lambda _: found), llm=llm, prompt=template)

    def joined(documents: Sequence[Document]) -> str:
        return "\n\n".join(map(retriever.text_of, documents))

    def asked(mode: Mode, question: str, texts: Sequence[str]) -> None:
        found[:] = [Document(text) for text in texts]
        context = retriever.retriever if mode == "off" else retriever
        chain = {"context": context | joined, "question": RunnablePassthrough()} | template | llm.bind(mode=mode)
        (chain | StrOutputParser()).invoke(question)

    return App("langchain", name, lambda texts: retriever.precompute([Document(text) for text in texts]), asked)
