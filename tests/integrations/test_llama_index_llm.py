"""What LlamaIndex asks of the LLM and gets, whatever the model: chats, tools, structures, events, copies."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ThinkingBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import ChatPromptTemplate, RichPromptTemplate
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import SimpleSummarize
from llama_index.core.schema import QueryBundle
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector, PydanticSingleSelector
from llama_index.core.selectors.utils import get_selector_from_llm
from llama_index.core.tools import FunctionTool, ToolMetadata
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.lmcache_rag import KVPrecompute, KVPrefetch, KVReuseEvent, LmcacheRag, StructuredProgram
from llama_index.llms.lmcache_rag.embedding import LocalEmbedding
from pydantic import BaseModel, Field

from lmcache_rag.engine import Chat, ToolCall
from lmcache_rag.errors import EngineError, PromptError
from tests.integrations.stub import StubEngine, StubServer, UndescribedEngine, answer, call


@pytest.fixture
def stub() -> StubEngine:
    return StubEngine()


@pytest.fixture
def server() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int = Field(le=99)


def greet(name: str) -> str:
    """Greets somebody."""
    return f"Hello, {name}!"


GREET = FunctionTool.from_defaults(greet)
ADA = '{"name": "Ada", "age": 36}'
ASK = PromptTemplate("Who is it? {hint}")


def model(engine: Any, **values: Any) -> LmcacheRag:
    return LmcacheRag(engine=engine, **{"chat_template": True, **values})


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=text)


def asked_chat(engine: StubEngine) -> Chat:
    prompt = engine.asked[-1][0]
    assert isinstance(prompt, Chat)
    return prompt


def test_a_model_calls_tools_where_its_chat_template_offers_them() -> None:
    assert model(StubEngine()).metadata.is_function_calling_model
    assert not model(StubEngine(), chat_template=False).metadata.is_function_calling_model
    assert not model(StubEngine(calls_tools=False)).metadata.is_function_calling_model


def test_tools_and_their_choice_are_handed_on_and_calls_come_back() -> None:
    engine = StubEngine(answer("I greet.", call("greet", name="Ada")))
    llm = model(engine)
    response = llm.chat_with_tools([GREET], user_msg="Greet Ada.", chat_history=[user("Hello")], max_tokens=5)
    chat = asked_chat(engine)
    assert [message["content"] for message in chat.messages] == ["Hello", "Greet Ada."]
    assert [tool["function"]["name"] for tool in chat.tools] == ["greet"]
    assert chat.tools[0]["function"]["parameters"]["properties"]["name"]["type"] == "string"
    assert (chat.tool_choice, chat.parallel) == ("auto", False)
    assert engine.asked[-1][1].max_tokens == 5
    (selected,) = llm.get_tool_calls_from_response(response)
    assert (selected.tool_id, selected.tool_name, selected.tool_kwargs) == ("call-1", "greet", {"name": "Ada"})
    assert response.message.content == "I greet."
    assert isinstance(response.raw, dict)
    assert response.raw["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({"tool_required": True}, "required"),
        ({"tool_choice": "greet"}, "greet"),
        ({"tool_choice": {"type": "function", "function": {"name": "greet"}}}, "greet"),
        ({"tool_choice": None}, "auto"),
        ({"tool_choice": "none", "tool_required": True}, "none"),
    ],
)
def test_every_form_of_a_tool_choice_is_understood(given: dict[str, Any], choice: str) -> None:
    engine = StubEngine()
    model(engine).chat_with_tools([GREET], user_msg="Hello", allow_parallel_tool_calls=True, **given)
    assert (asked_chat(engine).tool_choice, asked_chat(engine).parallel) == (choice, True)


def test_calls_and_their_results_in_the_history_take_openais_form() -> None:
    engine = StubEngine(answer("", call("greet", name="Ada")), answer("Done."))
    llm = model(engine)
    called = llm.chat([user("Greet Ada.")]).message
    result = ChatMessage(role=MessageRole.TOOL, content="Hello, Ada!", additional_kwargs={"tool_call_id": "call-1"})
    older = {"id": "old", "type": "function", "function": {"name": "greet", "arguments": "{}"}}
    history = [
        ChatMessage(role=MessageRole.DEVELOPER, content="Be short."),
        ChatMessage(role=MessageRole.MODEL, content="", additional_kwargs={"tool_calls": [older]}),
        called,
        result,
        ChatMessage(role=MessageRole.ASSISTANT, blocks=[ThinkingBlock(content="Hm."), TextBlock(text="So.")]),
    ]
    llm.chat(history)
    system, first, second, tool, last = asked_chat(engine).messages
    assert system == {"role": "system", "content": "Be short."}
    assert first == {"role": "assistant", "content": "", "tool_calls": [older]}
    function = {"name": "greet", "arguments": '{"name": "Ada"}'}
    assert second["tool_calls"] == [{"id": "call-1", "type": "function", "function": function}]
    assert tool == {"role": "tool", "content": "Hello, Ada!", "tool_call_id": "call-1"}
    assert last == {"role": "assistant", "content": "So."}


def test_streamed_calls_come_with_the_last_response() -> None:
    llm = model(StubEngine(answer("I greet.", call("greet", name="Ada"))))

    async def streamed() -> list[Any]:
        return [r async for r in await llm.astream_chat_with_tools([GREET], user_msg="Greet Ada.")]

    for responses in (list(llm.stream_chat_with_tools([GREET], user_msg="Greet Ada.")), asyncio.run(streamed())):
        assert "".join(response.delta or "" for response in responses) == "I greet."
        assert not llm.get_tool_calls_from_response(responses[0], error_on_no_tool_call=False)
        assert llm.get_tool_calls_from_response(responses[-1])[0].tool_kwargs == {"name": "Ada"}


def test_an_answer_without_a_call_is_an_error_where_one_is_needed() -> None:
    llm = model(StubEngine(answer("Blue."), answer("", finish_reason="length")))
    with pytest.raises(ValueError, match=r"calls no tool .got 'Blue\."):
        llm.get_tool_calls_from_response(llm.chat([user("Hello")]))
    with pytest.raises(ValueError, match="max_tokens=256: raise it"):
        llm.predict_and_call([GREET], "Hello")


def test_arguments_that_are_no_object_reach_the_tool_as_none() -> None:
    llm = model(StubEngine(answer("", ToolCall("1", "greet", "[1"))))
    assert llm.get_tool_calls_from_response(llm.chat([user("Hello")]))[0].tool_kwargs == {}


def test_tools_take_the_chat_template(stub: StubEngine) -> None:
    with pytest.raises(PromptError, match="chat_template=True"):
        model(stub, chat_template=False).chat_with_tools([GREET], user_msg="Hello")
    with pytest.raises(PromptError, match="leave it out"):
        LmcacheRag(engine=stub, chat_template=True, messages_to_prompt=str)
    with pytest.raises(PromptError, match="names no tool"):
        model(stub).chat_with_tools([GREET], user_msg="Hello", tool_choice="wave")
    with pytest.raises(PromptError, match="ImageBlock"):
        model(stub).chat([ChatMessage(role=MessageRole.USER, blocks=[ImageBlock(image=b"\x89PNG")])])


def test_an_agent_calls_tools_until_it_answers() -> None:
    for streaming in (False, True):
        engine = StubEngine(answer("", call("greet", name="Ada")), answer("I greeted her."))
        agent = FunctionAgent(tools=[GREET], llm=model(engine), system_prompt="Greet.", streaming=streaming)

        async def run(agent: FunctionAgent = agent) -> str:
            return str(await agent.run("Greet Ada."))

        assert asyncio.run(run()) == "I greeted her."
        roles = [message["role"] for message in asked_chat(engine).messages]
        assert roles == ["system", "user", "assistant", "tool"]
        assert asked_chat(engine).messages[-1]["content"] == "Hello, Ada!"
        assert engine.synchronous == 0


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_structured_answers_follow_the_schema(chat_template: bool) -> None:
    engine = StubEngine(answer(ADA), calls_tools=False)
    llm = model(engine, chat_template=chat_template, stop=("\n",))
    assert llm.structured_predict(Person, ASK, llm_kwargs={"max_tokens": 9}, hint="x{y}") == Person(name="Ada", age=36)
    assert asyncio.run(llm.astructured_predict(Person, ASK, hint="x{y}")).age == 36
    assert llm.as_structured_llm(Person).complete("Who?").raw == Person(name="Ada", age=36)
    assert asyncio.run(llm.as_structured_llm(Person).achat([user("Who?")])).raw == Person(name="Ada", age=36)
    for _, sampling in engine.asked:
        assert sampling.json_schema == Person.model_json_schema()
        assert sampling.stop == ()
    assert (engine.asked[0][1].max_tokens, engine.synchronous, engine.asynchronous) == (9, 2, 2)
    prompt = engine.asked[0][0]
    text = prompt.messages[-1]["content"] if isinstance(prompt, Chat) else prompt
    assert isinstance(text, str)
    assert text.startswith("Who is it? x{y}")
    assert '"title": "Person"' in text
    llm.complete("Hello")
    assert engine.asked[-1][1].json_schema is None


def test_the_schema_stands_behind_the_nodes() -> None:
    engine = StubEngine(answer(ADA))
    messages = [ChatMessage(role=MessageRole.SYSTEM, content="Nodes: {context_str}"), user("Who?")]
    model(engine).structured_predict(Person, ChatPromptTemplate(messages), context_str="NODES")
    system, last = asked_chat(engine).messages
    assert system["content"] == "Nodes: NODES"
    assert "Person" in last["content"]


def test_objects_are_streamed_as_they_grow() -> None:
    llm = model(StubEngine(answer(ADA)))

    async def streamed() -> list[Any]:
        return [each async for each in await llm.astream_structured_predict(Person, ASK, hint="")]

    for objects in (list(llm.stream_structured_predict(Person, ASK, hint="")), asyncio.run(streamed())):
        assert objects[-1] == Person(name="Ada", age=36)
        seen = [(each.name, each.age) for each in objects]
        assert (seen[0], seen[-2]) == (("Ad", None), ("Ada", 36))
        assert ("Ada", None) in seen


def test_an_answer_without_text_is_no_text() -> None:
    """LlamaIndex's chat engines would write "None" into the conversation."""
    llm = model(StubEngine(answer("")))
    assert llm.chat([user("Hi")]).message.content == ""
    assert str(SimpleChatEngine.from_defaults(llm=llm).chat("Hi")) == ""


