"""`bench store`, small: its prompts hold what they are to hold, and the figures are of what they say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from lmcache_rag.bench.store import batch, bench_store


def test_the_row(tmp_path: Path) -> None:
    row = bench_store(tmp_path, 9000, lambda _note: None)
    assert row["chunks"] == 9000
    assert row["found_tokens_share"] > 0.75
    assert row["scheduler_calls_per_plan"] < 3
    assert 0 < row["mapped_bytes_per_chunk"] - row["mapped_token_bytes_per_chunk"] < 700
    assert all(value >= 0 for value in row.values())


def test_the_text_repeats_itself_as_text_does() -> None:
    chunks = batch(3)
    assert [chunk.tolist() for chunk in batch(3)[:5]] == [chunk.tolist() for chunk in chunks[:5]]
    assert min(map(len, chunks)) >= 100 and max(map(len, chunks)) <= 512
    text = np.concatenate(chunks)
    _, counts = np.unique(text, return_counts=True)
    assert counts.max() > 100 * np.median(counts)  # frequent words
    shared = [len(set(one[:80].tolist()) & set(two[:80].tolist())) for one, two in pairwise(chunks)]
    assert np.median(shared) > 40  # a document's header
    headed = batch(0, headed=True)
    assert all((chunk[:80] == headed[0][:80]).all() for chunk in headed)
