"""From a request's tokens and options to a `BlendPlan`: which stored chunks lie where. Knows nothing of vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope, best_variant, variant_of
from lmcache_rag.codec import CODECS
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore, codec_of
from lmcache_rag.plan.budget import Calibration, share_of
from lmcache_rag.plan.cost import CostModel
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.records.catalog import Catalog, Match
from lmcache_rag.request import BlendOptions, ReuseReport
from lmcache_rag.vllm.config import ConnectorConfig

_KEPT_CATALOGS = 16
_CHEAPER = "cheaper to compute"


class Planner:
    """Plans blends for one model over one store."""

    def __init__(
        self, store: Store, model: str, config: ConnectorConfig, max_tokens: int, calibration: Calibration
    ) -> None:
        self._store = store
        self._model = model
        self._config = config
        self._max_tokens = max_tokens
        self._calibration = calibration
        self.cost = CostModel()
        self._catalogs: dict[str, Catalog] = {}

    def plan(self, token_ids: Sequence[int], options: BlendOptions, report: ReuseReport) -> BlendPlan | None:
        """The plan, or None for plain prefill; `report.reason` then says why. Misses that vLLM's own prefill is to
        compute are counted in `report`."""
        try:
            return self._plan(token_ids, options, report)
        except StoreError as error:
            report.reason = f"store: {error}"
            return None

    def _plan(self, token_ids: Sequence[int], options: BlendOptions, report: ReuseReport) -> BlendPlan | None:
        prompt = np.asarray(token_ids, dtype=np.int32)
        matches = self._matches(prompt, options)
        if not matches:
            report.reason = "no stored chunk in the prompt"
            return None
        end = matches[-1].start + matches[-1].length
        if end > len(prompt) or matches[0].start < 0:
            report.reason = f"a segment ends at {end}, behind the prompt's {len(prompt)} tokens"
            return None
        namespace = options.namespace or self._config.namespace
        chunks = ChunkStore(
            self._store, KVScope(namespace, self._model), self._config.codec, extra=self._config.extra_codecs
        )
        if options.mode == "precompute":
            plan = self._precompute(prompt, matches, chunks, options, report)
        else:
            plan = self._blend(prompt, matches, chunks, options, report)
        if plan is not None and plan.end > self._max_tokens:
            report.reason = f"the reused part ends at {plan.end}, behind max_blend_tokens ({self._max_tokens})"
            return None
        return plan

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
        context, primer = prompt[:start], start - options.primer_tokens
        name = chunks.variants(prompt[start:]).get(variant_of(context[:primer], context[primer:]))
        if name is not None and not CODECS[codec_of(name)].lossless:
            name = None  # what one level lost is not to be stored at another
        return BlendPlan(
            mode="precompute",
            namespace=chunks.scope.namespace,
            token_ids=tuple(prompt.tolist()),
            preamble=PlannedSegment(0, start, name=chunks.preamble(context), exact=True),
            segments=(PlannedSegment(start, length, name=name),),
            end=len(prompt),
            selector="none",
            ratio=0.0,
            primer_tokens=options.primer_tokens,
        )

    def _blend(
        self, prompt: np.ndarray, matches: list[Match], chunks: ChunkStore, options: BlendOptions, report: ReuseReport
    ) -> BlendPlan | None:
        preamble, context = self._context(prompt, matches, chunks)
        ratio = self._calibration.ratio_for(options.target_kl) if options.ratio is None else options.ratio
        segments = self._segments(prompt, matches, context, chunks)
        if options.ttft_goal_s is not None:
            segments = [_with_levels(segment, chunks) for segment in segments]
            preamble = _with_levels(preamble, chunks)
        elif self._config.never_slower:
            segments = [self._if_worth_loading(segment, ratio, len(segments)) for segment in segments]
        while segments and segments[-1].name is None:
            report.miss(segments[-1].reason, segments.pop().length)
        if not segments:
            faster = _CHEAPER in report.misses
            report.reason = "plain prefill is faster" if faster else "no chunk of the prompt is stored"
            return None
        end = min(segments[-1].end, len(prompt) - 1)
        reused = sum(segment.length for segment in segments if segment.name is not None)
        known = reused + (preamble.length if preamble.name is not None else 0)
        if end - known > reused:
            report.reason = "most of the prompt before the last stored chunk is not stored"
            for segment in segments:
                if segment.name is None:
                    report.miss(segment.reason, segment.length)
            return None
        segments[-1] = _cut(segments[-1], end)
        return BlendPlan(
            mode="blend",
            namespace=chunks.scope.namespace,
            token_ids=tuple(prompt.tolist()),
            preamble=preamble,
            segments=tuple(segment for segment in segments if segment.length),
            end=end,
            selector=options.selector,
            ratio=ratio,
            ttft_goal_s=options.ttft_goal_s,
        )

    def _if_worth_loading(self, segment: PlannedSegment, ratio: float, among: int) -> PlannedSegment:
        """The segment, without its object where computing it is faster."""
        size = self._store.size(segment.name) if segment.name is not None else None
        share = 0.0 if segment.exact else share_of(ratio, foreign=segment.foreign)
        if size is None or self.cost.worth_loading(size, segment.length, share, among):
            return segment
        return replace(segment, name=None, exact=False, foreign=False, reason=_CHEAPER)

    def _matches(self, prompt: np.ndarray, options: BlendOptions) -> list[Match]:
        if options.segments is not None:
            return [Match(start, length, 0, prompt[start : start + length]) for start, length in options.segments]
        namespace = options.namespace or self._config.namespace
        catalog = self._catalogs.pop(namespace, None)
        if catalog is None:
            catalog = Catalog(self._store, KVScope(namespace, self._model), self._config.min_match_tokens)
            while len(self._catalogs) >= _KEPT_CATALOGS:
                del self._catalogs[next(iter(self._catalogs))]
        self._catalogs[namespace] = catalog  # the last one is the one used last
        return catalog.find(prompt)

    def _context(
        self, prompt: np.ndarray, matches: list[Match], chunks: ChunkStore
    ) -> tuple[PlannedSegment, np.ndarray]:
        """The prompt's tokens before its first chunk as a segment, and the preamble that its chunks' own variant was
        computed behind.

        A stored preamble that begins the prompt is found like a chunk, and is taken out of `matches`. Its KV is exact
        at position 0, also where only its beginning is in this prompt.
        """
        first = matches[0]
        if len(matches) > 1 and first.start == first.offset == 0:
            name = chunks.preamble(first.chunk)
            if name is not None:
                matches.pop(0)
                return PlannedSegment(0, first.length, name=name, exact=True), first.chunk
        preamble = prompt[: max(0, first.start - first.offset)]
        return PlannedSegment(0, len(preamble), name=chunks.preamble(preamble), exact=True), preamble

    def _segments(
        self, prompt: np.ndarray, matches: list[Match], context: np.ndarray, chunks: ChunkStore
    ) -> list[PlannedSegment]:
        """The matches as segments, each with the best variant of its chunk: the one that is exact in this place, else
        one computed behind the prompt's preamble, else another."""
        behind_preamble = variant_of(context)
        segments = []
        for match in matches:
            variants = chunks.variants(match.chunk)
            in_place = match.offset == 0 and np.array_equal(prompt[: match.start], context)
            exact = in_place and behind_preamble in variants
            variant = behind_preamble if exact else best_variant(variants, context)
            foreign = variant is None and bool(variants)
            if foreign:
                variant = min(variants, key=lambda name: ("-" not in name, name))  # primed ones first
            name = variants[variant] if variant is not None else None
            segments.append(PlannedSegment(match.start, match.length, match.offset, name, exact, foreign))
        return segments


def plan_digest(plan: BlendPlan, caller_salt: str | None) -> str:
    """Names everything that shapes a blend's KV, so that it is found again only by a request with the same plan."""
    shaped_by = (
        caller_salt,
        plan.namespace,
        plan.token_ids,
        plan.preamble,
        plan.segments,
        plan.selector,
        plan.ratio,
        plan.ttft_goal_s,
    )
    return hashlib.blake2b(repr(shaped_by).encode(), digest_size=16).hexdigest()


def _with_levels(segment: PlannedSegment, chunks: ChunkStore) -> PlannedSegment:
    return segment if segment.name is None else replace(segment, levels=tuple(chunks.levels(segment.name)))


def _cut(segment: PlannedSegment, end: int) -> PlannedSegment:
    return replace(segment, length=max(0, min(segment.length, end - segment.start)))