def test_sampling_is_the_fields_and_a_calls_own() -> None:
    stub = StubEngine(answer("x"))
    llm = model(stub, temperature=0.7, top_p=0.9, seed=1)
    llm.complete("Hi")
    llm.complete("Hi", seed=2)
    given = [(sampling.temperature, sampling.top_p, sampling.seed) for _, sampling in stub.asked]
    assert given == [(0.7, 0.9, 1), (0.7, 0.9, 2)]


def test_embedding_leaves_the_event_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, threads, batches = LocalEmbedding(), set(), []

    def embed(texts: list[str]) -> np.ndarray:
        threads.add(threading.get_ident())
        batches.append(len(texts))
        return np.zeros((len(texts), 3), np.float32)

    monkeypatch.setattr(embedding._embedder, "embed", embed)

    async def asked() -> None:
        await embedding.aget_query_embedding("a")
        await embedding.aget_text_embedding("b")
        await embedding.aget_text_embedding_batch(["c"] * 8)

    asyncio.run(asked())
    assert threading.get_ident() not in threads
    assert sorted(batches) == [1, 1, 8]


def test_a_structured_answer_that_is_cut_off_is_an_error() -> None:
    llm = model(StubEngine(answer('{"name": "A', finish_reason="length")))
    with pytest.raises(ValueError, match="cut off"):  # as LlamaIndex's extractors and synthesizers expect
        llm.structured_predict(Person, ASK, hint="")
    with pytest.raises(PromptError, match="cut off after 7 tokens: raise max_tokens"):
        llm.structured_predict(Person, ASK, hint="")
    with pytest.raises(PromptError, match="raise max_tokens"):
        list(llm.stream_structured_predict(Person, ASK, hint=""))
    assert llm.complete("Hello").text.startswith('{"name')  # not structured: the caller sees the finish reason


