"""A LangChain chat model over an lmcache-rag engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, SkipValidation

from langchain_lmcache_rag.prompts import plain_text, turns_of
from lmcache_rag.engine import Completion, Delta, EngineSettings, Sampling, engine_of
from lmcache_rag.prompt import chat_text, encode
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, SelectorName

if TYPE_CHECKING:
    from lmcache_rag.engine import LocalEngine

_BLEND_FIELDS = ("mode", "selector", "target_kl", "ratio")
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "stop")


class ChatLmcacheRag(BaseChatModel):
    """A chat model that takes the KV of stored chunks from a store instead of reading them again.

    Stored chunks are found in each prompt by their tokens, so every chain works unchanged; `KVRetriever` stores the
    chunks. Each message's `response_metadata` says under `reuse` what was reused; its `usage_metadata` counts the
    tokens that were not computed as `cache_read`.

    Args:
        engine: a running engine; it stays the caller's to close.
        settings: instead of `engine`: the engine to start. Close it with `llm.engine.close()`.
        values: the fields below, and those of every LangChain chat model. All but `chat_template` can also be given
            with a call, or bound (`llm.bind(mode="off")`).

    Attributes:
        max_tokens: longest answer.
        temperature: 0 is greedy.
        stop: generation ends before any of these strings.
        mode: `off` is vLLM without any reuse.
        selector: which tokens of stored chunks are repaired.
        target_kl: how far from full prefill answers may be; see `BlendOptions`.
        ratio: the share of stored chunks' tokens that is repaired, 0 to 1, instead of a target.
        chat_template: whether prompts are written in the model's own chat template, or as plain text.
        streaming: whether `invoke` streams too, for callbacks that want each token.

    Raises:
        EngineError: not exactly one of `engine` and `settings` is given, or the engine does not start.
        PromptError: when called: the prompt does not fit the model or is not text, or an argument is unknown.
    """

    model_config = ConfigDict(extra="forbid")

    engine: SkipValidation[Any] = Field(exclude=True, repr=False)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    mode: Literal["blend", "off"] = "blend"
    selector: SelectorName = DEFAULT_SELECTOR
    target_kl: float = Field(default=DEFAULT_TARGET_KL, gt=0.0)
    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    chat_template: bool = False
    streaming: bool = False

    def __init__(
        self, *, engine: LocalEngine | None = None, settings: EngineSettings | None = None, **values: Any
    ) -> None:
        running = engine_of(engine, settings)
        try:
            super().__init__(**{"engine": running, **values})
        except BaseException:
            if engine is None:
                running.close()
            raise

    @property
    def model_name(self) -> str:
        """The engine's model: Hugging Face id or folder."""
        return str(self.engine.settings.model)

    def prompt_text(self, messages: Sequence[BaseMessage]) -> str:
        """Messages as the model reads them. Raises `PromptError` for what is not text."""
        if self.chat_template:
            return chat_text(self.engine.tokenizer, turns_of(messages))
        return plain_text(messages)

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a whole prompt's text, or of its beginning. A chat template writes its special tokens itself;
        to plain text the tokenizer adds its own."""
        return encode(self.engine.tokenizer, text, add_special_tokens=not self.chat_template)

    @property
    def _llm_type(self) -> str:
        return "lmcache-rag"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {
            "model_name": self.model_name,
            "model_fingerprint": self.engine.model_fingerprint,
            "namespace": self.engine.settings.namespace,
            "chat_template": self.chat_template,
            **{name: getattr(self, name) for name in (*_SAMPLING_FIELDS, *_BLEND_FIELDS)},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(**{**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "lmcache-rag"})

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self.engine.generate(*self._request(messages, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(await self.engine.agenerate(*self._request(messages, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for delta in self.engine.stream(*self._request(messages, stop, kwargs)):
            if delta.text or delta.completion is not None:
                yield self._piece(delta)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for delta in self.engine.astream(*self._request(messages, stop, kwargs)):
            if delta.text or delta.completion is not None:
                yield self._piece(delta)

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[list[int], Sampling, BlendOptions]:
        """What one call asks for: the fields, and the call's own arguments over them."""
        values = {name: getattr(self, name) for name in (*_SAMPLING_FIELDS, *_BLEND_FIELDS)} | kwargs
        values.pop("stream", None)  # LangChain's own: which of our methods it is to call
        if stop is not None:
            values["stop"] = stop
        if "target_kl" in kwargs and "ratio" not in kwargs:
            values["ratio"] = None
        blend = {name: values.pop(name) for name in _BLEND_FIELDS}
        options = BlendOptions.checked(**blend)
        return self.get_token_ids(self.prompt_text(messages)), Sampling.checked(**values), options

    def _result(self, completion: Completion) -> ChatResult:
        message = AIMessage(
            content=completion.text, response_metadata=self._report(completion), usage_metadata=_usage(completion)
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _piece(self, delta: Delta) -> ChatGenerationChunk:
        if delta.completion is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=delta.text))
        message = AIMessageChunk(
            content=delta.text,
            response_metadata=self._report(delta.completion),
            usage_metadata=_usage(delta.completion),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _report(self, completion: Completion) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "finish_reason": completion.finish_reason,
            "reuse": completion.reuse.model_dump(),
            "ttft_s": completion.ttft_s,
            "total_s": completion.total_s,
        }


def _usage(completion: Completion) -> UsageMetadata:
    answer_tokens = len(completion.token_ids)
    reuse = completion.reuse
    return UsageMetadata(
        input_tokens=completion.prompt_tokens,
        output_tokens=answer_tokens,
        total_tokens=completion.prompt_tokens + answer_tokens,
        input_token_details=InputTokenDetails(cache_read=reuse.local_tokens + reuse.reused_tokens),
    )
