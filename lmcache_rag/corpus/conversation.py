"""A conversation over an index: each question's prompt continues the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache_rag.corpus.corpus import Corpus, Hit
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, chat_text, encode


@dataclass
class _Turn:
    question: str
    hits: Sequence[Hit]
    answer: Sequence[int] = ()


class Conversation:
    """Questions over an index and their answers.

    A turn's passages are those found for its question, without those that the conversation has already. The prompt's
    tokens are those of the prompt before, its answer, and what is new, so that KV of all earlier turns is used again.
    Where a prompt would get too long, the oldest turns are forgotten, unless its question is too long by itself.

    Args:
        longest: so many tokens a prompt may have.
        passages: so many are searched for each question.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, longest: int, passages: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._longest = longest
        self._passages = passages
        self._turns: list[_Turn] = []
        self._joint = joint(tokenizer, corpus.manifest.prompt)

    def __len__(self) -> int:
        """How many turns are remembered."""
        return len(self._turns)

    def ask(self, question: str) -> tuple[MarkedPrompt, list[Hit]]:
        """The prompt for the next question, and the passages found for it.

        Raises:
            CorpusError: the index is empty.
            PromptError: the question is no text.
        """
        hits = self._corpus.search(question, self._passages)
        self._turns.append(_Turn(question, hits))
        for first in range(len(self._turns)):
            prompt = self._prompt(self._turns[first:])
            if len(prompt.token_ids) <= self._longest:
                del self._turns[:first]
                break
        return prompt, hits

    def answered(self, text: str, token_ids: Sequence[int] = ()) -> None:
        """Remember the answer to the last question: its text, and its tokens where they are known. Without any text
        the question is forgotten."""
        if text.strip():
            self._turns[-1].answer = answer_ids(self._tokenizer, text, token_ids)
        else:
            self.forget()

    def forget(self) -> None:
        """Forget the last question."""
        del self._turns[-1]

    def _prompt(self, turns: Sequence[_Turn]) -> MarkedPrompt:
        form, tokenizer = self._corpus.manifest.prompt, self._tokenizer
        whole = MarkedPrompt((), 0, ())
        told: set[str] = set()
        for number, turn in enumerate(turns):
            fresh = [text for text in dict.fromkeys(hit.text for hit in turn.hits) if text not in told]
            told.update(fresh)
            if number:
                whole = self._continued(whole, fresh, turn.question)
            else:
                whole = form.plan(tokenizer, fresh, turn.question)
            whole = whole.followed_by(turn.answer, (), ())
        return replace(whole, primer=self._corpus.primer_digest)

    def _continued(self, whole: MarkedPrompt, texts: Sequence[str], question: str) -> MarkedPrompt:
        """With what follows an answer."""
        form, tokenizer = self._corpus.manifest.prompt, self._tokenizer
        if not texts:
            form = form.model_copy(update={"question": form.question.lstrip("\n")})
        opening = self._joint + (heading(form) if texts else "")
        return whole.followed_by(
            encode(tokenizer, opening, add_special_tokens=False),
            [form.chunk_ids(tokenizer, text) for text in texts],
            form.question_ids(tokenizer, question),
        )


def joint(tokenizer: Any, form: PromptFormat) -> str:
    """What stands between an answer and what is asked next: an empty line, or what the model's chat template has there
    in prompts that are written with it."""
    if form.add_special_tokens:
        return "\n\n"
    answer, following = "\x02answer\x02", "\x02next\x02"
    turns = [("user", "x"), ("assistant", answer), ("user", following)]
    try:
        text = chat_text(tokenizer, [{"role": role, "content": content} for role, content in turns])
    except PromptError:
        return "\n\n"
    before, found, _ = text.partition(following)
    return before.partition(answer)[2] if found and answer in before else "\n\n"


def heading(form: PromptFormat) -> str:
    """The line before the first passage."""
    before, newline, line = form.preamble.rstrip("\n").rpartition("\n")
    return f"{line}\n" if newline and before else ""


def answer_ids(tokenizer: Any, text: str, token_ids: Sequence[int]) -> list[int]:
    """The tokens of an answer's text: those that were generated, as far as they are not behind its end, then others."""
    kept = list(token_ids)
    while kept and not text.startswith(tokenizer.decode(kept, skip_special_tokens=False)):
        del kept[-1]
    rest = text[len(tokenizer.decode(kept, skip_special_tokens=False)) :] if kept else text
    return kept + (encode(tokenizer, rest, add_special_tokens=False) if rest else [])
