"""A conversation as a prompt: messages, and the tools that the model may call, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.errors import PromptError

Message = Mapping[str, Any]
"""`role` and `content`; of an assistant's also `tool_calls`, of a tool's also `tool_call_id`."""


_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class ToolCall:
    """What the model asks to be called.

    Attributes:
        arguments: a JSON object, as the model wrote it.
    """

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Chat:
    """A conversation; the model's own chat template writes it as text, up to where the answer begins.

    Attributes:
        tools: functions, as `{"type": "function", "function": {"name", "description", "parameters"}}`.
        tool_choice: `auto`, `none`, `required` (at least one call), or the name of the one to be called.
        parallel: whether the answer may hold several calls.
        template_kwargs: what the chat template takes besides, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise PromptError("The conversation has no messages.")
        names = [tool.get("function", {}).get("name") for tool in self.tools]
        if not all(names):
            raise PromptError("A tool has no name: give {'type': 'function', 'function': {'name': ..., ...}}.")
        if self.tool_choice not in ((*_CHOICES, *names) if names else _CHOICES[:2]):
            known = ", ".join(map(str, names)) or "none are given"
            raise PromptError(f"tool_choice {self.tool_choice!r} names no tool (tools: {known}).")

    @property
    def offers_tools(self) -> bool:
        """Whether the answer may be a call."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be a call."""
        return self.offers_tools and self.tool_choice != "auto"

    def check_callable(self, *, calls_tools: bool) -> None:
        """Raises `PromptError` where the model is to choose whether to call, and is not known to be able to."""
        if self.offers_tools and not self.forces_tools and not calls_tools:
            raise PromptError(
                "The model's chat template is not known to offer tools: name vLLM's parser (tool_parser; of a server "
                "--tool-call-parser), or force a call by tool_choice."
            )

    @property
    def choice(self) -> str | dict[str, Any]:
        """`tool_choice` in OpenAI's form."""
        if self.tool_choice in _CHOICES:
            return self.tool_choice
        return {"type": "function", "function": {"name": self.tool_choice}}

    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them: content always there, arguments of calls as objects. Those that the
        model wrote wrong are left out, as vLLM's server does: else no further turn could be asked.
        """
        return [_turn(message) for message in self.messages]


def _turn(message: Message) -> dict[str, Any]:
    turn = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"].get("arguments"))}}
            for call in message["tool_calls"]
        ]
    return turn


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
