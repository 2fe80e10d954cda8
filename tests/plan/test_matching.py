"""Where a prompt says what is stored: which parts of chunks are reused for whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.records.part import VariantRow
from lmcache_rag.request import ReuseReport

CHUNK = list(range(2000, 2300))
BEFORE, BEHIND = list(range(100)), list(range(500, 600))


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    chunks = ChunkStore(DiskStore(tmp_path), KVScope("default", "f" * 32), "raw")
    key = key_of(CHUNK)
    chunks.records.add({key: np.array(CHUNK, np.int32)}, [VariantRow(key, f"{0:016}.raw", 1000, 1)])
    return chunks


def found(chunks: ChunkStore, prompt: list[int], unit: int) -> list[tuple[int, int, int]]:
    matches = Matcher(unit_tokens=unit).find(np.array(prompt, np.int32), chunks).matches
    for match in matches:
        assert prompt[match.start : match.end] == CHUNK[match.offset : match.offset + match.length]
    return [(match.start, match.offset, match.length) for match in matches]


@pytest.mark.parametrize(
    ("start", "end", "units"),
    [
        (0, 300, (0, 300)),
        (1, 300, (4, 300)),
        (4, 300, (4, 300)),
        (5, 300, (64, 300)),
        (0, 299, (0, 296)),
        (0, 296, (0, 296)),
        (0, 295, (0, 192)),
        (100, 200, (128, 192)),
        (130, 190, None),
        (100, 260, (128, 192)),
        (60, 200, (64, 192)),
    ],
)
def test_parts_are_reused_in_units(chunks: ChunkStore, start: int, end: int, units: tuple[int, int] | None) -> None:
    prompt = [*BEFORE, *CHUNK[start:end], *BEHIND]
    assert found(chunks, prompt, 1) == [(100, start, end - start)]
    expected = [] if units is None else [(100 + units[0] - start, units[0], units[1] - units[0])]
    assert found(chunks, prompt, 64) == expected


def test_who_knows_a_part_of_a_chunk_cannot_find_out_the_next_token(chunks: ChunkStore) -> None:
    """However far into a chunk a client's knowledge goes, one token more, right or wrong, makes no difference."""
    for known in range(40, 255):
        right, wrong = (found(chunks, [*BEFORE, *CHUNK[:known], token, *BEHIND], 64) for token in (CHUNK[known], 7))
        if known + 1 not in range(64, 257, 64):  # where all of a unit was known but for its last token
            assert right == wrong


def test_a_chunk_shorter_than_a_unit_is_reused_whole(chunks: ChunkStore) -> None:
    short = list(range(4000, 4050))
    key = key_of(short)
    chunks.records.add({key: np.array(short, np.int32)}, [VariantRow(key, f"{0:016}.raw", 1000, 1)])
    matcher = Matcher(unit_tokens=64)
    lengths = {
        cut: [match.length for match in matcher.find(np.array([*BEFORE, *short[cut:], *BEHIND]), chunks).matches]
        for cut in (0, 2, 10)
    }
    assert lengths == {0: [50], 2: [46], 10: []}


def test_whether_too_much_was_found_is_told_to_nobody_who_might_be_guessing(chunks: ChunkStore) -> None:
    prompt = np.array([token for number in range(300) for token in [*CHUNK[:40], 5000 + number]], np.int32)
    for unit, told in ((1, True), (64, False)):
        report = ReuseReport()
        Matcher(unit_tokens=unit).matches(prompt, None, chunks, report)
        assert report.matching_cut_short is told
