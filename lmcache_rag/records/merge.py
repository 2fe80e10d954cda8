"""Merging parts of the records into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_rag.records.part import Part

_SLICE = 1 << 14
"""Tokens are copied for so many chunks at a time."""


@dataclass(frozen=True)
class Live:
    """All that parts say together, as columns.

    Attributes:
        key_high, key_low: uint64 `[chunks]`, ascending: of all known chunks, also of those of which nothing is left.
        tokens: int64 `[chunks]`: how many each has.
        chunk, form, size_bytes, used_s: int64 `[objects]`, by chunk: of what is stored.
        forms: what `form` counts in.
        held_chunk, owner: int64 and uint64 `[ownerships]`: who holds what.
    """

    key_high: np.ndarray
    key_low: np.ndarray
    tokens: np.ndarray
    chunk: np.ndarray
    form: np.ndarray
    size_bytes: np.ndarray
    used_s: np.ndarray
    forms: tuple[str, ...]
    held_chunk: np.ndarray
    owner: np.ndarray

    def key(self, chunk: int) -> bytes:
        """The key of a chunk."""
        return int(self.key_high[chunk]).to_bytes(8, "big") + int(self.key_low[chunk]).to_bytes(8, "big")


def live(parts: Sequence[Part]) -> Live:
    """What is stored, of whom, and who owns it.

    Args:
        parts: the oldest first.
    """
    new_id, chosen, high, low = _united(parts)
    chunk, form, size, used = (column.astype(np.int64) for column in _objects(parts, new_id))
    held_chunk, owner, held = _ownerships(parts, new_id)
    tokens = np.zeros(len(high), np.int64)
    for part, numbers, own in zip(parts, new_id, chosen, strict=True):
        tokens[numbers[own]] = np.diff(part.token_at)[own]
    there, held = size > 0, held > 0
    return Live(
        high,
        low,
        tokens,
        chunk[there],
        form[there],
        size[there],
        used[there],
        _all_forms(parts),
        held_chunk[held],
        owner[held],
    )


def merge(parts: Sequence[Part], *, whole: bool) -> Part:
    """One part that says what these say together.

    Args:
        parts: the oldest first.
        whole: nothing is older than they are, so that what they say is gone can be forgotten.
    """
    new_id, chosen, high, low = _united(parts)
    variants, owners = _objects(parts, new_id), _ownerships(parts, new_id)
    alive = np.ones(len(high), bool)
    if whole:
        variants, owners = ([column[rows[2] > 0] for column in rows] for rows in (variants, owners))
        alive = np.bincount(variants[0], minlength=len(high)) > 0
        owners = [column[alive[owners[0]]] for column in owners]
    place = np.cumsum(alive) - 1
    token_at, tokens = _tokens(parts, new_id, chosen, alive)
    gram, gram_chunk, gram_at = _grams(parts, new_id, chosen, alive, place)
    count = int(alive.sum())
    return Part(
        key_high=high[alive],
        key_low=low[alive],
        token_at=token_at,
        tokens=tokens,
        gram=gram,
        gram_chunk=gram_chunk,
        gram_at=gram_at,
        variant_at=_counted(place[variants[0]], count),
        variant_form=variants[1].astype(np.uint32),
        variant_size=variants[2].astype(np.uint64),
        variant_used=variants[3].astype(np.uint32),
        owner_at=_counted(place[owners[0]], count),
        owner=owners[1].astype(np.uint64),
        owner_held=owners[2].astype(np.uint8),
        forms=_all_forms(parts),
    )


def _objects(parts: Sequence[Part], new_id: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What is said last of each object: its chunk, form, size and use."""
    return _last_rows(
        [_chunks(new_id, parts, number, "variant_at") for number in range(len(parts))],
        _united_forms(parts),
        [part.variant_size for part in parts],
        [part.variant_used for part in parts],
    )


