"""The squared error of quantizing raw values, in the arithmetic of `calib.quantize`, fast.

Groups lie behind one another as in `calib.ranked`. Above 8 bits float32 sums are too coarse, and
NumPy does it in float64.
"""

from __future__ import annotations

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
_FEW_STEPS = 3
_ROW = 256  # values that are soon gone through
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
def least_errors(
    magnitude: Singles, sums: Floats, starts: Starts, start: Starts, grid: tuple[int, int]
) -> Starts:
    """Which of the thresholds ``k / points · max|x|``, k = 1 … points, has the least error on a
    grid that is symmetric, of several the smallest: k of each group, ``(G,)``.

    Args:
        magnitude: ``(N,)``, the groups behind one another, ascending in each.
        sums: of the magnitudes from each on to the end of its group, see `calib.ranked`.
        starts: where they begin, ``(G + 1,)``.
        start: the k to begin with, ``(G,)``: the better, the sooner the others are ruled out.
        grid: its steps, and points.
    """
    best = np.empty(start.size, np.int64)
    for group in range(start.size):
        first, last = starts[group], starts[group + 1]
        row = magnitude[first:last]
        few = grid[0] <= _FEW_STEPS and _ROW * (grid[0] - 1) <= row.size
        if few and row[row.size - 1] > _TINY:
            best[group] = _most_gain(row, sums[first + group : last + group + 1], grid)
        else:
            best[group] = _least_error(row, start[group], grid)
    return best


@kernel()
def _most_gain(row: Singles, sums: Floats, grid: tuple[int, int]) -> int:
    """The k with the least error, by the formula of `calib.cells`: with few levels that takes less
    than going through all values."""
    steps, points = grid
    n, step = row.size, np.float64(row[-1]) / (points * steps)  # of k = 1
    gain = np.zeros(points)
    for level in range(steps):
        at = 0
        for k in range(1, points + 1):
            boundary = (level + 0.5) * k * step
            while at < n and row[at] <= boundary:
                at += 1
            gain[k - 1] += k * (sums[at] - boundary * (n - at))
    return int(np.argmax(gain)) + 1


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
