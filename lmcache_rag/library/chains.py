"""Chains of pieces: a conversation's KV is stored in pieces, each the variant that was computed behind all tokens
before it, so that its name says where it belongs. A piece without those before it is of no use."""

from __future__ import annotations

import hashlib

import numpy as np

from lmcache_rag.chunk_kv import NO_CONTEXT
from lmcache_rag.records.merge import Live
from lmcache_rag.records.records import Records


class Behind:
    """The tokens before a piece, one piece after another."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._begun = False

    @property
    def variant(self) -> str:
        """What the variant is called that is computed behind them."""
        return self._digest.hexdigest()[:16] if self._begun else NO_CONTEXT

    def then(self, token_ids: np.ndarray) -> Behind:
        """These tokens and a piece's."""
        following = Behind()
        following._digest, following._begun = self._digest.copy(), True
        following._digest.update(np.asarray(token_ids, dtype="<i4").tobytes())
        return following


def chained(records: Records, found: Live) -> tuple[np.ndarray, np.ndarray]:
    """When each object of a namespace of conversations was last used (int64, seconds since 1970), itself or one that
    comes behind it; and how many come before it. One that lacks some of those was last used before all others."""
    by_variant: dict[str, list[int]] = {}
    for number, form in enumerate(found.form.tolist()):
        by_variant.setdefault(found.forms[form].partition(".")[0], []).append(number)
    used, depth = np.full(len(found.form), -1, np.int64), np.zeros(len(found.form), np.int64)
    order: list[tuple[int, int]] = []  # object, and the one before it
    waiting = [(Behind(), -1)]
    while waiting:
        behind, parent = waiting.pop()
        for number in by_variant.pop(behind.variant, ()):
            tokens = records.tokens(found.key(int(found.chunk[number])))
            if tokens is None:
                continue
            used[number] = found.used_s[number]
            depth[number] = depth[parent] + 1 if parent >= 0 else 0
            order.append((number, parent))
            waiting.append((behind.then(tokens), number))
    for number, parent in reversed(order):
        if parent >= 0:
            used[parent] = max(used[parent], used[number])
    return used, depth
