"""What codecs of fixed width share: a group's streams are of one length, so all its layers are one tensor of bytes."""

from __future__ import annotations

import numpy as np
import torch
from lmcache_rag_kernels import CodedGroups
from torch import Tensor

from lmcache_rag.errors import CorruptObjectError


def to_streams(data: Tensor) -> list[bytes | memoryview]:
    """Views of uint8 `[layers, bytes]`."""
    return [layer.data for layer in data.numpy()]


def from_streams(coded: CodedGroups, group: int, length: int) -> Tensor:
    """A view of one of the groups in `coded`, uint8 `[layers, length]`. Raises `CorruptObjectError` where a stream is
    of another length."""
    starts, lengths = coded.places[group].T
    steps = np.diff(starts)
    if (lengths != length).any() or (steps != steps[:1]).any():
        raise CorruptObjectError(f"a layer's stream in group {coded.first + group} must have {length} bytes")
    data = torch.frombuffer(coded.data[starts[0] : starts[-1] + length], dtype=torch.uint8)
    return data.as_strided((coded.layers, length), (int(steps[0]) if len(steps) else length, 1))
