"""What would be reused of a prompt, run by run, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmcache_rag.chunk_kv import codec_in, variant_in
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.names import parsed
from lmcache_rag.plan.plan import PlannedSegment
from lmcache_rag.plan.planner import Planner
from lmcache_rag.records.catalog import find
from lmcache_rag.request import BlendOptions, ReuseReport


def explain(
    planner: Planner, chunks: ChunkStores, namespace: str, token_ids: Sequence[int] | np.ndarray, min_match: int
) -> tuple[list[dict[str, Any]], str]:
    """A row for each run of the prompt's tokens, in order, and why nothing would be reused, where that is so. What an
    engine measures, and so whether computing would be faster, is not known here."""
    report = ReuseReport(prompt_tokens=len(token_ids))
    chunks.of(namespace).refresh()  # planning does not wait for a store that is reached over a network
    plan = planner.plan(token_ids, BlendOptions(namespace=namespace), report)
    store = chunks.of(namespace)
    if plan is None:
        found = find(store.records, token_ids, min_match) if store.records.parts else None
        rows = [
            {"start": match.start, "tokens": match.length, "reuse": "no", "why": report.reason, "offset": match.offset,
             "key": match.key.hex(), "stored": sorted(match.stored)}
            for match in (found.matches if found is not None else ())
        ]  # fmt: skip
        return _with_gaps(rows, len(token_ids)), report.reason
    segments = [segment for segment in (plan.preamble, *plan.segments) if segment.length]
    return _with_gaps([_row(segment, first=segment is plan.preamble) for segment in segments], len(token_ids)), ""


def _row(segment: PlannedSegment, *, first: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"start": segment.start, "tokens": segment.length}
    if segment.name is None:
        return {**row, "reuse": "no", "why": "the preamble is not stored" if first else segment.reason}
    key, form, _ = parsed(segment.name)
    kind = "exact" if segment.exact else "repaired"
    why = "preamble" if first else "computed behind another preamble" if segment.foreign else "found by its tokens"
    return {
        **row, "reuse": kind, "why": why, "offset": segment.offset, "key": key.hex(), "variant": variant_in(form),
        "codec": codec_in(form), "bytes": segment.size_bytes,
    }  # fmt: skip


def _with_gaps(rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The rows, and between them what is in no stored chunk."""
    whole, end = [], 0
    for row in [*rows, {"start": length, "tokens": 0}]:
        if row["start"] > end:
            whole.append({"start": end, "tokens": row["start"] - end, "reuse": "no", "why": "in no stored chunk"})
        end = max(end, row["start"] + row["tokens"])
        whole.append(row)
    return whole[:-1]
