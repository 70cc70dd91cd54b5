"""What a calibrator may ask about a tensor, and the two things that answer.

`Samples` holds raw values and answers exactly (weights). `Histogram` holds bfloat16 counts and
answers from at most 65,536 bins, however many values were counted (activations).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calib.counter import Counter
from calib.granularity import PerChannel
from calib.qtypes import QuantType
from calib.quantize import fake_quantize, scale_from_threshold

Floats = NDArray[np.float64]

# Above this width a bfloat16 bin is wider than a quantization step (method.md, section 4).
HISTOGRAM_BITS = 8

_LARGEST_CODE = 0x7F7F


@dataclass(frozen=True, slots=True)
class Tail:
    """Of the values with ``|x| > t``: how many there are, and the sum of ``|x|``."""

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
        """Count and sum of the magnitudes strictly above ``t``."""

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        """The mean squared error of quantizing to ``qtype`` with threshold ``t`` (0: no error
        is defined, and the mean square is answered)."""


class Samples:
    """Raw values of shape ``(G, N)``, optionally each standing for ``counts`` values.

    The input is never modified and may be read-only. Memory: up to 32 bytes a value on top.
    """

    def __init__(self, values: NDArray[np.floating], counts: NDArray[np.int64] | None = None):
        self._values = values
        self._counts = counts

    @property
    def groups(self) -> int:
        return int(self._values.shape[0])

    @cached_property
    def has_negative(self) -> bool:
        return bool((self._values < 0).any())

    def count(self) -> Floats:
        return self._ranked.count[:, 0].copy()

    def max_abs(self) -> Floats:
        return self._ranked.magnitude[:, -1].astype(np.float64)

    def mean_abs(self) -> Floats:
        return self._ranked.sum[:, 0] / self.count()

    def rms(self) -> Floats:
        mean_square: Floats = self._ranked.square_sum[:, 0] / self.count()
        return np.sqrt(mean_square)

    def quantile(self, q: float) -> Floats:
        return self._ranked.quantile(q)

    def tail(self, t: Floats) -> Tail:
        rank = self._ranked.rank(t)
        return Tail(*(self._ranked.at(sums, rank, t) for sums in self._ranked.count_and_sum))

    def squared_excess(self, t: Floats) -> Floats:
        """The sum of ``(|x| - t)²`` over the magnitudes above ``t``."""
        ranked, rank = self._ranked, self._ranked.rank(t)
        square_sum = ranked.at(ranked.square_sum, rank, t)
        count, total = (ranked.at(sums, rank, t) for sums in ranked.count_and_sum)
        return square_sum - 2 * t * total + t**2 * count

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        thresholds = np.asarray(t, np.float64)
        rows = [self._mse(row, qtype) for row in thresholds.reshape(-1, self.groups)]
        return np.stack(rows).reshape(thresholds.shape)

    def _mse(self, t: Floats, qtype: QuantType) -> Floats:
        scale = scale_from_threshold(t, qtype)
        written = fake_quantize(self._values, scale, qtype, PerChannel(0))
        squares = np.square(written.astype(np.float64) - self._values)
        if self._counts is not None:
            squares *= self._counts
        return np.where(t > 0, squares.sum(axis=1) / self.count(), self.rms() ** 2)

    @cached_property
    def _ranked(self) -> _Ranked:
        return _Ranked(np.abs(self._values), self._counts)


class Histogram:
    """The counts of a `Counter` as a distribution of one group.

    Bins are the values of bfloat16; the exact minimum and maximum bound the outermost ones.
    """

    groups = 1

    def __init__(self, counter: Counter):
        codes = np.flatnonzero(counter.counts)
        low, high = _bin_edges(codes)
        self._low = np.clip(low, counter.min, counter.max)
        self._high = np.clip(high, counter.min, counter.max)
        centre = np.clip(_bin_centre(codes), counter.min, counter.max)
        self._counts = counter.counts[codes]
        self._bins = Samples(centre[None], self._counts[None])
        self._bounds = counter.min, counter.max

    @property
    def has_negative(self) -> bool:
        return self._bounds[0] < 0

    def count(self) -> Floats:
        return self._bins.count()

    def max_abs(self) -> Floats:
        return np.array([max(abs(bound) for bound in self._bounds)])

    def mean_abs(self) -> Floats:
        return self._bins.mean_abs()

    def rms(self) -> Floats:
        return self._bins.rms()

    def quantile(self, q: float) -> Floats:
        return self.max_abs() if q >= 1 else self._bins.quantile(q)

    def tail(self, t: Floats) -> Tail:
        return self._bins.tail(t)

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        """As `Distribution.mse`; values are taken to spread evenly over their bin.

        Above 8 bits, where a bin is wider than a step, it is `modelled_mse`.
        """
        thresholds = np.asarray(t, np.float64)
        if qtype.bits > HISTOGRAM_BITS:
            return self.modelled_mse(thresholds, qtype)
        rows = [self._measured_mse(float(row), qtype) for row in thresholds.ravel()]
        return np.array(rows).reshape(thresholds.shape)

    def snap(self, t: Floats) -> Floats:
        """``t``, or the exact maximum where ``t`` lies in the top bin, too coarse to tell."""
        reach = np.maximum(np.abs(self._low), np.abs(self._high))
        inner_edge = np.minimum(np.abs(self._low), np.abs(self._high))[reach.argmax()]
        return np.where(t >= inner_edge, self.max_abs(), t)

    def _measured_mse(self, t: float, qtype: QuantType) -> float:
        if not t > 0:
            return float(self.rms()[0]) ** 2
        step = float(scale_from_threshold(np.array(t), qtype))
        low, high = self._low / step, self._high / step
        width = high - low
        flat = width <= 0
        mean = (_squared_error_integral(high, qtype) - _squared_error_integral(low, qtype)) / (
            np.where(flat, 1.0, width)
        )
        point = low - np.clip(np.rint(low), qtype.qmin, qtype.qmax)
        mean_square = np.where(flat, point**2, mean)
        return float(mean_square @ self._counts) * step**2 / float(self.count()[0])

    def modelled_mse(self, t: Floats, qtype: QuantType) -> Floats:
        """J(t), the noise model that OCTAV minimises (OCTAV, equation 4), in the shape of ``t``:
        ``κ t² P(0 < |x| ≤ t) + E[(|x| - t)²; |x| > t]``."""
        tail = self.tail(t)
        inside = self.tail(np.zeros_like(t)).count - tail.count
        clipped = self._bins.squared_excess(t)
        return (qtype.rounding_noise * t**2 * inside + clipped) / self.count()


class _Ranked:
    """Magnitudes in ascending order, and their sums from each rank to the end."""

    def __init__(self, magnitude: NDArray[np.floating], counts: NDArray[np.int64] | None):
        if counts is None:
            self.magnitude = np.sort(magnitude, axis=1)
            self._counts: NDArray[np.int64] | None = None
        else:
            order = np.argsort(magnitude, axis=1)
            self.magnitude = np.take_along_axis(magnitude, order, axis=1)
            self._counts = np.take_along_axis(counts, order, axis=1)

    def _from_rank(self, power: int) -> Floats:
        terms = self.magnitude.astype(np.float64) ** power
        if self._counts is not None:
            terms *= self._counts
        sums = np.zeros((terms.shape[0], terms.shape[1] + 1))
        np.cumsum(terms[:, ::-1], axis=1, out=sums[:, 1:])
        return np.ascontiguousarray(sums[:, ::-1])

    @cached_property
    def count(self) -> Floats:
        return self._from_rank(0)

    @cached_property
    def sum(self) -> Floats:
        return self._from_rank(1)

    @cached_property
    def square_sum(self) -> Floats:
        return self._from_rank(2)

    @property
    def count_and_sum(self) -> tuple[Floats, Floats]:
        return self.count, self.sum

    def rank(self, t: Floats) -> NDArray[np.intp]:
        """How many magnitudes of each group are ≤ t, by bisection of all groups at once."""
        groups, n = self.magnitude.shape
        if groups == 1:
            return np.searchsorted(self.magnitude[0], t, side="right")
        flat = self.magnitude.ravel()
        before = np.arange(groups) * n - 1
        rank = np.zeros(np.shape(t), np.intp)
        for step in (1 << bit for bit in reversed(range(n.bit_length()))):
            candidate = rank + step
            inside = flat.take(before + np.minimum(candidate, n)) <= t
            rank += step * (inside & (candidate <= n))
        return rank

    @staticmethod
    def at(sums: Floats, rank: NDArray[np.intp], t: Floats) -> Floats:
        """``sums`` of each group from ``rank`` on, in the shape of ``t``."""
        groups, n = sums.shape
        return np.asarray(sums.ravel().take(np.arange(groups) * n + rank)).reshape(np.shape(t))

    def quantile(self, q: float) -> Floats:
        below = self.count[:, :1] - self.count[:, 1:]
        # The tolerance keeps q·N from landing a rounding error above the integer that it is.
        wanted = q * self.count[:, :1] * (1 - 1e-12)
        rank = np.argmax(below >= wanted, axis=1)
        return np.take_along_axis(self.magnitude, rank[:, None], axis=1)[:, 0].astype(np.float64)


def _bin_centre(codes: NDArray[np.intp]) -> Floats:
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _bin_edges(codes: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """The interval of float32 values counted under each code, lower edge first; ±0 has none."""
    bits = codes.astype(np.uint32) << np.uint32(16)
    magnitude = codes & 0x7FFF
    half = np.where(magnitude == 0, 0, 0x8000).astype(np.uint32)
    inner = (bits - half).view(np.float32).astype(np.float64)
    outer = (bits + half).view(np.float32).astype(np.float64)
    outer = np.where(magnitude == _LARGEST_CODE, np.copysign(np.inf, outer), outer)
    return np.minimum(inner, outer), np.maximum(inner, outer)


def _squared_error_integral(x: Floats, qtype: QuantType) -> Floats:
    """An antiderivative of the squared quantization error, x in steps; continuous, so that the
    difference at the ends of an interval is the error over it, clipping included."""
    level = np.clip(np.rint(x), qtype.qmin, qtype.qmax)
    error = x - level
    return np.asarray(level / 12.0 + error * error * error / 3.0)
