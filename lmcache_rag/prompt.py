"""Where each chunk lies in a prompt's tokens.

A prompt is a preamble, the chunks one after another, and the rest (the question). Each part is tokenised on its own
and the token ids are concatenated, so that a chunk has the same tokens in every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, field_validator

from lmcache_rag.errors import PromptError

TEMPLATE_DATE = date(2024, 7, 26)
"""What a chat template that prints today's date is given, so that prompts begin alike on all days. It is the date that
Llama 3's own template takes where it knows none."""

_FIRST_WORDS = ("A", "The")
"""Their first tokens differ, but in a tokenizer that knows neither."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text.

    Raises:
        PromptError: there is half a surrogate pair in it, as broken JSON and file names that are not UTF-8 have.
    """
    check_text(text)
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def opening_ids(encode: Callable[[str], Sequence[int]], text: str) -> list[int]:
    """Token ids of a text that passages follow, as they are where the whole prompt is tokenised as one text: blank
    lines at its end are other tokens there than at the end of a text, and a space merges with the passage's first word.

    Args:
        encode: gives a text's token ids.
    """
    one, other = (encode(text + word) for word in _FIRST_WORDS)
    differ = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return list(encode(text) if differ is None else one[:differ])


def check_text(text: str) -> None:
    """Raises `PromptError` where a text is none: no tokenizer and no database takes half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise PromptError(
            f"The text has half a surrogate pair at character {error.start} ({around}), which stands for nothing: "
            "remove it."
        ) from None


@dataclass(frozen=True)
class Segment:
    """A place in a prompt: tokens `start` to `start + length`."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt's tokens and where its parts lie: preamble, segments, and the rest.

    Attributes:
        primer: digest of the primer that its chunks were computed behind; see `BlendOptions`.
    """

    token_ids: tuple[int, ...]
    preamble_length: int
    segments: tuple[Segment, ...]
    primer: str | None = None

    @classmethod
    def assemble(cls, preamble: Sequence[int], chunks: Sequence[Sequence[int]], rest: Sequence[int]) -> MarkedPrompt:
        """Concatenate the token ids of preamble, chunks and rest."""
        token_ids = list(preamble)
        segments = []
        for chunk in chunks:
            segments.append(Segment(len(token_ids), len(chunk)))
            token_ids.extend(chunk)
        token_ids.extend(rest)
        return cls(tuple(token_ids), len(preamble), tuple(segments))

    def followed_by(
        self, preamble: Sequence[int], chunks: Sequence[Sequence[int]], rest: Sequence[int]
    ) -> MarkedPrompt:
        """With further tokens, as a conversation goes on; here `preamble` is what stands before the further chunks."""
        shift, more = len(self.token_ids), MarkedPrompt.assemble(preamble, chunks, rest)
        segments = [Segment(segment.start + shift, segment.length) for segment in more.segments]
        return replace(self, token_ids=self.token_ids + more.token_ids, segments=(*self.segments, *segments))


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
        return encode(tokenizer, self.preamble, add_special_tokens=self.add_special_tokens)

    def chunk_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of one passage."""
        return encode(tokenizer, self.chunk.replace("{text}", text), add_special_tokens=False)

    def question_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Token ids of what follows the last chunk."""
        return encode(tokenizer, self.question.replace("{question}", question), add_special_tokens=False)

    def plan(self, tokenizer: Tokenizer, texts: Sequence[str], question: str) -> MarkedPrompt:
        """The prompt for `question` over `texts`."""
        return MarkedPrompt.assemble(
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


def chat_text(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    today: date = TEMPLATE_DATE,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Messages (`role` and `content`) in the model's own chat template, up to where its answer begins. The text has its
    special tokens in it, so it is tokenised with `add_special_tokens=False`.

    Args:
        tools: functions that the model may call, in OpenAI's form.
        today: what the template is told where it prints a date. Chunks are computed behind it, and on a real date they
            would be foreign a day later.
        template_kwargs: what this template takes besides.

    Raises:
        PromptError: the model has no chat template, or it does not take these messages.
    """
    from jinja2.exceptions import TemplateError

    dated = "strftime_now" in str(getattr(tokenizer, "chat_template", None))  # the one way in which a date gets in
    given: dict[str, Any] = {**({"strftime_now": today.strftime} if dated else {}), **(template_kwargs or {})}
    if tools:
        given["tools"] = list(tools)
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **given))
    except (AttributeError, ValueError, TypeError, TemplateError) as error:
        raise PromptError(f"The model's chat template cannot be used ({error}): use the plain form.") from error


def model_format(tokenizer: Any) -> PromptFormat:
    """The model's own chat template; plain completion where it has none, or one that cannot be cut."""
    try:
        return chat_format(tokenizer)
    except PromptError:
        return completion_format()


def chat_format(tokenizer: Any) -> PromptFormat:
    """The model's own chat template, cut around the passages.

    Raises:
        PromptError: the model has no chat template, or one that repeats or changes what is said to it.
    """
    passages, question = "\x02passages\x02", "\x02question\x02"
    system = "You answer questions using the given passages. Answer with a few words."
    content = f"Passages:\n{passages}\nQuestion: {question}"
    try:
        text = chat_text(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": content}])
    except PromptError:
        text = ""
    if system not in text:  # some templates know no system message: they refuse it, or leave it out
        text = chat_text(tokenizer, [{"role": "user", "content": f"{system}\n\n{content}"}])
    preamble, _, rest = text.partition(passages)
    asked = rest.replace(question, "{question}")
    if text.count(content) != 1 or text.count(passages) != 1 or asked.count("{question}") != 1:
        raise PromptError(
            "The model's chat template cannot be used (it repeats or changes what is said to it): use the plain form."
        )
    return PromptFormat(preamble=preamble, question=asked, add_special_tokens=False)
