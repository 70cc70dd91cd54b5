"""What a calibrator may ask about a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast, runtime_checkable

import numpy as np

from calib.qtypes import QuantType
from calib.ranked import Floats

# Above this width a bfloat16 bin is wider than a quantization step (method.md, section 4), and
# float32 too coarse for sums of errors.
HISTOGRAM_BITS = 8


@dataclass(frozen=True, slots=True)
class Tail:
    """Of the values beyond a threshold: how many there are, and their sum."""

    count: Floats
    sum: Floats


class Distribution(Protocol):
    """Statistics of the values of a tensor, group by group.

    Every answer is float64 of shape ``(G,)``, G the number of groups. ``tail`` and ``mse`` also
    take thresholds of shape ``(..., G)`` and then answer in that shape.
    """

    @property
    def groups(self) -> int:
        """G, the number of groups."""

    @property
    def has_negative(self) -> bool:
        """Whether any value of any group is below 0."""

    def count(self) -> Floats:
        """How many values there are, zeros included."""

    def max_abs(self) -> Floats:
        """The largest magnitude."""

    def mean_abs(self) -> Floats:
        """The mean magnitude, zeros included."""

    def rms(self) -> Floats:
        """The root of the mean square, zeros included."""

    def quantile(self, q: float) -> Floats:
        """The smallest magnitude that at least a fraction ``q`` of all values do not exceed."""

    def tail(self, t: Floats) -> Tail:
        """Count of the values with ``|x| > t``, and the sum of ``|x|``."""

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        """The mean squared error of quantizing to ``qtype`` with threshold ``t`` (0: no error
        is defined, and the mean square is answered). Levels count from the zero point."""

    def extremes(self) -> tuple[Floats, Floats]:
        """The smallest and the largest value."""

    def signed_quantile(self, q: float) -> Floats:
        """The smallest value that at least a fraction ``q`` of all values do not exceed."""

    def tails(self, low: Floats, high: Floats) -> tuple[Tail, Tail]:
        """Count and sum of the values strictly below ``low``, and of those strictly above
        ``high``, both ``(G,)``."""


@runtime_checkable
class Seeking(Protocol):
    """A distribution that finds itself what a calibrator would otherwise seek step by step."""

    def fixed_point(self, noise: float) -> Floats:
        """The one s with ``s = Σ |x|·1{|x| > s} / (noise·Σ 1{0 < |x| ≤ s} + Σ 1{|x| > s})``, or
        where the two sides pass each other; 0 where all values are."""

    def least_mse(self, points: int, qtype: QuantType) -> Floats:
        """What `sweep` finds."""


def seeking(dist: Distribution) -> Seeking | None:
    """``dist`` if it is `Seeking`."""
    return cast(Seeking, dist) if _seeks(type(dist)) else None


@cache  # asking a protocol takes microseconds
def _seeks(kind: type) -> bool:
    return issubclass(kind, Seeking)


@cache
def usual_noises(noise: float) -> frozenset[float]:
    """Rounding noises that are likely to be asked for together with ``noise``, one pass finding
    all: those of the same kind of grid at other widths."""
    kinds = ((True, True), (True, False), (False, False))
    noises = (
        {QuantType(bits, signed=signed, narrow=narrow).rounding_noise for bits in range(2, 9)}
        for signed, narrow in kinds
    )
    return frozenset(next((kind for kind in noises if noise in kind), ()))


def sweep(dist: Distribution, points: int, qtype: QuantType) -> Floats:
    """Of ``k / points · max|x|``, k = 1 … points, the one with the least ``mse``, of several the
    smallest."""
    largest = dist.max_abs()
    fractions = np.arange(1, points + 1) / points
    errors = dist.mse(fractions[:, None] * largest, qtype)
    best: Floats = fractions[np.argmin(errors, axis=0)] * largest
    return best


def or_mean_square(dist: Distribution, t: Floats, mse: Floats) -> Floats:
    """``mse``, but the mean square where ``t`` is 0."""
    positive = t > 0
    return mse if positive.all() else np.where(positive, mse, dist.rms() ** 2)
