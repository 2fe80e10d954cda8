"""Real questions with passages: which passages a question is asked over, and how they are cut."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from lmcache_rag.errors import LmcacheRagError, PromptError
from lmcache_rag.prompt import check_text
from lmcache_rag.request import first_problem


class DataError(LmcacheRagError):
    """The evaluation data cannot be used."""


@dataclass(frozen=True)
class Question:
    """A question over some passages, with its gold answer."""

    text: str
    answer: str
    passages: tuple[str, ...]


def _whole(text: str) -> str:
    try:
        check_text(text)
    except PromptError as error:
        raise ValueError(str(error)) from None
    return text


_Text = Annotated[str, AfterValidator(_whole)]


class _Context(BaseModel):
    text: _Text


class _Example(BaseModel):
    question: _Text
    answers: list[Annotated[_Text, Field(pattern=r"\S")]] = Field(min_length=1)
    ctxs: list[_Context]


def read_questions(path: Path, *, passages: int, words: int, limit: int) -> list[Question]:
    """The file's first `limit` questions.

    Each is asked over up to two passages that contain the answer, filled up with others to `passages`, shuffled, each
    cut to `words` words: around the answer where it occurs, else from the start.

    Raises:
        DataError: the file is not a JSON list of objects with `question`, `answers` and `ctxs`, or a question has too
            few passages.
    """
    try:
        examples = TypeAdapter(list[_Example]).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(f"{path} is not a list of questions: {first_problem(error)}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).") from None
    questions = []
    for example in examples[:limit]:
        answer, texts = example.answers[0], [context.text for context in example.ctxs]
        if len(texts) < passages:
            raise DataError(f"The question {example.question!r} has {len(texts)} passages, fewer than {passages}.")
        holding = [text for text in texts if answer.lower() in text.lower()][:2]
        chosen = (holding + [text for text in texts if text not in holding])[:passages]
        random.Random(len(example.question)).shuffle(chosen)  # noqa: S311
        cut = tuple(_cut(text, answer, words) for text in chosen)
        questions.append(Question(example.question, answer, cut))
    if not questions:
        raise DataError(f"{path} has no questions.")
    return questions


def _cut(text: str, answer: str, words: int) -> str:
    at, split = text.lower().find(answer.lower()), text.split()
    start = len(text[:at].split()) - words // 2 if at >= 0 else 0
    start = max(0, min(start, len(split) - words))
    return " ".join(split[start : start + words])
