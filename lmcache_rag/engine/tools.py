"""Tool calls in the answers of an engine in this process, read by vLLM's own parsers.

A forced call is generated under a JSON grammar, so that any model can be made to call; whether to call at all is the
model's to say only where it was trained to, in a form that one of vLLM's parsers knows.
"""

from __future__ import annotations

import json
from typing import Any

from lmcache_rag.engine.chat import Chat, ToolCall
from lmcache_rag.errors import PromptError

_PARSERS = (
    ("<|python_tag|>", "llama3_json"),
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
)
"""What a chat template writes around a call -> vLLM's parser of that form; the first that is found."""


def tool_parser_of(template: Any) -> str | None:
    """The name of vLLM's parser for the calls of a model, by its chat template (or several, by name); None where that
    offers no tools, or in a form that is not known here."""
    template = "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
    if "tools" not in template:
        return None
    return next((parser for mark, parser in _PARSERS if mark in template), None)


class ToolReader:
    """Reads the answer to one chat that offers tools.

    Args:
        parser: name of vLLM's parser; None where only forced calls can be read.

    Raises:
        PromptError: the tools are not as vLLM takes them, or the model cannot choose to call.
    """

    def __init__(self, chat: Chat, tokenizer: Any, parser: str | None) -> None:
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        self._chat = chat
        chat.check_callable(calls_tools=parser is not None)
        try:
            self._request = ChatCompletionRequest(
                messages=[{"role": "user", "content": ""}], tools=list(chat.tools), tool_choice=chat.choice
            )
        except ValidationError as error:
            raise PromptError(f"The tools cannot be used: {error.errors()[0]['msg']}") from error
        self._parser: Any = None
        if not chat.forces_tools:
            try:
                made = ToolParserManager.get_tool_parser(str(parser))
            except KeyError:
                raise PromptError(f"tool_parser: vLLM has no parser {parser!r}.") from None
            self._parser = made(tokenizer, self._request.tools)
        self._text, self._token_ids = "", list[int]()

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the answer has to follow, where a call is forced."""
        from vllm.tool_parsers.utils import get_json_schema_from_tools

        schema = get_json_schema_from_tools(
            tool_choice=self._request.tool_choice, tools=self._request.tools, parallel_tool_calls=self._chat.parallel
        )
        assert isinstance(schema, dict) or not self._chat.forces_tools
        return schema if isinstance(schema, dict) else None

    def shown(self, text: str, token_ids: list[int]) -> str:
        """Take what was generated; returns what of it is text for the user and no part of a call."""
        before, ids_before = self._text, list(self._token_ids)
        self._text += text
        self._token_ids += token_ids
        if self._parser is None or not text:
            return ""
        delta = self._parser.extract_tool_calls_streaming(
            before, self._text, text, ids_before, self._token_ids, token_ids, self._request
        )
        return (delta.content or "") if delta is not None else ""

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The answer's text without calls, and the calls. Calls that were cut off by the answer's length are none."""
        if self._chat.forces_tools:
            return "", tuple(_forced(self._chat, self._text))
        found = self._parser.extract_tool_calls(self._text, self._request)
        made = found.tool_calls if self._chat.parallel else found.tool_calls[:1]
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in made)
        return found.content or "", calls


def _forced(chat: Chat, text: str) -> list[ToolCall]:
    """The calls in an answer that follows the grammar: a list of names and parameters, or one function's parameters."""
    from vllm.renderers.chat_utils import make_tool_call_id

    try:
        answer = json.loads(text)
    except ValueError:
        return []
    if chat.tool_choice != "required":
        answer = [{"name": chat.tool_choice, "parameters": answer}]
    return [
        ToolCall(make_tool_call_id(), call["name"], json.dumps(call.get("parameters", {}), ensure_ascii=False))
        for call in answer
    ]
