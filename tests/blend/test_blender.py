"""What a blend runs: which tokens, in which passes, how deep; and what it keeps for the next one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rows

from lmcache_rag.blend import Blender, LayerSpec, Workspace
from lmcache_rag.blend.passes import Pass
from lmcache_rag.blend.steps import LEAST_TOKENS, finished, next_of
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope, KVShape
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.request import ReuseReport
from tests.helpers import chunk_store

LAYERS, TOKENS, QUESTION = 12, 40, 3
SHAPE = KVShape(LAYERS, 1, 8, torch.float32)


class Recorder:
    """Runs a pass over arbitrary K and V, and notes which positions went through how many layers."""

    def __init__(self) -> None:
        self.passes: list[tuple[list[int], int]] = []

    def __call__(self, token_ids: torch.Tensor, nested: Pass) -> None:
        rows = torch.ones(len(token_ids), 1, 8)
        for layer in range(LAYERS):
            if not nested.attention(layer, rows, rows, rows, torch.empty_like(rows)):
                break
        self.passes.append((nested.positions.tolist(), layer + 1))


class Blends:
    """Blends over a store of chunks whose KV is all zeros."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.store = DiskStore(folder)
        self.recorder = Recorder()
        workspace = Workspace(
            [LayerSpec(scale=1.0)] * LAYERS, kv_heads=1, head_size=8, max_tokens=TOKENS + QUESTION, dtype=torch.float32
        )
        self.workspace = workspace
        self.blender = Blender(workspace, self.recorder, SHAPE, max_pass_tokens=1000)

    def chunks(self, namespace: str = "default") -> ChunkStore:
        return chunk_store(self.store, KVScope(namespace, "model"), SHAPE)

    def stored(self, start: int, length: int, namespace: str = "default", *, exact: bool = False) -> PlannedSegment:
        chunks, token_ids = self.chunks(namespace), np.arange(start, start + length, dtype=np.int32)
        if exact:
            chunks.save_preamble(ChunkKV(token_ids, torch.zeros(LAYERS, 2, length, 1, 8)))
        else:
            chunks.save(ChunkKV(token_ids, torch.zeros(LAYERS, 2, length, 1, 8)), NO_CONTEXT)
        return PlannedSegment(start, length, name=chunks.name(token_ids, NO_CONTEXT), exact=exact)

    def plan(
        self,
        *segments: PlannedSegment,
        preamble: PlannedSegment | None = None,
        selector: str = "none",
        ratio: float = 0.0,
        namespace: str = "default",
        cache_salt: str | None = None,
    ) -> BlendPlan:
        return BlendPlan(
            mode="blend",
            cache_salt=cache_salt,
            namespace=namespace,
            token_ids=tuple(range(TOKENS + QUESTION)),
            preamble=preamble or PlannedSegment(0, segments[0].start, exact=True),
            segments=segments,
            end=TOKENS,
            selector=selector,
            ratio=ratio,
        )

    def blend(self, *segments: PlannedSegment, namespace: str = "default", **options: Any) -> ReuseReport:
        plan = self.plan(*segments, namespace=namespace, **options)
        self.recorder.passes.clear()
        return finished(self.blender.blend(plan, self.chunks(namespace)))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Tokens and layers of each pass of the last blend."""
        return [(len(positions), layers) for positions, layers in self.recorder.passes]


@pytest.fixture
def blends(tmp_path: Path) -> Blends:
    return Blends(tmp_path)


PROBE = (QUESTION, LAYERS)


@pytest.mark.parametrize(
    ("selector", "ratio", "stored", "expected"),
    [
        ("query", 0.25, TOKENS, [PROBE, (10, 10)]),  # five sixths of 12 layers
        ("query", 1.0, TOKENS, [(40, 12)]),  # full prefill's KV, so all layers, and nothing to choose
        ("head", 0.25, TOKENS, [(10, 12)]),
        ("none", 0.0, TOKENS, []),
        ("all", 0.0, TOKENS, [(40, 12)]),
        ("query", 0.25, TOKENS - 20, [(20 + QUESTION, 12), (5, 10)]),  # 20 tokens that are not stored
        ("query", 0.0, TOKENS - 20, [(20, 12)]),
        ("query", 1.0, TOKENS - 20, [(40, 12)]),
        ("head", 0.25, TOKENS - 20, [(25, 12)]),
        ("none", 0.0, TOKENS - 20, [(20, 12)]),
        ("cacheblend", 0.25, TOKENS - 20, [(40, 2), (25, 12)]),
    ],
)
def test_what_is_run_how_deep(
    selector: str, ratio: float, stored: int, expected: list[tuple[int, int]], blends: Blends
) -> None:
    report = blends.blend(blends.stored(TOKENS - stored, stored), selector=selector, ratio=ratio)
    assert blends.sizes == expected
    assert report.recomputed_tokens == (stored if selector == "all" else int(ratio * stored))
    assert report.unknown_tokens == TOKENS - stored
    assert report.token_layers == sum(tokens * layers for tokens, layers in expected)


def test_a_separator_between_chunks_rides_with_the_probe(blends: Blends) -> None:
    """It needs all layers, the selected tokens do not."""
    blends.blend(blends.stored(0, 20), blends.stored(21, 19), selector="query", ratio=0.25)
    assert blends.sizes == [(1 + QUESTION, 12), (10, 10)]
    assert blends.recorder.passes[0][0] == [20, 40, 41, 42]


@pytest.mark.parametrize("selector", ["query", "head", "none"])
def test_tokens_without_kv_are_run_once(selector: str, blends: Blends) -> None:
    """A preamble that is not stored, a separator, and a chunk that was there when the plan was made."""
    gone = blends.stored(25, 10)
    assert gone.name is not None
    blends.store.delete([gone.name])
    report = blends.blend(blends.stored(5, 19), gone, blends.stored(35, 5), selector=selector, ratio=0.25)
    run = [position for positions, layers in blends.recorder.passes if layers == LAYERS for position in positions]
    lacking = [*range(5), 24, *range(25, 35)]
    assert [position for position in run if position in lacking] == lacking
    assert (report.unknown_tokens, report.missed_tokens) == (6, 10)


@pytest.mark.parametrize(("selector", "kept"), [("query", "carried"), ("head", "reused")])
def test_what_each_token_came_from(selector: str, kept: str, blends: Blends) -> None:
    gone = blends.stored(25, 10)
    assert gone.name is not None
    blends.store.delete([gone.name])
    chunks = (blends.stored(5, 19), gone, blends.stored(35, 5))
    assert not blends.blender.trace
    blends.blender.trace = True
    report = blends.blend(*chunks, selector=selector, ratio=0.25)
    tokens = [kind for kind, length in report.trace for _ in range(length)]
    assert len(tokens) == report.prompt_tokens == TOKENS + QUESTION
    assert tokens[:5] == ["unknown"] * 5 and tokens[24:35] == ["unknown", *["missed"] * 10]
    assert (tokens.count("recomputed"), tokens.count(kept)) == (report.recomputed_tokens, report.reused_tokens)
    assert tokens[TOKENS:] == ["vllm"] * QUESTION


def test_a_preamble_is_loaded_once(blends: Blends) -> None:
    preamble, chunk = blends.stored(0, 10, exact=True), blends.stored(10, 30)
    first = blends.blend(chunk, preamble=preamble)
    blends.workspace.key[:], blends.workspace.value[:] = 5.0, 5.0
    assert preamble.name is not None
    blends.store.delete([preamble.name])  # it need not even be there any more
    second = blends.blend(chunk, preamble=preamble)
    assert 0 < second.bytes_loaded < first.bytes_loaded
    assert first.codecs == {"raw": 40} and second.codecs == {"raw": 30}
    for report in (first, second):
        assert (report.reused_tokens, report.exact_tokens, report.misses) == (40, 10, {})
    assert not blends.workspace.key[:, :TOKENS].any() and not blends.workspace.value[:, :TOKENS].any()


def test_a_preamble_that_had_to_be_computed_is_kept_too(blends: Blends) -> None:
    preamble, chunk = blends.stored(0, 10, exact=True), blends.stored(10, 30)
    assert preamble.name is not None
    blends.store.write(preamble.name, [b"damaged"])
    first, second = (blends.blend(chunk, preamble=preamble) for _ in range(2))
    assert (first.misses, first.exact_tokens) == ({"corrupt": 10}, 0)
    assert (second.misses, second.exact_tokens) == ({}, 10)
    assert blends.sizes == []
    assert bool((blends.workspace.key[:, :10] == 1).all())  # what the recorder computes


def test_one_namespace_does_not_get_anothers_preamble(blends: Blends) -> None:
    for _ in range(2):  # it is kept when it comes again
        blends.blend(blends.stored(10, 30))
        assert blends.sizes == [(10, 12)]
    blends.blend(blends.stored(10, 30, "other"), namespace="other")
    assert blends.sizes == [(10, 12)]
    blends.blend(blends.stored(10, 30))
    assert blends.sizes == []


def test_text_of_a_callers_own_is_not_kept_for_others(blends: Blends) -> None:
    """Else its report would tell a caller that another one's prompt began with what it guessed."""

    def computed(cache_salt: str | None, preamble: PlannedSegment | None = None) -> bool:
        blends.blend(blends.stored(10, 30), cache_salt=cache_salt, preamble=preamble)
        return blends.sizes != []

    for caller in ("one", "another", None):
        assert computed(caller) and computed(caller) and not computed(caller)
    stored = blends.stored(0, 10, exact=True)  # by which a namespace shares it
    computed("one", stored)
    assert stored.name is not None
    blends.store.delete([stored.name])
    assert not computed("another", stored)


