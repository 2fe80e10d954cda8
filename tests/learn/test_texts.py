"""The prompts that codecs are learned from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_rag.errors import PromptError
from lmcache_rag.learn.texts import PROMPTS, built_in_texts, learning_prompts, mixed, read_texts
from lmcache_rag.prompt import completion_format

FORM = completion_format()


class Words:
    """A token a word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]


def test_the_built_in_text_is_enough_and_mixes_its_subjects() -> None:
    prompts = learning_prompts(Words(), FORM, built_in_texts(), 4096)
    assert len(prompts) == PROMPTS
    assert all(len(plan.segments) == 4 and 600 < len(plan.token_ids) < 900 for plan in prompts)


def test_prompts_fit_the_model() -> None:
    prompts = learning_prompts(Words(), FORM, built_in_texts(), 400)
    assert prompts and all(len(plan.token_ids) <= 400 - 16 for plan in prompts)
    assert learning_prompts(Words(), FORM, built_in_texts(), 60) == []


def test_too_little_text_gives_none() -> None:
    assert learning_prompts(Words(), FORM, ["a few words"], 4096) == []


def test_short_texts_are_put_together() -> None:
    texts = [f"word{number} " * 30 for number in range(40)]
    assert len(learning_prompts(Words(), FORM, texts, 4096)) == 2


def test_ones_own_are_half_at_most() -> None:
    built_in = learning_prompts(Words(), FORM, built_in_texts(), 4096)
    own = learning_prompts(Words(), FORM, ["own text " * 30000], 4096)
    both = mixed(own, built_in)
    assert len(both) == PROMPTS and both[: PROMPTS // 2] == own[: PROMPTS // 2] and both[PROMPTS // 2] == built_in[0]
    assert mixed(own[:3], built_in)[3:] == built_in[: PROMPTS - 3]
    assert mixed(own[:3], []) == own[:3]


def test_files(tmp_path: Path) -> None:
    plain, lines, wrong = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("Some text.")
    lines.write_text('{"text": "One."}\n\n{"text": "Two.", "title": "x"}\n')
    wrong.write_text('{"title": "x"}\n')
    assert read_texts(plain) == ["Some text."]
    assert read_texts(lines) == ["One.", "Two."]
    lines.write_text('{"text": "One.\u2028Two."}\n', encoding="utf-8")  # an end of a line within JSON is none
    assert read_texts(lines) == ["One.\u2028Two."]
    half = tmp_path / "d.jsonl"
    half.write_text('{"text": "\\ud800"}\n')
    for path in (wrong, half, tmp_path / "absent.txt"):
        with pytest.raises(PromptError, match="name a UTF-8 text file"):
            read_texts(path)
    plain.write_text(" \n")
    lines.write_text("\n")
    for path in (plain, lines):
        with pytest.raises(PromptError, match="has no text in it"):
            read_texts(path)
