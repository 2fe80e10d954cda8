"""Answers in a structure, by vLLM's grammars."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, Generator
from typing import Any, Generic, Self

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.output_parsers.pydantic import PydanticOutputParser
from llama_index.core.output_parsers.selection import SelectionOutputParser
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.prompt_type import PromptType
from llama_index.core.question_gen.output_parser import SubQuestionOutputParser
from llama_index.core.types import BasePydanticProgram, Model, PydanticProgramMode
from pydantic_core import from_json

_dispatcher = get_dispatcher(__name__)
_predict, _apredict = inspect.unwrap(LLM.predict), inspect.unwrap(LLM.apredict)
"""LlamaIndex's own, without their spans: the methods that override them have some."""

_MOST_QUESTIONS = 5
_SENTENCE = {"type": "string", "maxLength": 200}
"""Limits on what LlamaIndex leaves open: without, small models go on to the end of the answer's length."""


class StructuredAnswers(FunctionCallingLLM):
    """A language model whose answers can be made to follow a JSON schema, by a grammar."""

    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="What the chat template takes besides, such as `enable_thinking`."
    )
    chat_template: bool = Field(
        default=False, description="Whether prompts are written in the model's own chat template, or as plain text."
    )

    _json_schema: dict[str, Any] | None = PrivateAttr(default=None)

    def following(self, json_schema: dict[str, Any]) -> Self:
        """The same model, whose answers are JSON of this schema. One that is cut off by `max_tokens` is a
        `CutOffError`; `stop` does not hold."""
        following = self.model_copy()
        following._json_schema = json_schema
        return following

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """See `LLM.predict`. Where a parser of LlamaIndex is to read the answer, it follows a grammar."""
        schema = answer_schema(prompt, prompt_args)
        return str(_predict(self if schema is None else self.following(schema), prompt, **prompt_args))

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """See `predict`."""
        schema = answer_schema(prompt, prompt_args)
        return str(await _apredict(self if schema is None else self.following(schema), prompt, **prompt_args))

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """See `LLM.structured_predict`. The answer follows the schema of `output_cls` by a grammar.

        Raises:
            CutOffError: it is cut off by `max_tokens`.
        """
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        _structured_begins(output_cls, prompt, prompt_args)
        output = StructuredProgram(output_cls, self, prompt)(llm_kwargs=llm_kwargs, **prompt_args)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """See `structured_predict`."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        _structured_begins(output_cls, prompt, prompt_args)
        output = await StructuredProgram(output_cls, self, prompt).acall(llm_kwargs=llm_kwargs, **prompt_args)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        return StructuredProgram(output_cls, self, prompt).stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        return await StructuredProgram(output_cls, self, prompt).astream_call(llm_kwargs=llm_kwargs, **prompt_args)


class StructuredProgram(BasePydanticProgram[Model]):
    """Has a model write objects of a class, by a grammar: what it writes can always be read. Takes every model, and
    stands for LlamaIndex's programs wherever one is asked for.

    The class' schema is told to the model at the prompt's end, behind the nodes, so that their KV is reused.

    Args:
        output_cls: the class.
        llm: the model.
        prompt: the template of the prompts.

    Raises:
        CutOffError: when called: the answer is cut off by `max_tokens`.
    """

    def __init__(self, output_cls: type[Model], llm: StructuredAnswers, prompt: BasePromptTemplate) -> None:
        self._output_cls = output_cls
        self._llm = llm.following(output_cls.model_json_schema())
        self._prompt = prompt

    @property
    def output_cls(self) -> type[Model]:
        return self._output_cls

    def __call__(self, *args: Any, llm_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Model:
        """`kwargs` are the template's variables, and `llm_kwargs` arguments of the model's."""
        asked, options = self._asked(kwargs), llm_kwargs or {}
        if isinstance(asked, str):
            text = self._llm.complete(asked, formatted=True, **options).text
        else:
            text = self._llm.chat(asked, **options).message.content or ""
        return self._output_cls.model_validate_json(text)

    async def acall(self, *args: Any, llm_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Model:
        """See `__call__`."""
        asked, options = self._asked(kwargs), llm_kwargs or {}
        if isinstance(asked, str):
            text = (await self._llm.acomplete(asked, formatted=True, **options)).text
        else:
            text = (await self._llm.achat(asked, **options)).message.content or ""
        return self._output_cls.model_validate_json(text)

    def stream_call(
        self, *args: Any, llm_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Generator[Model | FlexibleModel, None, None]:
        """The object as it grows: what is there of it so far, all fields optional, and at last the object itself."""
        asked, options, growing = self._asked(kwargs), llm_kwargs or {}, _Growing(self._output_cls)
        if isinstance(asked, str):
            for piece in self._llm.stream_complete(asked, formatted=True, **options):
                yield from growing.of(piece.text)
        else:
            for response in self._llm.stream_chat(asked, **options):
                yield from growing.of(response.message.content or "")
        yield growing.whole()

    async def astream_call(
        self, *args: Any, llm_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """See `stream_call`."""
        asked, options, growing = self._asked(kwargs), llm_kwargs or {}, _Growing(self._output_cls)

        async def objects() -> AsyncGenerator[Model | FlexibleModel, None]:
            if isinstance(asked, str):
                async for piece in await self._llm.astream_complete(asked, formatted=True, **options):
                    for each in growing.of(piece.text):
                        yield each
            else:
                async for response in await self._llm.astream_chat(asked, **options):
                    for each in growing.of(response.message.content or ""):
                        yield each
            yield growing.whole()

        return objects()

    def _asked(self, variables: dict[str, Any]) -> str | list[ChatMessage]:
        """The prompt, with the schema at its end."""
        schema = PydanticOutputParser(self._output_cls).get_format_string(escape_json=False)
        if not self._llm.chat_template:
            return f"{self._llm._get_prompt(self._prompt, **variables)}\n\n{schema}"
        *before, last = self._llm._get_messages(self._prompt, **variables)
        return [*before, last.model_copy(update={"blocks": [*last.blocks, TextBlock(text=schema)]})]


class _Growing(Generic[Model]):
    """An object while its JSON is written."""

    def __init__(self, output_cls: type[Model]) -> None:
        self._output_cls = output_cls
        self._partial = create_flexible_model(output_cls)
        self._text = ""
        self._shown: Any = {}

    def of(self, text: str) -> Generator[FlexibleModel, None, None]:
        """Take the text so far; what is new in it of the object."""
        self._text = text
        values = from_json(text or "{}", allow_partial="trailing-strings")
        if isinstance(values, dict) and values != self._shown:
            self._shown = values
            yield self._partial(**values)

    def whole(self) -> Model:
        """The object, at the end of the text."""
        return self._output_cls.model_validate_json(self._text)


def answer_schema(prompt: BasePromptTemplate, variables: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of what a prompt's output parser reads, of those in LlamaIndex's core; None for any other text.

    Args:
        variables: what the prompt is filled in with.
    """
    parser = prompt.output_parser
    if isinstance(parser, PydanticOutputParser):
        return dict(parser.output_cls.model_json_schema())
    if isinstance(parser, SelectionOutputParser):
        single = prompt.metadata.get("prompt_type") == PromptType.SINGLE_SELECT
        choice: dict[str, Any] = {"type": "integer", "minimum": 1}
        if "num_choices" in variables:
            choice["maximum"] = variables["num_choices"]
        most = 1 if single else variables.get("max_outputs") or variables.get("num_choices")
        return _list_of({"choice": choice, "reason": _SENTENCE}, most)
    if isinstance(parser, SubQuestionOutputParser):
        name: dict[str, Any] = {"type": "string"}
        if "tools_str" in variables:
            name["enum"] = list(json.loads(variables["tools_str"]))
        questions = _list_of({"sub_question": _SENTENCE, "tool_name": name}, _MOST_QUESTIONS)
        return _object({"items": questions})
    return None


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _list_of(fields: dict[str, Any], most: int | None) -> dict[str, Any]:
    limit = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": _object(fields), "minItems": 1, **limit}


def _structured_begins(output_cls: type[Model], prompt: BasePromptTemplate, variables: dict[str, Any]) -> None:
    event = LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=variables)
    _dispatcher.event(event)
