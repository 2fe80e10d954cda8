"""Conversations over an index: each prompt continues the one before, with passages that it has not yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.corpus import Conversation, Corpus
from lmcache_rag.corpus.conversation import answer_ids, heading, joint
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.model import resolve_model
from lmcache_rag.model.default import DEFAULT_MODEL
from lmcache_rag.prompt import PromptFormat, chat_format, completion_format
from tests.corpus.test_corpus import EMBEDDER, manifest, text, update


@pytest.fixture
def corpus(tmp_path: Path, llama: LocalEngine) -> Corpus:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(text(number))
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama))
    update(corpus, folder)
    return corpus


def test_a_prompt_continues_the_one_before(corpus: Corpus, llama: LocalEngine) -> None:
    conversation = Conversation(corpus, llama.tokenizer, 900, passages=2)
    first, hits = conversation.ask("w20 w30")
    assert first == corpus.prompt("w20 w30", hits)
    llama.generate(first, Sampling(max_tokens=3, ignore_eos=True))
    conversation.answered("w7", [7])
    second, others = conversation.ask(text(3))
    told = (*first.token_ids, 7)
    assert second.token_ids[: len(told)] == told
    fresh = {hit.text for hit in others} - {hit.text for hit in hits}
    assert len(second.segments) == 2 + len(fresh) and fresh
    for segment, passage in zip(second.segments[2:], [hit.text for hit in others if hit.text in fresh], strict=True):
        assert list(second.token_ids[segment.start : segment.end]) == llama.tokenizer.encode(
            f" {passage} ", add_special_tokens=False
        )
    assert llama.generate(second, Sampling(max_tokens=1)).reuse.missed_tokens == 0


def test_passages_are_not_repeated(corpus: Corpus, llama: LocalEngine) -> None:
    conversation = Conversation(corpus, llama.tokenizer, 900, passages=2)
    first, _ = conversation.ask("w20 w30")
    conversation.answered("w7")
    second, _ = conversation.ask("w20 w30")
    question = corpus.manifest.prompt.question_ids(llama.tokenizer, "w20 w30")
    assert second.segments == first.segments
    assert list(second.token_ids[len(first.token_ids) :]) == [7, *question]


def test_the_oldest_turns_are_forgotten_where_a_prompt_gets_too_long(corpus: Corpus, llama: LocalEngine) -> None:
    conversation = Conversation(corpus, llama.tokenizer, 120, passages=2)
    for number in range(3):
        prompt, _ = conversation.ask(text(number, 5))
        assert len(prompt.token_ids) <= 120
        conversation.answered("w7")
    assert len(conversation) < 3
    assert prompt.preamble_length == len(corpus.manifest.prompt.preamble_ids(llama.tokenizer))
    remembered = len(conversation)
    too_long, _ = conversation.ask(text(9, 200))
    assert len(too_long.token_ids) > 120  # the engine says what to do
    conversation.forget()
    assert len(conversation) == remembered


def test_a_question_without_an_answer_is_forgotten(corpus: Corpus, llama: LocalEngine) -> None:
    conversation = Conversation(corpus, llama.tokenizer, 900, passages=2)
    first, _ = conversation.ask("w20")
    conversation.answered(" \n")
    assert len(conversation) == 0 and conversation.ask("w20")[0] == first


def test_what_stands_between_turns() -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
    chat = chat_format(tokenizer)
    assert (joint(tokenizer, chat), heading(chat)) == ("<|im_end|>\n<|im_start|>user\n", "Passages:\n")
    plain = completion_format()
    assert (joint(tokenizer, plain), heading(plain)) == ("\n\n", "Passages:\n")
    tokenizer.chat_template = None
    assert joint(tokenizer, chat) == "\n\n"
    assert heading(PromptFormat(preamble="Answer from these. ", question="{question}")) == ""


def test_an_answers_tokens_end_with_its_text(llama: LocalEngine) -> None:
    tokenizer = llama.tokenizer
    assert answer_ids(tokenizer, "w20 w30", [20, 30]) == [20, 30]
    assert answer_ids(tokenizer, "w20 w30", [20, 30, 2]) == [20, 30]  # the end of the sequence
    assert answer_ids(tokenizer, "w20 w", [20, 41]) == [20, *tokenizer.encode(" w", add_special_tokens=False)]
    assert answer_ids(tokenizer, "w20 w30", []) == [20, 30]
