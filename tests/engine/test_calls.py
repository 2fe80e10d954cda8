"""Requests as servers take them."""

from __future__ import annotations

from types import SimpleNamespace

from lmcache_rag.engine import Chat
from lmcache_rag.engine.calls import Answer, call_of, report_of
from lmcache_rag.prompt import MarkedPrompt, Segment
from lmcache_rag.request import PARAMS_KEY, BlendOptions, grant_of

ASKED = {"role": "user", "content": "How warm is it?"}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {"type": "object", "properties": {}}}}


def test_the_arguments_of_a_forced_call_are_kept_to_their_schema() -> None:
    def function(choice: str) -> dict:
        return call_of(Chat([ASKED], [TOOL], choice), None, None, None).body["tools"][0]["function"]

    assert function("warmth")["strict"] is function("required")["strict"] is True
    assert "strict" not in function("auto")
    assert "strict" not in TOOL["function"], "the caller's own tool was changed"
    loose = {**TOOL, "function": {**TOOL["function"], "strict": False}}
    assert call_of(Chat([ASKED], [loose], "warmth"), None, None, None).body["tools"][0]["function"]["strict"] is False


def piece(arguments: str = "", finish_reason: str | None = None, index: int = 0) -> SimpleNamespace:
    """A chunk of a streamed answer that calls a tool."""
    function = SimpleNamespace(name="" if arguments else None, arguments=arguments)
    calls = [SimpleNamespace(index=index, id=f"call-{index}", function=function)] if arguments else None
    choice = SimpleNamespace(delta=SimpleNamespace(content=None, tool_calls=calls), finish_reason=finish_reason)
    return SimpleNamespace(usage=None, model_extra=None, choices=[choice])


def test_a_call_that_is_cut_off_is_none() -> None:
    """Its arguments could be read as others than were meant."""
    answer = Answer(0.0)
    for chunk in (piece('{"place": "Ber'), piece(finish_reason="length")):
        answer.take(chunk)
    done = answer.completion()
    assert (done.tool_calls, done.finish_reason) == ((), "length")
    both = Answer(0.0)
    for chunk in (piece('{"place": '), piece('"Bern"}'), piece('{"place"', index=1), piece(finish_reason="length")):
        both.take(chunk)
    done = both.completion()
    assert [call.arguments for call in done.tool_calls] == ['{"place": "Bern"}']
    assert done.finish_reason == "tool_calls"


def test_thoughts_are_an_answers_beginning() -> None:
    answer = Answer(0.0)
    delta = SimpleNamespace(content=None, tool_calls=None, reasoning="Hmm.")
    choice = SimpleNamespace(delta=delta, finish_reason=None)
    answer.take(SimpleNamespace(usage=None, model_extra=None, choices=[choice]))
    begun = answer._first_at
    assert begun is not None
    answer.take(piece(finish_reason="stop"))
    assert answer.completion().ttft_s == begun


def test_marks_of_a_prompt_are_sent_and_a_grant_is_not() -> None:
    prompt = MarkedPrompt((5, 6, 7, 8), 1, (Segment(1, 2),), primer="0" * 16)
    options = BlendOptions(grant=grant_of("key"))
    extra = call_of(prompt, None, options, "salt").body["extra_body"]
    sent = extra["kv_transfer_params"][PARAMS_KEY]
    assert (sent["segments"], sent["primer"]) == ([[1, 2]], "0" * 16)
    assert "grant" not in sent
    assert extra["cache_salt"] == "salt"


def test_a_report_of_a_later_release_is_read_as_far_as_it_is_known() -> None:
    assert report_of({PARAMS_KEY: {"mode": "blend", "reused_tokens": 7, "added_later": 1}}, 9).reused_tokens == 7
    assert report_of({}, 9).vllm_tokens == 9
    assert "reports nothing" in report_of({PARAMS_KEY: "text"}, 9).reason
    for value in ({"mode": "a later mode"}, {"reused_tokens": "many"}):
        assert "another release's" in report_of({PARAMS_KEY: value}, 9).reason  # the answer is not lost over it
