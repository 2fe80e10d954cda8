"""Blend: load, rotate to place, select, recompute, carry the change over. CacheBlend's scheme (Yao et al. 2025,
https://arxiv.org/abs/2405.16444) with exchangeable selectors, and extrapolation behind it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lmcache_rag.blend.extrapolation import Extrapolation
from lmcache_rag.blend.loading import Loaded, Loader
from lmcache_rag.blend.passes import Pass, PassRunner, ProbePass
from lmcache_rag.blend.preambles import Preambles
from lmcache_rag.blend.selectors import SELECTORS
from lmcache_rag.blend.steps import Allowance, Steps
from lmcache_rag.blend.workspace import Workspace
from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.codec import CODECS
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.hot import HotChunks
from lmcache_rag.library.names import is_learned
from lmcache_rag.plan.budget import share_of
from lmcache_rag.plan.cost import PROBE_TOKENS, Rates
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.request import ReuseReport

_PLACED_FOR_ONE = 16
"""So many tokens' KV is decoded and placed in the time in which one is computed, or in less."""

_READ_AT_ONCE = 1024
"""Tokens of the paged cache, before the blend may pause."""

_MEASURED_TOKENS = 256
"""Prefill's rate is measured on so many at least: on more where these take hardly longer than a few."""

_MEASURED_CONTEXT = 2048
"""What attention takes is measured behind so many tokens."""


_Verdicts = list[Callable[[], int | None]]


