"""What every engine does."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.engine.chat import Chat, ToolCall
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import MarkedPrompt, Tokenizer
from lmcache_rag.request import BlendOptions, ReuseReport

Prompt = MarkedPrompt | Chat | Sequence[int] | str
"""A prompt with marks (its segments are known), or messages, token ids or text (stored chunks are found in them)."""


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        token_ids: of the answer; empty where a server answered.
        answer_tokens: how many tokens the answer has.
        finish_reason: `stop`, `length`, `tool_calls` or `abort`.
        ttft_s: seconds from submission to the first token.
        total_s: seconds from submission to the last.
        logprobs: per generated token, token id -> log-probability; empty where not asked for.
        tool_calls: what the model asks to be called, where a chat offers tools; they are no part of the text.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    reuse: ReuseReport
    ttft_s: float
    total_s: float
    prompt_tokens: int
    answer_tokens: int
    logprobs: tuple[dict[int, float], ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the last one carries the whole."""

    text: str
    completion: Completion | None = None


@dataclass
class PrecomputeReport:
    """What became of the chunks given to `precompute`.

    Attributes:
        computed: chunks computed and stored now, at least one variant of each.
        present: chunks that were stored already.
        unprimed: chunks that do not fit the model behind the primer, and have no primed variant.
        tokens, bytes_stored: of all variants stored now.
        evicted_objects: deleted from the store to make room.
        errors: number of a chunk -> why it is not stored, or not behind all that it should be.
    """

    computed: int = 0
    present: int = 0
    unprimed: int = 0
    tokens: int = 0
    bytes_stored: int = 0
    evicted_objects: int = 0
    seconds: float = 0.0
    errors: dict[int, str] = field(default_factory=dict)

    def count(self, number: int, requests: Sequence[ReuseReport], refusal: str) -> None:
        """Add what became of a chunk.

        Args:
            requests: that were to compute what was missing of it.
            refusal: why there are none; nothing where it was not refused.
        """
        if refusal:
            self.errors[number] = refusal
            return
        for each in requests:
            self.tokens += each.stored_tokens
            self.bytes_stored += each.bytes_stored
            self.evicted_objects += each.evicted_objects
        failed = [each.reason for each in requests if each.mode != "precompute" or each.reason]
        if failed:
            self.errors[number] = failed[0]
        elif any(each.stored_tokens for each in requests):
            self.computed += 1
        else:
            self.present += 1

    def check(self) -> None:
        """Raises `EngineError` where a chunk is not stored."""
        for number, why in self.errors.items():
            raise EngineError(f"Chunk {number} is not stored. {why}")


class Engine(ABC):
    """Answers prompts and precomputes chunks."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def max_model_len(self) -> int: ...

    @property
    @abstractmethod
    def model_name(self) -> str:
        """By which users know the model."""

    @property
    @abstractmethod
    def scope(self) -> str:
        """Names whose KV the engine uses and makes: two engines with the same scope share it."""

    @property
    @abstractmethod
    def calls_tools(self) -> bool:
        """Whether the model can choose to call tools."""

    @property
    def is_described(self) -> bool:
        """Whether what it says of itself, `model_name` and the like, is at hand: of a server it is asked for, once."""
        return True

    def describe(self) -> None:
        """Have that at hand. Raises `EngineError` where no server answers."""
        _ = self.model_name, self.max_model_len, self.calls_tools

    async def adescribe(self) -> None:
        """See `describe`; the event loop runs on meanwhile."""
        if not self.is_described:
            await asyncio.to_thread(self.describe)

    @abstractmethod
    def render(self, chat: Chat) -> str:
        """The text of a conversation in the model's own chat template, up to where its answer begins.

        Raises:
            PromptError: the model has no chat template, or it does not take these messages.
        """

    @abstractmethod
    def precompute(
        self,
        preamble: Sequence[int],
        chunks: Sequence[Sequence[int]],
        progress: Callable[[int], Any] | None = None,
        *,
        primer: Sequence[int] | None = None,
        namespace: str | None = None,
    ) -> PrecomputeReport:
        """Compute and store the KV of each chunk (token ids); `progress` gets each one's tokens.

        A chunk is computed behind `preamble`, which is exact where it is a prompt's first chunk, and once more behind
        `preamble` and `primer`, which needs less repair anywhere else. None stands for the engine's own primer, and
        an empty one leaves the second out. A namespace of None is the engine's own too. A chunk that cannot be stored
        is named in the report's `errors`, and the others are stored.
        """

    @abstractmethod
    def prefetch(self, chunks: Iterable[Sequence[int]]) -> int:
        """Have what is stored of chunks (token ids) brought from a slow store into its caches, in the background, since
        a prompt that holds them in this order is about to come. Returns how many objects that is; it waits for none.

        Raises:
            StoreError: the store could not be read lately.
        """

    @abstractmethod
    def own(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """Have stored chunks kept until `owner` releases them."""

    @abstractmethod
    def release(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """Let go of chunks: what no other owner has is deleted from the store."""

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Completion:
        """The whole answer. Requests with different `cache_salt` share nothing in vLLM's prefix cache."""
        return completed(self._pieces(prompt, sampling, options, cache_salt, handed_on=False))

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Iterator[Delta]:
        """The answer piece by piece. Leaving the iterator early ends the request."""
        return self._pieces(prompt, sampling, options, cache_salt, handed_on=True)

    async def agenerate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Completion:
        """See `generate`."""
        async for delta in self._apieces(prompt, sampling, options, cache_salt, handed_on=False):
            completion = delta.completion
        assert completion is not None
        return completion

    def astream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta]:
        """See `stream`."""
        return self._apieces(prompt, sampling, options, cache_salt, handed_on=True)

    @abstractmethod
    def _pieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> Iterator[Delta]:
        """The answer's pieces. Where they are not handed on to the caller, an answer may begin anew."""

    @abstractmethod
    def _apieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> AsyncIterator[Delta]:
        """See `_pieces`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all that the engine holds."""


def completed(deltas: Iterable[Delta]) -> Completion:
    """The whole answer, at the end of its pieces."""
    completion = None
    for delta in deltas:
        completion = delta.completion
    assert completion is not None
    return completion
