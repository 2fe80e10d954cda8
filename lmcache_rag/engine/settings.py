"""Settings of engines and of one generation. Unknown or impossible values are errors that name the field."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lmcache_rag.blobs.throttled import Throttle
from lmcache_rag.blobs.uri import StoreURI, TierURI
from lmcache_rag.codec import DEFAULT_CODEC, codec_named
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.library.eviction import eviction_named
from lmcache_rag.library.hot import DEFAULT_HOT_BYTES
from lmcache_rag.library.room import DAY_S
from lmcache_rag.model import DEFAULT_MODEL
from lmcache_rag.request import DEFAULT_NAMESPACE, NAMESPACE_PATTERN, Conversations, Learn, Refine, first_problem


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class EngineSettings(BaseSettings):
    """How a local engine is started. Each field can be set by an environment variable, `LMCACHE_RAG_<FIELD>`.

    Attributes:
        model: Hugging Face id or folder.
        store: folder or URI of the KV store (see `blobs.uri`); shared by every engine that names it.
        tiers: folders or URIs of caches in front of it, fastest first, such as `file:///var/cache/kv?capacity=100GiB`.
        codec: the one of `codec.CODECS` in which KV is stored: raw, q8, high, balanced, small, or another.
        extra_codecs: in which chunks are stored as well, for requests with a TTFT goal to choose from.
        namespace: whose KV: one namespace never sees another's.
        dtype: the model's compute type; `auto` is float32 on CPUs without native bfloat16, else the model's own.
        max_model_len: longest prompt and answer together; None takes the model's own limit.
        max_num_batched_tokens: tokens that vLLM computes in one step; None lets vLLM decide.
        kv_cache_bytes: size of vLLM's paged KV cache; None lets vLLM decide (on CPUs: 2 GiB).
        block_tokens: tokens per block of the paged KV cache; None lets vLLM decide (on CPUs: 32).
        threads: CPU threads; None takes all cores that this process may use.
        hot_bytes: memory for chunks that are read again and again, decoded; 0 for none.
        throttle: slows reading from the store down, to see what a slow one does.
        never_slower: whether stored KV is left alone where computing is estimated to be faster than loading.
        refine: when the exact KV of what was answered over blended KV is computed: `idle`, while nothing is asked, or
            `off`.
        learn: when text that recurs in prompts is computed and stored: `idle`, while nothing is asked, or `off`.
        conversations: `stored` keeps the exact KV of what was answered in the store, made while the engine is idle, so
            that other engines, and this one after a restart, go on from there; `local` keeps it in vLLM's cache alone.
        capacity_bytes: so much at most is stored in a namespace, its conversations included (`10GiB`); what is worth
            least is deleted then. None for no limit. To be the same for all engines that store into it.
        ttl_s: chunks that were not used for so long are deleted; None keeps them.
        conversations_ttl_s: the same of stored conversations and learned text; a week.
        eviction: what is worth least: `lru`, what was used longest ago, or `cost`: bytes weigh against computing.
        tool_parser: name of vLLM's parser for the model's tool calls; None goes by the model's chat template.
        trace: whether reports say of each of a prompt's tokens what it came from.
        forced_answers: whether requests may force their answer (`Sampling.forced_token_ids`).
        primed: whether chunks are computed behind a primer as well, unless `precompute` is told otherwise; without it
            ingest takes half the time and, in a transform codec, four fifths of the space; reuse loses more.
        prefix_caching: vLLM's own exact prefix cache.
        max_num_seqs: how many requests are computed at the same time.
        speculative_config: vLLM's speculative decoding, by its own options; `{"method": "ngram",
            "num_speculative_tokens": 4, "prompt_lookup_max": 4}` drafts what passages say. With drafts of a model
            nothing is blended.
        seed: of vLLM's sampler.
    """

    model_config = SettingsConfigDict(env_prefix="LMCACHE_RAG_", extra="forbid", frozen=True, hide_input_in_errors=True)

    model: Annotated[str, BeforeValidator(_path_as_text)] = DEFAULT_MODEL
    store: StoreURI = ".lmcache-rag/kv"
    tiers: tuple[TierURI, ...] = ()
    codec: Annotated[str, AfterValidator(codec_named)] = DEFAULT_CODEC
    extra_codecs: tuple[Annotated[str, AfterValidator(codec_named)], ...] = ()
    namespace: str = Field(default=DEFAULT_NAMESPACE, pattern=NAMESPACE_PATTERN)
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    block_tokens: int | None = Field(default=None, ge=8)
    threads: int | None = Field(default=None, ge=1)
    hot_bytes: int = Field(default=DEFAULT_HOT_BYTES, ge=0)
    throttle: Throttle | None = None
    never_slower: bool = True
    refine: Refine = "idle"
    learn: Learn = "idle"
    conversations: Conversations = "local"
    capacity_bytes: ByteSize | None = Field(default=None, ge=1 << 20)
    ttl_s: float | None = Field(default=None, gt=0.0)
    conversations_ttl_s: float | None = Field(default=7.0 * DAY_S, gt=0.0)
    eviction: Annotated[str, AfterValidator(eviction_named)] = "lru"
    tool_parser: str | None = None
    trace: bool = False
    forced_answers: bool = False
    primed: bool = True
    prefix_caching: bool = True
    max_num_seqs: int = Field(default=16, ge=1)
    speculative_config: dict[str, Any] | None = None
    seed: int = 0

    @classmethod
    def checked(cls, **values: Any) -> EngineSettings:
        """Like the constructor, but raises `EngineError` with one sentence that names the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise EngineError(first_problem(error)) from None


class RemoteSettings(BaseSettings):
    """How servers are asked. Each field can be set by an environment variable, `LMCACHE_RAG_<FIELD>`.

    Attributes:
        base_url: of an OpenAI-compatible server, or of several of the same model, which are asked in turn:
            `http://host:8000/v1`; in a string several are separated by commas.
        model: its name at the servers; None takes the one that they serve.
        api_key: the servers' key, where they ask for one.
        cache_salt: of all requests that name none: what a tenant reads and stores by.
        ingest_key: shown where KV is to be stored; see `lmcache-rag serve --ingest-key`.
        timeout_s: how long a server may say nothing before it is taken to have failed.
        patience_s: how long a request is tried again, at another server where there is one, before it fails.
    """

    model_config = SettingsConfigDict(env_prefix="LMCACHE_RAG_", extra="forbid", frozen=True, hide_input_in_errors=True)

    base_url: Annotated[tuple[str, ...], NoDecode] = Field(min_length=1)
    model: str | None = None
    api_key: SecretStr | None = None
    cache_salt: SecretStr | None = None
    ingest_key: SecretStr | None = None
    timeout_s: float = Field(default=600.0, gt=0.0)
    patience_s: float = Field(default=30.0, ge=0.0)

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return tuple(url.strip() for url in value.split(",")) if isinstance(value, str) else value

    @field_validator("base_url")
    @classmethod
    def _with_version(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address of a server: give http://host:port/v1")
        bare = [url.rstrip("/") for url in urls]
        return tuple(url if url.endswith("/v1") else f"{url}/v1" for url in bare)

    @classmethod
    def checked(cls, **values: Any) -> RemoteSettings:
        """Like the constructor, but raises `EngineError` with one sentence that names the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise EngineError(first_problem(error)) from None


