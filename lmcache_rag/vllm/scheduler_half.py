"""The connector's scheduler half: plans blends, keeps their KV apart from exact KV, and hands out reports."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from lmcache_rag.blend.steps import LEAST_TOKENS
from lmcache_rag.conversation.answers import Answered, Answers
from lmcache_rag.conversation.recurrence import RecentPrompts, free_runs
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.plan.plan import BlendPlan
from lmcache_rag.plan.planner import Planner
from lmcache_rag.request import PARAMS_KEY, BlendOptions, ReuseReport
from lmcache_rag.vllm.admission import admitted
from lmcache_rag.vllm.choosing import SMALL_REST, Choice, Chooser
from lmcache_rag.vllm.config import ConnectorConfig
from lmcache_rag.vllm.failures import Failures
from lmcache_rag.vllm.isolation import BlockNames, PrefixCache
from lmcache_rag.vllm.metadata import BlendJob, Learning, Refined, RefineJob, StepJobs, StepReports
from lmcache_rag.vllm.metrics import ReuseStats
from lmcache_rag.vllm.refinements import Refinements
from lmcache_rag.vllm.saving import MOST_SAVING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

_KEPT_REPORTS = 1024

_MOST_CHOICES = 4
"""What a request is answered from is chosen so often at most, however the prefix cache changes."""

_LEAST_PART = 4
"""A blend has so many-th part of a step's tokens at least, so that it comes to an end however many others there are."""

_ANSWERED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_ABORTED,  # also by a stop string, which is found outside the scheduler
)

_log = logging.getLogger(__name__)


@dataclass
class _Tracked:
    """A request. `report` is the dict that its response carries; it is completed in place.

    Attributes:
        request: vLLM's own.
        names: those that vLLM gave its blocks: of exact KV.
        options: None where it is not handled; vLLM then computes the whole prompt.
        choice: what it is answered from; None where it is not handled.
        planned_misses: what the plan leaves to prefill; the worker half's misses come on top.
        planned_at: when it was planned (`time.perf_counter`), and so began to wait for vLLM to take it up.
        choices: how often that was chosen anew, since what the prefix cache holds had changed.
        local_tokens: how many tokens the local prefix cache held when last asked, for the report.
        placed: blocks were allocated, so the report says what becomes of the request; a preemption changes it no more.
        failed: its blend failed, and the prompt is vLLM's to compute.
    """

    request: Request
    names: BlockNames
    options: BlendOptions | None
    choice: Choice | None
    report: dict[str, Any]
    planned_misses: dict[str, int]
    planned_at: float
    choices: int = 1
    local_tokens: int = 0
    placed: bool = False
    failed: bool = False

    @property
    def plan(self) -> BlendPlan | None:
        """The blend that provides its KV, if any."""
        return None if self.choice is None or self.failed else self.choice.plan


