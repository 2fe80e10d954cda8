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


_TOGETHER = 256
"""Of no more channels one matrix serves: it is small, and knows what heads have in common."""

_WIDTH = 128
"""Else heads are grouped, whole ones, of so many channels together at most, if not a single head has more."""

_FORM = 2
"""Of the arrays that tables are. Those of another form are learned again."""


@dataclass(frozen=True)
class CodecTables:
    """For each layer and for K (0) and V (1), with C = kv_heads * head_size channels. Heads are in groups, of
    W = C / head groups channels, with a matrix each.

    Attributes:
        mean: float32 `[layers, 2, C]`.
        directions: float16 `[layers, 2, head groups, W, W]`: row i is coordinate i's direction; falling sizes.
        size: float32 `[layers, 2, C]`: mean absolute value of each coordinate, a head group's after another's.
        distributions: of coordinates in steps, one for each of `SCALES`.
    """

    mean: np.ndarray
    directions: np.ndarray
    size: np.ndarray
    distributions: Distributions

    @functools.cached_property
    def backward(self) -> Tensor:
        """The directions in float32, to compute with: the same for all steps. PyTorch aligns them, NumPy would not."""
        return torch.from_numpy(self.directions).float()

    @functools.cached_property
    def forward(self) -> Tensor:
        """float32 `[layers, 2, head groups, W, W]`: `(x - mean) @ forward` are the coordinates of a head group's x."""
        return _inverse(self.directions)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits."""
        digest = hashlib.blake2b(digest_size=8)
        for array in self._arrays().values():
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def distribution(self, size: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
        """Per layer, for K's head groups and then V's: the distribution (uint8) of each coordinate that is stored.

        Args:
            size: of each coordinate in steps, `[layers, 2, C]`.
        """
        width = self.directions.shape[-1]
        return tuple(tuple(_stored(own) for own in layer.reshape(-1, width)) for layer in size)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return safetensors.numpy.save(self._arrays())

    @classmethod
    def from_bytes(cls, data: bytes) -> CodecTables:
        """Raises `CorruptObjectError` where it is not what `to_bytes` wrote, or what another release wrote."""
        try:
            arrays = safetensors.numpy.load(data)
            if "form" not in arrays or arrays["form"].tolist() != [_FORM]:
                raise CorruptObjectError("codec tables of another form, which this release does not read")
            distributions = Distributions(arrays["frequencies"])
            tables = cls(arrays["mean"], arrays["directions"], arrays["size"], distributions)
            _check(tables)
        except (SafetensorError, KeyError, ValueError) as error:
            raise CorruptObjectError(f"codec tables that cannot be read ({error})") from error
        return tables

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "form": np.array([_FORM], np.int32),
            "mean": self.mean,
            "directions": self.directions,
            "size": self.size,
            "frequencies": self.distributions.frequencies,
        }


def head_groups(kv_heads: int, head_size: int) -> int:
    """Into how many groups a layer's heads are divided, as many heads in each: one where all their channels are few,
    else as few as `_WIDTH` allows."""
    if kv_heads * head_size <= _TOGETHER:
        return 1
    together = max(1, _WIDTH // head_size)
    return next(
        groups for groups in range(1, kv_heads + 1) if kv_heads % groups == 0 and kv_heads // groups <= together
    )


def learn_tables(kv: Tensor, fisher: Tensor) -> CodecTables:
    """Tables from a sample of a model's KV.

    Args:
        kv: `[layers, 2, tokens, C]`, RoPE taken off K.
        fisher: `[layers, 2, head groups, W, W]`, W being C / head groups: mean of g g' over tokens, g being the
            gradient of a log-probability by a head group's channels of a row of kv.

    Raises:
        ModelError: kv or fisher are not finite numbers, or all of fisher is 0.
    """
    layers, _, groups, width, _ = fisher.shape
    mean = kv.float().mean(2)
    unit = fisher.double().diagonal(dim1=-2, dim2=-1).mean()
    if not (unit > 0 and unit.isfinite() and bool(kv.isfinite().all())):
        raise ModelError("The codec's tables cannot be learned from KV or gradients that are no numbers or all 0.")
    directions = np.empty((layers, 2, groups, width, width), np.float16)
    size = torch.empty(layers, 2, groups, width)
    counts = np.zeros((len(SCALES), 2 * _LARGEST + 2))
    for place in np.ndindex(layers, 2, groups):
        layer, part, group = place
        own = slice(group * width, (group + 1) * width)
        x = kv[layer, part, :, own].float() - mean[layer, part, own]
        metric = (fisher[place].double() / unit).numpy()
        of_layer = float(fisher[layer, part].diagonal(dim1=-2, dim2=-1).double().mean() / unit)
        directions[place] = _axes(x.double().numpy(), metric, of_layer)
        coordinates = x @ _inverse(directions[place])
        size[place] = coordinates.abs().mean(0).clamp(min=1e-12)
        for step in _LEARNED_STEPS:
            counts += _count(quantise(coordinates, step), size[place].numpy() / step)
    tables = CodecTables(mean.numpy(), directions, size.flatten(2).numpy(), _distributions(counts))
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


def _axes(x: np.ndarray, fisher: np.ndarray, mean: float) -> np.ndarray:
    """The directions of a head group of one layer's K or V, by falling size; `mean` is that of F over all its heads."""
    metric = (1 - _SHRINKAGE) * fisher + (_SHRINKAGE * mean + _FLOOR) * np.eye(len(fisher))
    values, vectors = np.linalg.eigh(metric)
    values = np.sqrt(np.maximum(values, values[-1] * 1e-9))
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    y = x @ root
    _, axes = np.linalg.eigh(y.T @ y)
    return axes[:, ::-1].T @ inverse


def _inverse(directions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.linalg.inv(directions.astype(np.float64)).astype(np.float32))


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
    layers, two, groups, width, _ = tables.directions.shape
    fits = (
        two == 2
        and tables.directions.shape[3] == tables.directions.shape[4]
        and tables.mean.shape == (layers, 2, groups * width)
        and tables.size.shape == tables.mean.shape
        and frequencies.ndim == 2
        and len(frequencies) == len(SCALES)
        and tables.mean.dtype == tables.size.dtype == np.float32
        and tables.directions.dtype == np.float16
        and frequencies.dtype == np.uint16
    )
    if not fits:
        raise ValueError("shapes or dtypes that do not fit each other")
    finite = all(bool(np.isfinite(array).all()) for array in (tables.mean, tables.size, tables.directions))
    if not finite or not (tables.size > 0).all():
        raise ValueError("values that are not numbers, or sizes of 0")
    _ = tables.distributions.slots
