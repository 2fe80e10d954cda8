"""The codecs in which KV can be written, one a line. A codec is imported when it is first made: codecs import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lmcache_rag.chunk_kv import KVShape
    from lmcache_rag.codec.base import Codec
    from lmcache_rag.codec.tables import CodecTables

DEFAULT_CODEC: Final = "balanced"
LOSSLESS_CODEC: Final = "raw"


@dataclass(frozen=True)
class NamedCodec:
    """A codec with its setting.

    Attributes:
        bits: length of a value of K or V, rather more than usual; 0 where it is the model's own.
        make: the codec, for a model of so many layers.
        learned: whether it needs tables.
        lossless: whether K and V come back bit by bit.
        residual: the same for what a variant of a chunk differs by from another one that was coded in this codec; None
            where each variant is coded whole.
    """

    bits: float
    make: Callable[[int, CodecTables | None], Codec]
    learned: bool = False
    lossless: bool = False
    residual: Callable[[int, CodecTables | None], Codec] | None = None


def _raw() -> Callable[..., Codec]:
    def make(_layers: int, _tables: Any) -> Codec:
        from lmcache_rag.codec.raw import RawCodec

        return RawCodec()

    return make


def _grouped(bits: int) -> Callable[..., Codec]:
    def make(_layers: int, _tables: Any) -> Codec:
        from lmcache_rag.codec.grouped import GroupedCodec

        return GroupedCodec(bits)

    return make


def _transform(bits: float, step: float) -> NamedCodec:
    def make(_layers: int, tables: Any) -> Codec:
        from lmcache_rag.codec.transform import TransformCodec

        return TransformCodec(tables, step)

    def residual(_layers: int, tables: Any) -> Codec:
        from lmcache_rag.codec.residual import ResidualCodec

        return ResidualCodec(tables, step)

    return NamedCodec(bits, make, learned=True, residual=residual)


def _cachegen() -> Callable[..., Codec]:
    def make(layers: int, _tables: Any) -> Codec:
        from lmcache_rag.codec.cachegen import CacheGenCodec

        return CacheGenCodec(layers)

    return make


CODECS: Final[dict[str, NamedCodec]] = {
    "raw": NamedCodec(0, _raw(), lossless=True),
    "q8": NamedCodec(8.6, _grouped(bits=8)),
    "high": _transform(3.3, step=0.15),
    "balanced": _transform(2.5, step=0.26),
    "q4": NamedCodec(4.6, _grouped(bits=4)),
    "small": _transform(1.4, step=0.7),
    "cachegen": NamedCodec(4.2, _cachegen()),
}
"""By falling fidelity."""


def codec_named(name: str) -> str:
    """The name of a codec. Raises `ValueError` where there is none of that name."""
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}, choose from {', '.join(CODECS)}")
    return name


def coded_bytes(shape: KVShape, codecs: Iterable[str]) -> int:
    """What one token's KV takes in all of these codecs, about."""
    uncoded = 8 * shape.dtype.itemsize
    bits = sum(CODECS[codec].bits or uncoded for codec in set(codecs))
    return math.ceil(shape.bytes_per_token * bits / uncoded)
