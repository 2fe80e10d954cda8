"""The entropy coder in NumPy: what the C++ version must do, bit for bit.

A stream is, little-endian: sixteen states (uint32), or as many as it has rows if those are fewer, and then words
(uint16). Lane i codes row i of a block of sixteen rows. Blocks follow one another; in a block, columns. At each column
the lanes whose state is too small take a word each, and then those at an escape take theirs, the integer itself.
"""

from __future__ import annotations

import numpy as np

PROBABILITY_BITS = 12
LANES = 16
_SLOTS = 1 << PROBABILITY_BITS
LOWEST = 1 << 16


def slot_table(frequencies: np.ndarray) -> np.ndarray:
    """uint32 `[distributions, 4096]`: symbol, its frequency, and the slot's place among the symbol's slots.

    Raises:
        ValueError: the frequencies cannot be used.
    """
    check_frequencies(frequencies)
    symbol = np.stack([np.repeat(np.arange(row.size), row) for row in frequencies]).astype(np.uint32)
    start = np.cumsum(frequencies, 1, dtype=np.uint32) - frequencies
    offset = np.arange(_SLOTS, dtype=np.uint32) - np.take_along_axis(start, symbol, 1)
    frequency = np.take_along_axis(frequencies.astype(np.uint32), symbol, 1)
    return (symbol << 24 | frequency << 12 | offset).astype(np.uint32)


def check_frequencies(frequencies: np.ndarray) -> None:
    """Raises `ValueError` where they are not as `Distributions` says."""
    symbols = frequencies.shape[1]
    if symbols % 2 or not 2 <= symbols <= 256:
        raise ValueError("a distribution has an even number of symbols, at most 256")
    escape = frequencies[:, -1]
    if (frequencies.sum(1, dtype=np.int64) != _SLOTS).any() or (escape == 0).any() or (escape == _SLOTS).any():
        raise ValueError("frequencies must add up to 4096, and the escape's must be neither 0 nor 4096")


def header_bytes(rows: int) -> int:
    """What the states of a stream of so many rows take."""
    return 4 * min(LANES, rows)


def encode(symbols: np.ndarray, distribution: np.ndarray, frequencies: np.ndarray) -> bytes:
    """A stream from int16 `[columns, rows]`; uint8 `[columns]` says which row of `frequencies` a column has."""
    check_frequencies(frequencies)
    columns, rows = symbols.shape
    count = frequencies.shape[1]
    starts = np.cumsum(frequencies, 1, dtype=np.uint64) - frequencies
    states = np.full(LANES, LOWEST, np.uint64)
    words: list[np.ndarray] = []
    for row in reversed(range(0, rows, LANES)):
        for column in reversed(range(columns)):
            values = symbols[column, row : row + LANES]
            frequency, start = frequencies[distribution[column]], starts[distribution[column]]
            index = values.astype(np.int64) + (count - 2) // 2
            inside = (index >= 0) & (index < count - 1)
            escaped = ~inside | (frequency[np.where(inside, index, 0)] == 0)
            words.append(values[escaped].astype("<i2").view("<u2"))
            index[escaped] = count - 1
            f, x = frequency[index].astype(np.uint64), states[: len(values)]
            full = x >= f << np.uint64(32 - PROBABILITY_BITS)
            words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
            x = np.where(full, x >> np.uint64(16), x)
            states[: len(values)] = (x // f << np.uint64(PROBABILITY_BITS)) + x % f + start[index]
    return b"".join([states[:rows].astype("<u4").tobytes(), *(part.tobytes() for part in reversed(words))])


def decode(data: np.ndarray, distribution: np.ndarray, slots: np.ndarray, symbols: int, out: np.ndarray) -> bool:
    """Write the integers of a stream (uint8 `[bytes]`) to float32 `[columns, rows]`; False where it does not fit."""
    content, header = data.tobytes(), header_bytes(out.shape[1])
    if len(content) < header or len(content) % 2:
        return False
    states = np.frombuffer(content[:header], "<u4").astype(np.uint32)
    words = np.frombuffer(content[header:], "<u2")
    at = 0
    for row in range(0, out.shape[1], LANES):
        for column, which in enumerate(distribution):
            target = out[column, row : row + LANES]
            x = states[: len(target)]
            entry = slots[which, x & np.uint32(_SLOTS - 1)]
            symbol = entry >> np.uint32(24)
            x = (entry >> np.uint32(12) & np.uint32(0xFFF)) * (x >> np.uint32(12)) + (entry & np.uint32(0xFFF))
            hungry, escaped = x < LOWEST, symbol == symbols - 1
            middle = at + int(hungry.sum())
            end = middle + int(escaped.sum())
            if end > len(words):
                return False
            x[hungry] = x[hungry] << np.uint32(16) | words[at:middle].astype(np.uint32)
            states[: len(target)] = x
            target[:] = symbol.astype(np.float32) - (symbols - 2) // 2
            target[escaped] = words[middle:end].astype("<u2").view("<i2")
            at = end
    return bool((states == LOWEST).all()) and at == len(words)