def test_a_blend_pauses_where_no_more_may_be_computed(blends: Blends) -> None:
    """What was allowed at first is used up by the probe; then the rest is repaired in two pieces."""
    plan = blends.plan(blends.stored(4, 36), selector="query", ratio=1 / 3)
    whole = finished(blends.blender.blend(plan, blends.chunks()))
    expected = blends.workspace.key.clone(), blends.workspace.value.clone()
    blends.recorder.passes.clear()
    allowance, steps, pauses = blends.blender.allowance, blends.blender.blend(plan, blends.chunks()), 0
    while True:
        allowance.tokens = LEAST_TOKENS
        report = next_of(steps)
        if report is not None:
            break
        pauses += 1
    assert pauses >= 1 and report.recomputed_tokens == whole.recomputed_tokens == 12
    assert all(tokens <= LEAST_TOKENS for tokens, _ in blends.sizes)
    assert torch.equal(blends.workspace.key[:, :TOKENS], expected[0][:, :TOKENS])
    assert torch.equal(blends.workspace.value[:, :TOKENS], expected[1][:, :TOKENS])
    assert report.phases_s.keys() == whole.phases_s.keys()


def test_a_blend_that_is_dropped_reads_no_more(blends: Blends) -> None:
    plan = blends.plan(blends.stored(4, 36))
    steps = blends.blender.blend(plan, blends.chunks())
    blends.blender.allowance.tokens = 0
    assert next_of(steps) is None
    steps.close()
    blends.blender.allowance.tokens = math.inf
    assert finished(blends.blender.blend(plan, blends.chunks())).reused_tokens == 36


