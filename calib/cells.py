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

from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from calib import compiled
from calib.compiled import kernel
from calib.products import product
from calib.ranked import Floats

Starts = NDArray[np.int64]
Tables = tuple[Starts, Starts, Starts, Starts]

_SAME = 3  # bins may end at the same code: where the exact maximum cuts the last, and at 0
_NEARLY, _NOISE = 1 + 1e-9, 1e-9
_SHIFTED = 3e-7  # a step in float32 is off by so much at most, in relation; five times
_TINY = 1e-30  # below, the smallest scale may be larger than the one wanted
_HUGE = 1e38  # above, the largest scale may be smaller than the one wanted
_LINES = 400  # edges between which excesses are taken from lines
_AT_A_TIME = 1 << 17


class Cells:
    """Bins of magnitudes, ascending on each side of each group; the sides lie behind one another,
    first the positive and then the negative one of every group.

    Args:
        cells: where each bin begins and ends, and how many values it holds, float64 ``(3, N)``.
        starts: where the bins of each side begin, and where the last ends, ``(2G + 1,)``.
    """

    def __init__(self, cells: Floats, starts: Starts):
        prepare = _prepared if compiled.enabled() else _plainly_prepared
        self._bins, self._squares, self._tables = prepare(cells, starts)

    def squared_error(self, step: Floats, levels: Starts) -> Floats:
        """The sum of squared errors ``(P, G)`` of grids with ``step`` ``(P, G)`` and so many
        ``levels`` ``(P, 2)`` above and below 0."""
        if compiled.enabled():
            gain = _gains(self._bins, self._tables, step, levels)
        else:
            gain = np.empty(step.shape)
            for sides in set(map(tuple, levels.tolist())):
                rows = np.flatnonzero((levels == sides).all(axis=1))
                groups, own = np.tile(np.arange(step.shape[1]), rows.size), step[rows]
                gain[rows] = self._plain_gain(groups, own.ravel(), sides).reshape(own.shape)
        return np.asarray(np.maximum(self._total - gain, 0))

    def least(self, step: Floats, grid: tuple[int, tuple[int, int]], count: Floats) -> Starts:
        """Which of P thresholds, that ascend evenly from the first to the largest magnitude, has
        the least `squared_error` over ``count``, of several the first, ``(G,)``.

        Args:
            step: of their grids, ``(P, G)``.
            grid: how many steps a threshold is, and levels as for `squared_error`.
            count: ``(G,)``.
        """
        levels = grid[1]
        if compiled.enabled():
            return _least(self._bins, self._tables, (self._squares, count), step, levels)
        bounds = self._bounds(len(step), grid)
        groups, best = np.arange(count.size), np.asarray(bounds.argmin(axis=1))
        least = self._total - self._plain_gain(groups, step[best, groups], levels)
        off = _NOISE * self._total + _SHIFTED * np.sqrt(self._total * np.maximum(least, 0))
        groups, at = np.nonzero(bounds <= (least * _NEARLY + off)[:, None])
        gain = self._plain_gain(groups, step[at, groups], levels)
        error = np.maximum(self._total[groups] - gain, 0) / count[groups]
        order = np.lexsort((at, error, groups))
        groups, at = groups[order], at[order]
        first = np.append(True, groups[1:] != groups[:-1])[: groups.size]
        best[groups[first]] = at[first]
        return best

    @cached_property
    def _total(self) -> Floats:
        return np.asarray(self._squares[0::2] + self._squares[1::2])

    def _plain_gain(self, groups: Starts, step: Floats, levels: tuple[int, int]) -> Floats:
        """What all levels gain of each of ``groups`` ``(C,)`` at its ``step``."""
        gain, starts = np.zeros(step.shape), self._tables[0]
        for side, n in enumerate(levels):
            sides = 2 * groups + side
            held = np.flatnonzero(starts[sides] < starts[sides + 1])
            most = max(1, _AT_A_TIME // max(n, 1))
            for first in range(0, held.size, most):
                own = held[first : first + most]
                boundary = (np.arange(n) + 0.5) * step[own, None]
                excess = _plain_excess(self._bins, self._tables, sides[own], boundary)
                gain[own] += 2 * step[own] * excess.sum(axis=1)
        return gain

    def _bounds(self, points: int, grid: tuple[int, tuple[int, int]]) -> Floats:
        """What the squared error at each threshold is not below, ``(G, P)``: excesses are convex,
        so that between edges at which they are known they are not above the line."""
        largest, excess = self._edges
        steps, levels = grid
        gain = np.zeros((largest.size, points))
        for own, n in zip(excess, levels, strict=True):
            if n > 0:
                gain += product(own, _line_weights(steps, n, points))
        bounds = self._total[:, None] - largest[:, None] * gain
        bounds[(largest < _TINY) | (largest > _HUGE)] = -np.inf
        return np.asarray(bounds)

    @cached_property
    def _edges(self) -> tuple[Floats, Floats]:
        """The largest magnitude of each group, ``(G,)``, and by how much the values of each side
        exceed edges up to it in sum, ``(2, G, E + 1)``."""
        starts = self._tables[0]
        ends = np.append(self._bins[1], 0)[starts[1:] - 1] * (np.diff(starts) > 0)
        largest = np.maximum(ends[0::2], ends[1::2])
        excess = np.zeros((2, largest.size, _LINES + 1))
        edge = np.arange(_LINES + 1) / _LINES
        for side in range(2):
            held = np.flatnonzero(starts[side:-1:2] < starts[side + 1 :: 2])
            boundary = edge * largest[held, None]
            sides = 2 * held + side
            excess[side, held] = _plain_excess(self._bins, self._tables, sides, boundary)
        return largest, excess


@lru_cache(32)
def _line_weights(steps: int, levels: int, points: int) -> Floats:
    """What each of the excesses at edges adds to the gain of so many ``levels`` at each threshold,
    ``(E + 1, P)``, in units of the largest magnitude."""
    step = np.arange(1, points + 1)[:, None] / (points * steps)
    boundary = (np.arange(levels) + 0.5) * step * _LINES
    inside = boundary < _LINES
    column = np.broadcast_to(np.arange(points)[:, None], boundary.shape)[inside]
    edge = boundary[inside].astype(np.intp)
    part = boundary[inside] - edge
    weights = np.zeros((_LINES + 1, points))
    np.add.at(weights, (edge, column), (1 - part) * 2 * step[column, 0])
    np.add.at(weights, (edge + 1, column), part * 2 * step[column, 0])
    return weights


def _plain_excess(bins: Floats, tables: Tables, sides: Starts, boundary: Floats) -> Floats:
    """The sum of ``x - boundary`` over the values above it, on each of ``sides`` ``(C,)``, none of
    which is empty: ``(C, B)``, in the shape of ``boundary``."""
    starts, table, begin, lowest = tables
    code = _codes(boundary)
    code -= lowest[sides, None]
    last = (begin[sides + 1] - begin[sides] - 1)[:, None]
    at = table[np.clip(code, 0, last, out=code) + begin[sides, None]]
    at += starts[sides, None]
    end = starts[sides + 1, None]
    for _ in range(_SAME):
        below = bins[1].take(at, mode="clip") <= boundary
        below &= at < end
        if not below.any():
            break
        at += below
    inside = at < end
    at[~inside] = 0
    excess = bins[4].take(at) - boundary * bins[3].take(at)
    above = np.maximum(boundary - bins[0].take(at), 0)
    excess += bins[2].take(at) * np.square(above)
    return np.where(inside, excess, 0)


def _plainly_prepared(cells: Floats, starts: Starts) -> tuple[Floats, Floats, Tables]:
    low, high, count = cells
    mean, mean_square = (low + high) / 2, (low * low + low * high + high * high) / 3
    width = high - low
    half_density = np.divide(count / 2, width, out=np.zeros_like(width), where=width > 0)
    from_here = [_from_here(terms, starts) for terms in (count, count * mean)]
    squares = _from_here(count * mean_square, starts)
    ends = np.append(squares, 0)[starts[:-1]] * (np.diff(starts) > 0)
    tables, lowest = [], []
    for side in np.split(high, starts[1:-1]):
        codes = _codes(side)
        nearest = min(int(codes.searchsorted(1)), codes.size - 1)
        first = int(codes[nearest]) if codes.size else 0
        ending = np.bincount(np.maximum(codes - first, 0))  # the one of 0 is far from the others
        tables.append(np.concatenate([[0], np.cumsum(ending)]))
        lowest.append(first)
    begin = np.cumsum([0, *(table.size for table in tables)])
    found = starts, np.concatenate(tables), begin, np.array(lowest)
    return np.stack([low, high, half_density, *from_here]), ends, found


def _from_here(terms: Floats, starts: Starts) -> Floats:
    """From each term on, the sum to the end of its side."""
    parts = [np.cumsum(part[::-1])[::-1] for part in np.split(terms, starts[1:-1])]
    return np.concatenate(parts)


@kernel()
def _prepared(cells: Floats, starts: Starts) -> tuple[Floats, Floats, Tables]:
    """The bins: where each begins and ends, half of what it holds per unit, and from it on the
    number of values and their sum, ``(5, N)``; the sums of squares of the sides; and tables.

    These tell where the bins are. For the code that `Counter` gives a value, from the lowest that
    occurs on, how many bins of a side end at smaller ones; of all sides behind one another. The
    tables are: where the bins of each side begin, those, where they begin, and the lowest codes.
    """
    low, high, count = cells[0], cells[1], cells[2]
    bins, squares = np.empty((5, low.size)), np.zeros(starts.size - 1)
    begin, lowest = np.zeros(starts.size, np.int64), np.zeros(starts.size - 1, np.int64)
    for side in range(squares.size):
        first, last = starts[side], starts[side + 1]
        number = total = square = 0.0
        for at in range(last - 1, first - 1, -1):
            a, b, n = low[at], high[at], count[at]
            number, total = number + n, total + n * ((a + b) / 2)
            square += n * ((a * a + a * b + b * b) / 3)
            bins[0, at], bins[1, at], bins[3, at], bins[4, at] = a, b, number, total
            bins[2, at] = n / 2 / (b - a) if b > a else 0.0
        squares[side], begin[side + 1] = square, begin[side] + 1
        if first < last:
            nearest = first + (first + 1 < last and _code(high[first]) < 1)
            lowest[side] = _code(high[nearest])
            begin[side + 1] += _code(high[last - 1]) - lowest[side] + 1
    table = np.zeros(begin[-1], np.int64)
    for side in range(squares.size):
        own = table[begin[side] : begin[side + 1]]
        for at in range(starts[side], starts[side + 1]):
            own[max(_code(high[at]) - lowest[side], 0) + 1] += 1
        for code in range(1, own.size):
            own[code] += own[code - 1]
    return bins, squares, (starts, table, begin, lowest)


@kernel()
def _code(magnitude: float) -> int:
    return int((np.int64(np.float32(magnitude).view(np.uint32)) + 0x8000) >> 16)


def _codes(magnitudes: Floats) -> Starts:
    bits = magnitudes.astype(np.float32).view(np.uint32).astype(np.int64)
    return (bits + 0x8000) >> 16


@kernel()
def _gains(bins: Floats, tables: Tables, steps: Floats, levels: Starts) -> Floats:
    gain = np.zeros(steps.shape)
    for side in range(tables[0].size - 1):
        for index in range(steps.shape[0]):
            step = steps[index, side // 2]
            n = levels[index, side % 2]
            gain[index, side // 2] += _side_gain(bins, tables, side, step, n)
    return gain


@kernel()
def _side_gain(bins: Floats, tables: Tables, side: int, step: float, levels: int) -> float:
    """What all ``levels`` above 0 gain on one side."""
    excess = 0.0
    for level in range(levels):
        own, _, beyond = _excess(bins, tables, side, (level + 0.5) * step)
        if beyond:
            break
        excess += own
    return 2 * step * excess


@kernel()
def _excess(bins: Floats, tables: Tables, side: int, boundary: float) -> tuple[float, float, bool]:
    """The sum of ``x - boundary`` over the values above, how many these are, and whether all bins
    are below."""
    low, high, half_density, count, total = bins[0], bins[1], bins[2], bins[3], bins[4]
    starts, table, begin, lowest = tables
    own, last = table[begin[side] : begin[side + 1]], starts[side + 1]
    at = starts[side] + own[min(max(_code(boundary) - lowest[side], 0), own.size - 1)]
    while at < last and high[at] <= boundary:
        at += 1
    if at == last:
        return 0.0, 0.0, True
    part = max(boundary - low[at], 0.0)
    above = count[at] - 2 * half_density[at] * part
    excess = total[at] - boundary * count[at] + half_density[at] * part * part
    return excess, above, False


@kernel()
def _least(
    bins: Floats,
    tables: Tables,
    sums: tuple[Floats, Floats],
    steps: Floats,
    levels: tuple[int, int],
) -> Starts:
    """From the largest step down, until what is clipped is more than the least error."""
    squares, count = sums
    best = np.zeros(count.size, np.int64)
    for group in range(count.size):
        total, least, clipped = squares[2 * group] + squares[2 * group + 1], np.inf, 0.0
        for index in range(steps.shape[0] - 1, -1, -1):
            step, gain = steps[index, group], 0.0
            for side in range(2):
                gain += _side_gain(bins, tables, 2 * group + side, step, levels[side])
            error = max(total - gain, 0.0) / count[group]
            if error <= least:
                best[group], least = index, error
            # With the threshold it falls, by twice the excess over it, which is convex.
            for side in range(2 if index > 0 else 0):
                threshold = step * levels[side]
                less = threshold - steps[index - 1, group] * levels[side]
                excess, above, _ = _excess(bins, tables, 2 * group + side, threshold)
                clipped += less * (2 * excess + less * above)
            if clipped > least * count[group] * _NEARLY + total * _NOISE:
                break
    return best
