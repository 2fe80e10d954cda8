"""The connector's scheduler half: plans blends, keeps their KV apart from exact KV, and hands out reports."""

from __future__ import annotations

import logging
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lmcache_rag.codec import CODECS
from lmcache_rag.library.chunks import codec_of
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.planner import Planner, plan_digest
from lmcache_rag.request import PARAMS_KEY, BlendOptions, ReuseReport, first_problem
from lmcache_rag.vllm.config import ConnectorConfig
from lmcache_rag.vllm.failures import Failures
from lmcache_rag.vllm.metadata import BlendJob, StepJobs, StepReports
from lmcache_rag.vllm.metrics import ReuseStats

if TYPE_CHECKING:
    from vllm.v1.request import Request

_KEPT_REPORTS = 1024

_SMALL_REST = 64
"""Where the prefix cache holds all but so few tokens of a blend, vLLM's own prefill of the rest is the faster way."""

_log = logging.getLogger(__name__)


@dataclass
class _Tracked:
    """A request. `report` is the dict that its response carries; it is completed in place.

    Attributes:
        plan: None where vLLM computes the whole prompt; also behind a blend that failed.
        planned_misses: what the plan leaves to vLLM's prefill; the worker half's misses come on top.
        planned_at: when it was planned (`time.perf_counter`), and so began to wait for vLLM to take it up.
        local_tokens: how many tokens the local prefix cache held when last asked, for the report.
        placed: blocks were allocated, so the report says what becomes of the request; a preemption changes it no more.
    """

    plan: BlendPlan | None
    report: dict[str, Any]
    planned_misses: dict[str, int]
    planned_at: float
    local_tokens: int = 0
    placed: bool = False


