"""Prompts: where the parts lie, and that a chunk has the same tokens in every prompt."""

from __future__ import annotations

import re
import zlib
from datetime import date, datetime, tzinfo

import pytest
from jinja2.exceptions import TemplateError
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import (
    MarkedPrompt,
    PromptFormat,
    Segment,
    chat_format,
    chat_text,
    completion_format,
    encode,
    model_format,
    opening_ids,
)
from tests.models import make_tiny


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


def test_a_conversation_goes_on_behind_a_prompt() -> None:
    first = MarkedPrompt((1, 2, 3), 1, (Segment(1, 1),), primer="digest")
    second = first.followed_by([4, 5], (), ()).followed_by([6], [[7, 8], [9]], [10])
    assert second.token_ids == tuple(range(1, 11))
    assert second.segments == (Segment(1, 1), Segment(6, 2), Segment(8, 1))
    assert (second.preamble_length, second.primer) == (1, "digest")


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


LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tiny model's own; a test gives it a chat template."""
    return AutoTokenizer.from_pretrained(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama"))


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has chat templates told another day than today."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromisoformat(day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def test_a_template_with_a_date_gives_the_same_preamble_every_day(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = LLAMA_3
    turns = [{"role": "user", "content": "why?"}]
    told, forms, texts = set(), set(), set()
    for day in ("2025-03-01", "2026-11-25"):
        on(day, monkeypatch)
        told.add(tokenizer.apply_chat_template(turns, tokenize=False))
        forms.add(chat_format(tokenizer).model_dump_json())
        texts.add(chat_text(tokenizer, turns))
    assert len(told) == 2  # the template itself follows the day
    assert len(forms) == len(texts) == 1
    assert "Today Date: 26 Jul 2024" in texts.pop()
    assert "Today Date: 01 Mar 2025" in chat_text(tokenizer, turns, date(2025, 3, 1))


REPEATING = "{% for message in messages %}{{ message.content }} {{ message.content }}{% endfor %}"
SHOUTING = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"
SILENT = "{{ messages[0].role }}"
BACKWARDS = "{{ messages[-1].content.split('Question: ')[1] }} {{ messages[-1].content.split('Question: ')[0] }}"
PLACEHOLDER = "{% for message in messages %}{{ message.content }}{% endfor %} {question}"


@pytest.mark.parametrize("template", [REPEATING, SHOUTING, SILENT, BACKWARDS, PLACEHOLDER], ids=str)
def test_a_template_that_repeats_or_changes_what_is_said_is_refused_in_words(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="use the plain form"):
        chat_format(tokenizer)
    assert model_format(tokenizer) == completion_format()


def test_a_template_that_leaves_system_messages_out_takes_the_instruction_with_the_question(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<user>{{ m.content | trim }}{% endfor %}"
    assert chat_format(tokenizer).preamble.startswith("<user>You answer")


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"], ids=ascii)
def test_half_a_surrogate_pair_is_refused_in_words(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for use in (completion_format().chunk_ids, completion_format().question_ids, encode):
        with pytest.raises(PromptError, match="half a surrogate pair"):
            use(tokenizer, text)


@pytest.mark.parametrize("values", [{"chunk": "no place"}, {"question": "no place"}, {"unknown": 1}])
def test_a_form_without_places_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PromptFormat(**{"preamble": "p", "question": "{question}", **values})


def test_braces_in_passages_are_just_text() -> None:
    ids = completion_format().chunk_ids(Letters(), "f{question}{0}")
    assert "".join(map(chr, ids)) == "\nf{question}{0}\n"


class Blanks:
    """A tokenizer that merges blank lines at a text's end, and a space with the word behind it; it knows no words."""

    def __init__(self, letters: bool = True) -> None:
        self._letters = letters

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.findall(r"\n\n$|\n| ?\w+|.", text):
            word = piece.strip(" ").isalnum()
            ids.append(0 if word and not self._letters else zlib.crc32(piece.encode()))
        return ids


def test_an_opening_has_the_tokens_that_it_has_before_a_passage() -> None:
    encode = Blanks()
    for text in ("Read this:\n\n", "Context:\n"):
        opening = opening_ids(encode, text)
        assert encode(text + "Glass is made of sand")[: len(opening)] == opening
        assert len(opening) == len(encode(text + "Glass")) - 1
    assert opening_ids(encode, "Read this:\n\n") != encode("Read this:\n\n")
    assert opening_ids(encode, "Context: ") == encode("Context:")
    assert opening_ids(encode, "") == []


def test_an_opening_of_a_tokenizer_that_knows_no_word_is_tokenised_as_it_is() -> None:
    encode = Blanks(letters=False)
    assert opening_ids(encode, "Read this:\n") == encode("Read this:\n")
