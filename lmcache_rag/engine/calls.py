"""A request as an OpenAI-compatible server takes it, and its answer as it comes back, piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from lmcache_rag.engine.base import Completion, Prompt
from lmcache_rag.engine.chat import Chat, ToolCall
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import MarkedPrompt, check_text
from lmcache_rag.request import PARAMS_KEY, BlendOptions, ReuseReport

_STRUCTURES = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Fields of `Sampling` as vLLM's `structured_outputs` calls them."""


@dataclass(frozen=True)
class Call:
    """What is sent.

    Attributes:
        is_chat: whether it goes to `/chat/completions`, or to `/completions`.
        body: arguments of the client's `create`, without the model.
        text: what is to be the beginning of a later prompt's text where that continues this one.
    """

    is_chat: bool
    body: Mapping[str, Any]
    text: str


def call_of(prompt: Prompt, sampling: Sampling | None, options: BlendOptions | None, cache_salt: str | None) -> Call:
    """A streamed request.

    Raises:
        PromptError: the prompt is empty or no text, or something is asked for that only an engine in this process does.
    """
    sampling, options = sampling or Sampling(), options or BlendOptions()
    if sampling.forced_token_ids or sampling.logprobs is not None:
        raise PromptError("A server gives neither forced answers nor log-probabilities: use a LocalEngine for these.")
    if isinstance(prompt, MarkedPrompt) and options.segments is None:
        segments = tuple((segment.start, segment.length) for segment in prompt.segments) or None
        options = options.model_copy(update={"segments": segments, "primer": options.primer or prompt.primer})
    asked, text = _asked(prompt)
    extra = _extra(sampling, options, cache_salt)
    if isinstance(prompt, Chat) and prompt.template_kwargs:
        extra["chat_template_kwargs"] = dict(prompt.template_kwargs)
    body = {
        **asked,
        **_sampled(sampling),
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": extra,
    }
    return Call(isinstance(prompt, Chat), body, text)


def _asked(prompt: Prompt) -> tuple[dict[str, Any], str]:
    """The prompt as arguments, and as a text that begins its continuations."""
    if isinstance(prompt, Chat):
        messages = [dict(message) for message in prompt.messages]
        asked: dict[str, Any] = {"messages": messages}
        if prompt.tools:
            asked["tools"] = [_forced(tool) if prompt.forces_tools else dict(tool) for tool in prompt.tools]
            asked["tool_choice"] = prompt.choice
            asked["parallel_tool_calls"] = prompt.parallel
        text = "\n".join(json.dumps(message, sort_keys=True, default=str) for message in messages)
        check_text(text)
        return asked, text
    if isinstance(prompt, str):
        check_text(prompt)
        if not prompt:
            raise PromptError("The prompt is empty.")
        return {"prompt": prompt}, prompt
    token_ids = list(prompt.token_ids if isinstance(prompt, MarkedPrompt) else prompt)
    if not token_ids:
        raise PromptError("The prompt is empty.")
    return {"prompt": token_ids}, " ".join(map(str, token_ids))


def _forced(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool whose call is forced: vLLM keeps the arguments to their schema where it is told to be strict."""
    return {**tool, "function": {"strict": True, **tool["function"]}}


def _sampled(sampling: Sampling) -> dict[str, Any]:
    sampled: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.stop:
        sampled["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        sampled["seed"] = sampling.seed
    return sampled


def _extra(sampling: Sampling, options: BlendOptions, cache_salt: str | None) -> dict[str, Any]:
    """What only vLLM's server knows."""
    extra: dict[str, Any] = {"kv_transfer_params": options.to_params()}
    if sampling.ignore_eos:
        extra["ignore_eos"] = True
    if cache_salt is not None:
        extra["cache_salt"] = cache_salt
    for name, form in sampling.structure.items():
        extra["structured_outputs"] = {_STRUCTURES[name]: list(form) if name == "choice" else form}
    return extra


@dataclass
class _PartialCall:
    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """Takes the pieces of one streamed answer.

    Attributes:
        begun: whether something of it has been handed on, so that it cannot be asked for again.
    """

    submitted_at: float
    begun: bool = False
    text: str = ""
    _first_at: float | None = None
    _finish_reason: str | None = None
    _usage: Any = None
    _params: Mapping[str, Any] = field(default_factory=dict)
    _calls: dict[int, _PartialCall] = field(default_factory=dict)

    def take(self, chunk: Any) -> str:
        """Add a chunk of the client's stream; returns the new text."""
        self._usage = chunk.usage or self._usage
        self._params = (chunk.model_extra or {}).get("kv_transfer_params") or self._params
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        delta = getattr(choice, "delta", None)
        text = (choice.text if delta is None else delta.content) or ""
        pieces = (delta.tool_calls if delta is not None else None) or ()
        for piece in pieces:
            call = self._calls.setdefault(piece.index, _PartialCall())
            call.call_id = piece.id or call.call_id
            if piece.function is not None:
                call.name += piece.function.name or ""
                call.arguments += piece.function.arguments or ""
        thoughts = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
        if self._first_at is None and (text or pieces or thoughts or choice.finish_reason):
            self._first_at = time.perf_counter()
        self.text += text
        return text

    def completion(self) -> Completion:
        """The whole answer. Raises `ConnectionError` where its end has not come."""
        now = time.perf_counter()
        if self._finish_reason is None:
            raise ConnectionError("The answer ended in the middle.")
        usage = self._usage
        prompt_tokens = usage.prompt_tokens if usage is not None else 0
        is_cut = self._finish_reason == "length"
        calls = tuple(
            ToolCall(call.call_id, call.name, call.arguments)
            for call in self._calls.values()
            if not is_cut or _is_object(call.arguments)  # one that is cut off is none
        )
        return Completion(
            text=self.text,
            token_ids=(),
            finish_reason="tool_calls" if calls else self._finish_reason,
            reuse=report_of(self._params, prompt_tokens),
            ttft_s=(self._first_at or now) - self.submitted_at,
            total_s=now - self.submitted_at,
            prompt_tokens=prompt_tokens,
            answer_tokens=usage.completion_tokens if usage is not None else 0,
            tool_calls=calls,
        )


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def report_of(params: Mapping[str, Any], prompt_tokens: int) -> ReuseReport:
    """The reuse report in a server's `kv_transfer_params`, without what a later release has added to it. The answer is
    worth more than its report, so one that cannot be read is no error."""
    figures, reason = params.get(PARAMS_KEY), "the server reports nothing"
    if isinstance(figures, Mapping):
        known = {name: value for name, value in figures.items() if name in ReuseReport.model_fields}
        try:
            return ReuseReport(**known)
        except ValidationError:
            reason = "the server's report is another release's"
    return ReuseReport(reason=reason, prompt_tokens=prompt_tokens, vllm_tokens=prompt_tokens)


def precompute_call(
    context: Sequence[int], chunk: Sequence[int], options: BlendOptions, cache_salt: str | None
) -> Call:
    """A request that has a chunk computed behind a context, and stored."""
    body = {
        "prompt": [*context, *chunk],
        "max_tokens": 1,
        "extra_body": _extra(Sampling(), options, cache_salt),
    }
    return Call(is_chat=False, body=body, text="")
