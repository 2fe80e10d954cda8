"""From a request's tokens and options to a `BlendPlan`: which stored chunks lie where. Knows nothing of vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lmcache_rag.chunk_kv import StoredForm
from lmcache_rag.codec import CODECS
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.names import codec_of
from lmcache_rag.plan.budget import Calibration, share_of
from lmcache_rag.plan.cost import CostModel
from lmcache_rag.plan.matching import NO_TOKEN, History, Matcher
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.sources import Sources
from lmcache_rag.plan.variants import MERGED, Context, context_of, suited
from lmcache_rag.records.catalog import Match
from lmcache_rag.request import BlendOptions, ReuseReport

_CHEAPER = "cheaper to compute"

_SINKS = 4
"""A prompt's first tokens attract the attention that is for nothing (attention sinks, Xiao et al. 2024,
https://arxiv.org/abs/2309.17453), and have KV like no others: where a chunk begins a prompt, they are computed."""

_MOST = 0.75
"""Where more than this share of a chunk's tokens is wanted, all of it is read."""


_WORTH_READING = 0.125
"""Stored exact KV of a prompt's beginning is loaded where this share of it is not in the prefix cache."""


class Planner:
    """Plans blends for one model over one store. It looks at what is recorded, never at what is stored.

    Args:
        namespace: of requests that name none.
        matcher: finds stored chunks in prompts that do not say where they are.
        max_tokens: a blend ends there at the latest.
        never_slower: whether stored KV is left alone where computing is estimated to be faster.
    """

    def __init__(
        self,
        chunks: ChunkStores,
        calibration: Calibration,
        *,
        namespace: str,
        matcher: Matcher,
        max_tokens: int,
        never_slower: bool,
    ) -> None:
        self._chunks = chunks
        self._calibration = calibration
        self._namespace = namespace
        self._matcher = matcher
        self.max_tokens = max_tokens
        self._never_slower = never_slower
        self.cost = CostModel()

    def namespace_of(self, options: BlendOptions) -> str:
        """In which a request is answered."""
        return options.namespace or self._namespace

    def ratio_of(self, options: BlendOptions) -> float:
        """The recompute ratio that a request wants, or that its target takes."""
        return self._calibration.ratio_for(options.target_kl) if options.ratio is None else options.ratio

    def plan(
        self,
        token_ids: Sequence[int] | np.ndarray,
        options: BlendOptions,
        report: ReuseReport,
        *,
        held_tokens: int = 0,
        behind: int = 0,
        history: History | None = None,
        learned: str = "",
    ) -> BlendPlan | None:
        """The plan, or None for plain prefill; `report.reason` then says why. Misses that vLLM's own prefill is to
        compute are counted in `report`.

        Args:
            held_tokens: the prompt's first tokens that prefill need not compute, since they are in the prefix cache.
            behind: so many of them a blend may begin behind.
            history: of the conversation that the prompt may belong to.
            learned: the namespace of text that was learned from the caller's prompts, where there is one.
        """
        try:
            prompt = np.asarray(token_ids, dtype=np.int32)
            return self._plan(prompt, options, report, held_tokens, behind, history, learned)
        except StoreError as error:
            report.reason = f"store: {error}"
            return None

    def exact(
        self, token_ids: Sequence[int] | np.ndarray, history: History, *, held_tokens: int = 0
    ) -> BlendPlan | None:
        """The plan that loads stored exact KV of a prompt's beginning; None where that takes longer than computing it,
        or there is none."""
        end = min(history.end, len(token_ids) - 1, self.max_tokens)
        segments = [_cut(segment, end) for segment in history.begun if segment.start < end]
        if end <= held_tokens:
            return None
        plan = BlendPlan(
            mode="prefix",
            namespace=history.chunks.scope.namespace,
            token_ids=tuple(token_ids),
            preamble=_preamble(0, None),
            segments=_located(segments, history.chunks),
            end=end,
            selector="none",
            ratio=0.0,
        )
        return plan if self.cost.worth_blending(plan, held_tokens) else None

    def _plan(
        self,
        prompt: np.ndarray,
        options: BlendOptions,
        report: ReuseReport,
        held_tokens: int,
        behind: int,
        history: History | None,
        learned: str,
    ) -> BlendPlan | None:
        chunks = self._chunks.of(self.namespace_of(options))
        chunks.follow()
        matches = self._matcher.matches(prompt, options.segments, chunks, report)
        if options.mode == "precompute" and matches:
            return self._precompute(prompt, matches, chunks, options, report)
        sources = self._sources(chunks, learned)
        matches = sources.matches(prompt, matches, self._matcher)
        if matches and (matches[-1].end > len(prompt) or matches[0].start < 0):
            report.reason = f"a segment ends at {matches[-1].end}, behind the prompt's {len(prompt)} tokens"
            return None
        if options.ttft_goal_s is not None:
            history = None  # it has no forms to choose from
        preamble, segments = _preamble(0, None), list[PlannedSegment]()
        if matches:
            preamble, segments = self._segments(prompt, matches, sources, options)
        start, begun, behind = _beginning(preamble, history, behind)
        if begun or behind:
            preamble = _preamble(0, None)
            segments = [_behind(segment, start) for segment in segments if segment.end > start]
        if history is not None:
            segments = self._with_history(prompt, segments, start, history)
        if segments and segments[0].start < _SINKS and not segments[0].exact:
            segments = [_behind(segment, _SINKS) for segment in segments if segment.end > _SINKS]
        if not segments:
            report.reason = "no stored chunk in the prompt"
            return None
        if segments[-1].end <= held_tokens:
            report.reason = "all stored chunks of the prompt are in the local prefix cache"
            return None
        plan = BlendPlan(
            mode="blend",
            namespace=chunks.scope.namespace,
            token_ids=tuple(prompt.tolist()),
            preamble=preamble,
            begun=_located(begun, chunks),
            held_tokens=behind,
            segments=_located(segments, chunks),
            end=min(segments[-1].end, len(prompt) - 1),
            selector=options.selector,
            ratio=self.ratio_of(options),
            ttft_goal_s=options.ttft_goal_s,
        )
        return self._worthwhile(plan, chunks, report, held_tokens)

    def is_stored(self, token_ids: Sequence[int] | np.ndarray, namespace: str, learned: str) -> np.ndarray:
        """Which tokens of a prompt are stored ones, of chunks or learned: bool. In the units in which they may be
        reused, or what is learned would tell more of what is stored than reports do. Raises `StoreError`."""
        chunks = self._chunks.of(namespace)
        chunks.follow()
        return self._sources(chunks, learned).taken(np.asarray(token_ids, dtype=np.int32), self._matcher)

    def _sources(self, chunks: ChunkStore, learned: str) -> Sources:
        if not learned:
            return Sources(chunks)
        stored = self._chunks.of(learned)
        stored.follow()
        return Sources(chunks, stored)

    def _precompute(
        self, prompt: np.ndarray, matches: list[Match], chunks: ChunkStore, options: BlendOptions, report: ReuseReport
    ) -> BlendPlan | None:
        start, length = matches[0].start, matches[0].length
        if len(matches) != 1 or start + length != len(prompt):
            report.reason = "precompute takes one segment that ends the prompt"
            return None
        if options.primer_tokens > start:
            report.reason = f"the primer's {options.primer_tokens} tokens do not fit before the segment"
            return None
        if len(prompt) > self.max_tokens:
            report.reason = f"a chunk that ends at {len(prompt)} is behind max_blend_tokens ({self.max_tokens})"
            return None
        context, primer = prompt[:start], start - options.primer_tokens
        form = chunks.variants(matches[0].key, matches[0].stored).get(
            Context(context[:primer], context[primer:]).variant
        )
        if form is not None and not CODECS[codec_of(form.name)].lossless:
            form = None  # what one codec lost is not to be stored in another
        return BlendPlan(
            mode="precompute",
            namespace=chunks.scope.namespace,
            token_ids=tuple(prompt.tolist()),
            preamble=_preamble(start, chunks.preamble(context)),
            segments=(_placed(PlannedSegment(start, length), form),),
            end=len(prompt),
            selector="none",
            ratio=0.0,
            primer_tokens=options.primer_tokens,
        )

    def _segments(
        self, prompt: np.ndarray, matches: list[Match], chunks: Sources, options: BlendOptions
    ) -> tuple[PlannedSegment, list[PlannedSegment]]:
        """The preamble and the chunks of a prompt, with what is stored of them."""
        forms = {match.key: chunks.variants(match.key, match.stored) for match in matches}
        preamble, context = _context(prompt, matches, forms, chunks)
        segments = [_segment(prompt, match, context, forms[match.key], options.primer) for match in matches]
        if options.ttft_goal_s is None:
            return preamble, segments
        return _with_forms(preamble, chunks), [_with_forms(segment, chunks) for segment in segments]

    def _with_history(
        self, prompt: np.ndarray, segments: list[PlannedSegment], start: int, history: History
    ) -> list[PlannedSegment]:
        """The chunks of a prompt, and what was said before where none of them is, from a position on."""
        free = prompt.copy()
        free[:start] = NO_TOKEN
        for segment in segments:
            free[segment.start : segment.end] = NO_TOKEN
        said = []
        for match in self._matcher.find(free, history.chunks).matches:
            forms = history.chunks.variants(match.key, match.stored)
            last = max(forms.values(), key=lambda form: form.used_s, default=None)
            partial = match.length < _MOST * len(match.chunk)
            said.append(_placed(PlannedSegment(match.start, match.length, match.offset, partial=partial), last))
        return sorted([*segments, *said], key=lambda segment: segment.start)

    def _worthwhile(
        self, plan: BlendPlan, chunks: ChunkStore, report: ReuseReport, held_tokens: int
    ) -> BlendPlan | None:
        """The plan without what is not worth loading, or None where plain prefill is faster."""
        segments = list(plan.segments)
        if plan.ttft_goal_s is None and self._never_slower:
            segments = [self._if_worth_loading(segment, plan.ratio, len(segments)) for segment in segments]
        segments = [_cut(segment, self.max_tokens) for segment in segments if segment.start < self.max_tokens]
        while segments and segments[-1].name is None:
            report.miss(segments[-1].reason, segments.pop().length)
        if not segments:
            faster = _CHEAPER in report.misses
            report.reason = "plain prefill is faster" if faster else "no chunk of the prompt is stored"
            return None
        end = min(segments[-1].end, len(plan.token_ids) - 1)
        segments[-1] = _cut(segments[-1], end)
        plan = replace(plan, segments=tuple(segment for segment in segments if segment.length), end=end)
        reused = sum(segment.length for segment in segments if segment.name is not None)
        known = plan.held_tokens + sum(segment.length for segment in plan.known)
        if end - known > reused:
            report.reason = "most of the prompt before the last stored chunk is not stored"
            for segment in segments:
                if segment.name is None:
                    report.miss(segment.reason, segment.length)
            return None
        if not self._never_slower or self.cost.worth_blending(plan, held_tokens):
            return plan
        report.reason = "plain prefill is faster"
        for segment in plan.segments:
            report.miss(segment.reason if segment.name is None else _CHEAPER, segment.length)
        return None

    def _if_worth_loading(self, segment: PlannedSegment, ratio: float, among: int) -> PlannedSegment:
        """The segment, without its object where computing it is faster."""
        share = 0.0 if segment.exact else share_of(ratio, foreign=segment.foreign)
        if segment.name is None:
            return segment
        if self.cost.worth_loading(segment, share, among):
            return segment
        return replace(segment, name=None, exact=False, foreign=False, reason=_CHEAPER)


