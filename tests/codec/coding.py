"""What a codec writes, as it is read from a store."""

from __future__ import annotations

import numpy as np
import torch
from lmcache_rag_kernels import CodedGroups

from lmcache_rag.codec import Codec


def coded_groups(codec: Codec, kv: torch.Tensor) -> CodedGroups:
    """Of `[layers, 2, tokens, heads, size]`."""
    streams = codec.encode(kv)
    lengths = np.array([[len(stream) for stream in group] for group in streams])
    places = np.stack([lengths.cumsum().reshape(lengths.shape) - lengths, lengths], axis=-1)
    data = memoryview(b"".join(stream for group in streams for stream in group))
    return CodedGroups(data, places, kv.shape[2], codec.group)
