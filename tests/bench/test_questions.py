"""Which passages a question is asked over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_rag.bench.questions import DataError, read_questions


def example(answer: str = "gold", passages: int = 6) -> dict:
    texts = [f"passage {number} " + "filler " * 40 for number in range(passages)]
    texts[3] += f"here is the {answer} at last " + "tail " * 40
    texts[5] += answer
    return {"question": "where?", "answers": [answer], "ctxs": [{"title": "", "text": text} for text in texts]}


def test_passages_with_the_answer_come_first_and_are_cut_around_it(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([example(), example("other")]))
    (question,) = read_questions(path, passages=4, words=20, limit=1)
    assert (question.text, question.answer, len(question.passages)) == ("where?", "gold", 4)
    assert all(len(passage.split()) == 20 for passage in question.passages)
    assert sum("gold" in passage for passage in question.passages) == 2
    assert {passage.split()[1] for passage in question.passages if passage.startswith("passage")} == {"0", "1"}
    assert read_questions(path, passages=4, words=20, limit=1) == [question]
    assert len(read_questions(path, passages=4, words=20, limit=9)) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "is not JSON"),
        ("{}", "list"),
        ('[{"question": "q"}]', "answers"),
        ('[{"question": "q", "answers": [" "], "ctxs": []}]', "answers.0"),
        ("[]", "has no questions"),
        (json.dumps([{"question": "half \udc80", "answers": ["a"], "ctxs": []}]), "0.question.*half a surrogate pair"),
        (json.dumps([example(passages=6)]), "fewer than 7"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_questions(path, passages=7, words=20, limit=5)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "absent.json", passages=1, words=20, limit=5)
