"""Counts as a distribution, which answers from at most 65,536 bins, however many values were
counted (activations)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from calib.cells import Cells
from calib.counter import Counter, all_bins
from calib.ordered import Ordered
from calib.protocol import HISTOGRAM_BITS, Tail, or_mean_square, sweep, usual_noises
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold
from calib.ranked import Floats, Ranked

_LARGEST_CODE = 0x7F7F


class Histogram:
    """The counts of each `Counter` as a group.

    Bins are the values of bfloat16; the exact minimum and maximum bound the outermost ones.
    """

    def __init__(self, *counters: Counter):
        self._bounds = np.array([[counter.min, counter.max] for counter in counters])
        self._largest: Floats = np.abs(self._bounds).max(axis=1)
        # Of the sides of each group: first its positive values, then the others.
        self._codes, self._counts, self._starts = all_bins(counters)
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        self._count = np.diff(sums[self._starts[::2]]).astype(np.float64)

    @property
    def groups(self) -> int:
        return self._largest.size

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
        self._ranked.expect(usual_noises(noise))
        found = self._ranked.fixed_point(noise)
        return np.where(found < self._ranked.largest, found, self.max_abs())

    def least_mse(self, points: int, qtype: QuantType) -> Floats:
        """See `Seeking`."""
        if qtype.bits > HISTOGRAM_BITS:
            return sweep(self, points, qtype)
        thresholds = np.arange(1, points + 1)[:, None] / points * self._largest
        step = scale_from_threshold(thresholds, qtype).astype(np.float64)
        grid = qtype.steps, (qtype.qmax, -qtype.qmin)
        best = self._cells.least(step, grid, self._count)
        best[self._largest == 0] = 0
        return np.asarray((best + 1) / points * self._largest)

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        """As `Distribution.mse`; values are taken to spread evenly over their bin.

        Above 8 bits, where a bin is wider than a step, it is `modelled_mse`.
        """
        if qtype.bits > HISTOGRAM_BITS:
            return self.modelled_mse(np.asarray(t, np.float64), qtype)
        thresholds = np.asarray(t, np.float64).reshape(-1, self.groups)
        steps = scale_from_threshold(thresholds, qtype)
        errors = self.squared_errors(steps, [qtype] * len(steps)) / self.count()
        return or_mean_square(self, thresholds, errors).reshape(np.shape(t))

    def squared_errors(self, steps: NDArray[np.float32], qtypes: Sequence[QuantType]) -> Floats:
        """As `Samples.squared_errors`, for at most 8 bits."""
        levels = np.array([(each.qmax, -each.qmin) for each in qtypes], np.int64)
        return self._cells.squared_error(steps.astype(np.float64), levels)

    def snap(self, t: Floats) -> Floats:
        """``t``, or the exact maximum where ``t`` lies in the top bin, too coarse to tell."""
        inner, outer = self._edges
        inner_edge = np.empty(self.groups)
        for group, (first, last) in enumerate(pairwise(self._starts[::2])):
            inner_edge[group] = inner[first + outer[first:last].argmax()]
        return np.where(t >= inner_edge, self.max_abs(), t)

    def modelled_mse(self, t: Floats, qtype: QuantType) -> Floats:
        """J(t), the noise model that OCTAV minimises (OCTAV, equation 4), in the shape of ``t``:
        ``κ t² P(0 < |x| ≤ t) + E[(|x| - t)²; |x| > t]``."""
        inside = self.tail(np.zeros_like(t)).count - self.tail(t).count
        clipped = self._ranked.squared_excess(t)
        return (qtype.rounding_noise * t**2 * inside + clipped) / self.count()

    @cached_property
    def _sides(self) -> NDArray[np.float64]:
        """For each bin the least and the largest magnitude on its side, ``(2, N)``."""
        low, high = self._bounds.T
        bounds = np.stack([low, high, -high, -low], axis=1).reshape(-1, 2) + 0.0  # no -0
        return np.repeat(bounds.T, np.diff(self._starts), axis=1)

    @cached_property
    def _edges(self) -> tuple[Floats, Floats]:
        """The magnitudes between which the values of each bin are."""
        inner, outer = _bin_edges(self._codes)
        return np.clip(inner, *self._sides), np.clip(outer, *self._sides)

    @cached_property
    def _centres(self) -> NDArray[np.float32]:
        """The magnitude that stands for those of each bin."""
        return np.clip(_bin_centre(self._codes), *self._sides).astype(np.float32)

    @cached_property
    def _ranked(self) -> Ranked:
        return Ranked.of_sides(self._centres, self._counts, self._starts)

    @cached_property
    def _ordered(self) -> Ordered:
        centres, counts = self._centres.astype(np.float64), self._counts.astype(np.float64)
        groups = []
        for first in range(0, 2 * self.groups, 2):
            positive, negative = (slice(*self._starts[n : n + 2]) for n in (first, first + 1))
            values = np.concatenate([-centres[negative][::-1], centres[positive]])
            groups.append((values, np.concatenate([counts[negative][::-1], counts[positive]])))
        return Ordered(groups)

    @property
    def _zeroth(self) -> NDArray[np.intp]:
        return np.zeros(self.groups, np.intp)

    @cached_property
    def _cells(self) -> Cells:
        return Cells(np.stack([*self._edges, self._counts]), self._starts)


def _bin_centre(codes: NDArray[np.intp]) -> Floats:
    magnitude = codes.astype(np.uint32) & np.uint32(0x7FFF)
    return (magnitude << np.uint32(16)).view(np.float32).astype(np.float64)


def _bin_edges(codes: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """The magnitudes of float32 values counted under each code, the smallest first; ±0 has none."""
    magnitude = codes.astype(np.uint32) & np.uint32(0x7FFF)
    bits = magnitude << np.uint32(16)
    half = np.where(magnitude == 0, np.uint32(0), np.uint32(0x8000))
    inner = (bits - half).view(np.float32).astype(np.float64)
    outer = (bits + half).view(np.float32).astype(np.float64)
    return inner, np.where(magnitude == _LARGEST_CODE, np.inf, outer)
