"""Prompts: where the parts lie, and that a chunk has the same tokens in every prompt."""

from __future__ import annotations

import pytest
from jinja2.exceptions import TemplateError
from pydantic import ValidationError

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, Segment, chat_format, completion_format


class Letters:
    """A tokenizer: a letter a token, and a BOS token."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(letter) for letter in text]


def test_assemble() -> None:
    plan = MarkedPrompt.assemble([1, 2], [[3, 4, 5], [6]], [7, 8])
    assert plan.token_ids == (1, 2, 3, 4, 5, 6, 7, 8)
    assert plan.preamble_length == 2
    assert plan.segments == (Segment(2, 3), Segment(5, 1))
    assert plan.segments[0].end == 5


def test_chunks_have_the_same_tokens_in_every_prompt() -> None:
    form = completion_format()
    one = form.plan(Letters(), ["alpha", "beta"], "why?")
    two = form.plan(Letters(), ["beta"], "how?")
    beta = form.chunk_ids(Letters(), "beta")
    for plan, segment in ((one, one.segments[1]), (two, two.segments[0])):
        assert list(plan.token_ids[segment.start : segment.end]) == beta


def test_bos_stands_at_the_start_only() -> None:
    plan = completion_format().plan(Letters(), ["alpha"], "why?")
    assert plan.token_ids[0] == 1 and plan.token_ids.count(1) == 1


def test_chat_template_is_cut_around_the_passages() -> None:
    class WithTemplate(Letters):
        def apply_chat_template(
            self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
        ) -> str:
            assert not tokenize and add_generation_prompt
            system, user = (message["content"] for message in messages)
            return f"<s><system>{system}</system><user>{user}</user><assistant>"

    form = chat_format(WithTemplate())
    assert form.preamble.startswith("<s><system>You") and form.preamble.endswith("<user>Passages:\n")
    assert form.question.replace("{question}", "why?") == "\nQuestion: why?</user><assistant>"
    assert form.plan(Letters(), ["alpha"], "why?").token_ids.count(1) == 0


def test_a_template_without_system_messages_takes_the_instruction_with_the_question() -> None:
    class WithoutSystem(Letters):
        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            if messages[0]["role"] == "system":
                raise TemplateError("System role not supported")
            return f"<user>{messages[0]['content']}</user>"

    form = chat_format(WithoutSystem())
    assert form.preamble.startswith("<user>You answer") and form.preamble.endswith("\n\nPassages:\n")

    class Refusing(Letters):
        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            raise TemplateError("no")

    with pytest.raises(PromptError, match="use the plain form"):
        chat_format(Refusing())


@pytest.mark.parametrize("values", [{"chunk": "no place"}, {"question": "no place"}, {"unknown": 1}])
def test_a_form_without_places_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PromptFormat(**{"preamble": "p", "question": "{question}", **values})


def test_braces_in_passages_are_just_text() -> None:
    ids = completion_format().chunk_ids(Letters(), "f{question}{0}")
    assert "".join(map(chr, ids)) == "\nf{question}{0}\n"
