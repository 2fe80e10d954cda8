"""The templates of both frameworks: what stands before the passages has the tokens that it has in prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONTEXT_PROMPT_TEMPLATE
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.prompts import chat_prompts, default_prompts
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE
from transformers import AutoTokenizer

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, key_of, variant_of
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.model import DEFAULT_MODEL, resolve_model
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.planner import Planner
from lmcache_rag.prompt import chat_text, opening_ids
from lmcache_rag.records.part import VariantRow
from lmcache_rag.request import BlendOptions, ReuseReport

PASSAGES = [
    (
        "The harbour was built in 1872 by the town's own masons, who had quarried the stone on the island opposite and "
        "brought it over in barges that they had bought from the navy for very little money."
    ),
    (
        "Glass is made of sand, soda and lime, molten together at some fifteen hundred degrees; "
        "what colours it are traces of metals, such as cobalt for blue, and it is cooled slowly, lest it should break."
    ),
]
PRIMER = [9] * 30
QUESTION = "Who built the harbour?"
ASKED = {"query_str": QUESTION, "existing_answer": "The masons of the town."}
TOKENIZER = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))

Write = Callable[[str], str]


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def chat(*turns: tuple[str, str]) -> str:
    return chat_text(TOKENIZER, [{"role": role, "content": content} for role, content in turns])


def messages(template: object, **variables: str) -> str:
    written: list[ChatMessage] = template.format_messages(**ASKED, **variables)  # type: ignore[attr-defined]
    return chat(*((message.role.value, message.content or "") for message in written))


RLM = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, just say that you don't know. Use three sentences maximum and keep the "
    f"answer concise.\nQuestion: {QUESTION} \nContext: "
)
SYSTEM = "You are an assistant for question-answering tasks. Use the following pieces of retrieved context.\n\n"
ENGINE, CONDENSE = DEFAULT_CONTEXT_TEMPLATE, DEFAULT_CONTEXT_PROMPT_TEMPLATE

TEMPLATES: dict[str, tuple[Write, bool]] = {
    "text_qa": (lambda text: messages(chat_prompts.CHAT_TEXT_QA_PROMPT, context_str=text), True),
    "tree_summarize": (lambda text: messages(chat_prompts.CHAT_TREE_SUMMARIZE_PROMPT, context_str=text), True),
    "refine": (lambda text: messages(chat_prompts.CHAT_REFINE_PROMPT, context_msg=text), False),
    "plain refine": (lambda text: default_prompts.DEFAULT_REFINE_PROMPT.format(**ASKED, context_msg=text), True),
    "summary": (lambda text: default_prompts.DEFAULT_SUMMARY_PROMPT.format(context_str=text), True),
    "citation": (lambda text: CITATION_QA_TEMPLATE.format(context_str=text, query_str=QUESTION), True),
    "context engine": (lambda text: chat(("system", ENGINE.format(context_str=text)), ("user", QUESTION)), True),
    "condense": (lambda text: chat(("system", CONDENSE.format(context_str=text)), ("user", QUESTION)), False),
    "rlm/rag-prompt": (lambda text: f"{RLM}{text} \nAnswer:", False),
    "system and context": (lambda text: chat(("system", SYSTEM + text), ("user", QUESTION)), True),
    "blank line": (lambda text: f"Answer by this only:\n\n{text}\n\nQuestion: {QUESTION}\n", True),
    "line": (lambda text: f"Answer by this only:\n{text}\n\nQuestion: {QUESTION}\n", True),
}
"""How a context is written, and whether a passage's first token is the same behind the template's text."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_chunk_is_foreign_behind_its_own_template(name: str, tmp_path: Path) -> None:
    write, first_is_exact = TEMPLATES[name]
    preamble = opening_ids(encode, write("\x02").partition("\x02")[0])
    chunks = ChunkStores(DiskStore(tmp_path), "f" * 32, "raw")
    records = chunks.of("default").records
    for token_ids, variants in [
        (preamble, [NO_CONTEXT]),
        *((encode(text), [variant_of(preamble), variant_of(preamble, PRIMER)]) for text in PASSAGES),
    ]:
        key = key_of(token_ids)
        rows = [VariantRow(key, f"{variant}.raw", 1000, 1) for variant in variants]
        records.add({key: np.array(token_ids, np.int32)}, rows)
    planner = Planner(chunks, ASSUMED, namespace="default", matcher=Matcher(), max_tokens=4096, never_slower=False)
    prompt = encode(write("\n\n".join(PASSAGES)))
    assert prompt[: len(preamble)] == preamble
    plan = planner.plan(prompt, BlendOptions(), ReuseReport())
    assert plan is not None and len(plan.segments) == 2
    assert plan.preamble.length == len(preamble) and plan.preamble.name is not None
    assert not any(segment.foreign for segment in plan.segments)
    assert plan.segments[0].exact is first_is_exact
    assert sum(segment.length for segment in plan.segments) >= sum(len(encode(text)) for text in PASSAGES) - 4
