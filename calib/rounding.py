"""The squared error of quantizing raw values, in the arithmetic of `calib.quantize`, fast.

Groups lie behind one another as in `calib.ranked`. Above 8 bits float32 sums are too coarse, and
NumPy does it in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import kernel
from calib.magnitudes import LARGEST, NEARLY, NOISE, SMALLEST_STEP, TINY, Singles, Starts
from calib.ranked import Floats

# Sums may be reordered, but ``x - level·step`` is not one operation: on the grid it is exactly 0.
_REORDERED: Any = {"reassoc", "nnan", "nsz"}
_EDGES = 2048
_MASK = _EDGES - 1
_LESS = 1 - 1e-12  # so that no magnitude is on the last edge
_FEW = 32
_LANES = 32
_SIDES = _LANES // 2  # thresholds side by side, each for two values
_A_LEVEL = 32  # bounds take as long as going through so many values for each level

Grid = tuple[int, int]
Places = NDArray[np.uint32]
# A group of magnitudes in E buckets that are equally wide, one behind another; for each of E + 1
# edges the place of the first magnitude from there on, the sum of all these, by how much they
# exceed the edge in sum, and that of the next edge minus this (never above 0); and the largest.
Row = tuple[Singles, Places, Floats, float]
# Room for what is computed side by side, and k / points from far below 1 on.
Lanes = tuple[Singles, Floats, Floats]


@kernel(fastmath=_REORDERED)
def _error(
    row: Singles, step: np.float32, low: np.float32, high: np.float32, unit: np.float32
) -> np.floating[Any]:
    """The squared error of ``row``, in ``1 / unit²``."""
    inverse = np.float32(1) / step
    total = np.float32(0)
    for at in range(row.size):
        level = min(max(np.rint(row[at] * inverse), low), high)
        error = (row[at] - level * step) * unit
        total += error * error
    return total


@kernel()
def squared_errors(
    values: Singles, starts: Starts, steps: Singles, levels: Singles, unit: Singles
) -> Floats:
    """The sum of squared errors of each group, ``(P, G)``.

    Args:
        values: ``(N,)``, the groups behind one another.
        starts: where they begin, ``(G + 1,)``.
        steps: of the grids, ``(P, G)``.
        levels: the lowest and the highest integer of each grid, ``(P, 2)``.
        unit: see `units`, ``(G,)``.
    """
    errors = np.empty(steps.shape)
    for group in range(unit.size):
        for index in range(steps.shape[0]):
            step, (low, high), known = steps[index, group], levels[index], 0
            while (
                steps[known, group] != step or levels[known, 0] != low or levels[known, 1] != high
            ):
                known += 1
            if known < index:  # several methods often agree on the maximum
                errors[index, group] = errors[known, group]
                continue
            total = 0.0
            for at in range(starts[group], starts[group + 1], 4096):
                row = values[at : min(at + 4096, starts[group + 1])]
                total += float(_error(row, step, low, high, unit[group]))
            errors[index, group] = total / np.float64(unit[group]) ** 2
    return errors


@kernel()
def seek(
    values: Singles,
    starts: Starts,
    moments: tuple[Floats, Floats],
    noises: Floats,
    grids: tuple[Starts, int],
) -> tuple[Floats, Starts]:
    """The fixed point for each of F ``noises``, as `calib.ranked.Ranked.fixed_point`, ``(F, G)``;
    and which of the thresholds ``k / points · max|x|``, k = 1 … points, has the least error on
    each of W grids that are symmetric, of several the smallest: k of each group, ``(W, G)``.

    Magnitudes are put into buckets: that takes a fraction of the time of sorting them, and what
    lies above a threshold is known but for the values of one.

    Args:
        values: ``(N,)``, the groups behind one another.
        starts: where they begin, ``(G + 1,)``.
        moments: the largest magnitude and the sum of squares of each group, ``(G,)``.
        noises: the first W are those of the grids.
        grids: their steps, ``(W,)``, and points.
    """
    (largest, squares), (steps, points) = moments, grids
    found = np.zeros((noises.size, largest.size))
    best = np.ones((steps.size, largest.size), np.int64)
    fractions = np.maximum(np.arange(1 - _SIDES, points + 1), 1) / points
    lanes = np.empty(3 * _LANES, np.float32), np.empty(_SIDES), fractions
    longest = np.diff(starts).max()
    room, codes = np.empty(longest, np.float32), np.empty(longest, np.uint16)
    places, sums = np.empty(_EDGES + 1, np.uint32), np.empty((3, _EDGES + 1))
    for group in range(largest.size):
        row = values[starts[group] : starts[group + 1]]
        if largest[group] == 0:
            continue
        edges = min(row.size, _EDGES) + 1
        filled = room[: row.size], places[:edges], sums[:, :edges], largest[group]
        _fill(row, codes[: row.size], filled)
        for number in range(noises.size):
            found[number, group] = _fixed_point(filled, noises[number])
        for width in range(steps.size):
            grid = steps[width], points
            if row.size > _A_LEVEL * steps[width] and largest[group] > TINY:
                guess = int(np.rint(found[width, group] / largest[group] * points))
                k = min(max(guess, 1), points)
                best[width, group] = _least_bounded(filled, squares[group], k, grid, lanes)
            else:
                best[width, group] = _least_of_all(filled, grid, lanes)
    return found, best


@kernel()
def _fill(values: Singles, code: NDArray[np.uint16], filled: Row) -> None:
    row, place, sums, largest = filled
    total, excess, less = sums[0], sums[1], sums[2]
    last = np.int32(place.size - 2)
    width = largest / float(last + 1)
    per_width = _LESS * float(last + 1) / largest if largest > TINY else 0.0
    for at in range(row.size):
        code[at] = min(max(np.int32(abs(values[at]) * per_width), np.int32(0)), last)
    place[:], total[:] = 0, 0
    for at in range(row.size):
        place[code[at]] += np.uint32(1)
        total[code[at]] += abs(values[at])
    rest, after, end = 0.0, 0.0, np.uint32(row.size)
    place[last + 1], excess[last + 1], less[last + 1] = end, 0.0, 0.0
    for edge in range(last, -1, -1):
        rest += float(total[edge])
        own = place[edge]
        place[edge] = end  # where each ends, until they are filled
        end -= own
        total[edge] = rest
        own_excess = float(rest - edge * width * (row.size - np.int64(end)))
        excess[edge], less[edge], after = own_excess, after - own_excess, own_excess
    for at in range(row.size):
        place[code[at]] -= np.uint32(1)
        row[place[code[at]]] = abs(values[at])


@kernel()
def _fixed_point(filled: Row, noise: float) -> float:
    (row, place, _, largest), total = filled, filled[2][0]
    nonzero = row.size
    for at in range(place[1]):
        nonzero -= row[at] == 0
    width = largest / (place.size - 1)
    first, last = 0, place.size - 1
    while last - first > 1:  # the root is not below the edge of first
        middle = (first + last) // 2
        above = row.size - np.int64(place[middle])
        if total[middle] >= middle * width * (noise * (nonzero - above) + above):
            first = middle
        else:
            last = middle
    bucket, rest = row[place[first] : place[last]], total[last]
    _sort(bucket)
    above, at = row.size - np.int64(place[last]), bucket.size
    while at > 0:  # down to the first magnitude that the root is not below
        value = np.float64(bucket[at - 1])
        if rest + value >= value * (noise * (nonzero - above - 1) + above + 1):
            break
        at, above, rest = at - 1, above + 1, rest + value
    root = float(rest / (noise * (nonzero - above) + above))
    return max(root, float(bucket[at - 1])) if at > 0 else root


@kernel()
def _sort(bucket: Singles) -> None:
    if bucket.size > _FEW:
        bucket.sort()
        return
    for at in range(1, bucket.size):
        value, to = bucket[at], at
        while to > 0 and bucket[to - 1] > value:
            bucket[to] = bucket[to - 1]
            to -= 1
        bucket[to] = value


@kernel()
def _least_bounded(filled: Row, square: float, start: int, grid: Grid, lanes: Lanes) -> int:
    """The k with the least error, of several the smallest: from the largest down, until what is
    clipped is more; only what bounds do not rule out is measured.

    The error is that of the sums, and values are only gone through where two are too close to tell.
    """
    (row, place, sums, largest), (steps, points) = filled, grid
    excess, slope, edges = sums[1], sums[2], place.size - 1
    noise = square * max(NOISE, row.size * 1e-16)
    per_k, less = edges / points, 4 * largest / points
    best, least = start, _measured(filled, square, start / points * largest, steps)
    clipped, second = 0.0, np.inf
    for top in range(points, 0, -4):
        enough = least * NEARLY + noise
        for k in range(top, max(top - 4, 0), -1):
            step = k / (points * steps)
            bound = square - 2 * largest * step * _gain(excess, slope, step * edges, steps)
            if bound > enough or k == start:
                continue
            error = _measured(filled, square, k / points * largest, steps)
            second = min(second, max(error, least))
            if error < least or (error == least and k < best):
                best, least = k, error
        # Four thresholds further, what is clipped has grown by this at least.
        edge = min(int(top * per_k) + 1, edges)
        clipped += less * (2 * excess[edge] + less * (row.size - np.int64(place[edge])))
        if clipped > enough:
            break
    return best if second > least * NEARLY + noise else _least_of_all(filled, grid, lanes)


@kernel(fastmath=_REORDERED)
def _gain(excess: Floats, slope: Floats, step: float, steps: int) -> float:
    """What all levels gain at most over the ones below, over ``2·step``, in edges as ``step`` is.

    By the formula of `calib.cells`: the sum of excesses lies below the line from one of ``excess``
    to the next. It takes a look-up for each level, however many values there are.
    """
    total = 0.0
    for level in range(np.int32(steps)):
        boundary = (np.float64(level) + 0.5) * step
        edge = np.intp(np.int32(boundary))
        # The mask changes nothing, but says that it is not negative: then it is vectorized.
        total += excess[edge & _MASK] + (boundary - edge) * slope[edge & _MASK]
    return total


@kernel()
def _measured(filled: Row, square: float, threshold: float, steps: int) -> float:
    """The squared error of a threshold, by the formula of `calib.cells`."""
    (row, place, sums, largest), edges = filled, filled[1].size - 1
    step = np.float64(np.float32(min(max(threshold / steps, SMALLEST_STEP), LARGEST / steps)))
    gain, per_width = 0.0, edges / largest
    for level in range(steps):
        boundary = (level + 0.5) * step
        edge = min(int(boundary * per_width), edges - 1)
        gain += sums[0, edge + 1] - boundary * (row.size - np.int64(place[edge + 1]))
        for at in range(place[edge], place[edge + 1]):
            gain += max(row[at] - boundary, 0.0)
    return square - 2 * step * gain


@kernel()
def _least_of_all(filled: Row, grid: Grid, lanes: Lanes) -> int:
    """As `_least_bounded`; all are measured, many side by side."""
    (row, _, _, largest), (steps, points), (side, errors, fractions) = filled, grid, lanes
    exponent = min(max(-math.frexp(largest)[1], -126), 126)
    unit, high = np.float32(math.ldexp(1.0, exponent)), np.float32(steps)
    best, least = points, np.inf
    for low in range(points + 1 - _SIDES, 1 - _SIDES, -_SIDES):
        first = low + _SIDES - 1  # of the fractions
        _set_steps(fractions[first : first + _SIDES], largest, (high, unit), side)
        errors[:] = 0
        for at in range(0, row.size, 256):
            _add_errors(row[at : min(at + 256, row.size)], side, high, unit, errors)
        lane = int(errors.argmin())
        if errors[lane] <= least:
            best, least = max(low + lane, 1), float(errors[lane])
        below = (low - 1) / points * largest  # and at smaller thresholds it is more still
        if below <= 0 or _clipped(filled, below, unit) > least * NEARLY:
            break
    return best


@kernel(fastmath=_REORDERED)
def _set_steps(
    fractions: Floats, largest: float, given: tuple[np.float32, np.float32], side: Singles
) -> None:
    """Sets the second third of ``side`` to the steps in units, and the first to one over them."""
    high, unit = given
    for lane in range(_SIDES):
        wanted = max(fractions[lane] * largest / high, SMALLEST_STEP)
        step = np.float32(min(wanted, LARGEST / high)) * unit
        side[lane] = side[_SIDES + lane] = np.float32(1) / step
        side[_LANES + lane] = side[_LANES + _SIDES + lane] = step


@kernel()
def _clipped(filled: Row, threshold: float, unit: np.float32) -> float:
    """The least of the error in ``1 / unit²`` of what is clipped."""
    (row, place, _, largest), edges, total = filled, filled[1].size - 1, 0.0
    edge = min(int(threshold * (edges / largest)) + 1, edges) if largest > TINY else edges
    for at in range(place[edge], row.size):
        total += ((row[at] - threshold) * unit) ** 2
    return total


@kernel(fastmath=_REORDERED)
def _add_errors(
    row: Singles, side: Singles, high: np.float32, unit: np.float32, errors: Floats
) -> None:
    """Adds the squared errors of ``row`` in ``1 / unit²``, for each of the steps in ``side``."""
    for lane in range(_LANES):
        side[2 * _LANES + lane] = 0
    for at in range(0, row.size, 2):
        one = row[at] * unit
        other = row[at + 1] * unit if at + 1 < row.size else np.float32(0)
        for lane in range(_LANES):
            value = one if lane < _SIDES else other
            level = min(np.rint(value * side[lane]), high)
            error = value - level * side[_LANES + lane]
            side[2 * _LANES + lane] += error * error
    for lane in range(_SIDES):
        errors[lane] += side[2 * _LANES + lane] + side[2 * _LANES + _SIDES + lane]
