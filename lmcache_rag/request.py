"""What a request says about blending, and what is reported back.

Both travel in vLLM's `kv_transfer_params` under the key `lmcache_rag`: options on the way in, the report on the way
out. This module imports neither vllm nor torch, so that a client of a server can use it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lmcache_rag.errors import PromptError

PARAMS_KEY = "lmcache_rag"
STORE_FAILED = 424
"""HTTP status of a server whose store fails: it can still answer prompts."""
INGEST_HEADER = "X-LMCache-RAG-Ingest-Key"
"""With it a client shows a server that it may store."""
INGEST_KEY = "LMCACHE_RAG_INGEST_KEY"
"""The environment variable that holds the key, of servers and of clients."""


def grant_of(ingest_key: str) -> str:
    """What a server's middleware puts into a request whose client has shown the ingest key, for the engine to see."""
    return hmac.new(ingest_key.encode(), b"lmcache-rag: may store", hashlib.sha256).hexdigest()


SelectorName = Literal["none", "all", "head", "cacheblend", "query"]
DEFAULT_SELECTOR: SelectorName = "query"
DEFAULT_TARGET_KL = 0.055
"""What recomputing 15% of the tokens gives on the default model."""

Conversations = Literal["local", "stored"]
"""Whether the exact KV of conversations is kept in the store, for other engines and after a restart."""

Refine = Literal["idle", "off"]
"""When exact KV is computed of what was answered over blended KV."""

Learn = Literal["idle", "off"]
"""When text that recurs in prompts is computed and stored."""

DEFAULT_NAMESPACE = "default"
SECRET_INPUT = "secret_input"  # noqa: S105  # not one itself
"""The type of a validation error whose input no message repeats."""
_MOST_SEGMENTS = 4096
"""In one prompt: looking up what is stored of each takes time."""

NAMESPACE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


class BlendOptions(BaseModel):
    """How one request is to be treated.

    Attributes:
        mode: `blend` puts stored chunk KV together and repairs it; `off` is untouched vLLM; `precompute` computes the
            KV of the prompt's one segment behind what comes before it and stores it, unless it is stored; the answer's
            text means nothing.
        selector: which tokens are recomputed; see `lmcache_rag.blend.selectors`.
        target_kl: how far from full prefill the next-token distributions may be: mean KL divergence in nats. The
            model's calibration says which recompute ratio that takes.
        ratio: recompute ratio r, the share of segment tokens that is recomputed, 0 to 1, instead of a target.
        ttft_goal_s: seconds from the start of the blend by when the answer should begin. Of each chunk the form of
            highest fidelity is loaded that the store's bandwidth allows. None takes the engine's own codec.
        segments: `(start, length)` of each chunk in the prompt's tokens, ascending. None finds stored chunks in the
            prompt by their tokens.
        primer_tokens: of a precompute request: how many tokens right before the segment are its primer; the tokens
            before those are the preamble.
        primer: digest (`chunk_kv.context_digest`) of the primer behind which the caller's chunks were computed: of
            several variants of a chunk, that one is preferred. None takes the last one made.
        namespace: KV of one namespace is never used for another; None stands for the engine's own.
        grant: of a precompute request at a server with an ingest key: set by the server itself; see `grant_of`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["blend", "off", "precompute"] = "blend"
    selector: SelectorName = DEFAULT_SELECTOR
    target_kl: float = Field(default=DEFAULT_TARGET_KL, gt=0.0)
    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    ttft_goal_s: float | None = Field(default=None, gt=0.0)
    segments: tuple[tuple[int, int], ...] | None = Field(default=None, max_length=_MOST_SEGMENTS)
    primer_tokens: int = Field(default=0, ge=0)
    primer: str | None = None
    namespace: str | None = Field(default=None, pattern=NAMESPACE_PATTERN)
    grant: str | None = Field(default=None, repr=False)

    @field_validator("segments")
    @classmethod
    def _ascending(cls, segments: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        end = 0
        for start, length in segments or ():
            if start < end or length < 1:
                raise ValueError(
                    f"segment ({start}, {length}) overlaps the one before it or is empty; "
                    "give (start, length) pairs in ascending order"
                )
            end = start + length
        return segments

    @classmethod
    def checked(cls, **values: Any) -> BlendOptions:
        """Like the constructor, but raises `PromptError` with one sentence that names the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise PromptError(first_problem(error)) from None

    def to_params(self) -> dict[str, Any]:
        """The value of vLLM's `kv_transfer_params`."""
        return {PARAMS_KEY: self.model_dump(mode="json", exclude={"grant"})}