class Blender:
    """Does blends, one at a time.

    Args:
        run: runs the model over the workspace.
        max_pass_tokens: longer passes are cut into several, which is exact since attention is causal.
        never_slower: whether loading is given up where computing would be faster.
        trace: whether reports say of each token what it came from.

    Attributes:
        allowance: how much may be done before a blend pauses.
        token_layers: of the blend under way: layers run, summed over the tokens run.
        rates: how fast this machine computes, measured here.
    """

    def __init__(
        self,
        workspace: Workspace,
        run: PassRunner,
        shape: KVShape,
        max_pass_tokens: int,
        *,
        never_slower: bool = True,
        trace: bool = False,
    ) -> None:
        self.workspace = workspace
        self.trace = trace
        self._run = run
        self.shape = shape
        self._max_pass_tokens = max_pass_tokens
        self.preambles = Preambles()
        self.allowance = Allowance()
        self.token_layers = 0
        self._slower_s = 0.0  # than `rates` said, the last time
        self.rates = self._measured_rates()
        self.loader = Loader(shape, self.rates.prefill_tokens_per_s if never_slower else 0.0)

    def blend(
        self, plan: BlendPlan, chunks: HotChunks, held: Callable[[int, int], None] | None = None
    ) -> Steps[ReuseReport]:
        """Leave K and V of positions 0 to `plan.end` in the workspace, and say what was done. The workspace is this
        blend's until then.

        Args:
            held: puts those of some of the first `plan.held_tokens` there, from one position to another.
        """
        report = ReuseReport(
            mode=plan.mode, selector=plan.selector, ratio=plan.ratio, prompt_tokens=len(plan.token_ids)
        )
        self.token_layers = 0
        self.workspace.holder = self
        with self._timed(report, "load"):
            if plan.held_tokens:
                assert held is not None
                yield from self._read_held(plan.held_tokens, held)
            state = _Blend(self, plan, report)
            yield from state.load(chunks)
        with self._timed(report, "select"):
            recomputed = yield from state.select()
        with self._timed(report, "recompute"):
            yield from state.recompute(recomputed)
        state.count(recomputed)
        computing_s = report.phases_s["select"] + report.phases_s["recompute"]
        self._slower_s = max(0.0, computing_s - self.rates.computing_s(plan))
        self.preambles.keep(
            self.workspace,
            plan.preamble_of,
            plan.token_ids[: plan.preamble.length],
            is_preamble=plan.shares_preamble,
        )
        return report

    def _read_held(self, tokens: int, held: Callable[[int, int], None]) -> Steps[None]:
        yield from self.allowance.pause()  # some of it may be computed in the step that the blend begins in
        for start in range(0, tokens, _READ_AT_ONCE):
            end = min(tokens, start + _READ_AT_ONCE)
            yield from self.allowance.take((end - start) // _PLACED_FOR_ONE)
            held(start, end)

    def loading_s(self, plan: BlendPlan) -> float | None:
        """How long loading may take where the answer has a goal: what is left of it beside what is computed."""
        if plan.ttft_goal_s is None:
            return None
        rates = self.rates
        vllm_s = rates.prefill_s(plan.end, len(plan.token_ids)) + rates.pass_s
        return plan.ttft_goal_s - rates.computing_s(plan) - rates.reading_s(plan) - self._slower_s - vllm_s

    def _measured_rates(self) -> Rates:
        limit = min(self.workspace.max_tokens, self._max_pass_tokens)
        many = min(_MEASURED_TOKENS, limit)
        few = max(1, many // 16)
        few_s, many_s = self._pass_s(few), self._pass_s(many)
        while many_s < 4 * few_s and 2 * many <= limit:
            many *= 2
            many_s = self._pass_s(many)
        few_s = min(few_s, many_s)
        token_s = (many_s - few_s) / (many - few) if many_s > few_s else many_s / many
        pass_s = max(0.0, few_s - few * token_s)
        late, before = max(1, min(many, limit // 2)), min(_MEASURED_CONTEXT, self.workspace.max_tokens // 2)
        key_s = max(0.0, self._pass_s(late, before) - pass_s - late * token_s) / (late * max(1, before))
        attending_s = min(key_s * (many + few) / 2, token_s / 2)
        return Rates(1 / (token_s - attending_s), pass_s=pass_s, key_s=key_s)

    def _pass_s(self, tokens: int, before: int = 0) -> float:
        """Seconds of a pass of so many tokens, with others before them."""
        positions = torch.arange(before, before + tokens, device=self.workspace.device)
        seconds = []
        for _ in range(3):  # the first one pays for what is only done once
            start = time.perf_counter()
            self._run(torch.ones_like(positions), Pass(self.workspace, positions))
            float(self.workspace.value[-1, 0, 0, 0])  # waits for a device that runs behind
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def run(
        self, plan: BlendPlan, positions: Tensor, make: Callable[[Tensor], Pass], whole: Sequence[int] = ()
    ) -> Steps[None]:
        """Run the prompt's tokens at `positions` (ascending, in main memory); those behind `plan.end` are the probed
        question.

        Args:
            make: makes the pass of some of the positions.
            whole: ends of what is to go through one pass, if that can be: positions, ascending.
        """
        if not len(positions):
            return
        prompt = torch.tensor(plan.token_ids, dtype=torch.int64)
        probe = positions >= plan.end
        token_ids = torch.cat([prompt[positions[~probe]], prompt[len(prompt) - int(probe.sum()) :]])
        ends = torch.searchsorted(positions, torch.tensor(whole, dtype=torch.int64)).tolist()
        start = 0
        while start < len(positions):
            most = min(len(positions) - start, self._max_pass_tokens)
            count = yield from self.allowance.take(most)
            parts = [end - start for end in ends if start < end <= start + most]
            if parts and count < len(positions) - start:
                count = max((part for part in parts if part <= count), default=parts[0])
            nested = make(positions[start : start + count])
            self.token_layers += nested.token_layers
            self._run(token_ids[start : start + count], nested)
            start += count

    @contextmanager
    def _timed(self, report: ReuseReport, phase: str) -> Iterator[None]:
        """Count the seconds of a phase, but for its pauses."""
        start, paused_s = time.perf_counter(), self.allowance.paused_s
        try:
            yield
        finally:
            own_s = time.perf_counter() - start - (self.allowance.paused_s - paused_s)
            report.phases_s[phase] = report.phases_s.get(phase, 0.0) + own_s


class _Blend:
    """One blend under way: what was loaded, and what selectors may look at (`selectors.Selection`).

    Attributes:
        required: bool `[end]`: tokens whose KV is neither in memory nor was loaded. They are run once, in all layers.
            This and what follows is in main memory, so that a device is not waited for.
        candidates, budget, segments, layers: see `selectors.Selection`.
    """

    def __init__(self, blender: Blender, plan: BlendPlan, report: ReuseReport) -> None:
        self.layers = len(blender.workspace.layers)
        self._blender = blender
        self._plan = plan
        self._report = report
        self.required = torch.ones(plan.end, dtype=torch.bool)
        self.required[: plan.held_tokens] = False
        self._missed = torch.zeros_like(self.required)
        self._lossy: set[PlannedSegment] = set()
        self._reused: set[PlannedSegment] = set()

    def load(self, chunks: HotChunks) -> Steps[None]:
        """Place all that is in memory or in the store, and so know what may be recomputed."""
        plan = self._plan
        self._reused = yield from self._loaded(chunks)
        self._pending = self.required.clone()
        self.segments = tuple(segment for segment in plan.segments if segment in self._reused)
        self.candidates = ~self.required
        self.candidates[: plan.held_tokens] = False
        everything = plan.ratio >= 1 or plan.selector == "all"
        for segment in self._reused:
            if segment.exact and not (everything and segment in self._lossy):
                self.candidates[segment.start : segment.end] = False
        wanted = sum(share_of(plan.ratio, foreign=segment.foreign) * segment.length for segment in self.segments)
        candidates = int(self.candidates.sum())
        self.budget = candidates if plan.selector == "all" else min(math.ceil(wanted), candidates)
        repairs_all = self.budget == candidates and plan.selector != "none"  # then there is nothing to choose
        self._selector = SELECTORS["all" if repairs_all else plan.selector]

    def select(self) -> Steps[Tensor]:
        """The tokens to recompute: bool `[end]`."""
        selected = torch.zeros_like(self.required)
        if self.budget:
            chosen = yield from self._selector.select(self)
            selected[chosen] = True
        return selected

    def recompute(self, recomputed: Tensor) -> Steps[None]:
        """Run what was selected (bool `[end]`), and what has no KV yet: that needs all layers, the others as many as
        their selector says."""
        depth = 1.0 if bool(self._pending.any()) else self._selector.depth
        layers = math.ceil(self.layers * depth)
        workspace, extrapolation = self._blender.workspace, None
        if self._selector.extrapolates and bool(recomputed.any()):
            extrapolation = Extrapolation(workspace, recomputed, self.segments, layers)

        def make(positions: Tensor) -> Pass:
            observe = None if extrapolation is None else extrapolation.after(positions)
            return Pass(workspace, positions, observe, stop_after=layers - 1)

        positions = (self._take_pending() | recomputed).nonzero().flatten()
        whole = () if extrapolation is None else extrapolation.ends
        yield from self._blender.run(self._plan, positions, make, whole)

    def question_attention(self, first_layer: int) -> Steps[Tensor]:
        workspace, end = self._blender.workspace, self._plan.end
        question = min(PROBE_TOKENS, len(self._plan.token_ids) - end, workspace.max_tokens - end)
        mass = torch.zeros(end, dtype=torch.float32, device=workspace.device)
        probe = torch.arange(end, end + question)
        positions = torch.cat([self._take_pending().nonzero().flatten(), probe])
        yield from self._blender.run(
            self._plan, positions, lambda part: ProbePass(workspace, part, end, first_layer, mass)
        )
        return mass.cpu()

    def _take_pending(self) -> Tensor:
        """Tokens that have no KV yet and get it by the pass that is made next: bool `[end]`. The first pass through all
        layers takes them along, be it the probe. There they attend to chunks that are not repaired yet, which costs
        next to nothing (docs/blending.md), and the repair pass need not run all layers for them."""
        pending, self._pending = self._pending, torch.zeros_like(self._pending)
        return pending

    def value_deviation(self, layer: int) -> Steps[Tensor]:
        workspace = self._blender.workspace
        value = workspace.value[layer, : self._plan.end]
        reused = value.clone()
        everything = (self.required | self.candidates).nonzero().flatten()
        yield from self._blender.run(self._plan, everything, lambda part: Pass(workspace, part, stop_after=layer))
        return (value.float() - reused.float()).square().sum((1, 2)).cpu()

    def count(self, recomputed: Tensor) -> None:
        """Fill the report's token counts; tokens in the local prefix cache count as local only."""
        local, report = self._plan.local_tokens, self._report
        report.local_tokens = local
        report.token_layers = self._blender.token_layers
        report.recomputed_tokens = int(recomputed[local:].sum())
        report.reused_tokens = int((~self.required & ~recomputed)[local:].sum())
        report.unknown_tokens = int((self.required & ~self._missed)[local:].sum())
        for segment in self._reused:
            tokens = max(0, segment.end - max(segment.start, local))
            report.exact_tokens += tokens if segment.exact else 0
            report.foreign_tokens += tokens if segment.foreign else 0
            report.learned_tokens += tokens if is_learned(segment.name or "") else 0
        if self._blender.trace:
            report.trace = self._trace(recomputed)

    def _trace(self, recomputed: Tensor) -> tuple[tuple[str, int], ...]:
        """What the prompt's tokens came from, in runs; see `ReuseReport.trace`."""
        kinds = ("unknown", "missed", "reused", "carried", "recomputed", "local")
        found = torch.zeros(self._plan.end, dtype=torch.int8)
        found[self._missed] = kinds.index("missed")
        found[~self.required] = kinds.index("reused")
        if self._selector.extrapolates and bool(recomputed.any()):
            found[self.candidates] = kinds.index("carried")
        found[recomputed] = kinds.index("recomputed")
        found[: self._plan.local_tokens] = kinds.index("local")
        values, counts = torch.unique_consecutive(found, return_counts=True)
        runs = [(kinds[value], count) for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
        return (*runs, ("vllm", len(self._plan.token_ids) - self._plan.end))

    def _loaded(self, chunks: HotChunks) -> Steps[set[PlannedSegment]]:
        """Place all that is in memory or in the store; returns which segments that is."""
        plan, blender, reused = self._plan, self._blender, set()
        allowance = blender.allowance
        preamble = plan.preamble
        if blender.preambles.place(blender.workspace, plan.preamble_of, plan.token_ids[: preamble.length]):
            self.required[: preamble.length] = False
            reused.add(preamble)
        wanted = [segment for segment in plan.known if segment not in reused]
        placed: list[tuple[PlannedSegment, Loaded, _Verdicts]] = []
        found_in_order = blender.loader.load(
            chunks,
            wanted,
            plan.end - plan.held_tokens,
            blender.loading_s(plan),
            may_wait=lambda: allowance.alone,
            paused_s=lambda: allowance.paused_s,
        )
        for found in found_in_order:
            if found is None:
                yield from allowance.pause()
                continue
            segment, kv = found
            yield from allowance.take(segment.length // _PLACED_FOR_ONE)
            verdicts: _Verdicts = []
            wrong = kv if isinstance(kv, str) else self._placed(segment, kv, verdicts)
            if wrong or isinstance(kv, str):
                self._miss(segment, wrong)
            else:
                placed.append((segment, kv, verdicts))
        for segment, kv, verdicts in placed:  # what a device decodes, it decodes meanwhile
            if any(verdict() is not None for verdict in verdicts):
                self._miss(segment, "corrupt")
            else:
                self._count_placed(segment, kv)
                reused.add(segment)
        for segment in plan.segments:
            if segment.name is None:
                self._miss(segment, segment.reason)
        return reused

    def _placed(self, segment: PlannedSegment, kv: Loaded, verdicts: _Verdicts) -> str:
        """Put what was loaded in its place; why that cannot be, or nothing."""
        if segment.offset + segment.length > kv.tokens:
            return "shorter than planned"
        wanted = list(self._plan.token_ids[segment.start : segment.end])
        if kv.token_ids[segment.offset :][: segment.length].tolist() != wanted:
            return "of other tokens"  # whatever the records say
        try:
            self._blender.workspace.place(kv, segment.start, segment.offset, segment.length, verdicts)
        except CorruptObjectError:
            return "corrupt"
        return ""

    def _count_placed(self, segment: PlannedSegment, kv: Loaded) -> None:
        """Note where a segment's KV is from, and that it needs no computing."""
        report, codecs = self._report, self._report.codecs
        report.bytes_loaded += kv.size_bytes
        written = max(0, segment.end - max(segment.start, self._plan.local_tokens))
        report.hot_tokens += 0 if kv.size_bytes else written
        if not CODECS[kv.codec].lossless:
            self._lossy.add(segment)
        codecs[kv.codec] = codecs.get(kv.codec, 0) + segment.length
        self.required[segment.start : segment.end] = False

    def _miss(self, segment: PlannedSegment, reason: str) -> None:
        self._missed[segment.start : segment.end] = True
        self._report.miss(reason, max(0, segment.end - max(segment.start, self._plan.local_tokens)))
