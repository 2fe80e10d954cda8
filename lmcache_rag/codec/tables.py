"""What the transform codec knows of a model: learned once, stored once, named by digest in every object.

An error e in a layer's K or V costs e' F e, where F is the Fisher information: the second moment of the gradient of the
log-probability of what the model says next, by that K or V. To second order it is twice the KL divergence that e causes
(Amari 1998). So K and V are taken to coordinates in which F is the identity and, among those, to the principal axes of
the data: errors of one size then cost the same wherever they are, and the coordinates are uncorrelated.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
from lmcache_rag_kernels.rans import Distributions
from safetensors import SafetensorError
from torch import Tensor

from lmcache_rag.errors import CorruptObjectError, ModelError

SCALES = np.geomspace(0.06, 40.0, 48)
"""The distributions are those of coordinates whose mean size is so many steps. Smaller ones are not stored at all."""

_EDGES = np.sqrt(SCALES[1:] * SCALES[:-1])
_LARGEST = 126
_SHRINKAGE = 0.2
"""The share of the identity in F: its small eigenvalues cannot be estimated well, and must not be taken for nothing."""

_FLOOR = 1e-6
"""Of F, whose mean over all layers is 1: a layer that answers do not look at has none of its own."""

_LEARNED_STEPS = (0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
_PRIOR = 20.0
"""How many observations a distribution's Laplace prior counts for."""


@dataclass(frozen=True)
class CodecTables:
    """For each layer and for K (0) and V (1), with C = kv_heads * head_size.

    Attributes:
        mean: float32 `[layers, 2, C]`.
        backward: float16 `[layers, 2, C, C]`: row i is coordinate i's direction; falling sizes.
        size: float32 `[layers, 2, C]`: mean absolute value of each coordinate.
        distributions: of coordinates in steps, one for each of `SCALES`.
    """

    mean: np.ndarray
    backward: np.ndarray
    size: np.ndarray
    distributions: Distributions

    @functools.cached_property
    def forward(self) -> Tensor:
        """float32 `[layers, 2, C, C]`: `(x - mean) @ forward` are the coordinates of x."""
        return _inverse(self.backward)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits."""
        digest = hashlib.blake2b(digest_size=8)
        for array in self._arrays().values():
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def distribution(self, step: float) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Per layer, for K and V: the distribution (uint8) of each coordinate that is stored at this step."""
        return tuple((_stored(k / step), _stored(v / step)) for k, v in self.size)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return safetensors.numpy.save(self._arrays())

    @classmethod
    def from_bytes(cls, data: bytes) -> CodecTables:
        """Raises `CorruptObjectError` where it is not what `to_bytes` wrote."""
        try:
            arrays = safetensors.numpy.load(data)
            distributions = Distributions(arrays["frequencies"])
            tables = cls(arrays["mean"], arrays["backward"], arrays["size"], distributions)
            _check(tables)
        except (SafetensorError, KeyError, ValueError) as error:
            raise CorruptObjectError(f"codec tables that cannot be read ({error})") from error
        return tables

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "mean": self.mean,
            "backward": self.backward,
            "size": self.size,
            "frequencies": self.distributions.frequencies,
        }


def learn_tables(kv: Tensor, fisher: Tensor) -> CodecTables:
    """Tables from a sample of a model's KV.

    Args:
        kv: `[layers, 2, tokens, C]`, RoPE taken off K.
        fisher: `[layers, 2, C, C]`: mean of g g' over tokens, g being the gradient of a log-probability by a row of kv.

    Raises:
        ModelError: kv or fisher are not finite numbers, or all of fisher is 0.
    """
    layers, _, _, width = kv.shape
    mean = kv.float().mean(2)
    unit = fisher.double().diagonal(dim1=-2, dim2=-1).mean()
    if not (unit > 0 and unit.isfinite() and bool(kv.isfinite().all())):
        raise ModelError("The codec's tables cannot be learned from KV or gradients that are no numbers or all 0.")
    backward = np.empty((layers, 2, width, width), np.float16)
    size = torch.empty_like(mean)
    counts = np.zeros((len(SCALES), 2 * _LARGEST + 2))
    for layer in range(layers):
        for part in range(2):
            x = kv[layer, part].float() - mean[layer, part]
            metric = (fisher[layer, part].double() / unit).numpy()
            backward[layer, part] = _axes(x.double().numpy(), metric)
            coordinates = x @ _inverse(backward[layer, part])
            size[layer, part] = coordinates.abs().mean(0).clamp(min=1e-12)
            for step in _LEARNED_STEPS:
                counts += _count(quantise(coordinates, step), size[layer, part].numpy() / step)
    tables = CodecTables(mean.numpy(), backward, size.numpy(), _distributions(counts))
    try:
        _check(tables)
    except ValueError as error:
        raise ModelError(f"The codec's tables cannot be learned ({error}): use --codec q8, which has none.") from error
    return tables