def _beginning(
    preamble: PlannedSegment, history: History | None, behind: int
) -> tuple[int, tuple[PlannedSegment, ...], int]:
    """Where what is blended begins; and what is before it: stored exact KV, or that of so many tokens in the paged
    cache; neither where it is the preamble."""
    stored, known = history.end if history is not None else 0, preamble.end if preamble.name is not None else 0
    if stored - behind <= stored * _WORTH_READING:
        stored = 0
    if max(stored, behind) <= known:
        return preamble.end, (), 0
    if history is not None and stored > behind:
        return stored, history.begun, 0
    return behind, (), behind


def _context(
    prompt: np.ndarray, matches: list[Match], forms: Mapping[bytes, Mapping[str, StoredForm]], chunks: Sources
) -> tuple[PlannedSegment, Context]:
    """The prompt's tokens before its first chunk as a segment, and what its chunks' own variants were computed behind.

    A stored preamble that begins the prompt is found like a chunk, and is taken out of `matches`. Its KV is exact at
    position 0, also where only its beginning is in this prompt.
    """
    first = matches[0]
    if len(matches) > 1 and first.start == first.offset == 0:
        form = chunks.preamble(first.chunk)
        if form is not None:
            matches.pop(0)
            return _preamble(first.length, form), Context(first.chunk)
    inside = first.offset if first.offset <= MERGED else 0  # of a part of a chunk the chunk's beginning is not here
    before = prompt[: max(0, first.start - inside)]
    context, length = context_of(before, forms, chunks)
    return _preamble(length, chunks.preamble(context.preamble)), context


