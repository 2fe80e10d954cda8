"""The KV of a chain's documents: computed as the chain prompts them, and let go of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document

from langchain_lmcache_rag.chat_models import ChatLmcacheRag
from langchain_lmcache_rag.prompts import preamble_of
from lmcache_rag.engine import PrecomputeReport, failures, precompute_texts
from lmcache_rag.engine.texts import FRAMEWORKS
from lmcache_rag.prompt import opening_ids
from lmcache_rag.terminal import err

_log = logging.getLogger("langchain_lmcache_rag")

Progress = Callable[[int, int], Any]
"""Gets how many documents are done, and how many there are."""


class DocumentKV:
    """How a chain prompts its documents, and their KV.

    Args:
        llm: the model that will answer.
        prompt: the chain's prompt; KV is computed behind its text before `{context}`. A string is a template too.
        context: name of the prompt's variable that stands for the documents.
        document_prompt: how the chain writes one document into the prompt: a template of `page_content` and metadata,
            or a function.

    Attributes:
        preamble: the text that KV is computed behind.
        last_report: what became of the documents of the last `precompute`; None before the first.

    Raises:
        PromptError: no two prompts of the template begin alike.
    """

    def __init__(
        self,
        llm: ChatLmcacheRag,
        prompt: BasePromptTemplate[Any] | str,
        context: str,
        document_prompt: str | Callable[[Document], str],
    ) -> None:
        self.llm = llm
        self.preamble = preamble_of(prompt, context, llm.prompt_text)
        self.last_report: PrecomputeReport | None = None
        self._document_prompt = document_prompt
        self._warnings = set[str]()

    def text_of(self, document: Document) -> str:
        """A document as the chain prompts it."""
        if isinstance(self._document_prompt, str):
            return str(format_document(document, PromptTemplate.from_template(self._document_prompt)))
        return self._document_prompt(document)

    def precompute(
        self,
        documents: Sequence[Document],
        *,
        owner: str = FRAMEWORKS,
        progress: Progress | None = None,
        show_progress: bool = False,
    ) -> PrecomputeReport:
        """Compute and store the KV of each document, which `owner` then keeps; one that is stored costs nothing. One
        that cannot be stored, as it is longer than the model's context, is named in a warning, once, and in the
        report's `errors`.

        Raises:
            StoreError: the store cannot be read or written to.
        """
        texts = [self.text_of(document) for document in documents]
        preamble = opening_ids(self.llm.get_token_ids, self.preamble)
        with ExitStack() as stack:
            steps = [] if progress is None else [progress]
            if show_progress:
                bar = stack.enter_context(err.progress())
                task = bar.add_task("documents", total=len(texts))
                steps.append(lambda done, _total: bar.update(task, completed=done))
            count = _Count(len(texts), steps)
            report = precompute_texts(self.llm.engine, preamble, texts, count.one, owner)
            count.all()
        if report.errors:
            names = [_name(document, text) for document, text in zip(documents, texts, strict=True)]
            self.warn(f"The KV of {len(report.errors)} documents is not stored: {failures(report, names)}")
        self.last_report = report
        return report

    def warn(self, message: str) -> None:
        """Once each."""
        if message not in self._warnings:
            self._warnings.add(message)
            _log.warning("%s", message)


class _Count:
    """Tells how many documents are done."""

    def __init__(self, total: int, steps: Sequence[Progress]) -> None:
        self._done, self._total, self._steps = 0, total, steps

    def one(self, _tokens: int) -> None:
        self._done += 1
        self._tell()

    def all(self) -> None:
        """The end: those that were left out are done too."""
        if self._done < self._total:
            self._done = self._total
            self._tell()

    def _tell(self) -> None:
        for step in self._steps:
            step(self._done, self._total)


def _name(document: Document, text: str) -> str:
    source = document.id or document.metadata.get("source")
    return f"document {source}" if source else f"document {text[:40]!a}"
