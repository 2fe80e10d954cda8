"""A LangChain chat model over an lmcache-rag engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, SkipValidation

from langchain_lmcache_rag.prompts import plain_text, turns_of
from langchain_lmcache_rag.structured import Method, structured
from langchain_lmcache_rag.tools import call_chunks_of, calls_of, choice_of
from lmcache_rag.engine import Chat, Completion, Delta, Engine, EngineSettings, Sampling, engine_of
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import encode
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, SelectorName

_BLEND_FIELDS = ("mode", "selector", "target_kl", "ratio")
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "stop")


class ChatLmcacheRag(BaseChatModel):
    """A chat model that takes the KV of stored chunks from a store instead of reading them again.

    Stored chunks are found in each prompt by their tokens, so every chain works unchanged; `KVRetriever` stores the
    chunks. Each message's `response_metadata` says under `reuse` what was reused; its `usage_metadata` counts the
    tokens that were not computed as `cache_read`. Over a server it can be copied and pickled.

    Args:
        engine: a running engine; it stays the caller's to close.
        settings: instead of `engine`: the engine to start. Close it with `llm.engine.close()`.
        base_url: instead of both: of a server, or of several of one model; neither vllm nor torch is imported then.
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
        chat_template_kwargs: what the template takes besides, such as `{"enable_thinking": False}`.
        streaming: whether `invoke` streams too, for callbacks that want each token.

    Raises:
        EngineError: not exactly one of `engine`, `settings` and `base_url` is given, or the engine does not start.
            When copied or pickled: the engine runs in this process.
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
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    streaming: bool = False

    def __init__(
        self,
        *,
        engine: Engine | None = None,
        settings: EngineSettings | None = None,
        base_url: str | Sequence[str] | None = None,
        **values: Any,
    ) -> None:
        running = engine_of(engine, settings, base_url)
        try:
            super().__init__(**{"engine": running, **values})
        except BaseException:
            if engine is None:
                running.close()
            raise

    @property
    def model_name(self) -> str:
        """The engine's model: Hugging Face id or folder, or its name at the server."""
        return str(self.engine.model_name)

    def prompt_text(self, messages: Sequence[BaseMessage]) -> str:
        """Messages as the model reads them, where no tools are bound. Raises `PromptError` for what is not text."""
        if self.chat_template:
            return str(self.engine.render(Chat(turns_of(messages), template_kwargs=self.chat_template_kwargs)))
        return plain_text(messages)

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a whole prompt's text, or of its beginning. A chat template writes its special tokens itself;
        to plain text the tokenizer adds its own."""
        return encode(self.engine.tokenizer, text, add_special_tokens=not self.chat_template)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """See `BaseChatModel.bind_tools`. Takes `chat_template=True`, and a model trained to call tools, unless a call
        is forced: that is written by a grammar, so that every model can.

        Args:
            tools: functions, tools, classes, or OpenAI's dictionaries.
            tool_choice: `auto` (the model chooses, also None), `none`, `any` or `required` or True (at least one call),
                or the name of the one to be called.
            strict: as in OpenAI's form of a tool.
            kwargs: `parallel_tool_calls=False` for one call at most; others as with any call.

        Raises:
            PromptError: `tool_choice` names none of the tools.
        """
        given = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choice = choice_of(tool_choice)
        Chat([{"role": "user", "content": ""}], given, choice)
        return self.bind(tools=given, tool_choice=choice, **kwargs)

    def with_structured_output(  # type: ignore[override]
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """See `BaseChatModel.with_structured_output`. Answers are written by a grammar, so that every model's can be
        read. The model is told nothing of the schema by `json_schema`: say in the prompt what is not plain from names.

        Args:
            schema: a pydantic class, a TypedDict class, a JSON schema, or OpenAI's form of a function.
            method: `json_schema`; `function_calling`, a forced call, of which the model's chat template tells it, and
                which takes `chat_template=True`; or `json_mode`, any JSON object.
            include_raw: whether the message comes too: `{"raw", "parsed", "parsing_error"}`.
            strict: as in OpenAI's form.
            kwargs: arguments of all calls, such as `max_tokens`.

        Raises:
            PromptError: the schema is missing, or the method is unknown.
            OutputParserException: when called: the answer was cut off by `max_tokens`, or the class refuses it.
        """
        return structured(self, schema, method, strict=strict, include_raw=include_raw, **kwargs)

    async def agenerate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        """See `BaseChatModel.agenerate`."""
        await self.engine.adescribe()  # LangChain asks for it within the event loop
        return await super().agenerate(messages, *args, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002  # LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """See `BaseChatModel.astream`."""
        await self.engine.adescribe()  # LangChain asks for it within the event loop
        async for piece in super().astream(input, config, **kwargs):
            yield piece

    @property
    def _llm_type(self) -> str:
        return "lmcache-rag"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {
            "model_name": self.model_name,
            "scope": self.engine.scope,
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
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
    ) -> tuple[Chat | str, Sampling, BlendOptions]:
        """What one call asks for: the fields, and the call's own arguments over them."""
        values = {name: getattr(self, name) for name in (*_SAMPLING_FIELDS, *_BLEND_FIELDS)} | kwargs
        for own in ("stream", "streaming"):  # LangChain's: which of our methods it is to call
            values.pop(own, None)
        prompt = self._prompt(messages, values)
        if stop is not None:
            values["stop"] = stop
        if "target_kl" in kwargs and "ratio" not in kwargs:
            values["ratio"] = None
        options = BlendOptions.checked(**{name: values.pop(name) for name in _BLEND_FIELDS})
        sampling = Sampling.for_text(**values)
        has_form = bool(sampling.structure) or (isinstance(prompt, Chat) and prompt.forces_tools)
        if has_form and stop is None and "stop" not in kwargs:  # the fields' are for prose: within JSON they would cut
            sampling = sampling.model_copy(update={"stop": ()})
        return prompt, sampling, options

    def _prompt(self, messages: list[BaseMessage], values: dict[str, Any]) -> Chat | str:
        """The prompt of one call; takes from its arguments what concerns tools."""
        tools = [convert_to_openai_tool(tool) for tool in values.pop("tools", None) or ()]
        choice = choice_of(values.pop("tool_choice", None))
        parallel = bool(values.pop("parallel_tool_calls", True))
        if self.chat_template:
            given = values.pop("chat_template_kwargs", self.chat_template_kwargs)
            return Chat(turns_of(messages), tools, choice, parallel, given)
        if tools and choice != "none":
            raise PromptError(
                "Plain prompts offer no tools: use ChatLmcacheRag(chat_template=True); structured output goes by "
                'method="json_schema" too.'
            )
        return plain_text(messages)

    def _result(self, completion: Completion) -> ChatResult:
        calls, invalid = calls_of(completion.tool_calls)
        message = AIMessage(
            content=completion.text,
            tool_calls=calls,
            invalid_tool_calls=invalid,
            response_metadata=self._report(completion),
            usage_metadata=_usage(completion),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _piece(self, delta: Delta) -> ChatGenerationChunk:
        if delta.completion is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=delta.text))
        message = AIMessageChunk(
            content=delta.text,
            tool_call_chunks=call_chunks_of(delta.completion.tool_calls),
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
    reuse = completion.reuse
    return UsageMetadata(
        input_tokens=completion.prompt_tokens,
        output_tokens=completion.answer_tokens,
        total_tokens=completion.prompt_tokens + completion.answer_tokens,
        input_token_details=InputTokenDetails(cache_read=reuse.local_tokens + reuse.reused_tokens),
    )