def test_another_program_mode_is_kept_to() -> None:
    engine = StubEngine(answer("", call("Person", name="Ada", age=36)))
    llm = model(engine, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert llm.structured_predict(Person, ASK, hint="").name == "Ada"
    assert asyncio.run(llm.astructured_predict(Person, ASK, hint="")).name == "Ada"
    assert asked_chat(engine).tool_choice == "required"
    assert list(llm.stream_structured_predict(Person, ASK, hint=""))[-1].name == "Ada"


def test_function_calling_programs_and_selectors_work() -> None:
    llm = model(StubEngine(answer("", call("SingleSelection", index=2, reason="It is."))))
    selector = get_selector_from_llm(llm)
    assert isinstance(selector, PydanticSingleSelector)
    assert selector.select(["one", "two"], "Which?").ind == 1
    assert asyncio.run(selector.aselect(["one", "two"], "Which?")).ind == 1
    person = model(StubEngine(answer("", call("Person", name="Ada", age=36))))
    program = FunctionCallingProgram.from_defaults(Person, prompt=ASK, llm=person)
    assert program(hint="") == Person(name="Ada", age=36)


def test_a_program_of_ours_stands_for_llama_indexs_own() -> None:
    from llama_index.core.base.base_selector import SingleSelection
    from llama_index.core.selectors.prompts import DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL

    llm = model(StubEngine(answer('{"index": 1, "reason": "It is."}'), calls_tools=False))
    assert isinstance(get_selector_from_llm(llm), LLMSingleSelector)
    program = StructuredProgram(SingleSelection, llm, PromptTemplate(DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL))
    assert PydanticSingleSelector.from_defaults(program).select(["one", "two"], "Which?").ind == 0


def test_answers_for_a_parser_follow_its_form() -> None:
    engine = StubEngine(answer('[{"choice": 2, "reason": "It is."}]'))
    llm = model(engine, chat_template=False)
    single = LLMSingleSelector.from_defaults(llm=llm)
    assert single.select(["one", "two"], "Which?").ind == 1
    assert asyncio.run(single.aselect(["one", "two"], "Which?")).ind == 1
    assert engine.asynchronous == 1
    assert LLMMultiSelector.from_defaults(llm=llm).select(["one", "two", "three"], "Which?").inds == [1]
    (one, _, several) = [sampling.json_schema for _, sampling in engine.asked]
    assert one is not None and several is not None
    assert (one["minItems"], one["maxItems"], several["maxItems"]) == (1, 1, 3)
    assert one["items"]["properties"]["choice"] == {"type": "integer", "minimum": 1, "maximum": 2}

    engine.answers = [answer('{"items": [{"sub_question": "What?", "tool_name": "b"}]}')]
    tools = [ToolMetadata(name=name, description="a tool") for name in "ab"]
    (question,) = LLMQuestionGenerator.from_defaults(llm=llm).generate(tools, QueryBundle("What?"))
    assert (question.sub_question, question.tool_name) == ("What?", "b")
    schema = engine.asked[-1][1].json_schema
    assert schema is not None
    assert schema["properties"]["items"]["items"]["properties"]["tool_name"]["enum"] == ["a", "b"]

    engine.answers = [answer(ADA)]
    llm.predict(PromptTemplate("Who?", output_parser=PydanticOutputParser(Person)))
    assert engine.asked[-1][1].json_schema == Person.model_json_schema()
    llm.predict(PromptTemplate("Who?"))
    assert engine.asked[-1][1].json_schema is None


class Recorder(BaseEventHandler):
    """Keeps all events."""

    events: list[BaseEvent] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


class Spans(BaseSpanHandler[BaseSpan]):
    """Keeps the spans that were entered."""

    entered: list[str] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Spans"

    def new_span(self, id_: str, bound_args: Any, **kwargs: Any) -> BaseSpan:
        self.entered.append(id_)
        return BaseSpan(id_=id_)

    def prepare_to_exit_span(self, id_: str, bound_args: Any, **kwargs: Any) -> BaseSpan | None:
        return self.open_spans.get(id_)

    def prepare_to_drop_span(self, id_: str, bound_args: Any, **kwargs: Any) -> BaseSpan | None:
        return self.open_spans.get(id_)


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, Spans]]:
    root, recorder, spans = get_dispatcher("root"), Recorder(), Spans()
    handlers, span_handlers = root.event_handlers, root.span_handlers
    root.event_handlers, root.span_handlers = [*handlers, recorder], [*span_handlers, spans]
    yield recorder, spans
    root.event_handlers, root.span_handlers = handlers, span_handlers


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat", "astream_chat"])
@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_each_answer_is_an_event_of_its_own_span(
    recorder: tuple[Recorder, Spans], kind: str, way: str, chat_template: bool
) -> None:
    events, spans = recorder
    engine = StubEngine()
    llm = model(engine, chat_template=chat_template)
    method = way.replace("chat", kind)
    prompt: Any = [user("A colour?")] if kind == "chat" else "A colour?"

    async def asked() -> list[Any]:
        made = await getattr(llm, method)(prompt)
        return [each async for each in made] if inspect.isasyncgen(made) else [made]

    if way.startswith("a"):
        responses = asyncio.run(asked())
    else:
        made = getattr(llm, method)(prompt)
        responses = list(made) if inspect.isgenerator(made) else [made]
    assert str(responses[-1]).endswith("Blue.")
    assert responses[-1].raw["usage"] == {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    (event,) = [event for event in events.events if isinstance(event, KVReuseEvent)]
    assert (event.reuse.reused_tokens, event.answer_tokens, event.model_name) == (80, 7, "stub")
    (span,) = [span for span in spans.entered if span.startswith("LmcacheRag.")]
    assert span.startswith(f"LmcacheRag.{method}-")
    assert event.span_id == span
    assert llm.last_reuse == event.reuse
    assert (engine.synchronous, engine.asynchronous) == ((0, 1) if way.startswith("a") else (1, 0))


def test_structured_predictions_have_events_and_one_span(recorder: tuple[Recorder, Spans]) -> None:
    events, spans = recorder
    llm = model(StubEngine(answer(ADA)))
    llm.structured_predict(Person, ASK, hint="")
    assert [event.output for event in events.events if isinstance(event, LLMStructuredPredictEndEvent)] == [
        Person(name="Ada", age=36)
    ]
    assert llm.last_reuse is not None
    llm.predict(ASK, hint="")
    names = [span.partition("-")[0] for span in spans.entered]
    assert [names.count(f"LmcacheRag.{name}") for name in ("structured_predict", "predict", "chat")] == [1, 1, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_clients_of_a_server_are_copied_whole(server: StubServer, copied: Any) -> None:
    llm = LmcacheRag(base_url=server.url, max_tokens=5)
    for whole in (llm, KVPrecompute(llm), KVPrefetch(llm)):
        again = copied(whole)
        found = again if isinstance(again, LmcacheRag) else again._llm
        assert found is not llm
        assert found.max_tokens == 5
        assert found.engine.model_name == "some-model"
        assert found.engine is not llm.engine
    assert copied(KVPrecompute(llm)).to_dict() == KVPrecompute(llm).to_dict()


def test_a_client_of_a_server_imports_neither_vllm_nor_torch() -> None:
    program = (
        "import sys\n"
        "from llama_index.llms.lmcache_rag import *\n"
        "llm = LmcacheRag(base_url='http://127.0.0.1:9/v1')\n"
        "print([name for name in ('vllm', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_exactly_one_engine_is_named(stub: StubEngine) -> None:
    with pytest.raises(EngineError, match="base_url="):
        LmcacheRag(engine=stub, base_url="http://127.0.0.1:9/v1")  # type: ignore[arg-type]


def test_lists_are_the_templates_own_elsewhere(stub: StubEngine) -> None:
    llm = model(stub, chat_template=False)
    llm.predict(RichPromptTemplate("{% for topic in topics %}- {{ topic }}\n{% endfor %}"), topics=["one", "two"])
    assert stub.asked[-1][0] == "- one\n- two\n"
    llm.predict(RichPromptTemplate("{% for part in context_str %}<{{ part }}>{% endfor %}"), context_str=["a", "b"])
    assert stub.asked[-1][0] == "<a><b>"
    llm.predict(PromptTemplate("{names}"), names=["one", "two"])
    assert stub.asked[-1][0] == "['one', 'two']"


@pytest.mark.parametrize("option", [{"logprobs": 5}, {"forced_token_ids": (1, 2)}])
def test_what_no_answer_of_llama_index_shows_is_refused(stub: StubEngine, option: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="only engine"):
        model(stub).complete("Why?", **option)


def test_a_server_is_asked_what_it_is_beside_the_event_loop() -> None:

    async def asked(*, predicts: bool) -> None:
        engine = UndescribedEngine()
        llm = model(engine)
        await (llm.apredict(PromptTemplate("Why?")) if predicts else llm.acomplete("Why?"))
        assert engine.described_by not in ("", threading.current_thread().name)

    for predicts in (False, True):
        asyncio.run(asked(predicts=predicts))


@pytest.mark.parametrize("chat_template", [False, True])
def test_texts_given_as_a_list_stand_as_they_are(stub: StubEngine, chat_template: bool) -> None:
    passage = "The first line.\nIt isn't the last one."
    summarize = SimpleSummarize(llm=model(stub, chat_template=chat_template))
    assert summarize.get_response("What is it?", [passage]) == "Blue."
    prompt = stub.asked[-1][0]
    text = stub.render(prompt) if isinstance(prompt, Chat) else prompt
    assert isinstance(text, str) and f"\n{passage}\n" in text