def _ownerships(parts: Sequence[Part], new_id: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What is said last of each chunk and owner: chunk, owner, and whether it is held."""
    return _last_rows(
        [_chunks(new_id, parts, number, "owner_at") for number in range(len(parts))],
        [part.owner for part in parts],
        [part.owner_held for part in parts],
    )


def _united(parts: Sequence[Part]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """The new number of each part's chunks; which of them give their tokens; and the keys, ascending."""
    high = np.concatenate([part.key_high for part in parts])
    low = np.concatenate([part.key_low for part in parts])
    order = np.lexsort((low, high))  # stable, so that of equal keys the oldest part's comes first
    high, low = high[order], low[order]
    first = np.ones(len(order), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    group = np.cumsum(first) - 1
    numbers = np.empty(len(order), np.int64)
    numbers[order] = group
    lengths = np.concatenate([np.diff(part.token_at) for part in parts])
    has_tokens = lengths[order] > 0
    source = np.full(int(first.sum()), -1, np.int64)
    source[group[has_tokens]] = order[has_tokens]
    chosen = np.zeros(len(order), bool)
    chosen[source[source >= 0]] = True
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(numbers, ends), np.split(chosen, ends), high[first], low[first]


def _chunks(new_id: Sequence[np.ndarray], parts: Sequence[Part], number: int, starts: str) -> np.ndarray:
    """The new number of the chunk of each row of a table that begins as `starts` says."""
    return np.repeat(new_id[number], np.diff(getattr(parts[number], starts)))


def _last_rows(
    chunks: Sequence[np.ndarray], names: Sequence[np.ndarray], *columns: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of the rows with the same chunk and name the last one, by chunk."""
    table = [np.concatenate(column) for column in (chunks, names, *columns)]
    order = np.lexsort((table[1], table[0]))
    table = [column[order] for column in table]
    last = np.ones(len(order), bool)
    last[:-1] = (table[0][1:] != table[0][:-1]) | (table[1][1:] != table[1][:-1])
    return [column[last] for column in table]


def _all_forms(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(form for part in parts for form in part.forms))


def _united_forms(parts: Sequence[Part]) -> list[np.ndarray]:
    number = {form: number for number, form in enumerate(_all_forms(parts))}
    return [np.array([number[form] for form in part.forms], np.uint32)[part.variant_form] for part in parts]


def _tokens(
    parts: Sequence[Part], new_id: Sequence[np.ndarray], chosen: Sequence[np.ndarray], alive: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.zeros(len(alive), np.int64)
    for part, numbers, own in zip(parts, new_id, chosen, strict=True):
        lengths[numbers[own]] = np.diff(part.token_at)[own]
    lengths[~alive] = 0
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty(starts[-1], np.int32)
    for part, numbers, own in zip(parts, new_id, chosen, strict=True):
        rows = np.flatnonzero(own & alive[numbers])
        for at in range(0, len(rows), _SLICE):
            some = rows[at : at + _SLICE]
            length = lengths[numbers[some]]
            target = _ranges(starts[numbers[some]], length)
            tokens[target] = part.tokens[_ranges(part.token_at[some].astype(np.int64), length)]
    return np.concatenate([starts[:-1][alive], starts[-1:]]).astype(np.uint64), tokens


def _grams(
    parts: Sequence[Part],
    new_id: Sequence[np.ndarray],
    chosen: Sequence[np.ndarray],
    alive: np.ndarray,
    place: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grams, chunks, places = [], [], []
    for part, numbers, own in zip(parts, new_id, chosen, strict=True):
        kept = (own & alive[numbers])[part.gram_chunk]
        grams.append(part.gram[kept])
        chunks.append(place[numbers[part.gram_chunk[kept]]].astype(np.uint32))
        places.append(part.gram_at[kept])
    gram = np.concatenate(grams)
    order = gram.argsort(kind="stable")
    return gram[order], np.concatenate(chunks)[order], np.concatenate(places)[order]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, so many of each, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _counted(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.uint32)
