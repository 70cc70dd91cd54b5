"""What the magnitudes of a group are together: the largest, squares in sum, and by how much they
exceed each of many edges in sum, from which bounds on squared errors follow.
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

_REORDERED: Any = {"reassoc", "nnan", "nsz"}
_FEWER_EDGES = 512
_CACHED = 1 << 15  # values
NEARLY, NOISE = 1 + 2e-5, 1e-12
TINY = 1e-30  # below, the smallest scale may be larger than the one wanted
SMALLEST_STEP = 2.0**-126
LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-7)


def plain_excesses(rows: Singles, sums: Floats) -> Floats:
    """For each group the sum of ``|x| - t`` over the magnitudes above ``t = j / m · max|x|``, j =
    0 … m, of ``rows`` ``(G, N)`` with their ``sums`` ``(G, N + 1)``: ``(G, m + 1)``."""
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
def line_weights(steps: int, points: int, edges: int) -> Floats:
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
    """k of the least error as `calib.rounding.seek` finds it, of ``rows`` ``(G, N)`` and their
    `plain_excesses`, in NumPy: the bounds of all groups are one product of matrices."""
    steps, points = grid
    largest = rows[:, -1].astype(np.float64)
    gains = excess @ line_weights(steps, points, excess.shape[1] - 1)
    bounds = squares[:, None] - largest[:, None] * gains
    bounds[(largest > 0) & (largest < TINY)] = -np.inf
    best, least = np.full(len(rows), points), np.full(len(rows), np.inf)
    levels, unit = np.array([-steps, steps], np.float32), units(largest)
    hopeful = np.arange(len(rows))
    for _ in range(points):
        at = np.argmin(bounds[hopeful], axis=1)
        enough = least[hopeful] * NEARLY + squares[hopeful] * NOISE
        kept = bounds[hopeful, at] <= enough
        hopeful, at = hopeful[kept], at[kept]
        if not hopeful.size:
            break
        bounds[hopeful, at] = np.inf
        step = (at + 1) / points * largest[hopeful] / steps
        step = np.clip(step, SMALLEST_STEP, LARGEST / steps).astype(np.float32)
        error = plain_squared_errors(rows[hopeful], step[None], levels, unit[hopeful])[0]
        better = (error < least[hopeful]) | ((error == least[hopeful]) & (at < best[hopeful]))
        best[hopeful[better]], least[hopeful[better]] = at[better], error[better]
    return best + 1


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
