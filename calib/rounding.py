"""The squared error of quantizing raw values, in the arithmetic of `calib.quantize`, fast.

Groups lie behind one another as in `calib.ranked`. Above 8 bits float32 sums are too coarse, and
NumPy does it in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import kernel
from calib.magnitudes import Singles, Starts, line_weights
from calib.ranked import Floats

# Sums may be reordered, but ``x - level·step`` is not one operation: on the grid it is exactly 0.
_REORDERED: Any = {"reassoc", "nnan", "nsz"}
_CACHED = 1 << 15  # values
_EDGES = 2048
_MASK = _EDGES - 1
_A_LEVEL = 16  # as many values are gone through in the time that one takes
_A_RANK = 24  # the same, of a level that is looked up among the ranks
_A_CALL = 40  # and of beginning
_NEARLY, _NOISE = 1 + 2e-5, 1e-12
_TINY = 1e-30  # below, the smallest scale may be larger than the one wanted
_SMALLEST_STEP = 2.0**-126
_LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-7)

Places = NDArray[np.uint32]
Grid = tuple[int, int]
Given = tuple[float, int, int, int]


def units(largest: Floats) -> Singles:
    """For each group a power of two near ``1 / largest``, so that squares stay within float32."""
    _, exponent = np.frexp(largest)
    power: Singles = np.ldexp(np.float32(1), np.clip(-exponent, -127, 126))
    return power


def plain_squared_errors(piece: Singles, steps: Singles, levels: Singles, unit: Singles) -> Floats:
    """As `squared_errors`, of a ``piece`` ``(G, N)``, in NumPy: in parts that stay in the cache."""
    errors = np.empty(steps.shape)
    rows = max(1, _CACHED // max(piece.shape[1], 1))
    for first in range(0, len(piece), rows):
        part = slice(first, first + rows)
        values, error = piece[part], np.empty(piece[part].shape, np.float32)
        with np.errstate(over="ignore", under="ignore"):
            for step, found in zip(steps[:, part, None], errors[:, part], strict=True):
                np.divide(values, step, out=error)
                np.rint(error, out=error)
                np.clip(error, *levels, out=error)
                np.multiply(error, step, out=error)
                np.subtract(values, error, out=error)
                np.multiply(error, unit[part, None], out=error)
                found[:] = np.einsum("gn,gn->g", error, error)
    return errors / unit.astype(np.float64) ** 2


def plain_least_errors(
    rows: Singles, excess: Floats, squares: Floats, grid: tuple[int, int]
) -> Starts:
    """As `least_errors`, of ``rows`` ``(G, N)`` and their `plain_excesses`, in NumPy: the bounds
    of all groups are one product of matrices."""
    steps, points = grid
    largest = rows[:, -1].astype(np.float64)
    gains = excess @ line_weights(steps, points, excess.shape[1] - 1)
    bounds = squares[:, None] - largest[:, None] * gains
    bounds[(largest > 0) & (largest < _TINY)] = -np.inf
    best, least = np.full(len(rows), points), np.full(len(rows), np.inf)
    levels, unit = np.array([-steps, steps], np.float32), units(largest)
    hopeful = np.arange(len(rows))
    for _ in range(points):
        at = np.argmin(bounds[hopeful], axis=1)
        enough = least[hopeful] * _NEARLY + squares[hopeful] * _NOISE
        kept = bounds[hopeful, at] <= enough
        hopeful, at = hopeful[kept], at[kept]
        if not hopeful.size:
            break
        bounds[hopeful, at] = np.inf
        step = (at + 1) / points * largest[hopeful] / steps
        step = np.clip(step, _SMALLEST_STEP, _LARGEST / steps).astype(np.float32)
        error = plain_squared_errors(rows[hopeful], step[None], levels, unit[hopeful])[0]
        better = (error < least[hopeful]) | ((error == least[hopeful]) & (at < best[hopeful]))
        best[hopeful[better]], least[hopeful[better]] = at[better], error[better]
    return best + 1


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
        levels: the lowest and the highest integer of the grid.
        unit: see `units`, ``(G,)``.
    """
    errors = np.empty(steps.shape)
    for group in range(unit.size):
        for index in range(steps.shape[0]):
            step, known = steps[index, group], 0
            while steps[known, group] != step:
                known += 1
            if known < index:  # several methods often agree on the maximum
                errors[index, group] = errors[known, group]
                continue
            total = 0.0
            for at in range(starts[group], starts[group + 1], 4096):
                row = values[at : min(at + 4096, starts[group + 1])]
                total += float(_error(row, step, levels[0], levels[1], unit[group]))
            errors[index, group] = total / np.float64(unit[group]) ** 2
    return errors


