"""Where chunks go on beside a run that was found."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.model import DEFAULT_MODEL, resolve_model
from lmcache_rag.plan.continuing import continued
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.records.catalog import Match
from lmcache_rag.records.part import VariantRow

CHUNK = np.arange(2000, 2200, dtype=np.int32)


def runs(prompt: list[int], *found: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Start, offset and length of what is found beside matches that are given so."""
    matches = [Match(start, length, offset, b"k", CHUNK, {}) for start, offset, length in found]
    whole = continued(np.array(prompt, np.int32), matches)
    for match in whole:
        assert prompt[match.start : match.end] == CHUNK[match.offset : match.offset + match.length].tolist()
    assert all(one.end <= other.start for one, other in itertools.pairwise(whole))
    return [(match.start, match.offset, match.length) for match in whole]


def test_short_runs_count_on_both_sides_of_a_match() -> None:
    chunk = CHUNK.tolist()
    prompt = [7, *chunk[:20], 8, 8, *chunk[21:100], 9, *chunk[102:120], 9, 9, 9, *chunk[120:130], 7]
    assert runs(prompt, (23, 21, 79)) == [(1, 0, 20), (23, 21, 79), (103, 102, 18), (124, 120, 10)]


def test_what_is_too_far_or_too_short_does_not_count() -> None:
    chunk = CHUNK.tolist()
    far = [*chunk[:50], *[7] * 17, *chunk[50:70]]
    assert runs(far, (0, 0, 50)) == [(0, 0, 50)]
    short = [*chunk[:50], 7, *chunk[50:57], 8, *chunk[58:80]]  # it leads on all the same
    assert runs(short, (0, 0, 50)) == [(0, 0, 50), (59, 58, 22)]


def test_two_matches_of_a_chunk_share_what_lies_between() -> None:
    chunk = CHUNK.tolist()
    prompt = [*chunk[:50], 7, *chunk[51:70], 7, *chunk[71:150]]
    assert runs(prompt, (0, 0, 50), (71, 71, 79)) == [(0, 0, 50), (51, 51, 19), (71, 71, 79)]


@pytest.fixture(scope="module")
def tokenizer() -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


TEXT = (
    "The harbour was built in 1872 by the town's own masons, who had quarried the stone on the island opposite and "
    "brought it over in barges that they had bought from the navy for very little money.\n"
    'A plaque beside the "old" gate says so.\n'
    "Most of the fishermen have moved away since, and the quays are used by yachts.\n\n"
    "- In summer a ferry leaves twice a day.\n"
    "- In winter it leaves on Mondays and Fridays only.\n"
    "- The lighthouse keeper's house is open to visitors in August.\n"
)


@pytest.mark.parametrize(
    "written",
    [
        lambda text: json.dumps([{"text": text}]),
        lambda text: json.dumps({"documents": [text]}, indent=2),
        lambda text: str([text]),
        lambda text: textwrap.indent(text, "    "),
        lambda text: textwrap.indent(text, "> ", lambda _: True),
    ],
    ids=["JSON", "indented JSON", "str(list)", "indented", "quoted"],
)
def test_escaped_quoted_and_indented_text_is_found(
    tokenizer: Callable[[str], list[int]], tmp_path: Path, written: Callable[[str], str]
) -> None:
    chunks = ChunkStore(DiskStore(tmp_path), KVScope("default", "f" * 32), "raw")
    token_ids = tokenizer(TEXT.strip())
    key = key_of(token_ids)
    chunks.records.add({key: np.array(token_ids, np.int32)}, [VariantRow(key, f"{0:016}.raw", 1000, 1)])
    prompt = np.array(tokenizer("Use this context:\n" + written(TEXT.strip()) + "\nWhen was it built?"), np.int32)
    covered = sum(match.length for match in Matcher().find(prompt, chunks).matches)
    assert covered >= 0.75 * len(token_ids)
    for_tenants = Matcher(unit_tokens=64).find(prompt, chunks).matches
    assert all(match.offset % 64 in (0, 4) or match.offset == len(token_ids) for match in for_tenants)
