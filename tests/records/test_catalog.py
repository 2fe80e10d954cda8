"""Finding stored chunks in prompts by their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.records.catalog import MOST_COMPARED, find
from lmcache_rag.records.part import _DTYPES, VariantRow
from lmcache_rag.records.records import Records

SCOPE = KVScope("default", "f" * 32)


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(DiskStore(tmp_path), SCOPE)


def save(records: Records, *chunks: Sequence[int]) -> None:
    ids = {key_of(chunk): np.array(chunk, dtype=np.int32) for chunk in chunks}
    records.add(ids, [VariantRow(key, "a" * 16 + ".raw", 100, 0) for key in ids])


def found(
    records: Records, prompt: Sequence[int], min_match: int = 32, *, keys: bool = True
) -> list[tuple[int, int, int]]:
    matches = find(records, prompt, min_match).matches
    for match in matches:
        expected = match.chunk[match.offset : match.offset + match.length].tolist()
        assert list(prompt[match.start : match.start + match.length]) == expected
        assert match.key == key_of(match.chunk) or not keys
    return [(match.start, match.length, match.offset) for match in matches]


def test_whole_chunks_anywhere(records: Records) -> None:
    one, two = tokens(1, 200), tokens(2, 90)
    save(records, one)
    save(records, two)
    prompt = [*tokens(3, 21), *two, *tokens(4, 5), *one, *tokens(5, 9)]
    assert found(records, prompt) == [(21, 90, 0), (116, 200, 0)]


def test_edges_that_merged_with_neighbours_and_parts(records: Records) -> None:
    chunk = tokens(1, 200)
    save(records, chunk)
    assert found(records, [5, 6, 7, *chunk[2:-3], 8, 9]) == [(3, 195, 2)]
    assert found(records, [5, *chunk[60:110], 6]) == [(1, 50, 60)]


@pytest.mark.parametrize("length", [32, 33, 47, 64])
@pytest.mark.parametrize("start", [0, 1, 77, 136])
def test_every_run_of_the_shortest_length_is_found(records: Records, length: int, start: int) -> None:
    chunk = tokens(7, 200)
    save(records, chunk)
    run = chunk[start : start + length]
    assert found(records, [1001, *run, 1002]) == [(1, length, start)]


def test_shorter_runs_are_left_alone(records: Records) -> None:
    chunk = tokens(1, 200)
    save(records, chunk)
    assert found(records, [1001, *chunk[50:81], 1002]) == []
    assert found(records, [1001, *chunk[50:100], 1002], min_match=51) == []


def test_a_chunk_in_which_one_token_changed_is_found_around_it(records: Records) -> None:
    chunk = tokens(1, 200)
    save(records, chunk)
    assert found(records, [*chunk[:120], 1001, *chunk[121:]]) == [(0, 120, 0), (121, 79, 121)]


def test_the_same_chunk_twice_and_overlapping_chunks(records: Records) -> None:
    text = tokens(1, 300)
    save(records, text[:180], text[140:])
    assert found(records, text) == [(0, 180, 0), (180, 120, 40)]
    assert found(records, [*text[:180], 1001, *text[:180]]) == [(0, 180, 0), (181, 180, 0)]


def test_longest_of_chunks_that_begin_alike(records: Records) -> None:
    text = tokens(1, 300)
    save(records, text[:60], text[:250])
    assert found(records, [*text, 1001]) == [(0, 250, 0)]


def test_what_is_gone_is_found_no_more(records: Records) -> None:
    chunk = tokens(1, 100)
    assert found(records, chunk) == []
    save(records, chunk)
    assert found(records, chunk) == [(0, 100, 0)]
    records.add({}, [VariantRow(key_of(chunk), "a" * 16 + ".raw", 0, 0)])
    assert found(records, chunk) == []
    save(records, chunk)
    assert found(records, chunk) == [(0, 100, 0)]


@pytest.mark.parametrize("name", [name for name in _DTYPES if not name.startswith("owner")])
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_part_tells_nothing_untrue_and_fails_no_prompt(records: Records, name: str, seed: int) -> None:
    """What is mapped has no checksum compared: an array of it may hold anything."""
    draw = np.random.default_rng(seed)
    header = tokens(1, 80)
    chunks = [[*header, *tokens(number, 80)] for number in range(2, 40)]
    save(records, *chunks)
    records.compact()
    (part,) = records.parts
    damaged = getattr(part, name).copy()
    bad = draw.random(len(damaged)) < 0.3
    limit = 300 if seed % 2 else np.iinfo(damaged.dtype).max
    damaged[bad] = draw.integers(limit, size=bad.sum(), dtype=damaged.dtype)
    records.parts = (replace(part, **{name: damaged}),)
    for number in range(0, len(chunks), 2):
        prompt = [*chunks[number], 1001, *chunks[number + 1][120:], *header]
        for start, length, offset in found(records, prompt, keys=False):
            assert length >= 32 and start >= 0 and offset >= 0 and start + length <= len(prompt)


def test_long_chunk(records: Records) -> None:
    chunk = tokens(1, 20_000)
    save(records, chunk)
    assert found(records, [1001, *chunk[19_000:], 1002]) == [(1, 1000, 19_000)]


def test_a_shared_header_hides_nothing_and_costs_a_few_comparisons(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2,000 chunks that begin alike, a prompt's are found, and not all are compared with it."""
    from lmcache_rag.records import catalog

    header = tokens(1, 80)
    chunks = [[*header, *tokens(seed, 100)] for seed in range(2, 2002)]
    save(records, *chunks)
    compared = 0
    verified = catalog._verified

    def counting(*arguments):
        nonlocal compared
        compared += 1
        return verified(*arguments)

    monkeypatch.setattr(catalog, "_verified", counting)
    prompt = [*chunks[700], *chunks[3], 1001, *chunks[1999]]
    assert found(records, prompt) == [(0, 180, 0), (180, 180, 0), (361, 180, 0)]
    assert found(records, [*header, *[1001 + i for i in range(50)]]) == [(0, 80, 0)]
    assert compared < 60


def test_a_text_that_repeats_itself_is_found_and_bounded(records: Records) -> None:
    same = [7] * 512
    other = tokens(3, 5) * 60
    save(records, same, other)
    assert sum(length for _, length, _ in found(records, [1, *same, 2])) > 400
    assert sum(length for _, length, _ in found(records, [1, *other, 2])) > 200


def test_more_candidates_than_are_compared_is_said(records: Records) -> None:
    """Single fingerprints of many chunks: what is left out is left to prefill, and the report says so."""
    pieces = [tokens(seed, 40) for seed in range(MOST_COMPARED + 50)]
    save(records, *([*piece, *tokens(10_000 + number, 60)] for number, piece in enumerate(pieces)))
    result = find(records, [token for piece in pieces for token in piece])
    assert result.cut_short and len(result.matches) > MOST_COMPARED // 2
    assert not find(records, pieces[0]).cut_short