@kernel()
def least_errors(
    ranked: tuple[Singles, Floats],
    squares: Floats,
    starts: Starts,
    start: Starts,
    grids: tuple[Starts, int],
) -> Starts:
    """Which of the thresholds ``k / points · max|x|``, k = 1 … points, has the least error on each
    of W grids that are symmetric, of several the smallest: k of each group, ``(W, G)``.

    Args:
        ranked: magnitudes ``(N,)``, the groups behind one another, ascending in each; and their
            sums from each rank on, see `calib.ranked`.
        squares: the sum of squares of each group, ``(G,)``.
        starts: where they begin, ``(G + 1,)``.
        start: the k to begin with, ``(W, G)``: the better, the sooner the others are ruled out.
        grids: their steps, ``(W,)``, and points.
    """
    (magnitude, sums), (steps, points) = ranked, grids
    best = np.empty_like(start)
    tables, places = np.empty((2, _EDGES + 1)), np.empty(_EDGES + 1, np.uint32)
    for group in range(squares.size):
        first, last = starts[group], starts[group + 1]
        row, total = magnitude[first:last], sums[first + group : last + group + 1]
        table, above = tables[:, : min(row.size, _EDGES) + 1], places[: min(row.size, _EDGES) + 1]
        most = row.size // _A_LEVEL if row[-1] > _TINY else 0
        if most >= steps.min():
            _excesses(row, total, table, above)
        for width in range(steps.size):
            k = start[width, group]
            if steps[width] <= most:
                given = squares[group], k, steps[width], points
                best[width, group] = _least_bounded(row, total, table, above, given)
            else:
                best[width, group] = _least_error(row, k, (steps[width], points))
    return best


@kernel()
def _excesses(row: Singles, total: Floats, table: Floats, above: Places) -> None:
    """Sets the sums of ``x - t`` over the values above ``t = j / m · max x``, j = 0 … m, and
    how much each is less than the next; and the ranks of the first of these values."""
    excess, slope = table[0], table[1]
    edges, after = excess.size - 1, 0.0
    width = np.float64(row[-1]) / edges
    per_width, rank = (1 - 1e-12) / width, np.int64(row.size)
    above[:] = row.size
    for at in range(row.size - 1, -1, -1):
        above[int(row[at] * per_width)] = at
    for edge in range(edges, -1, -1):
        less = np.int64(above[edge]) - rank
        rank += less & (less >> 63)  # the minimum, without a branch
        above[edge] = rank
        excess[edge] = total[rank] - edge * width * (row.size - rank)
        slope[edge] = after - excess[edge]
        after = excess[edge]


