"""The prompts from which codec tables are learned: passages of a text, and a question about one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, Tokenizer, check_text

PROMPTS = 40
_PASSAGES, _WORDS, _FEWEST_WORDS = 4, 150, 40
_QUESTION_WORDS = 6
_ROOM_FOR_ANSWER = 16


def learning_prompts(
    tokenizer: Tokenizer, prompt: PromptFormat, texts: Iterable[str], longest: int, count: int = PROMPTS
) -> list[MarkedPrompt]:
    """Prompts over passages of `texts`, `count` at most and of fewer than `longest` tokens each; none where the texts
    are too short, or the model's context is."""
    passages = list(_passages(texts))
    groups = [passages[at : at + _PASSAGES] for at in range(0, len(passages) - _PASSAGES + 1, _PASSAGES)]
    stride = max(1, len(groups) // count)
    found = []
    for number, group in enumerate(groups[::stride][:count]):
        words = group[number % _PASSAGES].split()[:_QUESTION_WORDS]
        for fewer in range(_PASSAGES, 0, -1):
            plan = prompt.plan(tokenizer, group[:fewer], f"What is said about {' '.join(words)}?")
            if len(plan.token_ids) + _ROOM_FOR_ANSWER <= longest:
                found.append(plan)
                break
    return found


def built_in_texts() -> Iterator[str]:
    """Python's own documentation, which every Python installation has, in an order that mixes its subjects."""
    names = sorted(topics)
    yield from (topics[name] for start in range(7) for name in names[start::7])


def read_texts(path: Path) -> list[str]:
    """A plain text file, or one of JSON lines with a `text` each.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8")
        texts = [content]
        if path.suffix == ".jsonl":
            texts = [str(json.loads(line)["text"]) for line in content.split("\n") if line.strip()]
        for text in texts:
            check_text(text)
    except (OSError, ValueError, KeyError, TypeError, PromptError) as error:
        raise PromptError(
            f"{path} cannot be read ({error}): name a UTF-8 text file, or JSON lines with a `text` each."
        ) from error
    if not any(text.strip() for text in texts):
        raise PromptError(f"{path} has no text in it: name another file.")
    return texts


def mixed(own: Sequence[MarkedPrompt], built_in: Sequence[MarkedPrompt], count: int = PROMPTS) -> list[MarkedPrompt]:
    """Half of each, more of the built-in ones where there are few of one's own: tables learned from few texts suit
    no others."""
    taken = own[: count // 2]
    return [*taken, *built_in[: count - len(taken)]]


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of so many words, of one text or of several short ones."""
    words: list[str] = []
    for text in texts:
        words += text.split()
        while len(words) >= _WORDS:
            yield " ".join(words[:_WORDS])
            del words[:_WORDS]
    if len(words) >= _FEWEST_WORDS:
        yield " ".join(words)
