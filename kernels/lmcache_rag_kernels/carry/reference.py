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
        device = lessons[0].taught.device
        spans = [torch.arange(lesson.rows.start, lesson.rows.stop, device=device) for lesson in lessons]
        self._lengths = [len(span) for span in spans]
        self._taught_lengths = [len(lesson.taught) for lesson in lessons]
        self._positions = torch.cat(spans)
        self._taught = torch.cat([lesson.taught for lesson in lessons])

    def __call__(
        self, key: Tensor, value: Tensor, key_before: Tensor, value_before: Tensor, rotation: Rotation | None
    ) -> None:
        changed = torch.stack([key[self._taught] - key_before, value[self._taught] - value_before], dim=1)
        if rotation is not None:
            keys = changed[:, 0]
            rotate(keys, rotation, self._taught, inverse=True, out=keys)
        # K and V of a chunk in one product, and all chunks rotated at once: most of what this takes is calls.
        parts = changed.flatten(1).float().split(self._taught_lengths)
        products = [lesson.weights @ part for lesson, part in zip(self._lessons, parts, strict=True)]
        carried = torch.cat(products).unflatten(1, changed.shape[1:]).to(changed.dtype)
        if rotation is not None:
            keys = carried[:, 0]
            rotate(keys, rotation, self._positions, out=keys)
        # Gathered and scattered is what few tokens change; what all the others get is added to whole rows.
        for lesson, own in zip(self._lessons, carried.split(self._lengths), strict=True):
            key[lesson.rows] += own[:, 0]
            value[lesson.rows] += own[:, 1]