def quantise(coordinates: Tensor, step: float) -> Tensor:
    """int16: the nearest multiple of the step.

    A dead zone, and decoding to the mean of an interval, would give fewer bits for the same squared error; but they
    shrink K and V, which changes what the model says more than errors of zero mean do (docs/codec.md). What is more
    than 32,767 steps from the mean is cut off there.
    """
    return (coordinates / step).round().clamp(-32768, 32767).to(torch.int16)


def _axes(x: np.ndarray, fisher: np.ndarray) -> np.ndarray:
    """`backward` of one layer's K or V: the directions, by falling size."""
    width = len(fisher)
    metric = (1 - _SHRINKAGE) * fisher + (_SHRINKAGE * np.trace(fisher) / width + _FLOOR) * np.eye(width)
    values, vectors = np.linalg.eigh(metric)
    values = np.sqrt(np.maximum(values, values[-1] * 1e-9))
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    y = x @ root
    _, axes = np.linalg.eigh(y.T @ y)
    return axes[:, ::-1].T @ inverse


def _inverse(backward: np.ndarray) -> Tensor:
    return torch.from_numpy(np.linalg.inv(backward.astype(np.float64)).astype(np.float32))


def nearest_scale(size: np.ndarray) -> np.ndarray:
    """Which of `SCALES` (uint8) is nearest to each size in steps."""
    return np.searchsorted(_EDGES, size).astype(np.uint8)


def laplace_distributions() -> Distributions:
    """For each of `SCALES`, where nothing was learned."""
    return _distributions(np.zeros((len(SCALES), 2 * _LARGEST + 2)))


def _stored(size: np.ndarray) -> np.ndarray:
    """The distributions (uint8) of the coordinates up to the last that is not too small."""
    kept = np.flatnonzero(size >= SCALES[0])
    return nearest_scale(size[: kept[-1] + 1 if len(kept) else 0])


def _count(symbols: Tensor, size: np.ndarray) -> np.ndarray:
    """How often each symbol occurs in each distribution, `[distributions, symbols]`, from int16 `[tokens, C]`."""
    escape = 2 * _LARGEST + 1
    index = symbols.int() + _LARGEST
    index = torch.where((index < 0) | (index >= escape), escape, index)
    index += torch.from_numpy(nearest_scale(size)).int() * (escape + 1)
    kept = index[:, torch.from_numpy(size >= SCALES[0])].flatten()
    return torch.bincount(kept, minlength=len(SCALES) * (escape + 1)).view(len(SCALES), -1).numpy()


def _distributions(counts: np.ndarray) -> Distributions:
    """One per row of counts: coordinates whose size is the same number of steps share one, whatever their layer."""
    centre = np.arange(-_LARGEST, _LARGEST + 1)
    rows = []
    for scale, count in zip(SCALES, counts, strict=True):
        prior = np.append(np.exp(-np.abs(centre) / max(scale, 0.2)), 0.0)
        rows.append(_frequencies(count + prior * (_PRIOR / prior.sum())))
    return Distributions(np.stack(rows))


def _frequencies(weights: np.ndarray) -> np.ndarray:
    """uint16, adding up to 4096, of at least 1 for the escape."""
    shares = np.floor(weights / weights.sum() * 4095)
    shares[-1] = max(1, shares[-1])
    shares[shares[:-1].argmax()] += 4096 - shares.sum()
    return shares.astype(np.uint16)


def _check(tables: CodecTables) -> None:
    """Raises `ValueError` where shapes, dtypes or values do not fit each other."""
    frequencies = tables.distributions.frequencies
    layers, two, width = tables.mean.shape
    fits = (
        two == 2
        and tables.backward.shape == (layers, 2, width, width)
        and tables.size.shape == tables.mean.shape
        and frequencies.ndim == 2
        and len(frequencies) == len(SCALES)
        and tables.mean.dtype == tables.size.dtype == np.float32
        and tables.backward.dtype == np.float16
        and frequencies.dtype == np.uint16
    )
    if not fits:
        raise ValueError("shapes or dtypes that do not fit each other")
    finite = all(bool(np.isfinite(array).all()) for array in (tables.mean, tables.size, tables.backward))
    if not finite or not (tables.size > 0).all():
        raise ValueError("values that are not numbers, or sizes of 0")
    _ = tables.distributions.slots
