"""The connector's worker half: goes on with a blend in each step, and writes what it made to the paged cache."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lmcache_rag.blend.blender import Blender
from lmcache_rag.blend.steps import Steps, next_of
from lmcache_rag.blend.workspace import LayeredKV
from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import ChunkKV, variant_of
from lmcache_rag.codec import LOSSLESS_CODEC
from lmcache_rag.codec.tables import CodecTables
from lmcache_rag.conversation.prefixes import PIECE_TOKENS, pieces, stored_pieces
from lmcache_rag.conversation.refinement import PIECE_S, Refiner
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.hot import HotChunks
from lmcache_rag.library.room import Limits, Rooms
from lmcache_rag.library.tables import ModelCodecs, machine_store
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.request import ReuseReport
from lmcache_rag.vllm.failures import Failures
from lmcache_rag.vllm.metadata import BlendJob, Refined, RefineJob, StepReports
from lmcache_rag.vllm.model import BoundModel
from lmcache_rag.vllm.paged import PagedCache
from lmcache_rag.vllm.saver import Saver
from lmcache_rag.vllm.saving import PAUSE_S, Made, Saved, Saving, save_behind, save_in_order

_PIECES = 8
"""So many pieces of a conversation are loaded, or handed on to be stored, in a step."""

_WITHOUT_TABLES = "q8"
"""Learned text is in this codec where the engine's own has no tables yet: nobody waits for them to be learned."""

_RECENT_BLENDS = 8
"""The least overhead of so many counts, so that what else the machine did in one of them does not."""