class Sampling(BaseModel):
    """How an answer is sampled.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 is greedy.
        stop: generation ends before any of these strings.
        forced_token_ids: what the answer's first tokens are, whatever the model would say, for teacher forcing. No text
            is made of such an answer. Takes an engine with `forced_answers`.
        logprobs: how many log-probabilities per generated token are returned; -1 for the whole vocabulary.
        json_schema, regex, choice, grammar: at most one: what the answer has to follow: a JSON schema, a regular
            expression, one of several strings, or a context-free grammar in EBNF.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    forced_token_ids: tuple[int, ...] = ()
    logprobs: int | None = Field(default=None, ge=-1)
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = Field(default=None, min_length=1)
    grammar: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Sampling:
        if len(self.structure) > 1:
            raise ValueError(f"give one of {', '.join(self.structure)}, not several")
        return self

    @property
    def structure(self) -> dict[str, Any]:
        """What the answer has to follow: one entry, or none."""
        forms = {name: getattr(self, name) for name in ("json_schema", "regex", "choice", "grammar")}
        return {name: form for name, form in forms.items() if form is not None}

    @classmethod
    def checked(cls, **values: Any) -> Sampling:
        """Like the constructor, but raises `PromptError` with one sentence that names the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise PromptError(first_problem(error)) from None

    @classmethod
    def for_text(cls, **values: Any) -> Sampling:
        """Like `checked`, for callers who hand on text: raises `PromptError` for what that does not show."""
        for name in ("logprobs", "forced_token_ids"):
            if values.get(name) is not None:
                raise PromptError(f"{name}: only engine.generate takes it, since the answer here is text.")
        return cls.checked(**values)
