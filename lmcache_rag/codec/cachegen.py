"""CacheGen's codec (Liu et al. 2024, SIGCOMM, https://arxiv.org/abs/2310.07240), to compare with.

In each group of ten tokens the first is the anchor, and the others are coded as their difference to it; anchors in 8
bits, differences in steps that grow with the layer, by thirds of the depth; and every channel has its own distribution.
The paper profiles distributions per channel and layer beforehand, for arithmetic coding; here they are Laplace
distributions, of which the stream names one for each channel, and interleaved rANS codes, within 1% of the same length.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from lmcache_rag_kernels import CodedGroups, rans
from lmcache_rag_kernels.rans import Distributions
from torch import Tensor

from lmcache_rag.codec.base import GroupCodec
from lmcache_rag.codec.tables import SCALES, laplace_distributions, nearest_scale
from lmcache_rag.errors import CorruptObjectError

_GROUP = 10
_STEPS = (0.5, 1.0, 1.5)
"""Of differences, in the first, second and last third of the layers, in units of the layer's own standard deviation."""
_ANCHOR_LEVELS = 127


class CacheGenCodec(GroupCodec):
    """All tokens are one group, as in the paper, since the names of the distributions would cost each group a tenth of
    its bytes. A stream is, for K and then V: a scale for anchors and one for differences (float32); then each channel's
    distribution for anchors (uint8), K's before V's, and for differences; then the length of what `rans` wrote of the
    anchors (uint32), that, and what it wrote of the differences.

    Args:
        layers: how many the model has.
    """

    group = 1 << 24

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def encode_group(self, kv: Tensor) -> list[bytes | memoryview]:
        return [self._encode(layer, own) for layer, own in enumerate(kv)]

    def decode_group(self, coded: CodedGroups, group: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        begin, end = coded.span(group)
        streams = (coded.stream(group, layer) for layer in range(coded.layers))
        return torch.stack([_decode(stream, (end - begin, heads, size), dtype) for stream in streams])

    def _encode(self, layer: int, kv: Tensor) -> bytes:
        x = kv.detach().flatten(2).float().cpu()
        anchors = x[:, ::_GROUP]
        anchor_step = (anchors.abs().amax((1, 2), keepdim=True) / _ANCHOR_LEVELS).clamp_min(1e-12)
        anchor_steps = (anchors / anchor_step).round()
        differences = x - _spread(anchor_steps * anchor_step, x.shape[1])
        differences[:, ::_GROUP] = 0
        step = (differences.std((1, 2), keepdim=True, correction=0) * self._step(layer)).clamp_min(1e-12)
        steps = (differences / step).round().clamp(-32768, 32767)
        symbols = torch.cat([anchor_steps, steps], dim=1).mT.flatten(0, 1)  # per channel: its anchors, then the rest
        rows = anchors.shape[1]
        parts = [symbols[:, :rows], symbols[:, rows:]]
        distribution = [nearest_scale(part.abs().mean(1).numpy()) for part in parts]
        head = torch.cat([anchor_step, step], dim=1).numpy().astype("<f4").tobytes()
        head += np.concatenate(distribution).tobytes()
        streams = [
            rans.encode(part.to(torch.int16), own, _distributions(), part.shape[1])[0]
            for part, own in zip(parts, distribution, strict=True)
        ]
        return head + len(streams[0]).to_bytes(4, "little") + b"".join(streams)

    def _step(self, layer: int) -> float:
        return _STEPS[layer * len(_STEPS) // self._layers]


def _decode(stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    tokens, heads, size = shape
    channels, groups = 2 * heads * size, -(-tokens // _GROUP)
    at = 16 + 2 * channels
    distribution = np.frombuffer(stream[16:at], np.uint8)
    end = at + 4 + int.from_bytes(stream[at : at + 4], "little")
    if len(distribution) < 2 * channels or distribution.max() >= len(SCALES) or end > len(stream):
        raise CorruptObjectError(f"a coded layer that is cut short or not of shape {shape}")
    anchor_steps = rans.decode(stream[at + 4 : end], distribution[:channels], _distributions(), groups)
    steps = rans.decode(stream[end:], distribution[channels:], _distributions(), tokens)
    if anchor_steps is None or steps is None:
        raise CorruptObjectError(f"a coded layer that cannot be one of {tokens} tokens")
    anchor_step, step = torch.frombuffer(bytearray(stream[:16]), dtype=torch.float32).view(2, 2, 1, 1).unbind(1)
    anchors = _spread(anchor_steps.view(2, -1, groups).mT * anchor_step, tokens)
    decoded = torch.addcmul(anchors, steps.view(2, -1, tokens).mT, step)
    return decoded.reshape(2, tokens, heads, size).to(dtype)


def _spread(anchors: Tensor, tokens: int) -> Tensor:
    """Each token's anchor, `[2, tokens, C]`."""
    return anchors.repeat_interleave(_GROUP, dim=1)[:, :tokens]


@functools.cache
def _distributions() -> Distributions:
    return laplace_distributions()