class WorkerHalf:
    """Runs where the model runs. Its memory, the workspace, is allocated here, at start-up.

    Args:
        codec: in which KV is stored, and which is preferred.
        extra_codecs: in which chunks are stored as well.
        limits: of what is stored.
        workspace_tokens: the longest blend.
        max_pass_tokens: longest nested forward; vLLM has memory for that many tokens a step.
        block_tokens: tokens per block of the paged cache.
        hot_bytes, never_slower, trace: see `ConnectorConfig`.
    """

    def __init__(
        self,
        model: BoundModel,
        store: Store,
        fingerprint: str,
        codec: str,
        extra_codecs: Sequence[str],
        limits: Limits,
        shipped: Callable[[], CodecTables | None],
        *,
        workspace_tokens: int,
        max_pass_tokens: int,
        block_tokens: int,
        hot_bytes: int,
        never_slower: bool,
        trace: bool,
    ) -> None:
        self._model = model
        codecs = ModelCodecs(store, fingerprint, model.shape, machine_store(), shipped)
        self._rooms = Rooms(store, limits)
        self._chunks = ChunkStores(store, fingerprint, codec, codecs, extra_codecs, self._rooms)
        self._codecs, self._codec = codecs, codec
        self._without_tables = ChunkStores(store, fingerprint, _WITHOUT_TABLES, codecs, rooms=self._rooms)
        self._chats = ChunkStores(store, fingerprint, LOSSLESS_CODEC, codecs, rooms=self._rooms)
        self._hot = HotChunks(self._chunks, hot_bytes, pinned=model.device.type == "cuda")
        self._block_tokens = block_tokens
        self._blender = Blender(
            model.workspace(workspace_tokens),
            model,
            model.shape,
            max_pass_tokens,
            never_slower=never_slower,
            trace=trace,
        )
        self._paged = PagedCache(model.layers, model.shape, model.device, block_tokens)
        # Where all layers have a window vLLM forgets the blocks that lie before it.
        keeps_all = any(spec.window is None for spec in model.specs)
        held_s = self._paged.token_s(self._blender.workspace) if keeps_all else None
        self._rates = self._blender.rates = replace(self._blender.rates, held_s=held_s)
        self._refiner = Refiner(self._blender.workspace, model, self._rates)
        self._refined: Refined | None = None
        self._saver = Saver()
        self._saving: tuple[RefineJob, Future[Saved]] | None = None
        self._stored_to = 0  # the last piece that was to be stored of the conversation under way
        self._next_run = 0  # of the prompt that is learned from
        self._learned = True  # since the scheduler half was told
        self._overheads_s: deque[float] = deque(maxlen=_RECENT_BLENDS)
        self._failures = Failures()
        self._stores_aside = store.remote or model.device.type != "cpu"
        self._storing = Saving(self._saver, self._rooms, self._failures)
        self._placed: set[str] = set()
        self._under_way: tuple[BlendJob, Steps[ReuseReport]] | None = None
        self._done: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._reports: dict[str, dict[str, Any]] = {}

    def begin(self, job: BlendJob) -> None:
        """Take a blend; none is under way."""
        assert self._under_way is None, "two blends at once"
        self._under_way = job, self._blended(job)

    @torch.inference_mode()
    def go_on(self, tokens: float) -> None:
        """Go on with the blend that is under way, if any, by so many tokens about. At its end its report is kept for
        the scheduler half, of a precompute request when its chunk is stored too. Where it fails, whatever the reason,
        vLLM is told that its blocks were not loaded."""
        is_waiting = math.isinf(tokens) and self._under_way is None
        self._end_stored(PAUSE_S if is_waiting else 0.0)
        if self._under_way is None:
            return
        job, steps = self._under_way
        self._blender.allowance.tokens = tokens
        try:
            report = next_of(steps)
        except Exception as error:  # noqa: BLE001  # one request's misfortune is not to end the engine for all
            report = _failed(job.plan, self._failures.note("A blend", error))
            self._failed_blocks.update(job.block_ids[job.plan.local_tokens // self._block_tokens :])
        if report is None:
            return
        self._under_way = None
        if job.request_id in self._storing:
            self._placed.add(job.request_id)
            self._end_stored()
        else:
            self._end(job.request_id, report)

    def _end_stored(self, wait_s: float = 0.0) -> None:
        for request_id, report in self._storing.take(wait_s):
            self._end(request_id, report)

    def _end(self, request_id: str, report: ReuseReport) -> None:
        self._done.add(request_id)
        self._reports[request_id] = report.model_dump()

    def drop(self, request_id: str) -> None:
        """A request was aborted: its blend ends here, and vLLM may free its blocks."""
        if self._under_way is not None and self._under_way[0].request_id == request_id:
            self._under_way[1].close()
            self._under_way = None
            self._done.add(request_id)

    @torch.inference_mode()
    def refine(self, job: RefineJob) -> None:
        """Do a piece of what is done while nothing is asked, and keep for the scheduler half how far that came."""
        if self._model.asleep:
            self._refined = Refined(failure="asleep")
            return
        try:
            steps = {"compute": self._compute, "write": self._write, "store": self._store, "learn": self._learn_runs}
            self._refined = replace(steps[job.step](job), evicted=self._rooms.take_evicted())
            if job.last and self._refined.done:
                self._refiner.forget()
        except Exception as error:  # noqa: BLE001  # nobody waits for it
            self._refiner.forget()
            self._refined = Refined(failure=self._failures.note("Refinement", error))

    def _compute(self, job: RefineJob) -> Refined:
        """The next tokens' exact KV: from the prefix cache or the store where it is there, else by a pass."""
        before = done = self._refiner.take_up(job.token_ids)
        done = self._read(job, done)
        if done == before and job.chats:
            done = self._loaded(job, done)
        if done == before:
            done = self._refiner.advance()
        return Refined(done=done == len(job.token_ids))

    def _read(self, job: RefineJob, done: int) -> int:
        """Read what the prefix cache holds behind what is done; returns how many first tokens are done then."""
        held_s, block = self._rates.held_s, self._block_tokens
        if held_s is None or done >= len(job.held_ids) * block:
            return done
        first = done // block
        last = min(len(job.held_ids), first + max(1, int(PIECE_S / held_s / block)))
        return self._refiner.give(
            last * block - done,
            lambda _: self._paged.read(self._blender.workspace, job.held_ids, range(first, last)),
        )

    def _loaded(self, job: RefineJob, done: int) -> int:
        """Load some of the pieces that follow what is done; returns how many first tokens are done then. What cannot be
        used is computed."""
        start, chunks = time.perf_counter(), self._chats.of(job.chats)
        chunks.follow()
        wanted = [
            PlannedSegment(piece.start, PIECE_TOKENS, name=form.name)
            for piece, form in stored_pieces(chunks, job.token_ids)
            if piece.start >= done
        ]
        wanted = wanted[:_PIECES]
        for found in self._blender.loader.load(self._chats, wanted, len(job.token_ids), may_wait=lambda: False):
            if found is None:
                if time.perf_counter() - start > PIECE_S:
                    break
                time.sleep(PAUSE_S)
                continue
            if found[0].start > done or isinstance(found[1], str):
                break
            tokens = job.token_ids[done : done + PIECE_TOKENS]
            if tuple(found[1].token_ids.tolist()) != tokens:
                break
            try:
                done = self._refiner.give(PIECE_TOKENS, functools.partial(self._place_piece, found[1]))
            except CorruptObjectError:
                break
            if time.perf_counter() - start > PIECE_S:
                break
        return done

    def _place_piece(self, kv: LayeredKV, start: int) -> None:
        self._blender.workspace.place(kv, start, 0, PIECE_TOKENS)

    def _write(self, job: RefineJob) -> Refined:
        self._refiner.place()
        if job.block_ids:
            skipped = job.start // self._block_tokens
            block_ids = (0,) * skipped + job.block_ids
            self._paged.write(self._blender.workspace, block_ids, job.start, len(job.token_ids))
        return Refined(done=True)

    def _store(self, job: RefineJob) -> Refined:
        """Have some pieces stored by a thread, and see in later steps whether it is done: a store may take long, and no
        request is to wait for it."""
        if self._is_saving():
            return Refined()
        of, saved = self._take_saved()
        is_same = of is not None and of.token_ids == job.token_ids
        chunks = self._chats.of(job.chats)
        chunks.follow()
        missing = (piece for piece in pieces(job.token_ids) if chunks.missing(piece.token_ids, piece.variant))
        following = list(itertools.islice(missing, _PIECES))
        # Where a piece that was stored is missing again, it made room for those behind it.
        is_full = is_same and (saved.is_full or (bool(following) and following[0].start <= self._stored_to))
        if is_full:
            return Refined(done=True, stored_bytes=saved.size_bytes)
        wanted = [
            (ChunkKV(piece.token_ids, self._refiner.taken(piece.start, PIECE_TOKENS)), piece.variant)
            for piece in following
        ]
        if wanted:
            self._stored_to = following[-1].start
            self._saving = job, self._saver.submit(save_in_order, chunks, wanted)
        return Refined(done=not wanted, stored_bytes=saved.size_bytes)

    def _learn_runs(self, job: RefineJob) -> Refined:
        """Have the next run that recurs stored by a thread, as a chunk computed behind what precedes it."""
        if self._is_saving():
            return Refined()
        of, saved = self._take_saved()
        stored = Refined(stored_bytes=saved.size_bytes, learned_tokens=saved.tokens, is_full=saved.is_full)
        learning, token_ids = job.learning, np.array(job.token_ids, np.int32)
        assert learning is not None
        is_same = of is not None and (of.step, of.token_ids) == (job.step, job.token_ids)
        number = self._next_run = self._next_run + 1 if is_same else 0
        if number == len(learning.runs) or (is_same and saved.is_full):
            return replace(stored, done=True)
        preamble, (start, length) = learning.preamble, learning.runs[number]
        run = self._taken_from_refiner(token_ids, start, length)
        before = self._taken_from_refiner(token_ids, 0, preamble)
        variant = variant_of(token_ids[:preamble], token_ids[preamble:start])
        self._saving = job, self._saver.submit(self._save_run, learning.learned, before, run, variant)
        return stored

    def _taken_from_refiner(self, token_ids: np.ndarray, start: int, length: int) -> ChunkKV:
        return ChunkKV(token_ids[start : start + length], self._refiner.taken(start, length))

    def _save_run(self, namespace: str, preamble: ChunkKV, run: ChunkKV, variant: str) -> Saved:
        try:
            self._codecs.for_writing(self._codec)
            chunks = self._chunks.of(namespace)
        except StoreError:
            chunks = self._without_tables.of(namespace)
        return save_behind(chunks, preamble, run, variant)

    def _is_saving(self) -> bool:
        """Whether a thread is still storing something."""
        if self._saving is None or self._saving[1].done():
            return False
        time.sleep(PAUSE_S)  # vLLM steps on meanwhile
        return True

    def _take_saved(self) -> tuple[RefineJob | None, Saved]:
        """What a thread has stored last, and for which job. Raises what it raised."""
        saving, self._saving = self._saving, None
        return (None, Saved()) if saving is None else (saving[0], saving[1].result())

    def take_done(self) -> set[str]:
        """The requests whose blends ended since the last call, well or not."""
        done, self._done = self._done, set()
        return done

    def take_failed_blocks(self) -> set[int]:
        """The blocks of the paged cache that were to be written since the last call, and were not."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _blended(self, job: BlendJob) -> Steps[ReuseReport]:
        plan = job.plan
        before = self._stored_before(job) if plan.mode == "precompute" else None

        def held(start: int, end: int) -> None:
            blocks = range(start // self._block_tokens, end // self._block_tokens)
            self._paged.read(self._blender.workspace, job.block_ids, blocks)

        report = before if before is not None else (yield from self._blender.blend(plan, self._hot, held))
        start = time.perf_counter()
        end = min(plan.end, len(plan.token_ids) - 1)
        if end > plan.local_tokens:
            self._paged.write(self._blender.workspace, job.block_ids, plan.local_tokens, end)
        report.phases_s["write"] = time.perf_counter() - start
        if before is not None:
            return report
        self._learn(plan, report)
        if plan.mode == "precompute":
            self._store_chunk(job, report)
        return report

    def take_reports(self) -> StepReports | None:
        """What was done since the last call."""
        reports, self._reports = self._reports, {}
        placed, self._placed = self._placed, set()
        refined, self._refined = self._refined, None
        rates, self._learned = self._rates if self._learned else None, False
        return StepReports(reports, placed, rates, refined) if reports or placed or refined or rates else None

    def _learn(self, plan: BlendPlan, report: ReuseReport) -> None:
        """Note how fast the store was, and how much longer the blend took than loading and what `Rates` says."""
        rates = replace(self._rates, load_bytes_per_s=self._blender.loader.bytes_per_s)
        if plan.mode == "blend" and not report.misses:  # what is missed is computed besides
            spent_s = sum(report.phases_s.values()) - report.phases_s["load"]
            self._overheads_s.append(max(0.0, spent_s - rates.computing_s(plan)))
        self._rates = replace(rates, overhead_s=min(self._overheads_s, default=0.0))
        self._learned = True

    def _stored_before(self, job: BlendJob) -> ReuseReport | None:
        """The report of a precompute request of which all is stored, or is being stored for another: nothing is
        computed for it, and its answer is over zeros. None where something is to be computed."""
        plan, made = job.plan, Made.by(job.plan)
        report = ReuseReport(mode=plan.mode, prompt_tokens=len(plan.token_ids))
        chunks = self._chunks.of(plan.namespace)
        try:
            chunks.follow()
            is_stored = not chunks.lacks_preamble(made.preamble) and not chunks.missing(made.chunk, made.variant)
        except StoreError:
            return None  # storing will say why it cannot be
        if not is_stored and not self._storing.join(job.request_id, report, made.what):
            return None
        self._blender.workspace.clear(plan.end)
        report.local_tokens, report.reused_tokens = plan.local_tokens, plan.end - plan.local_tokens
        return report

    def _store_chunk(self, job: BlendJob, report: ReuseReport) -> None:
        """Store the preamble and the chunk of a precompute request, where they are missing: by a thread, but where that
        would be in the way of what is computed meanwhile, and nobody else waits."""
        made = Made.by(job.plan)
        preamble = ChunkKV(made.preamble, self._blender.workspace.take(0, len(made.preamble)))
        chunk = ChunkKV(made.chunk, self._blender.workspace.take(made.start, len(made.chunk)))
        self._storing.begin(
            job.request_id,
            report,
            made.what,
            lambda: save_behind(self._chunks.of(made.namespace), preamble, chunk, made.variant),
            here=self._blender.allowance.alone and not self._stores_aside,
        )

    def close(self) -> None:
        """Record what was used and is not yet recorded, behind all that is to be stored."""
        self._saver.close(self._chunks.flush, self._chats.flush)


def _failed(plan: BlendPlan, failure: str) -> ReuseReport:
    """The report of a blend that an exception ended: what was to be reused is missed."""
    report = ReuseReport(
        reason=f"failed: {failure}",
        failure=failure,
        prompt_tokens=len(plan.token_ids),
        local_tokens=plan.local_tokens,
    )
    unnamed = [segment for segment in plan.segments if segment.name is None]
    for segment in [*plan.known, *unnamed]:
        reason = segment.reason if segment.name is None else report.reason
        report.miss(reason, max(0, segment.end - max(segment.start, plan.local_tokens)))
    return report
