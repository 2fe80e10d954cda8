"""The codecs in which KV can be written, one a line. A codec is imported when it is first made: codecs import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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
    """

    bits: float
    make: Callable[[int, CodecTables | None], Codec]
    learned: bool = False
    lossless: bool = False


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


def _transform(step: float) -> Callable[..., Codec]:
    def make(_layers: int, tables: Any) -> Codec:
        from lmcache_rag.codec.transform import TransformCodec

        return TransformCodec(tables, step)

    return make


def _cachegen() -> Callable[..., Codec]:
    def make(layers: int, _tables: Any) -> Codec:
        from lmcache_rag.codec.cachegen import CacheGenCodec

        return CacheGenCodec(layers)

    return make


CODECS: Final[dict[str, NamedCodec]] = {
    "raw": NamedCodec(0, _raw(), lossless=True),
    "q8": NamedCodec(8.6, _grouped(bits=8)),
    "high": NamedCodec(3.3, _transform(step=0.15), learned=True),
    "balanced": NamedCodec(2.5, _transform(step=0.26), learned=True),
    "q4": NamedCodec(4.6, _grouped(bits=4)),
    "small": NamedCodec(1.4, _transform(step=0.7), learned=True),
    "cachegen": NamedCodec(4.2, _cachegen()),
}
"""By falling fidelity."""


def codec_named(name: str) -> str:
    """The name of a codec. Raises `ValueError` where there is none of that name."""
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}, choose from {', '.join(CODECS)}")
    return name