def _segment(
    prompt: np.ndarray, match: Match, context: Context, forms: Mapping[str, StoredForm], primer: str | None
) -> PlannedSegment:
    """A match as a segment, with the variant of its chunk, of these, that suits this place best."""
    begins = match.offset == 0 and np.array_equal(prompt[: match.start], context.preamble)
    first = abs(match.start - match.offset - len(context.preamble)) <= context.merged
    chosen = suited(forms, context, first=begins or first, primer=primer)
    exact = begins and chosen == context.variant
    foreign = chosen is not None and not context.is_before(chosen)
    partial = match.length < _MOST * len(match.chunk)
    segment = PlannedSegment(match.start, match.length, match.offset, exact=exact, foreign=foreign, partial=partial)
    return _placed(segment, forms.get(chosen or ""))


def _preamble(length: int, form: StoredForm | None) -> PlannedSegment:
    return _placed(PlannedSegment(0, length, exact=True), form)


def _placed(segment: PlannedSegment, form: StoredForm | None) -> PlannedSegment:
    return segment if form is None else replace(segment, name=form.name, size_bytes=form.size_bytes)


def plan_digest(plan: BlendPlan) -> str:
    """Names everything that shapes a blend's KV, so that it is found again only by a request with the same plan."""
    shaped_by = (
        plan.cache_salt,
        plan.namespace,
        plan.token_ids,
        plan.preamble,
        plan.begun,
        plan.held_tokens,
        plan.segments,
        plan.selector,
        plan.ratio,
        plan.ttft_goal_s,
    )
    return hashlib.blake2b(repr(shaped_by).encode(), digest_size=16).hexdigest()


def _with_forms(segment: PlannedSegment, chunks: Sources) -> PlannedSegment:
    return segment if segment.name is None else replace(segment, forms=tuple(chunks.forms(segment.name)))


def _located(segments: Sequence[PlannedSegment], chunks: ChunkStore) -> tuple[PlannedSegment, ...]:
    """With where each is read from, as far as that is known."""
    tiers = [chunks.store.tier_of(segment.name) if segment.name is not None else None for segment in segments]
    return tuple(replace(segment, tier=tier or "") for segment, tier in zip(segments, tiers, strict=True))


def _behind(segment: PlannedSegment, start: int) -> PlannedSegment:
    """What of a segment is behind a position."""
    cut = max(0, start - segment.start)
    return replace(
        segment,
        start=segment.start + cut,
        length=segment.length - cut,
        offset=segment.offset + cut,
        partial=segment.partial or cut > (1 - _MOST) * segment.length,
    )


def _cut(segment: PlannedSegment, end: int) -> PlannedSegment:
    return replace(segment, length=max(0, min(segment.length, end - segment.start)))
