"""A LlamaIndex LLM over an lmcache-rag engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import TokenAsyncGen
from llama_index.llms.lmcache_rag.copies import Copyable
from llama_index.llms.lmcache_rag.events import KVReuseEvent, figures_of
from llama_index.llms.lmcache_rag.messages import (
    answer_message,
    calls_in,
    chat_of,
    plain_text,
    tool_choice_of,
    tool_form,
)
from llama_index.llms.lmcache_rag.prompts import as_texts, preamble_of
from llama_index.llms.lmcache_rag.structured import StructuredAnswers

from lmcache_rag.engine import Completion, Delta, Engine, EngineSettings, Prompt, Sampling, engine_of
from lmcache_rag.errors import CutOffError, PromptError
from lmcache_rag.prompt import encode
from lmcache_rag.request import (
    DEFAULT_SELECTOR,
    DEFAULT_TARGET_KL,
    BlendOptions,
    ReuseReport,
    SelectorName,
)

_BLEND_FIELDS = ("mode", "selector", "target_kl", "ratio")
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "seed", "stop")

_dispatcher = get_dispatcher(__name__)


class _Call(NamedTuple):
    """One request to the engine.

    Attributes:
        span_id: of the call that asks for it.
    """

    prompt: Prompt
    sampling: Sampling
    options: BlendOptions
    span_id: str | None


class LmcacheRag(Copyable, StructuredAnswers):
    """A language model that takes the KV of stored chunks from a store instead of reading them again.

    Stored chunks are found in each prompt by their tokens, so every LlamaIndex query engine works unchanged;
    `KVPrecompute` and `KVVectorStore` store the chunks. Each response's `raw` says under `reuse` what was reused, and
    so does a `KVReuseEvent`. Structured predictions follow a grammar, with every model; tools are called where the
    model's chat template offers them.

    Args:
        engine: a running engine; it stays the caller's to close.
        settings: instead of `engine`: the engine to start. Close it with `llm.engine.close()`.
        base_url: instead of both: of a server, or of several of the same model (`http://host:8000/v1`).
        values: the fields below, and those of every LlamaIndex LLM (`system_prompt`, `messages_to_prompt`, ...).

    Raises:
        EngineError: not exactly one of `engine`, `settings` and `base_url` is given, or the engine does not start. When
            copied or pickled: the engine runs in this process.
        PromptError: `messages_to_prompt` is given with `chat_template`. When called: the prompt does not fit the model,
            an argument is unknown, or a structured answer is cut off by `max_tokens` (`CutOffError`).
    """

    model_config = ConfigDict(extra="forbid")

    max_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Of the likeliest tokens, this share is drawn from.")
    seed: int | None = Field(default=None, description="Makes drawing repeatable.")
    stop: tuple[str, ...] = Field(default=(), description="Generation ends before any of these strings.")
    mode: Literal["blend", "off"] = Field(default="blend", description="`off` is vLLM without any reuse.")
    selector: SelectorName = Field(default=DEFAULT_SELECTOR, description="Which tokens of stored chunks are repaired.")
    target_kl: float = Field(
        default=DEFAULT_TARGET_KL, gt=0.0, description="How far from full prefill answers may be; see BlendOptions."
    )
    ratio: float | None = Field(
        default=None, ge=0.0, le=1.0, description="The share of stored chunks' tokens that is repaired, not a target."
    )

    _engine: Engine = PrivateAttr()
    _reports: deque[ReuseReport] = PrivateAttr(default_factory=lambda: deque(maxlen=1))

    def __init__(
        self,
        *,
        engine: Engine | None = None,
        settings: EngineSettings | None = None,
        base_url: str | Sequence[str] | None = None,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        **values: Any,
    ) -> None:
        super().__init__(**{"messages_to_prompt": messages_to_prompt or plain_text, **values})
        if messages_to_prompt is not None and self.chat_template:
            raise PromptError("messages_to_prompt writes the plain form: leave it out, or chat_template=True.")
        self._engine = engine_of(engine, settings, base_url)

    @classmethod
    def class_name(cls) -> str:
        return "LmcacheRag"

    @property
    def engine(self) -> Engine:
        """The engine that answers."""
        return self._engine

    @property
    def last_reuse(self) -> ReuseReport | None:
        """What was reused for the answer that was finished last; None before the first."""
        return self._reports[-1] if self._reports else None

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self._engine.max_model_len,
            num_output=self.max_tokens,
            model_name=self._engine.model_name,
            is_chat_model=self.chat_template,
            is_function_calling_model=self.chat_template and self._engine.calls_tools,
        )

    def to_payload(self) -> dict[str, Any]:
        """See `BaseLLM.to_payload`. It is asked for before every call, also within event loops, so no server is."""
        return super().to_payload() if self._engine.is_described else {"class_name": self.class_name()}

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `BaseLLM.complete`. `kwargs` are fields of `Sampling` that shape the answer's text, and some of
        `BlendOptions`: see the class."""
        call = self._completion(prompt, kwargs, formatted=formatted)
        return self._text_response(call, self._engine.generate(*call[:3]))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """See `complete`; leaving the generator early ends the request. The last response carries `raw`."""
        call = self._completion(prompt, kwargs, formatted=formatted)

        def pieces() -> CompletionResponseGen:
            text = ""
            for delta in self._engine.stream(*call[:3]):
                text += delta.text
                yield from self._text_pieces(call, text, delta)

        return pieces()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `complete`."""
        call = self._completion(prompt, kwargs, formatted=formatted)
        return self._text_response(call, await self._engine.agenerate(*call[:3]))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """See `stream_complete`."""
        call = self._completion(prompt, kwargs, formatted=formatted)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async for delta in self._engine.astream(*call[:3]):
                text += delta.text
                for piece in self._text_pieces(call, text, delta):
                    yield piece

        return pieces()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `complete`. With `chat_template` also `tools` (in OpenAI's form), `tool_choice` (`auto`, `none`,
        `required` or a tool's name) and `allow_parallel_tool_calls` may be given."""
        call = self._conversation(messages, kwargs)
        return self._chat_response(call, self._engine.generate(*call[:3]))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """See `chat` and `stream_complete`; tool calls come with the last response."""
        call = self._conversation(messages, kwargs)

        def pieces() -> ChatResponseGen:
            text = ""
            for delta in self._engine.stream(*call[:3]):
                text += delta.text
                yield from self._chat_pieces(call, text, delta)

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `chat`."""
        call = self._conversation(messages, kwargs)
        return self._chat_response(call, await self._engine.agenerate(*call[:3]))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """See `stream_chat`."""
        call = self._conversation(messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async for delta in self._engine.astream(*call[:3]):
                text += delta.text
                for piece in self._chat_pieces(call, text, delta):
                    yield piece

        return pieces()

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tools that the model asks to be called.

        Raises:
            ValueError: there are none, and `error_on_no_tool_call`.
        """
        calls = calls_in(response.message)
        if not calls and error_on_no_tool_call:
            cut = isinstance(response.raw, dict) and response.raw.get("finish_reason") == "length"
            why = f"was cut off after max_tokens={self.max_tokens}: raise it" if cut else "calls no tool"
            raise ValueError(f"The answer {why} (got {response.message.content!r}).")
        return [
            ToolSelection.model_validate(
                {"tool_id": call.tool_call_id or "", "tool_name": call.tool_name, "tool_kwargs": call.tool_kwargs}
            )
            for call in calls
        ]

    def preamble(self, template: BasePromptTemplate) -> str:
        """All text before `{context_str}` in the prompts that this model is given for `template`.

        Raises:
            PromptError: the template has no `{context_str}`, or what stands before it differs from prompt to prompt.
        """

        def render(**variables: str) -> str:
            if self.chat_template:
                messages = self._get_messages(template, **variables)
                return self._engine.render(chat_of(messages, template_kwargs=self.chat_template_kwargs))
            return self._get_prompt(template, **variables)

        return preamble_of(template, render)

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a whole prompt's text, or of its beginning. A chat template writes its special tokens itself;
        to plain text the tokenizer adds its own."""
        return encode(self._engine.tokenizer, text, add_special_tokens=not self.chat_template)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """See `LLM.apredict`."""
        await self._engine.adescribe()  # LlamaIndex reads the metadata within the event loop
        return await super().apredict(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """See `LLM.astream`."""
        await self._engine.adescribe()  # LlamaIndex reads the metadata within the event loop
        return await super().astream(prompt, **prompt_args)

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        return super()._get_prompt(prompt, **as_texts(prompt, prompt_args))

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        return super()._get_messages(prompt, **as_texts(prompt, prompt_args))

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())
        if user_msg:
            asked = ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            messages.append(asked)
        return {
            "messages": messages,
            "tools": [tool_form(tool) for tool in tools],
            "tool_choice": tool_choice_of(tool_choice, required=tool_required and bool(tools)),
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _completion(self, prompt: str, kwargs: dict[str, Any], *, formatted: bool) -> _Call:
        if self.chat_template and formatted:
            return self._call(self.token_ids(prompt), kwargs)
        if self.chat_template:
            given = kwargs.pop("chat_template_kwargs", self.chat_template_kwargs)
            asked = [ChatMessage(role=MessageRole.USER, content=prompt)]
            return self._call(chat_of(asked, template_kwargs=given), kwargs)
        assert self.completion_to_prompt is not None
        return self._call(prompt if formatted else self.completion_to_prompt(prompt), kwargs)

    def _conversation(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> _Call:
        tools, tool_choice = kwargs.pop("tools", None) or (), kwargs.pop("tool_choice", None)
        parallel = kwargs.pop("allow_parallel_tool_calls", True)
        if self.chat_template:
            choice = tool_choice_of(tool_choice, required=False)
            given = kwargs.pop("chat_template_kwargs", self.chat_template_kwargs)
            return self._call(chat_of(messages, tools, choice, parallel=parallel, template_kwargs=given), kwargs)
        if tools:
            raise PromptError("Tools are offered in the model's chat template: LmcacheRag(..., chat_template=True).")
        assert self.messages_to_prompt is not None
        return self._call(self.messages_to_prompt(messages), kwargs)

    def _call(self, prompt: Prompt, kwargs: dict[str, Any]) -> _Call:
        """What one call asks for: the fields, and the call's own arguments over them."""
        values = {name: getattr(self, name) for name in (*_SAMPLING_FIELDS, *_BLEND_FIELDS)}
        if self._json_schema is not None:
            values |= {"json_schema": self._json_schema, "stop": ()}
        values |= kwargs
        if "target_kl" in kwargs and "ratio" not in kwargs:
            values["ratio"] = None
        blend = {name: values.pop(name) for name in _BLEND_FIELDS}
        return _Call(prompt, Sampling.for_text(**values), BlendOptions.checked(**blend), active_span_id.get())

    def _text_response(self, call: _Call, completion: Completion) -> CompletionResponse:
        return CompletionResponse(text=completion.text, raw=self._ended(call, completion))

    def _text_pieces(self, call: _Call, text: str, delta: Delta) -> CompletionResponseGen:
        if delta.text or delta.completion is not None:
            raw = None if delta.completion is None else self._ended(call, delta.completion)
            yield CompletionResponse(text=text, delta=delta.text, raw=raw)

    def _chat_response(self, call: _Call, completion: Completion, delta: str | None = None) -> ChatResponse:
        return ChatResponse(message=answer_message(completion), delta=delta, raw=self._ended(call, completion))

    def _chat_pieces(self, call: _Call, text: str, delta: Delta) -> ChatResponseGen:
        if delta.completion is not None:
            yield self._chat_response(call, delta.completion, delta.text)
        elif delta.text:
            message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
            yield ChatResponse(message=message, delta=delta.text)

    def _ended(self, call: _Call, completion: Completion) -> dict[str, Any]:
        """Report an answer; returns its `raw`. Raises `CutOffError` where it was to be JSON, and is cut off."""
        self._reports.append(completion.reuse)
        _dispatcher.event(KVReuseEvent.of(completion, self._engine.model_name, call.span_id))
        if self._json_schema is not None and completion.finish_reason == "length":
            raise CutOffError(
                f"The structured answer was cut off after {completion.answer_tokens} tokens: raise max_tokens "
                f"(got {call.sampling.max_tokens}), or bound the lengths in the schema."
            )
        return figures_of(completion)
