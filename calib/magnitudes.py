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