@pytest.mark.parametrize("wrong", [None, 3])
def test_what_a_device_says_later_of_what_it_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int | None
) -> None:
    place, asked = LoadedKV.place, []

    def placed_without_waiting(kv: LoadedKV, offset: int, rows: Rows) -> None:
        place(kv, offset, rows)
        assert rows.verdicts is not None
        rows.verdicts.append(lambda: asked.append(offset) or wrong)

    blends = Blends(tmp_path)
    plan = blends.plan(blends.stored(0, 20), blends.stored(20, 20))
    monkeypatch.setattr(LoadedKV, "place", placed_without_waiting)
    report = finished(blends.blender.blend(plan, blends.chunks()))
    assert len(asked) == 2
    assert report.misses == ({} if wrong is None else {"corrupt": 40})
    assert (report.reused_tokens, report.missed_tokens) == ((40, 0) if wrong is None else (0, 40))
    assert report.codecs == ({"raw": 40} if wrong is None else {})


@pytest.mark.parametrize("context_tokens", [8192, 512, 1])
def test_rates_are_measured_as_they_are(context_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of 50 ms, 1 ms for each token, and 1 us for each one that it attends to."""
    now = 0.0
    monkeypatch.setattr("lmcache_rag.blend.blender.time.perf_counter", lambda: now)

    def run(token_ids: torch.Tensor, nested: Pass) -> None:
        nonlocal now
        now += 0.05 + len(token_ids) * 0.001 + float(nested.positions.sum()) * 1e-6

    workspace = Workspace(
        [LayerSpec(scale=1.0)], kv_heads=1, head_size=8, max_tokens=context_tokens, dtype=torch.float32
    )
    rates = Blender(workspace, run, SHAPE, max_pass_tokens=1000).rates
    if context_tokens == 1:  # what a pass costs cannot be told from what a token does
        assert rates.prefill_tokens_per_s > 0 and rates.key_s == 0
        return
    assert rates.prefill_s(0, 100) == pytest.approx(0.1 + 50 * 100e-6, rel=0.05)
    assert rates.key_s == pytest.approx(1e-6, rel=0.1) and rates.pass_s == pytest.approx(0.05, rel=0.1)
