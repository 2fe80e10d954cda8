"""Tools and structured outputs of the LangChain integration."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, Literal, TypedDict

import pytest

pytest.importorskip("langchain_core")

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_lmcache_rag import ChatLmcacheRag
from langchain_lmcache_rag.tools import calls_of
from pydantic import BaseModel, Field

from lmcache_rag.engine import LocalEngine, ToolCall
from lmcache_rag.errors import PromptError
from tests.integrations.stub import UndescribedEngine


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


CALL = r'I add\.\n<tool_call>\n\{"name": "add", "arguments": \{"a": 17, "b": 4\}\}\n</tool_call>'
"""What a model that was trained to call would write, as a regular expression."""


@pytest.fixture
def llm(calling: LocalEngine) -> ChatLmcacheRag:
    return ChatLmcacheRag(engine=calling, max_tokens=100, chat_template=True)


def test_the_model_chooses_to_call(llm: ChatLmcacheRag) -> None:
    asked = llm.bind_tools([add, weather]).bind(regex=CALL)
    answer = asked.invoke("What is 17 + 4?")
    assert answer.text.strip() == "I add."
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 17, "b": 4})
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert add.invoke(call).content == "21"


def test_calls_come_in_streams(llm: ChatLmcacheRag) -> None:
    asked = llm.bind_tools([add]).bind(regex=CALL)

    async def streamed() -> list[AIMessageChunk]:
        return [piece async for piece in asked.astream("What is 17 + 4?")]

    for pieces in (list(asked.stream("What is 17 + 4?")), asyncio.run(streamed())):
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        assert whole.text.strip() == "I add." and "tool_call" not in whole.text
        assert len([piece for piece in pieces if piece.text]) > 1
        assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("add", {"a": 17, "b": 4})]
        assert whole.response_metadata["reuse"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    "choice",
    ["add", "any", "required", True, {"type": "function", "function": {"name": "add"}}],
    ids=["name", "any", "required", "true", "dictionary"],
)
def test_calls_are_forced(smollm: LocalEngine, choice: Any) -> None:
    """Also of a model that knows of no tools."""
    llm = ChatLmcacheRag(engine=smollm, max_tokens=100, chat_template=True, stop=["}", "a"])
    answer = llm.bind_tools([add], tool_choice=choice, parallel_tool_calls=False).invoke("What is 17 + 4?")
    assert [(call["name"], set(call["args"])) for call in answer.tool_calls] == [("add", {"a", "b"})]
    assert answer.text == ""


def test_no_calls_where_none_are_wanted(llm: ChatLmcacheRag) -> None:
    messages = [HumanMessage("Hello")]
    none = llm.bind_tools([add], tool_choice="none").invoke(messages)
    assert none.text == llm.invoke(messages).text
    assert none.tool_calls == []


@pytest.mark.parametrize("choice", ["divide", {"type": "tool"}, 3], ids=["unknown", "form", "number"])
def test_choices_that_are_none_are_refused_at_once(llm: ChatLmcacheRag, choice: Any) -> None:
    with pytest.raises(PromptError, match="tool_choice"):
        llm.bind_tools([add], tool_choice=choice)


def test_models_that_know_no_tools_say_so(smollm: LocalEngine) -> None:
    with pytest.raises(PromptError, match="force a call"):
        ChatLmcacheRag(engine=smollm, chat_template=True).bind_tools([add]).invoke("Hello")
    for choice in ("auto", "add"):
        with pytest.raises(PromptError, match="chat_template=True"):
            ChatLmcacheRag(engine=smollm).bind_tools([add], tool_choice=choice).invoke("Hello")


def test_calls_and_results_are_in_the_prompt(llm: ChatLmcacheRag) -> None:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "1"}
    said = [{"type": "text", "text": "I add."}, {"type": "tool_use", "id": "1", "name": "add", "input": call["args"]}]
    history = [
        SystemMessage("Be brief."),
        HumanMessage("1 + 2?"),
        AIMessage(said, tool_calls=[call]),
        ToolMessage("3", tool_call_id="1"),
    ]
    text = llm.prompt_text(history)
    assert 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in text
    assert "<tool_response>\n3\n</tool_response>" in text
    answer = llm.bind_tools([add]).invoke(history)
    assert answer.usage_metadata["input_tokens"] > len(llm.get_token_ids(text))  # the tools are told too


def test_arguments_that_are_no_json() -> None:
    calls, invalid = calls_of([ToolCall("1", "add", '{"a": '), ToolCall("2", "add", ""), ToolCall("3", "add", '"a"')])
    assert [(call["id"], call["args"]) for call in calls] == [("2", {})]
    assert [(call["id"], call["args"]) for call in invalid] == [("1", '{"a": '), ("3", '"a"')]


class Battery(BaseModel):
    capacity_kwh: int = Field(ge=0, le=99)


class Station(BaseModel):
    """A station."""

    name: str = Field(max_length=20)
    batteries: list[Battery] = Field(max_length=2)


class Place(TypedDict):
    """A place."""

    name: Literal["Halden", "Narvik"]


TEXT = "The station Halden has one battery of 9 kWh. As JSON:"
METHODS = ("json_schema", "function_calling")


@pytest.mark.parametrize("method", METHODS)
def test_structured_output_is_the_class(llm: ChatLmcacheRag, method: Any) -> None:
    asked = llm.with_structured_output(Station, method=method)
    assert isinstance(asked.invoke(TEXT), Station)
    assert isinstance(asyncio.run(asked.ainvoke(TEXT)), Station)
    assert isinstance(list(asked.stream(TEXT))[-1], Station)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "schema",
    [
        Place,
        {
            "title": "place",
            "type": "object",
            "properties": {"name": {"enum": ["Halden", "Narvik"]}},
            "required": ["name"],
        },
        {"type": "object", "properties": {"name": {"enum": ["Halden", "Narvik"]}}, "required": ["name"]},
    ],
    ids=["typed-dict", "json-schema", "untitled"],
)
def test_structured_output_of_other_schemas(llm: ChatLmcacheRag, schema: Any, method: Any) -> None:
    raw = llm.with_structured_output(schema, method=method, include_raw=True).invoke(TEXT)
    assert set(raw["parsed"]) == {"name"} and raw["parsing_error"] is None
    assert isinstance(raw["raw"], AIMessage) and raw["raw"].response_metadata["reuse"]


def test_structured_output_of_plain_prompts_ignores_stops_for_prose(smollm: LocalEngine) -> None:
    llm = ChatLmcacheRag(engine=smollm, max_tokens=100, stop=["\n", '"', "}"])
    assert isinstance(llm.with_structured_output(Station).invoke(TEXT), Station)
    found = llm.with_structured_output(method="json_mode", stop=[]).invoke(f'{TEXT} {{"name": "Halden"}}\nAs JSON:')
    assert isinstance(found, dict)


@pytest.mark.parametrize("method", METHODS)
def test_answers_that_are_cut_off_say_so(llm: ChatLmcacheRag, method: Any) -> None:
    asked = llm.with_structured_output(Station, method=method, max_tokens=3)
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        asked.invoke(TEXT)
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        list(asked.stream(TEXT))
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        asyncio.run(asked.ainvoke(TEXT))
    raw = llm.with_structured_output(Station, method=method, max_tokens=3, include_raw=True).invoke(TEXT)
    assert raw["parsed"] is None and "max_tokens" in str(raw["parsing_error"])


def test_unusable_structures_are_refused(llm: ChatLmcacheRag) -> None:
    with pytest.raises(PromptError, match="schema"):
        llm.with_structured_output()
    with pytest.raises(PromptError, match="method"):
        llm.with_structured_output(Place, method="guess")  # type: ignore[arg-type]


def test_an_agent_calls_and_answers(calling: LocalEngine) -> None:
    """LangChain's agent over a model that calls once, then answers."""
    agents = pytest.importorskip("langchain.agents", reason="needs langchain, which is no dependency")
    llm = ChatLmcacheRag(engine=calling, max_tokens=60, chat_template=True)

    class Forced(ChatLmcacheRag):
        """Writes a call, as a model that was trained to would, where no result is there yet."""

        def _request(self, messages: Any, stop: Any, kwargs: Any) -> Any:
            done = any(isinstance(message, ToolMessage) for message in messages)
            return super()._request(messages, stop, kwargs if done else {**kwargs, "regex": CALL})

    agent = agents.create_agent(Forced(engine=calling, max_tokens=60, chat_template=True), [add])
    messages = agent.invoke({"messages": [HumanMessage("What is 17 + 4?")]})["messages"]
    assert [type(message) for message in messages] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert messages[2].content == "21"
    assert messages[3].response_metadata["reuse"]["prompt_tokens"] > 0
    assert isinstance(llm, BaseChatModel)
    structured = agents.create_agent(llm, [], response_format=Station).invoke({"messages": [HumanMessage(TEXT)]})
    assert isinstance(structured["structured_response"], Station)


