"""A deterministic text embedding without a model."""

from __future__ import annotations

import re
import zlib

DIMENSIONS = 512


def word_vector(text: str) -> list[float]:
    """Bag of words: how often each word of four letters or more occurs, words hashed to `DIMENSIONS`."""
    vector = [0.0] * DIMENSIONS
    for word in re.findall(r"\w{4,}", text.lower()):
        vector[zlib.crc32(word.encode()) % DIMENSIONS] += 1.0
    return vector
