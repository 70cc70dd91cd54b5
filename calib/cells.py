"""The squared error of quantizing values of which only the number in every bin is known.

Values spread evenly over their bin. On one side of 0, with a grid ``0, step … L·step``, the sum of
squared errors is that of the squares, less what each level gains over the one below it:

    Σ (x - x̂)² = Σ x² - 2·step · Σ_{l=0}^{L-1} Σ max(x - b_l, 0),    b_l = (l + ½)·step

since ``x̂`` passes from ``l·step`` to ``(l+1)·step`` at b_l, where both are as far off. The inner
sum follows from the number n and the sum of the values in the bin of b_l and all above it. In that
bin, which begins at a and holds d values per unit, those below b_l were counted as negative:

    Σ max(x - b_l, 0) = Σ x - n·b_l + d·(b_l - a)² / 2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calib import compiled
from calib.compiled import kernel
from calib.ranked import Floats

Starts = NDArray[np.int64]

_SAME = 3  # bins may end at the same code: where the exact maximum cuts the last, and at 0


class Cells:
    """Bins of magnitudes, ascending on each side of each group; the sides lie behind one another,
    first the negative and then the positive one of every group.

    Args:
        sides: where the bins of each begin and end, and how many values they hold, float64
            ``(3, N)``.
    """

    def __init__(self, sides: Sequence[Floats]):
        low, high, count = np.concatenate(sides, axis=1)
        self._starts = np.cumsum([0, *(side.shape[1] for side in sides)])
        mean, mean_square = (low + high) / 2, (low * low + low * high + high * high) / 3
        from_here = [self._from_here(terms) for terms in (count, count * mean)]
        width = high - low
        half_density = np.divide(count / 2, width, out=np.zeros_like(width), where=width > 0)
        self._bins = np.stack([low, high, half_density, *from_here])
        self._table = _tables(self._split(high))
        self._square_sum = np.array([part.sum() for part in self._split(count * mean_square)])

    def squared_error(self, step: Floats, levels: tuple[int, int]) -> Floats:
        """The sum of squared errors ``(P, G)`` of grids with ``step`` ``(P, G)`` and so many
        ``levels`` below and above 0."""
        if compiled.enabled():
            gain = _gains(self._bins, (self._starts, *self._table), step, levels)
        else:
            gain = np.zeros(step.shape)
            at, begin, lowest = self._table
            for side, bins in enumerate(self._split(self._bins)):
                table = at[begin[side] : begin[side + 1]], int(lowest[side])
                gain[:, side // 2] += _gain(bins, table, step[:, side // 2], levels[side % 2])
        total = self._square_sum[0::2] + self._square_sum[1::2]
        return np.asarray(np.maximum(total - gain, 0))

    def _split(self, terms: Floats) -> list[Floats]:
        return np.split(terms, self._starts[1:-1], axis=-1)

    def _from_here(self, terms: Floats) -> Floats:
        """From each term on, the sum to the end of its side."""
        parts = [np.cumsum(part[::-1])[::-1] for part in self._split(terms)]
        return np.concatenate(parts)


def _tables(highs: Sequence[Floats]) -> tuple[Starts, Starts, Starts]:
    """Where the bins are: for the code that `Counter` gives a value, from the lowest that occurs
    on, how many bins of a side end at smaller ones. Of all sides behind one another; where each
    begins; and the lowest."""
    tables, lowest = [], []
    for high in highs:
        codes = _codes(high)
        nearest = min(int(codes.searchsorted(1)), codes.size - 1)
        first = int(codes[nearest]) if codes.size else 0
        ending = np.bincount(np.maximum(codes - first, 0))  # the one of 0 is far from the others
        tables.append(np.concatenate([[0], np.cumsum(ending)]))
        lowest.append(first)
    begin = np.cumsum([0, *(table.size for table in tables)])
    return np.concatenate(tables), begin, np.array(lowest)


def _codes(magnitudes: Floats) -> Starts:
    bits = magnitudes.astype(np.float32).view(np.uint32).astype(np.int64)
    return (bits + 0x8000) >> 16


def _gain(bins: Floats, table: tuple[Starts, int], step: Floats, levels: int) -> Floats:
    """What all levels above 0 gain, ``(P,)``, on one side."""
    if bins.shape[1] == 0:
        return np.zeros(step.shape)
    boundary = (np.arange(levels) + 0.5) * step[:, None]
    at = table[0].take(_codes(boundary) - table[1], mode="clip")
    for _ in range(_SAME):
        at += bins[1].take(at, mode="clip") <= boundary
    inside = at < bins.shape[1]
    low, _, half_density, count, total = bins.take(np.where(inside, at, 0), axis=1)
    excess = total - boundary * count + half_density * np.square(np.maximum(boundary - low, 0))
    return np.asarray(2 * step * np.where(inside, excess, 0).sum(axis=1))


@kernel()
def _gains(
    bins: Floats,
    tables: tuple[Starts, Starts, Starts, Starts],
    steps: Floats,
    levels: tuple[int, int],
) -> Floats:
    low, high, half_density, count, total = bins[0], bins[1], bins[2], bins[3], bins[4]
    starts, table, begin, lowest = tables
    gain = np.zeros(steps.shape)
    for side in range(starts.size - 1):
        first, last = starts[side], starts[side + 1]
        own, group = table[begin[side] : begin[side + 1]], side // 2
        if first == last:
            continue
        for index in range(steps.shape[0]):
            step, excess = steps[index, group], 0.0
            for level in range(levels[side % 2]):
                boundary = (level + 0.5) * step
                code = (np.int64(np.float32(boundary).view(np.uint32)) + 0x8000) >> 16
                at = first + own[min(max(code - lowest[side], 0), own.size - 1)]
                while at < last and high[at] <= boundary:
                    at += 1
                if at == last:
                    break
                part = max(boundary - low[at], 0.0)
                excess += total[at] - boundary * count[at] + half_density[at] * part * part
            gain[index, group] += 2 * step * excess
    return gain