class ReuseReport(BaseModel):
    """What happened to one request's prompt. Token counts add up to `prompt_tokens` with `vllm_tokens`.

    Attributes:
        mode: what the prompt was answered from: `blend`; `continued`, KV of an earlier answer, which was blended;
            `prefix`, exact KV of its beginning from the store; `plain`, exact KV, computed or in vLLM's prefix cache
            (nothing to reuse, or not handled: see `reason`); `off`, the same, as asked; or `precompute`.
        prompt_tokens: length of the prompt.
        continued_tokens: of the local ones, those whose KV an earlier blend has shaped: it is approximate.
        local_tokens: already in this engine's paged cache (vLLM's prefix cache), kept as they are.
        reused_tokens: taken from the store and not recomputed.
        recomputed_tokens: taken from the store and recomputed to repair them.
        missed_tokens: in a segment that the store does not hold intact, or that is faster to compute, computed in full.
        unknown_tokens: in no segment, before or between segments, computed in full.
        vllm_tokens: left to vLLM's own prefill (the question, and what follows the last reusable chunk).
        exact_tokens: of the reused, those whose KV is full prefill's but for what the codec lost (the preamble, the
            first chunk behind it).
        foreign_tokens: of the reused and recomputed, those computed behind another preamble than the prompt's.
        learned_tokens: of the reused and recomputed, those of text that was learned from earlier prompts.
        hot_tokens: of the reused and recomputed, those that were not read, since they were in memory.
        token_layers: what selecting and recomputing cost: layers run, summed over the tokens run; full prefill is all
            layers times `prompt_tokens`.
        stored_tokens: written to the store by this request.
        bytes_loaded: bytes read from the store.
        bytes_stored: bytes written to the store.
        evicted_objects, evicted_bytes: what was deleted from the store to make room for that, or had expired.
        codecs: codec -> tokens loaded that were stored with it.
        misses: reason -> tokens.
        matching_cut_short: the prompt held more candidates than are compared with it, so that some stored chunks may
            not have been found.
        trace: where the engine keeps one: what each of the prompt's tokens came from, as runs of (what, how many):
            `local`, `reused`, `carried` (reused, and moved by the change of those recomputed), `recomputed`, `missed`,
            `unknown`, `vllm`.
        failure: the type of the exception that kept the prompt from being blended, or its KV from being stored.
        phases_s: seconds per phase: `plan`; `queue`, until vLLM takes the request up; of a blend `load`, `select`
            (where the question is probed, what has no KV is computed too), `recompute`, `write` and `store`. A local
            engine adds `vllm`, its own work up to the first token, so that they add up to the TTFT.
    """

    model_config = ConfigDict(extra="forbid")

    mode: Literal["blend", "continued", "prefix", "precompute", "off", "plain"] = "plain"
    reason: str = ""
    selector: str = ""
    ratio: float = 0.0
    prompt_tokens: int = 0
    local_tokens: int = 0
    continued_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    missed_tokens: int = 0
    unknown_tokens: int = 0
    vllm_tokens: int = 0
    exact_tokens: int = 0
    foreign_tokens: int = 0
    learned_tokens: int = 0
    hot_tokens: int = 0
    token_layers: int = 0
    stored_tokens: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    evicted_objects: int = 0
    evicted_bytes: int = 0
    codecs: dict[str, int] = Field(default_factory=dict)
    misses: dict[str, int] = Field(default_factory=dict)
    matching_cut_short: bool = False
    trace: tuple[tuple[str, int], ...] = ()
    failure: str = ""
    phases_s: dict[str, float] = Field(default_factory=dict)

    def miss(self, reason: str, tokens: int) -> None:
        """Count `tokens` as missed for `reason`."""
        self.missed_tokens += tokens
        self.misses[reason] = self.misses.get(reason, 0) + tokens


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, as `field: what is wrong (got value)`."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "options"
    got = "" if problem["type"] == SECRET_INPUT else f" (got {problem['input']!r})"
    return f"{field}: {problem['msg']}{got}"