class SchedulerHalf:
    """Runs where vLLM's scheduler runs.

    Args:
        unsupported: why no request of this engine is handled, or nothing.
        hash_block_tokens: tokens per block hash of the prefix cache.
    """

    def __init__(self, planner: Planner, config: ConnectorConfig, *, unsupported: str, hash_block_tokens: int) -> None:
        self._planner = planner
        self._config = config
        self._unsupported = unsupported
        self._hash_block_tokens = hash_block_tokens
        self._failures = Failures()
        self._tracked: dict[str, _Tracked] = {}
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._blending: str | None = None  # the request whose blend is under way, until vLLM has computed the rest
        self._taken_over = False  # its rest is computed in this step
        self._jobs: list[BlendJob] = []
        self.stats = ReuseStats()

    def add(self, request: Request) -> None:
        """Plan a new request, and keep what will be computed for it apart in the prefix cache."""
        start = time.perf_counter()
        report = ReuseReport(prompt_tokens=request.num_prompt_tokens)
        plan = self._plan(request, report)
        if plan is not None:
            salt(request, plan, self._hash_block_tokens)
        elif report.mode != "off":
            report.mode = "plain"
        report.vllm_tokens = request.num_prompt_tokens - report.missed_tokens
        planned_at = time.perf_counter()
        report.phases_s["plan"] = planned_at - start
        self._tracked[request.request_id] = _Tracked(plan, report.model_dump(), dict(report.misses), planned_at)

    def _plan(self, request: Request, report: ReuseReport) -> BlendPlan | None:
        try:
            given = _options_of(request)
            options = BlendOptions() if given is None else given
        except (ValidationError, TypeError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
            report.reason = f"invalid options: {problem}"
            _log.warning("request %s passes through: %s", request.request_id, report.reason)
            return None
        if options.mode == "off":
            report.mode, report.reason = "off", "as asked"
            return None
        report.reason = self._unsupported or _unhandled(request) or self._forbidden(options)
        if report.reason:
            return None
        if given is None and not self._config.automatic:
            report.reason = "no options given, and automatic matching is off"
            return None
        assert request.prompt_token_ids is not None
        try:
            return self._planner.plan(request.prompt_token_ids, options, report)
        except Exception as error:  # noqa: BLE001  # one request's misfortune is not to end the engine for all
            report.failure = self._failures.note("Planning a blend", error)
            report.reason = f"failed: {report.failure}"
            return None

    def _forbidden(self, options: BlendOptions) -> str:
        """What a client asks for and the operator has not allowed, or nothing."""
        config = self._config
        if options.namespace not in (None, config.namespace) and not config.clients_choose_namespace:
            return "clients may not choose a namespace here: the connector's clients_choose_namespace allows it"
        if options.mode == "precompute" and not config.clients_precompute:
            return "clients may not store KV here: the connector's clients_precompute allows it"
        return ""

    def matched_tokens(self, request: Request, computed_tokens: int) -> int | None:
        """How many tokens behind the locally computed ones a blend provides; None puts the request off to a later
        step, since one blend at a time is done. Asking changes nothing."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0
        tracked.local_tokens = computed_tokens
        if tracked.plan is None:
            return 0
        matched = max(0, _provided(tracked.plan) - computed_tokens)
        if computed_tokens and matched < _SMALL_REST:
            return 0
        return None if matched and self._blending is not None else matched

    def allocated(self, request: Request, block_ids: list[int], external_tokens: int) -> None:
        """vLLM has allocated blocks: for what a blend provides, which is then done in this step, or for the rest."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if not tracked.placed:
            tracked.report["phases_s"]["queue"] = time.perf_counter() - tracked.planned_at
        if external_tokens and tracked.plan is not None:
            self._blending = request.request_id
            plan = replace(tracked.plan, local_tokens=_provided(tracked.plan) - external_tokens)
            self._jobs.append(BlendJob(request.request_id, plan, tuple(block_ids)))
        elif self._blending == request.request_id:
            self._taken_over = True
        elif not tracked.placed:
            report, local = tracked.report, min(tracked.local_tokens, request.num_prompt_tokens)
            report["local_tokens"] = local
            report["vllm_tokens"] = request.num_prompt_tokens - local - report["missed_tokens"]
            if tracked.plan is not None:
                exact = local <= exact_span(tracked.plan)
                report["mode"] = "plain" if exact else "blend"
                report["reason"] = f"{'exact' if exact else 'blended'} KV in the local prefix cache"
        tracked.placed = True

    def take_jobs(self) -> StepJobs:
        """This step's blend, if any; the step's requests are known."""
        jobs, self._jobs = self._jobs, []
        if self._taken_over:
            self._blending, self._taken_over = None, False
        return StepJobs(jobs)

    def receive(self, step: StepReports) -> None:
        """Complete the reports of requests that the worker half blended, or failed to. A blend that failed is not
        tried again: the prompt is vLLM's to compute."""
        if step.rates is not None:
            self._planner.cost.learn(step.rates)
        for request_id, figures in step.reports.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue  # aborted meanwhile
            misses = dict(tracked.planned_misses)
            for reason, tokens in figures["misses"].items():
                misses[reason] = misses.get(reason, 0) + tokens
            report = {**figures, "misses": misses, "missed_tokens": sum(misses.values())}
            report["phases_s"] = {**tracked.report["phases_s"], **figures["phases_s"]}
            counted = ("local", "reused", "recomputed", "missed", "unknown")
            report["vllm_tokens"] = report["prompt_tokens"] - sum(report[f"{kind}_tokens"] for kind in counted)
            tracked.report.update(report)
            if figures["mode"] == "plain":
                tracked.plan = None

    def finish(self, request: Request) -> dict[str, Any]:
        """The report for the response. Nothing but the report is kept of a request that has ended."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return {}
        if self._blending == request.request_id:
            self._blending, self._taken_over = None, False
        self.stats.add(tracked.report)
        self._finished[request.request_id] = tracked.report
        while len(self._finished) > _KEPT_REPORTS:
            self._finished.popitem(last=False)
        return {PARAMS_KEY: tracked.report}

    def report_of(self, request_id: str) -> ReuseReport:
        """The report of a request that is running or was lately finished."""
        tracked = self._tracked.get(request_id)
        report = self._finished.get(request_id, {}) if tracked is None else tracked.report
        return ReuseReport(**report)


def salt(request: Request, plan: BlendPlan, hash_block_tokens: int) -> None:
    """Give a blended request's blocks hashes of their own, so that no exact request ever hits them.

    Blocks that hold exact KV only keep their hashes, under which they may be shared. The block hashes chain, so it is
    enough to mix the digest into what the first of the other blocks is chained to; the prompt's last full block is
    always one of those, since blocks that fill up later are chained to it. A precompute request is to find nothing, so
    that its whole KV is captured.
    """
    exact_tokens = exact_span(plan) if plan.mode == "blend" else 0
    if exact_tokens == plan.end:
        return
    digest = uuid.uuid4().hex if plan.mode == "precompute" else plan_digest(plan, request.cache_salt)
    kept = max(0, min(exact_tokens // hash_block_tokens, len(request.block_hashes) - 1))
    del request.block_hashes[kept:]
    if not kept:
        request.cache_salt = digest
        request.update_block_hashes()
        return
    parent = request.block_hashes[-1]
    request.block_hashes[-1] = type(parent)(parent + bytes.fromhex(digest))
    request.update_block_hashes()
    request.block_hashes[kept - 1] = parent


def exact_span(plan: BlendPlan) -> int:
    """How many of the prompt's first tokens get KV that equals full prefill's: the preamble, and an exact chunk that
    follows it, where they were stored lossless."""
    end = 0
    for segment in (plan.preamble, *plan.segments):
        if not segment.exact or not _is_lossless(segment) or segment.start != end:
            break
        end = segment.end
    return end


def _is_lossless(segment: PlannedSegment) -> bool:
    """Whether a segment's KV will be what was computed, whichever of its forms is loaded."""
    names = [segment.name, *(form.name for form in segment.forms)]
    return all(name is None or CODECS[codec_of(name)].lossless for name in names)


def _options_of(request: Request) -> BlendOptions | None:
    """What a request says about blending; None where it says nothing. Raises `ValidationError` and `TypeError`."""
    params: Any = request.kv_transfer_params or {}
    if not isinstance(params, dict):
        raise TypeError("kv_transfer_params is no object")
    given = params.get(PARAMS_KEY)
    return None if given is None else BlendOptions(**given)


def _provided(plan: BlendPlan) -> int:
    """How many of the prompt's tokens come from the blend; one at least stays for vLLM, which samples from it."""
    return min(plan.end, len(plan.token_ids) - 1)


def _unhandled(request: Request) -> str:
    """Why a request passes through untouched, or nothing."""
    if request.lora_request is not None:
        return "LoRA"
    if request.mm_features:
        return "multimodal input"
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "prompt embeddings"
    if request.pooling_params is not None:
        return "pooling"
    if request.resumable:
        return "streaming input"
    if request.skip_reading_prefix_cache:
        return "prompt logprobs, or reading caches is off"
    return ""
