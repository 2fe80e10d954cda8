"""From a wanted fidelity to a recompute ratio, by a curve that was measured on the model (`lmcache-rag calibrate`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from itertools import pairwise
from math import inf
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lmcache_rag.errors import ModelError

_FOLDER = "calibrations"

_SURCHARGE = 0.08
"""KV computed behind another preamble is as near to full prefill as KV behind the prompt's own when so much more of it
is recomputed (docs/blending.md)."""

_MOST_TIMES = 2.0
"""Who wants little recomputed does not want several times as much."""


def share_of(ratio: float, *, foreign: bool) -> float:
    """Which share of a chunk's tokens is recomputed."""
    return min(1.0, _MOST_TIMES * ratio, ratio + _SURCHARGE) if foreign else ratio


def ratio_of_foreign(share: float) -> float:
    """The ratio at which this share of the tokens of a chunk behind another preamble is recomputed."""
    return max(share / _MOST_TIMES, share - _SURCHARGE)


_log = logging.getLogger(__name__)


class Calibration(BaseModel):
    """How far a model's blends are from full prefill.

    Attributes:
        points: recompute ratio, and mean KL divergence (nats) of next-token distributions from full prefill's there;
            ascending ratios from 0 on. At ratio 1 it is 0.
        questions: how many it was measured on; 0 where it is an assumption.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: tuple[tuple[float, float], ...] = Field(min_length=1)
    questions: int = Field(ge=0)

    @field_validator("points")
    @classmethod
    def _ascending(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        ratios = [ratio for ratio, _ in points]
        ascending = ratios[0] == 0 and all(a < b < 1 for a, b in pairwise(ratios))
        if not ascending or not all(0 <= kl < inf for _, kl in points):
            raise ValueError("ratios must ascend from 0 to below 1, and divergences be numbers from 0 on")
        return points

    def ratio_for(self, target_kl: float) -> float:
        """The smallest recompute ratio at which the mean divergence is `target_kl` at most, rounded up to 0.001."""
        ratio, kl = self.points[0]
        if kl <= target_kl:
            return 0.0
        for next_ratio, next_kl in (*self.points[1:], (1.0, 0.0)):
            if next_kl <= target_kl:
                ratio += (next_ratio - ratio) * (kl - target_kl) / (kl - next_kl)
                return min(1.0, -(-ratio * 1000 // 1) / 1000)
            if next_kl < kl:  # noise may make the curve rise: then it is as flat as the last good point
                ratio, kl = next_ratio, next_kl
        return 1.0

    @classmethod
    def read(cls, cache: Path, fingerprint: str, codec: str) -> Calibration:
        """The model's own with this codec, else what holds for the default model."""
        path = _path(cache, fingerprint, codec)
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            return ASSUMED
        except (OSError, ValidationError) as error:
            _log.warning("%s cannot be used (%s): run `lmcache-rag calibrate` again.", path, error)
            return ASSUMED

    def write(self, cache: Path, fingerprint: str, codec: str) -> Path:
        """Keep it for the model with this codec; returns the file."""
        path = _path(cache, fingerprint, codec)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(self.model_dump_json(indent=2) + "\n")
        part.replace(path)
        return path


ASSUMED = Calibration(points=((0.0, 0.128), (0.05, 0.091), (0.1, 0.065), (0.15, 0.055)), questions=0)
"""Measured on SmolLM2-135M-Instruct (README), whose blends are further from full prefill than a larger model's."""


def calibration_of(rows: Iterable[tuple[float, float]], questions: int) -> Calibration:
    """From measured (ratio, mean KL divergence), of which rounding may have made a negative one.

    Raises:
        ModelError: a divergence is not a number.
    """
    points = tuple(sorted((ratio, 0.0 if -1e-3 < kl < 0 else kl) for ratio, kl in rows))
    try:
        return Calibration(points=points, questions=questions)
    except ValidationError as error:
        raise ModelError(f"The model cannot be calibrated: it was measured at {points}.") from error


def _path(cache: Path, fingerprint: str, codec: str) -> Path:
    return cache / _FOLDER / f"{fingerprint}.{codec}.json"
