"""Blend: load, rotate to place, select, recompute, carry the change over. CacheBlend's scheme (Yao et al. 2025,
https://arxiv.org/abs/2405.16444) with exchangeable selectors, and extrapolation behind it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lmcache_rag.blend.extrapolation import Extrapolation
from lmcache_rag.blend.loading import Loader
from lmcache_rag.blend.passes import Pass, PassRunner, ProbePass
from lmcache_rag.blend.selectors import SELECTORS
from lmcache_rag.blend.workspace import Workspace
from lmcache_rag.chunk_kv import ChunkKV, KVShape
from lmcache_rag.codec import CODECS
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.chunks import ChunkStore, LoadedKV
from lmcache_rag.plan.budget import share_of
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.request import ReuseReport

_MEASURED_TOKENS = 256
"""Prefill's rate is measured on so many."""

PROBE_TOKENS = 64
"""The question is probed with its last tokens only, this many at most."""


class Blender:
    """Does blends, one at a time.

    Args:
        run: runs the model over the workspace.
        max_pass_tokens: longer passes are cut into several, which is exact since attention is causal.
        never_slower: whether loading is given up where computing would be faster.

    Attributes:
        token_layers: of the blend under way: layers run, summed over the tokens run.
        prefill_tokens_per_s: how fast this machine computes, measured here.
    """

    def __init__(
        self,
        workspace: Workspace,
        run: PassRunner,
        shape: KVShape,
        max_pass_tokens: int,
        *,
        never_slower: bool = True,
    ) -> None:
        self.workspace = workspace
        self._run = run
        self.shape = shape
        self._max_pass_tokens = max_pass_tokens
        self._context: ChunkKV | None = None
        self.token_layers = 0
        self._slower_s = 0.0  # than `_computing_s` said, the last time
        self.prefill_tokens_per_s = self._measure_prefill()
        self.loader = Loader(shape, self.prefill_tokens_per_s if never_slower else 0.0)

    def blend(self, plan: BlendPlan, chunks: ChunkStore) -> ReuseReport:
        """Leave K and V of positions 0 to `plan.end` in the workspace, and say what was done."""
        report = ReuseReport(
            mode=plan.mode, selector=plan.selector, ratio=plan.ratio, prompt_tokens=len(plan.token_ids)
        )
        self.token_layers = 0
        with _timed(report, "load"):
            state = _Blend(self, plan, chunks, report)
        with _timed(report, "select"):
            selected = SELECTORS[plan.selector].select(state) if state.budget or plan.selector == "all" else None
        with _timed(report, "recompute"):
            recomputed = torch.zeros_like(state.required)
            if selected is not None:
                recomputed[selected] = True
            state.recompute(recomputed)
        state.count(recomputed)
        self._slower_s = max(0.0, report.phases_s["select"] + report.phases_s["recompute"] - self._computing_s(plan))
        if plan.mode == "precompute" and plan.preamble.name is None and plan.preamble.length:
            self._keep_context(plan.token_ids[: plan.preamble.length])
        return report

    def loading_s(self, plan: BlendPlan) -> float | None:
        """How long loading may take where the answer has a goal: what is left of it beside what is computed."""
        if plan.ttft_goal_s is None:
            return None
        return plan.ttft_goal_s - self._computing_s(plan) - self._slower_s

    def _computing_s(self, plan: BlendPlan) -> float:
        """How long computing takes at the rate of a plain prefill; the question is computed twice."""
        named = [segment for segment in (plan.preamble, *plan.segments) if segment.name is not None]
        computed = plan.end - sum(segment.length for segment in named) + 2.0 * (len(plan.token_ids) - plan.end)
        repaired = [segment for segment in named if not segment.exact]
        computed += sum(share_of(plan.ratio, foreign=segment.foreign) * segment.length for segment in repaired)
        return computed / self.prefill_tokens_per_s

    def _measure_prefill(self) -> float:
        tokens = min(_MEASURED_TOKENS, self.workspace.max_tokens, self._max_pass_tokens)
        positions = torch.arange(tokens, device=self.workspace.device)
        seconds = []
        for _ in range(3):  # the first one pays for what is only done once
            start = time.perf_counter()
            self._run(torch.ones_like(positions), Pass(self.workspace, positions))
            float(self.workspace.value[-1, 0, 0, 0])  # waits for a device that runs behind
            seconds.append(time.perf_counter() - start)
        return tokens / min(seconds)

    def place_context(self, plan: BlendPlan) -> bool:
        """Put what was computed before the last precomputed chunk in its place, where it is the same for this one."""
        token_ids = plan.token_ids[: plan.preamble.length]
        if self._context is None or tuple(self._context.token_ids.tolist()) != token_ids:
            return False
        self.workspace.place(self._context, 0, 0, len(token_ids))
        return True

    def _keep_context(self, token_ids: tuple[int, ...]) -> None:
        if self._context is None or tuple(self._context.token_ids.tolist()) != token_ids:
            self._context = ChunkKV(np.array(token_ids, dtype=np.int32), self.workspace.take(0, len(token_ids)))

    def run(self, plan: BlendPlan, positions: Tensor, make: Callable[[Tensor], Pass]) -> None:
        """Run the prompt's tokens at `positions` (ascending); those behind `plan.end` are the probed question.

        Args:
            make: makes the pass of some of the positions.
        """
        if not len(positions):
            return
        prompt = torch.tensor(plan.token_ids, dtype=torch.int64, device=self.workspace.device)
        probe = positions >= plan.end
        token_ids = torch.cat([prompt[positions[~probe]], prompt[len(prompt) - int(probe.sum()) :]])
        for ids, part in zip(
            token_ids.split(self._max_pass_tokens), positions.split(self._max_pass_tokens), strict=True
        ):
            nested = make(part)
            self.token_layers += nested.token_layers
            self._run(ids, nested)