@pytest.mark.parametrize("option", [{"logprobs": 5}, {"forced_token_ids": (1, 2)}])
def test_what_no_message_shows_is_refused(llm: ChatLmcacheRag, option: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="only engine"):
        llm.bind(**option).invoke("Why?")


def test_a_server_is_asked_what_it_is_beside_the_event_loop() -> None:
    async def asked(engine: UndescribedEngine, *, streams: bool) -> None:
        llm = ChatLmcacheRag(engine=engine)  # type: ignore[arg-type]
        answer = await llm.ainvoke("Why?") if not streams else [piece async for piece in llm.astream("Why?")]
        assert answer and engine.described_by not in ("", threading.current_thread().name)

    for streams in (False, True):
        asyncio.run(asked(UndescribedEngine(), streams=streams))


def test_over_a_server(smollm_server: Any) -> None:
    """The same over HTTP, where a chat's form is the server's to write."""
    llm = ChatLmcacheRag(base_url=smollm_server.url, max_tokens=100, chat_template=True)
    answer = llm.bind_tools([add], tool_choice="add").invoke("What is 17 + 4?")
    assert [(call["name"], set(call["args"])) for call in answer.tool_calls] == [("add", {"a", "b"})]
    assert answer.usage_metadata["output_tokens"] > 0
    assert isinstance(llm.with_structured_output(Station).invoke(TEXT), Station)
    plain = ChatLmcacheRag(base_url=smollm_server.url, max_tokens=8)
    pieces = list(plain.stream("One, two, three,"))
    assert "".join(piece.text for piece in pieces) == plain.invoke("One, two, three,").text
    assert json.dumps(pieces[-1].response_metadata["reuse"])
