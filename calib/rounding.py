"""The squared error of quantizing raw values, in the arithmetic of `calib.quantize`, fast.

Groups lie behind one another as in `calib.ranked`. Above 8 bits float32 sums are too coarse, and
NumPy does it in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import kernel
from calib.ranked import Floats

Singles = NDArray[np.float32]
Starts = NDArray[np.int64]

# Sums may be reordered, but ``x - level·step`` is not one operation: on the grid it is exactly 0.
_REORDERED: Any = {"reassoc", "nnan", "nsz"}
_CACHED = 1 << 15  # values
_A_LEVEL = 8  # as many values are gone through in the time that one takes
_EDGES, _FEWER_EDGES = 2048, 512
_NEARLY, _NOISE = 1 + 1e-5, 1e-12
_TINY = 1e-30  # below, the smallest scale may be larger than the one wanted
_SMALLEST_STEP = 2.0**-126
_LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-7)


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
    gains = excess @ _line_weights(steps, points, excess.shape[1] - 1)
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


def plain_excesses(rows: Singles, sums: Floats) -> Floats:
    """As `excesses`, of ``rows`` ``(G, N)`` with their ``sums`` ``(G, N + 1)``: ``(G, m + 1)``."""
    edges = min(rows.shape[1], _FEWER_EDGES)
    width = np.where(rows[:, -1:] > 0, rows[:, -1:].astype(np.float64), 1) / edges
    edge = np.minimum((rows * (1 / width)).astype(np.intp), edges)
    edge += np.arange(len(rows))[:, None] * (edges + 1)
    counts = np.bincount(edge.ravel(), minlength=len(rows) * (edges + 1)).reshape(-1, edges + 1)
    rank = np.cumsum(counts, axis=1) - counts
    above = rows.shape[1] - rank
    excess = np.take_along_axis(sums, rank, axis=1)
    return np.asarray(excess - np.arange(edges + 1) * width * above)


@lru_cache(32)
def _line_weights(steps: int, points: int, edges: int) -> Floats:
    """What each of the excesses at ``edges`` adds to the gain of each k, ``(edges + 1, points)``,
    in units of the largest magnitude."""
    step = np.arange(1, points + 1)[:, None] / (points * steps)
    boundary = (np.arange(steps) + 0.5) * step * edges
    edge = boundary.astype(np.intp)
    column = np.broadcast_to(np.arange(points)[:, None], edge.shape)
    weights = np.zeros((edges + 1, points))
    np.add.at(weights, (edge, column), (1 - (boundary - edge)) * 2 * step)
    np.add.at(weights, (edge + 1, column), (boundary - edge) * 2 * step)
    return weights


@kernel()
def moments(values: Singles, starts: Starts) -> tuple[Floats, Floats]:
    """The largest magnitude and the sum of squares of each group, ``(G,)`` each."""
    largest, squares = np.zeros(starts.size - 1), np.zeros(starts.size - 1)
    for group in range(largest.size):
        row = values[starts[group] : starts[group + 1]]
        largest[group], squares[group] = _largest(row), _square_sum(row)
    return largest, squares


@kernel(fastmath=_REORDERED)
def _largest(row: Singles) -> np.float32:
    largest = np.float32(0)
    for at in range(row.size):
        largest = max(largest, abs(row[at]))
    return largest


@kernel(fastmath=_REORDERED)
def _square_sum(row: Singles) -> float:
    total = 0.0
    for at in range(row.size):
        value = np.float64(row[at])
        total += value * value
    return total


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
def excesses(magnitude: Singles, sums: Floats, starts: Starts) -> Floats:
    """For each group the sum of ``|x| - t`` over the magnitudes above ``t = j / m · max|x|``, j =
    0 … m; m is the number of values, or `_EDGES`. Laid out as ``sums``, see `calib.ranked`."""
    table, above = np.empty(sums.size), np.empty(_EDGES + 1, np.int64)
    for group in range(starts.size - 1):
        row = magnitude[starts[group] : starts[group + 1]]
        part = slice(starts[group] + group, starts[group + 1] + group + 1)
        own, total = table[part], sums[part]
        edges = min(row.size, _EDGES)
        width = max(np.float64(row[-1]), _TINY) / edges
        per_width, rank = (1 - 1e-12) / width, np.int64(row.size)
        above[: edges + 1] = row.size
        for at in range(row.size - 1, -1, -1):
            above[int(row[at] * per_width)] = at
        for edge in range(edges, -1, -1):
            less = above[edge] - rank
            rank += less & (less >> 63)  # the minimum, without a branch
            own[edge] = total[rank] - edge * width * (row.size - rank)
    return table


@kernel()
def least_errors(
    ranked: tuple[Singles, Floats],
    squares: Floats,
    starts: Starts,
    start: Starts,
    grid: tuple[int, int],
) -> Starts:
    """Which of the thresholds ``k / points · max|x|``, k = 1 … points, has the least error on a
    grid that is symmetric, of several the smallest: k of each group, ``(G,)``.

    Args:
        ranked: magnitudes ``(N,)``, the groups behind one another, ascending in each; and their
            `excesses`.
        squares: the sum of squares of each group, ``(G,)``.
        starts: where they begin, ``(G + 1,)``.
        start: the k to begin with, ``(G,)``: the better, the sooner the others are ruled out.
        grid: its steps, and points.
    """
    magnitude, table = ranked
    best, bounds = np.empty(start.size, np.int64), np.empty(grid[1] + 1)
    for group in range(start.size):
        first, last = starts[group], starts[group + 1]
        row = magnitude[first:last]
        if _A_LEVEL * grid[0] <= row.size and row[-1] > _TINY:
            excess = table[first + group : first + group + min(row.size, _EDGES) + 1]
            best[group] = _least_bounded(bounds, row, excess, squares[group], grid[0])
        else:
            best[group] = _least_error(row, start[group], grid)
    return best


@kernel()
def _least_bounded(bounds: Floats, row: Singles, excess: Floats, square: float, steps: int) -> int:
    """The k with the least error, of several the smallest; only what ``bounds``, which are set
    here, do not rule out is gone through."""
    lowest, clipped = _bound(bounds, excess, steps, np.float64(row[-1]), square)
    grid, best, least = (steps, bounds.size - 1), 0, np.inf
    for _ in range(bounds.size):
        k = lowest + int(np.argmin(bounds[lowest:]))
        if bounds[k] > least * _NEARLY + square * _NOISE:
            break
        bounds[k] = np.inf
        error = _error_at(k, row, grid, least)
        if error < least or (error == least and k < best):
            best, least = k, error
    if lowest > 1 and clipped <= least * _NEARLY:  # lower ones were left out too soon
        return _least_error(row, best, grid)
    return best


@kernel()
def _bound(
    bounds: Floats, excess: Floats, steps: int, largest: float, square: float
) -> tuple[int, float]:
    """Sets lower bounds of the squared errors of k = ``points`` downward, until what is clipped is
    twice the least bound. Returns the last k, and what it clips at least.

    By the formula of `calib.cells`: the sum of excesses lies below the line from one of ``excess``
    to the next. It takes a look-up for each level, however many values there are.
    """
    points, edges = bounds.size - 1, excess.size - 1
    clipped, least = 0.0, square
    for k in range(points, 0, -1):
        step = k / (points * steps)
        gain = 0.0
        for level in range(steps):
            boundary = (level + 0.5) * step * edges
            edge = int(boundary)
            low, high = excess[edge], excess[edge + 1]
            gain += low + (boundary - edge) * (high - low)
        bounds[k] = square - 2 * step * largest * gain
        least = min(least, bounds[k])
        if clipped > 2 * least:
            return k, clipped
        # From one threshold to the next, what is clipped grows by this at least.
        clipped += 2 * largest / points * excess[min(k * edges // points + 1, edges)]
    return 1, clipped


@kernel()
def _error_at(k: int, row: Singles, grid: tuple[int, int], enough: float) -> float:
    largest = np.float64(row[-1])
    unit = np.float32(1 / min(max(largest, 1e-36), 1e36))
    limits = grid[0], unit, enough * np.float64(unit) ** 2
    error, _, _ = _error_up_to(row, row.size, k / grid[1] * largest, limits)
    return error / np.float64(unit) ** 2


@kernel()
def _least_error(row: Singles, start: int, grid: tuple[int, int]) -> int:
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
