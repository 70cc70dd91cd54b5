"""Counts as a distribution, which answers from at most 65,536 bins, however many values were
counted (activations)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calib.cells import Cells
from calib.counter import Counter
from calib.ordered import Ordered
from calib.protocol import HISTOGRAM_BITS, Tail, or_mean_square, sweep
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold
from calib.ranked import Floats, Ranked

_MINUS_ZERO = 0x8000
_LARGEST_CODE = 0x7F7F


class Histogram:
    """The counts of each `Counter` as a group.

    Bins are the values of bfloat16; the exact minimum and maximum bound the outermost ones.
    """

    def __init__(self, *counters: Counter):
        self._bounds = np.array([[counter.min, counter.max] for counter in counters])
        self._largest: Floats = np.abs(self._bounds).max(axis=1)
        self._codes, self._counts = zip(*(counter.bins() for counter in counters), strict=True)
        self._count = np.array([counts.sum() for counts in self._counts], np.float64)

    @property
    def groups(self) -> int:
        return len(self._codes)

    @property
    def has_negative(self) -> bool:
        return bool((self._bounds < 0).any())

    def count(self) -> Floats:
        return self._count.copy()

    def max_abs(self) -> Floats:
        return self._largest.copy()

    def mean_abs(self) -> Floats:
        return self._ranked.at(self._ranked.sum, self._zeroth) / self.count()

    def rms(self) -> Floats:
        mean_square = self._ranked.at(self._ranked.square_sum, self._zeroth) / self.count()
        return np.sqrt(mean_square)

    def quantile(self, q: float) -> Floats:
        return self.max_abs() if q >= 1 else self._ranked.quantile(q)

    def tail(self, t: Floats) -> Tail:
        return Tail(*self._ranked.tail(t))

    def extremes(self) -> tuple[Floats, Floats]:
        return self._bounds[:, 0].copy(), self._bounds[:, 1].copy()

    def signed_quantile(self, q: float) -> Floats:
        return self._ordered.quantile(q)

    def tails(self, low: Floats, high: Floats) -> tuple[Tail, Tail]:
        return Tail(*self._ordered.below(low)), Tail(*self._ordered.above(high))

    def fixed_point(self, noise: float) -> Floats:
        """See `Seeking`; the exact maximum where no bin's centre lies above."""
        found = self._ranked.fixed_point(noise)
        return np.where(found < self._ranked.largest, found, self.max_abs())

    def least_mse(self, points: int, qtype: QuantType) -> Floats:
        """See `Seeking`."""
        return sweep(self, points, qtype)

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        """As `Distribution.mse`; values are taken to spread evenly over their bin.

        Above 8 bits, where a bin is wider than a step, it is `modelled_mse`.
        """
        if qtype.bits > HISTOGRAM_BITS:
            return self.modelled_mse(np.asarray(t, np.float64), qtype)
        thresholds = np.asarray(t, np.float64).reshape(-1, self.groups)
        step = scale_from_threshold(thresholds, qtype).astype(np.float64)
        errors = self._cells.squared_error(step, (-qtype.qmin, qtype.qmax)) / self.count()
        return or_mean_square(self, thresholds, errors).reshape(np.shape(t))

    def snap(self, t: Floats) -> Floats:
        """``t``, or the exact maximum where ``t`` lies in the top bin, too coarse to tell."""
        inner_edge = np.empty(self.groups)
        for group, (low, high) in enumerate(self._edges):
            reach = np.maximum(np.abs(low), np.abs(high))
            inner_edge[group] = np.minimum(np.abs(low), np.abs(high))[reach.argmax()]
        return np.where(t >= inner_edge, self.max_abs(), t)

    def modelled_mse(self, t: Floats, qtype: QuantType) -> Floats:
        """J(t), the noise model that OCTAV minimises (OCTAV, equation 4), in the shape of ``t``:
        ``κ t² P(0 < |x| ≤ t) + E[(|x| - t)²; |x| > t]``."""
        inside = self.tail(np.zeros_like(t)).count - self.tail(t).count
        clipped = self._ranked.squared_excess(t)
        return (qtype.rounding_noise * t**2 * inside + clipped) / self.count()

    @cached_property
    def _edges(self) -> list[tuple[Floats, Floats]]:
        pairs = zip(map(_bin_edges, self._codes), self._bounds, strict=True)
        return [(np.clip(low, *bounds), np.clip(high, *bounds)) for (low, high), bounds in pairs]

    @cached_property
    def _centres(self) -> list[NDArray[np.float32]]:
        pairs = zip(self._codes, self._bounds, strict=True)
        return [np.clip(_bin_centre(c), *bounds).astype(np.float32) for c, bounds in pairs]

    @cached_property
    def _ranked(self) -> Ranked:
        centres = [centres[None] for centres in self._centres]
        return Ranked(centres, [counts[None] for counts in self._counts])

    @cached_property
    def _ordered(self) -> Ordered:
        groups = []
        for codes, centres, counts in zip(self._codes, self._centres, self._counts, strict=True):
            first = _first_negative(codes)
            order = np.r_[codes.size - 1 : first - 1 : -1, 0:first]  # -x ascends with its code
            groups.append((centres[order].astype(np.float64), counts[order].astype(np.float64)))
        return Ordered(groups)

    @property
    def _zeroth(self) -> NDArray[np.intp]:
        return np.zeros(self.groups, np.intp)

    @cached_property
    def _cells(self) -> Cells:
        sides = []
        for codes, counts, (low, high) in zip(self._codes, self._counts, self._edges, strict=True):
            first = _first_negative(codes)
            sides += [
                np.stack([-high[first:], -low[first:], counts[first:]]),
                np.stack([low[:first], high[:first], counts[:first]]),
            ]
        return Cells(sides)


def _first_negative(codes: NDArray[np.intp]) -> int:
    return int(np.searchsorted(codes, _MINUS_ZERO))


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
