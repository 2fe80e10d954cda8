"""The PyTorch version: a few products for each chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcache_rag_kernels.carry.lesson import Lesson
from lmcache_rag_kernels.rope import Rotation, rotate


class Carrier:
    """See `lmcache_rag_kernels.carry.Carrier`."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons
        self._spans = [
            torch.arange(lesson.rows.start, lesson.rows.stop, device=lesson.taught.device) for lesson in lessons
        ]
        self._lengths = [len(lesson.taught) for lesson in lessons]

    def __call__(
        self, key: Tensor, value: Tensor, key_before: Tensor, value_before: Tensor, rotation: Rotation | None
    ) -> None:
        before = zip(key_before.split(self._lengths), value_before.split(self._lengths), strict=True)
        for lesson, span, (own_key, own_value) in zip(self._lessons, self._spans, before, strict=True):
            changed = key[lesson.taught] - own_key
            if rotation is not None:
                rotate(changed, rotation, lesson.taught, inverse=True, out=changed)
            # Gathered and scattered is what few tokens change; what all the others get is added to whole rows.
            carried = _carried(lesson.weights, changed)
            if rotation is not None:
                rotate(carried, rotation, span, out=carried)
            key[lesson.rows] += carried
            value[lesson.rows] += _carried(lesson.weights, value[lesson.taught] - own_value)


def _carried(weights: Tensor, changed: Tensor) -> Tensor:
    """`[rows, kv_heads, head_size]`."""
    return (weights @ changed.flatten(1).float()).to(changed.dtype).unflatten(1, changed.shape[1:])
