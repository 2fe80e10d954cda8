"""What the connector is told at start-up (`kv_connector_extra_config`), and which engines it can serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.throttled import Throttle, ThrottledStore
from lmcache_rag.blobs.uri import StoreURI, TierURI, open_store
from lmcache_rag.codec import DEFAULT_CODEC, codec_named
from lmcache_rag.library.eviction import eviction_named
from lmcache_rag.library.hot import DEFAULT_HOT_BYTES
from lmcache_rag.library.room import DAY_S, Limits
from lmcache_rag.model import cache_folder, model_fingerprint, resolve_model
from lmcache_rag.records.fingerprints import SHORTEST
from lmcache_rag.request import DEFAULT_NAMESPACE, NAMESPACE_PATTERN, Conversations, Learn, Refine

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ConnectorConfig(BaseModel):
    """Settings of the connector.

    Attributes:
        store: folder or URI of the KV store.
        tiers: folders or URIs of caches in front of it, fastest first.
        namespace: of requests that name none.
        namespace_per_salt: each `cache_salt` has a namespace of its own, and requests without one are not handled. The
            salt is then what a tenant's requests read and store by, and nobody else knows: a gateway sets it.
        clients_choose_namespace: whether requests may name another, and so read what is stored there.
        clients_precompute: whether requests may store KV, which all later requests of the namespace are answered from.
        ingest_key: whether those may only who have shown the key in the environment (`INGEST_KEY`) to the server's
            middleware.
        offers_tools: whether the model is known to choose by itself to call tools, for clients that ask the server.
        codec: the one of `codec.CODECS` in which KV is stored.
        extra_codecs: in which chunks are stored as well, for requests with a TTFT goal to choose from.
        automatic: whether stored chunks are looked for in prompts of requests that say nothing about blending.
        min_match_tokens: the shortest run of a stored chunk's tokens that is reused where it is found automatically.
        match_unit_tokens: see `plan.matching.Matcher`; 1 where every client may know all that is stored.
        hot_bytes: memory for what is read again and again, decoded.
        throttle: slows reading from the store down, to see what a slow one does.
        never_slower: whether stored KV is left alone where computing is estimated to be faster than loading.
        refine: when the exact KV of what was answered over blended KV is computed: while the engine is idle, or never.
        learn: when text that recurs in prompts is computed and stored, for its caller's later prompts: while the engine
            is idle, or never. Each `cache_salt` has its own; see docs/learning.md.
        learn_unsalted: whether requests without a `cache_salt` are learned from too, all together: where they are of
            clients that may know each other's prompts.
        conversations: `stored` keeps the exact KV of what was answered in the store, made while the engine is idle, so
            that other engines, and this one after a restart, go on from there; `local` keeps it in vLLM's cache alone.
        capacity_bytes: so much at most is stored in a namespace, its conversations included (`10GiB`); what is worth
            least is deleted then. None for no limit. To be the same for all engines that store into it.
        ttl_s: chunks that were not used for so long are deleted; None keeps them.
        conversations_ttl_s: the same of stored conversations and learned text; a week.
        eviction: what is worth least: `lru`, what was used longest ago, or `cost`: bytes weigh against computing.
        trace: whether reports say of each of a prompt's tokens what it came from: for engines without foreign clients,
            to whom that would tell what is stored, to the token.
        max_blend_tokens: of longer prompts the rest is left to vLLM's prefill; bounds the memory reserved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    store: StoreURI
    tiers: tuple[TierURI, ...] = ()
    namespace: str = Field(default=DEFAULT_NAMESPACE, pattern=NAMESPACE_PATTERN)
    namespace_per_salt: bool = False
    clients_choose_namespace: bool = False
    clients_precompute: bool = False
    ingest_key: bool = False
    offers_tools: bool = True
    codec: Annotated[str, AfterValidator(codec_named)] = DEFAULT_CODEC
    extra_codecs: tuple[Annotated[str, AfterValidator(codec_named)], ...] = ()
    automatic: bool = True
    min_match_tokens: int = Field(default=SHORTEST, ge=SHORTEST)
    match_unit_tokens: int = Field(default=64, ge=1)
    hot_bytes: int = Field(default=DEFAULT_HOT_BYTES, ge=0)
    throttle: Throttle | None = None
    never_slower: bool = True
    refine: Refine = "idle"
    learn: Learn = "idle"
    learn_unsalted: bool = False
    conversations: Conversations = "local"
    capacity_bytes: ByteSize | None = Field(default=None, ge=1 << 20)
    ttl_s: float | None = Field(default=None, gt=0.0)
    conversations_ttl_s: float | None = Field(default=7.0 * DAY_S, gt=0.0)
    eviction: Annotated[str, AfterValidator(eviction_named)] = "lru"
    trace: bool = False
    max_blend_tokens: int = Field(default=32768, ge=1)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ConnectorConfig:
        """The connector's settings in a vLLM configuration."""
        transfer = vllm_config.kv_transfer_config
        return cls(**(transfer.kv_connector_extra_config if transfer is not None else {}))

    @property
    def limits(self) -> Limits:
        """Of what is stored in a namespace."""
        return Limits(self.capacity_bytes, self.ttl_s, self.conversations_ttl_s, self.eviction)

    def open_store(self) -> Store:
        """The store that these settings name."""
        store = open_store(self.store, self.tiers)
        return store if self.throttle is None else ThrottledStore(store, self.throttle)

    def workspace_tokens(self, max_model_len: int) -> int:
        """How many tokens a blend may span."""
        return min(self.max_blend_tokens, max_model_len)


def fingerprint_of(vllm_config: VllmConfig) -> str:
    """Identity of the KV that an engine computes: its model's files, compute type, and what changes either on the way.

    Raises:
        ModelError: the model's files cannot be found.
    """
    model = vllm_config.model_config
    changes = f"{model.quantization or ''}{model.hf_overrides or ''}"
    return model_fingerprint(model_folder(vllm_config), f"{model.dtype}{changes}", cache_folder())


def model_folder(vllm_config: VllmConfig) -> Path:
    """Where the model's files are. Raises `ModelError`."""
    return resolve_model(str(vllm_config.model_config.model), vllm_config.model_config.revision)


_MODELLESS = ("ngram",)
"""Drafts that no model makes, whose KV would be missing where a prompt was blended."""


def unsupported_engine(vllm_config: VllmConfig, kv_cache_groups: int = 1) -> str:
    """Why an engine's requests all pass through untouched, or nothing."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    speculative = vllm_config.speculative_config
    of_experts = model.is_moe or parallel.enable_expert_parallel
    kv_dtypes = ("auto", str(model.dtype).removeprefix("torch."))
    reasons = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "data parallelism of experts": parallel.data_parallel_size > 1 and of_experts,
        "expert load balancing": parallel.enable_eplb,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "dual batch overlap": parallel.enable_dbo or parallel.ubatch_size > 1,
        "speculative decoding other than by n-grams": speculative is not None and speculative.method not in _MODELLESS,
        "a quantised KV cache": vllm_config.cache_config.cache_dtype not in kv_dtypes,
        "multimodal RoPE": model.uses_mrope,
        # A layer adds what the batch's last requests asked for, also to a pass of ours.
        "LoRA": vllm_config.lora_config is not None,
        "several KV cache groups": kv_cache_groups != 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
