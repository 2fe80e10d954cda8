"""Where each chunk lies in a prompt's tokens.

A prompt is a preamble, the chunks one after another, and the rest (the question). Each part is tokenised on its own
and the token ids are concatenated, so that a chunk has the same tokens in every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, field_validator


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


@dataclass(frozen=True)
class Segment:
    """A chunk at a place in a prompt: tokens `start` to `start + length`."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class PromptPlan:
    """A prompt's tokens and where its parts lie: preamble, segments, and the rest."""

    token_ids: tuple[int, ...]
    preamble_length: int
    segments: tuple[Segment, ...]

    @classmethod
    def assemble(cls, preamble: Sequence[int], chunks: Sequence[Sequence[int]], rest: Sequence[int]) -> PromptPlan:
        """Concatenate the token ids of preamble, chunks and rest."""
        token_ids = list(preamble)
        segments = []
        for chunk in chunks:
            segments.append(Segment(len(token_ids), len(chunk)))
            token_ids.extend(chunk)
        token_ids.extend(rest)
        return cls(tuple(token_ids), len(preamble), tuple(segments))


class PromptFormat(BaseModel):
    """How passages and a question are written into a prompt.

    Attributes:
        preamble: all text before the first chunk.
        chunk: one passage; `{text}` stands for it.
        question: all text behind the last chunk; `{question}` stands for the question.
        stop: generation ends before any of these strings.
        add_special_tokens: whether the tokenizer puts its BOS token before the preamble; a chat template's text has
            it already.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preamble: str
    chunk: str = "\n{text}\n"
    question: str
    stop: tuple[str, ...] = ()
    add_special_tokens: bool = True

    @field_validator("chunk")
    @classmethod
    def _has_text(cls, value: str) -> str:
        if "{text}" not in value:
            raise ValueError("must contain {text}")
        return value

    @field_validator("question")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value

    def preamble_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the preamble, with the tokenizer's BOS token where it has one."""
        return tokenizer.encode(self.preamble, add_special_tokens=self.add_special_tokens)

    def chunk_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of one passage."""
        return tokenizer.encode(self.chunk.replace("{text}", text), add_special_tokens=False)

    def question_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Token ids of what follows the last chunk."""
        return tokenizer.encode(self.question.replace("{question}", question), add_special_tokens=False)

    def plan(self, tokenizer: Tokenizer, texts: Sequence[str], question: str) -> PromptPlan:
        """The prompt for `question` over `texts`."""
        return PromptPlan.assemble(
            self.preamble_ids(tokenizer),
            [self.chunk_ids(tokenizer, text) for text in texts],
            self.question_ids(tokenizer, question),
        )


def completion_format() -> PromptFormat:
    """Plain completion form, which suits base models and very small instruction-tuned ones.

    The preamble is a few sentences long on purpose: chunk KV computed behind a preamble of a few words only needs more
    repair, since a model's first tokens draw much of its attention.
    """
    return PromptFormat(
        preamble="Below are passages from documents. Each passage states facts. "
        "Read them, then answer the question with the words of the passages.\n\nPassages:\n",
        question="\nQuestion: {question}\nAnswer:",
        stop=("\n",),
    )


def chat_format(apply_chat_template: Callable[..., Any]) -> PromptFormat:
    """One user message in the model's own chat template (`tokenizer.apply_chat_template`), cut around the passages."""
    marks = {"passages": "\x02passages\x02", "question": "\x02question\x02"}
    text = apply_chat_template(
        [
            {
                "role": "user",
                "content": "Answer the question with the facts in the passages, in a few words.\n\nPassages:\n"
                f"{marks['passages']}\nQuestion: {marks['question']}",
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    preamble, rest = text.split(marks["passages"])
    return PromptFormat(
        preamble=preamble, question=rest.replace(marks["question"], "{question}"), add_special_tokens=False
    )
