"""Answers in a form, by the engine's grammars: what the model writes can always be read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from lmcache_rag.errors import PromptError

Method = Literal["json_schema", "function_calling", "json_mode"]


def structured(
    llm: BaseChatModel, schema: Any, method: Method, *, strict: bool | None, include_raw: bool, **arguments: Any
) -> Runnable[LanguageModelInput, Any]:
    """See `ChatLmcacheRag.with_structured_output`."""
    schema = _titled(schema)
    is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
    arguments |= {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
    parser: Runnable[Any, Any] = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
    if method == "json_mode":
        writer: Runnable[LanguageModelInput, AIMessage] = llm.bind(json_schema={"type": "object"}, **arguments)
    elif schema is None:
        raise PromptError(f"with_structured_output(method={method!r}) takes a schema: give one, or use 'json_mode'.")
    elif method == "json_schema":
        writer = llm.bind(json_schema=convert_to_json_schema(schema, strict=strict), **arguments)
    elif method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        writer = llm.bind_tools([schema], tool_choice=name, strict=strict, parallel_tool_calls=False, **arguments)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_model
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        raise PromptError(f"method is json_schema, function_calling or json_mode (got {method!r}).")
    parser = RunnableGenerator(_whole, _awhole) | parser
    if not include_raw:
        return writer | parser
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    unread = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=writer) | read.with_fallbacks([unread], exception_key="parsing_error")


def _titled(schema: Any) -> Any:
    """LangChain takes a JSON schema for one by its title."""
    is_untitled = isinstance(schema, dict) and schema.get("type") == "object" and "title" not in schema
    return {"title": "answer", **schema} if is_untitled else schema


def _whole(pieces: Iterator[AIMessage]) -> Iterator[AIMessage]:
    for piece in pieces:
        _check(piece)
        yield piece


async def _awhole(pieces: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    async for piece in pieces:
        _check(piece)
        yield piece


def _check(piece: AIMessage) -> None:
    """Raises `OutputParserException` where the answer ended before its form did."""
    if piece.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "The answer was cut off before it was whole: raise max_tokens, or shorten the prompt where the model's "
            "context is full.",
            llm_output=piece.text,
        )