class SchedulerHalf:
    """Runs where vLLM's scheduler runs.

    Args:
        unsupported: why no request of this engine is handled, or nothing.
        block_tokens: tokens per block of the prefix cache.
        max_tokens: the longest prompt that is refined or learned from.
        step_tokens: how many tokens vLLM computes in a step at most.
        chats: stored conversations, where they are used.
    """

    def __init__(
        self,
        planner: Planner,
        config: ConnectorConfig,
        *,
        unsupported: str,
        block_tokens: int,
        max_tokens: int,
        step_tokens: int,
        chats: ChunkStores | None = None,
    ) -> None:
        self._planner = planner
        self._config = config
        self._unsupported = unsupported
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._step_tokens = step_tokens
        self._answers = Answers()
        self._recent = RecentPrompts()
        self._chooser = Chooser(
            planner,
            self._answers,
            block_tokens,
            never_slower=config.never_slower,
            chats=chats,
            learns=config.learn == "idle",
            learns_unsalted=config.learn_unsalted,
        )
        self._refinements: Refinements | None = None
        self._failures = Failures()
        self._tracked: dict[str, _Tracked] = {}
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._blending: str | None = None  # the request whose blend is under way, until vLLM has computed the rest
        self._storing: set[str] = set()  # the requests whose chunks are kept in memory until they are stored
        self._taken_over = False  # its rest is computed in this step
        self._begun: BlendJob | None = None
        self._dropped: list[str] = []
        self.stats = ReuseStats()

    def bind(self, manager: KVCacheManager) -> None:
        """Get to know vLLM's cache."""
        if manager.enable_caching:
            self._chooser.prefixes = PrefixCache(manager, self._block_tokens)
        if "idle" in (self._config.refine, self._config.learn):
            self._refinements = Refinements(
                self._chooser.prefixes, self._block_tokens, self._max_tokens, self._planner.is_stored
            )

    def has_idle_work(self) -> bool:
        """Whether there is something to do while there is no request."""
        return bool(self._refinements) and not self._tracked

    def add(self, request: Request) -> None:
        """Plan a new request, and keep what will be computed for it apart in the prefix cache."""
        start = time.perf_counter()
        names = BlockNames.of(request)
        report = ReuseReport(prompt_tokens=request.num_prompt_tokens)
        options = admitted(request, report, self._config, self._unsupported)
        choice = self._choice(request, names, options, report)
        planned_at = time.perf_counter()
        report.phases_s["plan"] = planned_at - start
        self._tracked[request.request_id] = _Tracked(
            request, names, options, choice, report.model_dump(), dict(report.misses), planned_at
        )

    def _choice(
        self, request: Request, names: BlockNames, options: BlendOptions | None, report: ReuseReport
    ) -> Choice | None:
        """What the request is answered from; its blocks are named accordingly."""
        choice = None
        try:
            if options is not None:
                choice = self._chooser.choose(request, names, options, report)
                choice.names.give(request)
        except Exception as error:  # noqa: BLE001  # one request's misfortune is not to end the engine for all
            choice = None
            names.give(request)
            report.failure = self._failures.note("Planning a blend", error)
            report.reason = f"failed: {report.failure}"
        if (choice is None or choice.plan is None) and report.mode != "off":
            report.mode = "plain"
        report.vllm_tokens = request.num_prompt_tokens - report.missed_tokens
        return choice

    def matched_tokens(self, request: Request, computed_tokens: int) -> int | None:
        """How many tokens behind the locally computed ones a blend provides. None puts the request off to a later
        step: one blend at a time is done, or its blocks have other names now, under which vLLM is to look for them."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0
        tracked.local_tokens = computed_tokens
        if self._is_to_wait(tracked, computed_tokens) or self._chosen_anew(request, tracked):
            return None
        if self._is_to_wait(tracked, computed_tokens):  # what was chosen now is another blend
            return None
        if tracked.plan is not None and tracked.plan.held_tokens > computed_tokens:
            if not tracked.placed:  # else it was blended, and preempted since
                tracked.failed = True
                tracked.report["reason"] = "the KV to blend behind left the prefix cache"
            return 0
        return _matched(tracked.plan, computed_tokens)

    def _is_to_wait(self, tracked: _Tracked, computed_tokens: int) -> bool:
        """Whether there is a blend to do for a request, and another is under way, or what it would make cannot be kept
        in memory until it is stored."""
        plan = tracked.plan
        if plan is None or not _matched(plan, computed_tokens):
            return False
        return self._blending is not None or (plan.mode == "precompute" and len(self._storing) >= MOST_SAVING)

    def _chosen_anew(self, request: Request, tracked: _Tracked) -> bool:
        """Choose again where the prefix cache holds more or less than it did: blocks come and go while a request
        waits. Returns whether its blocks have other names now."""
        options, choice = tracked.options, tracked.choice
        if options is None or choice is None or tracked.placed or tracked.choices == _MOST_CHOICES:
            return False
        if not self._config.never_slower:
            return False
        try:
            if self._chooser.held(request, tracked.names, options) == choice.held:
                return False
        except Exception as error:  # noqa: BLE001  # as it was chosen, then
            self._failures.note("Looking into the prefix cache", error)
            return False
        tracked.choices += 1
        report = ReuseReport(prompt_tokens=request.num_prompt_tokens, phases_s=tracked.report["phases_s"])
        tracked.choice = self._choice(request, tracked.names, options, report)
        tracked.report, tracked.planned_misses = report.model_dump(), dict(report.misses)
        return tracked.choice is None or tracked.choice.names != choice.names

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
            self._begun = BlendJob(request.request_id, plan, tuple(block_ids))
        elif self._blending == request.request_id:
            self._taken_over = True
        elif not tracked.placed:
            self._report_local(request, tracked)
            self.stats.tell(request.request_id, tracked.report)
        tracked.placed = True

    def _report_local(self, request: Request, tracked: _Tracked) -> None:
        """Say what was found in the local prefix cache, where that and vLLM's own prefill make the whole prompt."""
        report, local = tracked.report, min(tracked.local_tokens, request.num_prompt_tokens)
        report["local_tokens"] = local
        missed = min(report["missed_tokens"], request.num_prompt_tokens - local)
        if missed < report["missed_tokens"]:  # what is in the cache is no miss, whatever the plan says of it
            report["missed_tokens"], report["misses"] = missed, {"not stored": missed} if missed else {}
        report["vllm_tokens"] = request.num_prompt_tokens - local - missed
        choice = tracked.choice
        if choice is None or not local:
            return
        continued = report["continued_tokens"] = self._approximate(choice, local)
        if tracked.failed:
            report["mode"] = "continued" if continued else "plain"
        elif not continued:
            report["mode"], report["reason"] = "plain", "exact KV in the local prefix cache"
        elif choice.plan is not None:
            report["mode"], report["reason"] = "blend", "blended KV in the local prefix cache"
        else:
            turns = choice.held.continued.turns if choice.held.continued is not None else 0
            report["mode"], report["reason"] = "continued", f"blended KV of {turns} answers before in the prefix cache"

    def _approximate(self, choice: Choice, tokens: int) -> int:
        """How many of so many first tokens have KV that a blend has shaped."""
        return max(0, tokens - choice.salts[0].kept_blocks * self._block_tokens) if choice.salts else 0

    def take_jobs(self, scheduled_tokens: int) -> StepJobs:
        """What the worker half is to do in this step; its requests are known, and how many tokens vLLM computes of
        them. A blend has what that leaves of a step's tokens, and no limit where vLLM computes none."""
        jobs = StepJobs(self._dropped, self._begun)
        self._dropped, self._begun = [], None
        if scheduled_tokens:
            jobs.tokens = max(LEAST_TOKENS, self._step_tokens // _LEAST_PART, self._step_tokens - scheduled_tokens)
        if self._taken_over:
            self._blending, self._taken_over = None, False
        if self._refinements is not None:
            jobs.refine = self._refine_job(self._refinements, idle=not scheduled_tokens and not self._tracked)
        return jobs

    def _refine_job(self, refinements: Refinements, *, idle: bool) -> RefineJob | None:
        if not idle:
            refinements.busy()
            return None
        try:
            return refinements.next_job()
        except Exception as error:  # noqa: BLE001  # nobody waits for it
            self._failures.note("Refinement", error)
            refinements.drop()
            return None

    def _take_refined(self, refinements: Refinements, refined: Refined) -> None:
        try:
            self.stats.refined(refinements.take(refined), refined)
        except Exception as error:  # noqa: BLE001  # nobody waits for it
            self._failures.note("Refinement", error)
            refinements.drop()

    def receive(self, step: StepReports) -> None:
        """Complete the reports of requests that the worker half blended, or failed to. A blend that failed is not
        tried again: the prompt is vLLM's to compute."""
        if step.rates is not None:
            self._planner.cost.learn(step.rates)
        if step.refined is not None and self._refinements is not None:
            self._take_refined(self._refinements, step.refined)
        if self._blending in step.placed:
            self._blending = None
        self._storing |= step.placed
        self._storing -= step.reports.keys()
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
            if tracked.choice is not None:
                report["continued_tokens"] = self._approximate(tracked.choice, report["local_tokens"])
            tracked.failed = figures["mode"] == "plain"
            if tracked.failed and report["continued_tokens"]:
                report["mode"] = "continued"  # what a blend had shaped is there all the same
            tracked.report.update(report)
            _count_cached(tracked.request, report["reused_tokens"])
            self.stats.tell(request_id, tracked.report)

    def finish(self, request: Request) -> dict[str, Any]:
        """The report for the response. Nothing but the report is kept of a request that has ended."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return {}
        if self._blending == request.request_id:
            self._drop(request.request_id)
        self.stats.add(tracked.report)
        self.stats.tell(request.request_id, tracked.report, ended=True)
        try:
            self._remember(request, tracked)
        except Exception as error:  # noqa: BLE001  # the request is answered
            self._failures.note("Remembering an answer", error)
        self._finished[request.request_id] = tracked.report
        while len(self._finished) > _KEPT_REPORTS:
            self._finished.popitem(last=False)
        return {PARAMS_KEY: tracked.report}

    def _drop(self, request_id: str) -> None:
        """A request ends whose blend may be under way, or is to begin."""
        self._blending, self._taken_over = None, False
        self._dropped.append(request_id)

    def _remember(self, request: Request, tracked: _Tracked) -> None:
        """Have an answer over approximate KV continued by later prompts, and made exact when there is time."""
        choice, options = tracked.choice, tracked.options
        if choice is None or options is None or options.mode == "precompute" or not tracked.placed:
            return
        if request.status not in _ANSWERED or not request.num_output_tokens:
            return
        approximate = bool(choice.salts) and (not tracked.failed or tracked.report["continued_tokens"] > 0)
        chats = self._chooser.chats(options, tracked.names)
        if approximate:
            self._answers.add(self._answered(request, tracked, choice, options))
        refines = self._config.refine == "idle" and self._chooser.prefixes is not None
        if refines and self._refinements is not None and (approximate or chats):
            self._refinements.refine(request, tracked.names, chats)
        if self._config.learn == "idle":
            self._learn(request, tracked, options)  # behind that, from what it puts into the prefix cache

    def _learn(self, request: Request, tracked: _Tracked, options: BlendOptions) -> None:
        """Have what the prompt shares with earlier ones of its caller's stored when there is time."""
        learned = self._chooser.learned(options, tracked.names)
        if not learned:
            return
        assert request.prompt_token_ids is not None
        recurring = self._recent.add(request.prompt_token_ids, learned)
        reused = np.zeros(request.num_prompt_tokens, bool)
        for segment in tracked.plan.known if tracked.plan is not None else ():
            reused[segment.start : segment.end] = True
        runs = free_runs(recurring.runs, reused)
        if runs and self._refinements is not None:
            learning = Learning(self._planner.namespace_of(options), learned, runs, recurring.preamble)
            self._refinements.learn(request, tracked.names, learning)

    def _answered(self, request: Request, tracked: _Tracked, choice: Choice, options: BlendOptions) -> Answered:
        plan, before = choice.plan, choice.continued
        ratios = [made.ratio for made in (plan, before) if made is not None]
        return Answered(
            np.array(request.all_token_ids, dtype=np.int32),
            request.num_prompt_tokens,
            self._chooser.terms(options, tracked.names),
            min(ratios, default=0.0),
            choice.salts,
            1 if before is None or plan is not None else 1 + before.turns,
        )

    def report_of(self, request_id: str) -> ReuseReport:
        """The report of a request that is running or was lately finished."""
        tracked = self._tracked.get(request_id)
        report = self._finished.get(request_id, {}) if tracked is None else tracked.report
        return ReuseReport(**report)


def _count_cached(request: Request, reused_tokens: int) -> None:
    """Have vLLM's own statistics, and the response's `cached_tokens`, count what was reused: else they count all that a
    blend provides, recomputed tokens too."""
    stats = request.prefill_stats
    if stats is not None and stats.num_prompt_tokens:
        most = stats.num_prompt_tokens - stats.num_local_cached_tokens  # less than was reused after a preemption
        stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, min(reused_tokens, most))


def _matched(plan: BlendPlan | None, computed_tokens: int) -> int:
    """How many tokens behind the locally computed ones a blend is to provide. A small rest is vLLM's to compute."""
    matched = 0 if plan is None else max(0, _provided(plan) - computed_tokens)
    return 0 if computed_tokens and matched < SMALL_REST else matched


def _provided(plan: BlendPlan) -> int:
    """How many of the prompt's tokens come from the blend; one at least stays for vLLM, which samples from it."""
    return min(plan.end, len(plan.token_ids) - 1)
