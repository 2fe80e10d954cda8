"""Real questions with passages: which passages a question is asked over, and how they are cut."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

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


Text = Annotated[str, AfterValidator(_whole)]
"""Text that every tokenizer takes."""


class _Context(BaseModel):
    text: Text


class _Example(BaseModel):
    question: Text
    answers: list[Annotated[Text, Field(pattern=r"\S")]] = Field(min_length=1)
    ctxs: list[_Context]


Item = TypeVar("Item")


def read_list(path: Path, item: type[Item]) -> list[Item]:
    """A file's JSON list of such objects.

    Raises:
        DataError: it cannot be read, or is something else, or empty.
    """
    try:
        found = TypeAdapter(list[item]).validate_python(json.loads(path.read_text(encoding="utf-8")))  # type: ignore[valid-type]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(f"{path} is not a list of questions: {first_problem(error)}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).") from None
    if not found:
        raise DataError(f"{path} has no questions.")
    return found


def read_questions(path: Path, *, passages: int, words: int, limit: int) -> list[Question]:
    """The file's first `limit` questions.

    Each is asked over up to two passages that contain the answer, filled up with others to `passages`, shuffled, each
    cut to `words` words: around the answer where it occurs, else from the start.

    Raises:
        DataError: the file is not a JSON list of objects with `question`, `answers` and `ctxs`, or a question has too
            few passages.
    """
    examples = read_list(path, _Example)
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
    return questions


def _cut(text: str, answer: str, words: int) -> str:
    at, split = text.lower().find(answer.lower()), text.split()
    start = len(text[:at].split()) - words // 2 if at >= 0 else 0
    start = max(0, min(start, len(split) - words))
    return " ".join(split[start : start + words])