class _Blend:
    """One blend under way: what was loaded, and what selectors may look at (`selectors.Selection`).

    Attributes:
        required: bool `[end]`: tokens whose KV was not loaded.
        candidates, budget, segments, layers: see `selectors.Selection`.
    """

    def __init__(self, blender: Blender, plan: BlendPlan, chunks: ChunkStore, report: ReuseReport) -> None:
        self.layers = len(blender.workspace.layers)
        self._blender = blender
        self._plan = plan
        self._report = report
        self.required = torch.ones(plan.end, dtype=torch.bool, device=blender.workspace.device)
        self._missed = torch.zeros_like(self.required)
        self._lossy: set[PlannedSegment] = set()
        if plan.mode == "precompute" and plan.preamble.name is None and blender.place_context(plan):
            self.required[: plan.preamble.length] = False
        loaded = {
            segment
            for segment, kv in blender.loader.load(
                chunks, (plan.preamble, *plan.segments), plan.end, blender.loading_s(plan)
            )
            if self._placed(segment, kv)
        }
        self.segments = tuple(segment for segment in plan.segments if segment in loaded)
        for segment in plan.segments:
            if segment.name is None:
                self._miss(segment, segment.reason)
        self.candidates = ~self.required
        everything = plan.ratio >= 1 or plan.selector == "all"
        for segment in (plan.preamble, *self.segments):
            if segment.exact and not (everything and segment in self._lossy):
                self.candidates[segment.start : segment.end] = False
        wanted = sum(share_of(plan.ratio, foreign=segment.foreign) * segment.length for segment in self.segments)
        self.budget = min(math.ceil(wanted), int(self.candidates.sum()))

    def recompute(self, recomputed: Tensor) -> None:
        """Run what has no KV and what was selected (bool `[end]`)."""
        last_layer = self._last_layer(recomputed)
        workspace, extrapolation = self._blender.workspace, None
        if SELECTORS[self._plan.selector].extrapolates and bool(recomputed.any()):
            layers = self.layers if last_layer is None else last_layer + 1
            extrapolation = Extrapolation(workspace, recomputed, self.segments, layers)

        def make(positions: Tensor) -> Pass:
            observe = None if extrapolation is None else extrapolation.after(positions)
            return Pass(workspace, positions, observe, last_layer)

        self._blender.run(self._plan, (self.required | recomputed).nonzero().flatten(), make)

    def _last_layer(self, recomputed: Tensor) -> int | None:
        """The last layer in which KV is recomputed. None, all of them, where tokens lack their KV, and where every
        candidate is recomputed, so that the result is full prefill's."""
        if bool(self.required.any()) or bool(torch.equal(recomputed, self.candidates)):
            return None
        return math.ceil(self.layers * SELECTORS[self._plan.selector].depth) - 1

    def question_attention(self, first_layer: int) -> Tensor:
        workspace, end = self._blender.workspace, self._plan.end
        question = min(PROBE_TOKENS, len(self._plan.token_ids) - end, workspace.max_tokens - end)
        mass = torch.zeros(end, dtype=torch.float32, device=workspace.device)
        probe = torch.arange(end, end + question, device=workspace.device)
        positions = torch.cat([self.required.nonzero().flatten(), probe])
        self._blender.run(self._plan, positions, lambda part: ProbePass(workspace, part, end, first_layer, mass))
        return mass

    def value_deviation(self, layer: int) -> Tensor:
        workspace = self._blender.workspace
        value = workspace.value[layer, : self._plan.end]
        reused = value.clone()
        everything = (self.required | self.candidates).nonzero().flatten()
        self._blender.run(self._plan, everything, lambda part: Pass(workspace, part, stop_after=layer))
        return (value.float() - reused.float()).square().sum((1, 2))

    def count(self, recomputed: Tensor) -> None:
        """Fill the report's token counts; tokens in the local prefix cache count as local only."""
        local, report = self._plan.local_tokens, self._report
        report.local_tokens = local
        report.token_layers = self._blender.token_layers
        report.recomputed_tokens = int(recomputed[local:].sum())
        report.reused_tokens = int((~self.required & ~recomputed)[local:].sum())
        report.unknown_tokens = int((self.required & ~self._missed)[local:].sum())
        for segment in (self._plan.preamble, *self.segments):
            if segment.name is not None:
                tokens = max(0, segment.end - max(segment.start, local))
                report.exact_tokens += tokens if segment.exact else 0
                report.foreign_tokens += tokens if segment.foreign else 0

    def _placed(self, segment: PlannedSegment, kv: LoadedKV | str) -> bool:
        """Put what was loaded in its place; False, and a miss, where that cannot be."""
        reason = kv if isinstance(kv, str) else ""
        if isinstance(kv, LoadedKV):
            if segment.offset + segment.length > kv.tokens:
                reason = "shorter than planned"
            else:
                try:
                    self._blender.workspace.place(kv, segment.start, segment.offset, segment.length)
                    self._report.bytes_loaded += kv.size_bytes
                    if not CODECS[kv.level].lossless:
                        self._lossy.add(segment)
                    levels = self._report.levels
                    levels[kv.level] = levels.get(kv.level, 0) + segment.length
                    self.required[segment.start : segment.end] = False
                except CorruptObjectError:
                    reason = "corrupt"
        if reason:
            self._miss(segment, reason)
        return not reason

    def _miss(self, segment: PlannedSegment, reason: str) -> None:
        self._missed[segment.start : segment.end] = True
        self._report.miss(reason, max(0, segment.end - max(segment.start, self._plan.local_tokens)))


@contextmanager
def _timed(report: ReuseReport, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        report.phases_s[phase] = report.phases_s.get(phase, 0.0) + time.perf_counter() - start