@kernel()
def _least_bounded(row: Singles, total: Floats, table: Floats, places: Places, given: Given) -> int:
    """The k with the least error, of several the smallest: from the largest down, until what is
    clipped is more; only what bounds do not rule out is measured.

    Where levels are few, the error is that of the ranks, and values are only gone through where
    two are too close to tell.
    """
    square, best, steps, points = given
    excess, slope = table[0], table[1]
    by_ranks, edges = _A_RANK * steps <= row.size + _A_CALL, excess.size - 1
    noise = square * max(_NOISE, row.size * 1e-16)
    largest, per_k = np.float64(row[-1]), edges / points
    less = 4 * largest / points
    least = _measured(best, row, total, places, (square, steps, points, edges, np.inf))
    clipped, second, start = 0.0, np.inf, best
    for top in range(points, 0, -4):
        enough = least * _NEARLY + noise
        for k in range(top, max(top - 4, 0), -1):
            step = k / (points * steps)
            bound = square - 2 * largest * step * _gain(excess, slope, step * edges, steps)
            if bound > enough or k == start:
                continue
            error = _measured(k, row, total, places, (square, steps, points, edges, least))
            second = min(second, max(error, least))
            if error < least or (error == least and k < best):
                best, least = k, error
        # Four thresholds further, what is clipped has grown by this at least.
        edge = min(int(top * per_k) + 1, edges)
        clipped += less * (2 * excess[edge] + less * (row.size - places[edge]))
        if clipped > enough:
            break
    if by_ranks and second <= least * _NEARLY + noise:
        return _least_error(row, best, (steps, points))
    return best


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
def _measured(
    k: int, row: Singles, total: Floats, places: Places, given: tuple[float, int, int, int, float]
) -> float:
    """The squared error of k, by whichever way is faster."""
    square, steps, points, edges, enough = given
    if _A_RANK * steps > row.size + _A_CALL:
        return _error_at(k, row, (steps, points), enough)
    largest = np.float64(row[-1])
    threshold = k / points * largest / steps
    step = np.float64(np.float32(min(max(threshold, _SMALLEST_STEP), _LARGEST / steps)))
    gain, per_width = 0.0, edges / largest
    for level in range(steps):
        boundary = (level + 0.5) * step
        edge = min(int(boundary * per_width), edges - 1)
        rank, last = np.int64(places[edge]), np.int64(places[edge + 1])
        while last - rank > 8:
            middle = (rank + last) // 2
            if row[middle] <= boundary:
                rank = middle + 1
            else:
                last = middle
        while rank < last and row[rank] <= boundary:
            rank += 1
        gain += total[rank] - boundary * (row.size - rank)
    return square - 2 * step * gain


@kernel()
def _error_at(k: int, row: Singles, grid: Grid, enough: float) -> float:
    largest = np.float64(row[-1])
    unit = np.float32(1 / min(max(largest, 1e-36), 1e36))
    limits = grid[0], unit, enough * np.float64(unit) ** 2
    error, _, _ = _error_up_to(row, row.size, k / grid[1] * largest, limits)
    return error / np.float64(unit) ** 2


@kernel()
def _least_error(row: Singles, start: int, grid: Grid) -> int:
    points, largest = grid[1], np.float64(row[-1])
    unit = np.float32(1 / min(max(largest, 1e-36), 1e36))
    best, inside = start, row.size
    least, _, inside = _error_up_to(row, inside, start / points * largest, (grid[0], unit, np.inf))
    for k in range(start + 1, points + 1):
        threshold = k / points * largest
        error, _, inside = _error_up_to(row, inside, threshold, (grid[0], unit, least))
        if error < least:
            best, least = k, error
    for k in range(start - 1, 0, -1):
        threshold = k / points * largest
        error, clipped, inside = _error_up_to(row, inside, threshold, (grid[0], unit, least))
        if error <= least:
            best, least = k, error
        if clipped > least:  # and that of smaller thresholds is larger still
            break
    return best


@kernel()
def _error_up_to(
    row: Singles, inside: int, threshold: float, limits: tuple[int, np.float32, float]
) -> tuple[float, float, int]:
    """The squared error of ``row``, the part of what is clipped, and how many values are not, which
    is near ``inside``; no more is added up once the error is ``enough``, the last of ``limits``."""
    steps, unit, enough = limits
    while inside < row.size and row[inside] <= threshold:
        inside += 1
    while inside > 0 and row[inside - 1] > threshold:
        inside -= 1
    step = np.float32(min(max(threshold / steps, _SMALLEST_STEP), _LARGEST / steps))
    high = np.float32(steps)
    clipped = np.float64(_error(row[inside:], step, -high, high, unit))
    total, at = clipped, inside
    while at > 0 and total <= enough:
        total += _error(row[max(at - 256, 0) : at], step, -high, high, unit)
        at -= 256
    return total, clipped, inside
