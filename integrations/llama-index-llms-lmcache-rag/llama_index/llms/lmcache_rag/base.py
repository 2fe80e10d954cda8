"""A LlamaIndex LLM over an lmcache-rag engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.llms.lmcache_rag.prompts import chat_form, plain_text, preamble_of

from lmcache_rag.engine import Completion, Delta, Engine, EngineSettings, Sampling, engine_of
from lmcache_rag.prompt import encode
from lmcache_rag.request import (
    DEFAULT_SELECTOR,
    DEFAULT_TARGET_KL,
    BlendOptions,
    ReuseReport,
    SelectorName,
)

if TYPE_CHECKING:
    from lmcache_rag.engine import LocalEngine

_BLEND_FIELDS = ("mode", "selector", "target_kl", "ratio")
_SAMPLING_FIELDS = ("max_tokens", "temperature", "stop")


class LmcacheRag(CustomLLM):
    """A language model that takes the KV of stored chunks from a store instead of reading them again.

    Stored chunks are found in each prompt by their tokens, so every LlamaIndex query engine works unchanged;
    `KVPrecompute` stores the chunks. Each response's `raw` says under `reuse` what was reused.

    Args:
        engine: a running engine; it stays the caller's to close.
        settings: instead of `engine`: the engine to start. Close it with `llm.engine.close()`.
        values: the fields below, and those of every LlamaIndex LLM (`system_prompt`, `messages_to_prompt`, ...).

    Raises:
        EngineError: not exactly one of `engine` and `settings` is given, or the engine does not start.
        PromptError: when called: the prompt does not fit the model, or an argument is unknown.
    """

    model_config = ConfigDict(extra="forbid")

    max_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    stop: tuple[str, ...] = Field(default=(), description="Generation ends before any of these strings.")
    mode: Literal["blend", "off"] = Field(default="blend", description="`off` is vLLM without any reuse.")
    selector: SelectorName = Field(default=DEFAULT_SELECTOR, description="Which tokens of stored chunks are repaired.")
    target_kl: float = Field(
        default=DEFAULT_TARGET_KL, gt=0.0, description="How far from full prefill answers may be; see BlendOptions."
    )
    ratio: float | None = Field(
        default=None, ge=0.0, le=1.0, description="The share of stored chunks' tokens that is repaired, not a target."
    )
    chat_template: bool = Field(
        default=False, description="Whether prompts are written in the model's own chat template, or as plain text."
    )

    _engine: Engine = PrivateAttr()
    _last_reuse: ReuseReport | None = PrivateAttr(default=None)

    def __init__(
        self,
        *,
        engine: LocalEngine | None = None,
        settings: EngineSettings | None = None,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        **values: Any,
    ) -> None:
        super().__init__(messages_to_prompt=messages_to_prompt or plain_text, **values)
        self._engine = engine_of(engine, settings)
        if self.chat_template and messages_to_prompt is None:
            self.messages_to_prompt = functools.partial(chat_form, self._engine.tokenizer)

    @classmethod
    def class_name(cls) -> str:
        return "LmcacheRag"

    @property
    def engine(self) -> LocalEngine:
        """The engine that answers."""
        return self._engine

    @property
    def last_reuse(self) -> ReuseReport | None:
        """What was reused for the answer that was finished last; None before the first."""
        return self._last_reuse

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self._engine.max_model_len,
            num_output=self.max_tokens,
            model_name=self._engine.settings.model,
            is_chat_model=self.chat_template,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `BaseLLM.complete`. `kwargs` are fields of `Sampling`, and some of `BlendOptions`: see the class."""
        sampling, options = self._request(kwargs)
        return self._finished(self._engine.generate(self._prompt_ids(prompt, formatted), sampling, options))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """See `complete`; leaving the generator early ends the request. The last response carries `raw`."""
        sampling, options = self._request(kwargs)
        text = ""
        for delta in self._engine.stream(self._prompt_ids(prompt, formatted), sampling, options):
            text += delta.text
            if delta.text or delta.completion is not None:
                yield self._piece(text, delta)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `complete`."""
        sampling, options = self._request(kwargs)
        return self._finished(await self._engine.agenerate(self._prompt_ids(prompt, formatted), sampling, options))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """See `stream_complete`."""
        sampling, options = self._request(kwargs)
        deltas = self._engine.astream(self._prompt_ids(prompt, formatted), sampling, options)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async for delta in deltas:
                text += delta.text
                if delta.text or delta.completion is not None:
                    yield self._piece(text, delta)

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `complete`; `messages` are written as text by `messages_to_prompt`."""
        response = await self.acomplete(self._text(messages), formatted=True, **kwargs)
        return completion_response_to_chat_response(response)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """See `stream_complete`."""
        responses = await self.astream_complete(self._text(messages), formatted=True, **kwargs)
        return astream_completion_response_to_chat_response(responses)

    def preamble(self, template: BasePromptTemplate) -> str:
        """All text before `{context_str}` in the prompts that this model is given for `template`.

        Raises:
            PromptError: the template has no `{context_str}`, or what stands before it differs from prompt to prompt.
        """

        def render(**variables: str) -> str:
            if self.metadata.is_chat_model:
                return self._text(self._get_messages(template, **variables))
            return self._get_prompt(template, **variables)

        return preamble_of(template, render)

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a whole prompt's text, or of its beginning. A chat template writes its special tokens itself;
        to plain text the tokenizer adds its own."""
        return encode(self._engine.tokenizer, text, add_special_tokens=not self.chat_template)

    def _text(self, messages: Sequence[ChatMessage]) -> str:
        assert self.messages_to_prompt is not None
        return self.messages_to_prompt(messages)

    def _prompt_ids(self, prompt: str, formatted: bool) -> list[int]:
        if not formatted and self.chat_template:
            prompt = self._text([ChatMessage(role=MessageRole.USER, content=prompt)])
        elif not formatted:
            assert self.completion_to_prompt is not None
            prompt = self.completion_to_prompt(prompt)
        return self.token_ids(prompt)

    def _request(self, kwargs: dict[str, Any]) -> tuple[Sampling, BlendOptions]:
        """What one call asks for: the fields, and the call's own arguments over them."""
        values = {name: getattr(self, name) for name in (*_SAMPLING_FIELDS, *_BLEND_FIELDS)} | kwargs
        if "target_kl" in kwargs and "ratio" not in kwargs:
            values["ratio"] = None
        blend = {name: values.pop(name) for name in _BLEND_FIELDS}
        return Sampling.checked(**values), BlendOptions.checked(**blend)

    def _piece(self, text: str, delta: Delta) -> CompletionResponse:
        raw = None if delta.completion is None else self._report(delta.completion)
        return CompletionResponse(text=text, delta=delta.text, raw=raw)

    def _finished(self, completion: Completion) -> CompletionResponse:
        return CompletionResponse(text=completion.text, raw=self._report(completion))

    def _report(self, completion: Completion) -> dict[str, Any]:
        self._last_reuse = completion.reuse
        answer_tokens = len(completion.token_ids)
        return {
            "reuse": completion.reuse.model_dump(),
            "ttft_s": completion.ttft_s,
            "total_s": completion.total_s,
            "finish_reason": completion.finish_reason,
            "usage": {
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": answer_tokens,
                "total_tokens": completion.prompt_tokens + answer_tokens,
            },
        }
