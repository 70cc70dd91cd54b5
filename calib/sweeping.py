"""The threshold of the least squared error among many, of raw values, in NumPy.

Measuring all is most of the work, so most are ruled out. The error of a value at a threshold is
``x² - 2·step·Σ max(x - b_l, 0)`` (see `calib.cells`). Between two edges e < e' at which it is
known, the chord of it lies below it by no more than that of x² does: ``(x - e)·(e' - x)``, whatever
the threshold. Each value being shared out among the edges around it, errors of all groups at all
thresholds are therefore bounded from below by a product of matrices, less one number for each
group; and exactly given where values are clipped, if thresholds are edges.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from calib.magnitudes import (
    CACHED,
    LARGEST,
    NEARLY,
    NOISE,
    SMALLEST_STEP,
    TINY,
    Singles,
    Starts,
    units,
)
from calib.products import product
from calib.ranked import Floats, Ranks

_MARGIN = 1 + 1e-4  # above what sums of float32 are off by
_SHIFTED = 3e-7  # by so much of the largest, at most, a position in float32 is off; doubled
_PART = 1 << 18  # values, or edges, at a time
TOP = 64
_TOP = (1, 4, 16, TOP)  # so many of the largest values say what is clipped at least
_EDGES = ((32, 100), (150, 200), (400, 300))  # for so many values at most
_MOST_EDGES = 400


class Swept(NamedTuple):
    """What a sweep of G groups found on each of W grids.

    Attributes:
        best: k of the least error, ``(W, G)``.
        least: that error, ``(W, G)``.
        last: the error at the largest magnitude, ``(W, G)``.
    """

    best: Starts
    least: Floats
    last: Floats


class _Part(NamedTuple):
    """Some groups, in units of theirs, in which squares stay within float32.

    Attributes:
        rows: magnitudes, ``(G, N)``.
        unit: see `units`, ``(G, 1)``.
        largest: the largest magnitude, ``(G,)``; in old units.
        ratio: its square.
        shares: how many values are at each edge, ``(G, E + 2)``.
        noise: by how much bounds may be too high, over largest², ``(G,)``.
        top: see `_top`.
    """

    rows: Singles
    unit: Singles
    largest: Floats
    ratio: Floats
    shares: Singles
    noise: Floats
    top: list[Floats]


def plain_sweeps(rows: Singles, top: Singles, squares: Floats, grids: tuple[Starts, int]) -> Swept:
    """As `calib.rounding.seek`, in NumPy: the k of the least error, of several the smallest.

    Args:
        rows: magnitudes, ``(G, N)``.
        top: the largest `TOP` of them, or all, ascending, ``(G, n)``.
        squares: the sum of their squares, ``(G,)``.
        grids: steps of W grids that are symmetric, ``(W,)``; and points.
    """
    widths, (groups, n) = grids[0].tolist(), rows.shape
    found = Swept(
        np.empty((len(widths), groups), np.int64),
        np.empty((len(widths), groups)),
        np.empty((len(widths), groups)),
    )
    edges = _edges(n, grids[1])
    size = max(1, _PART // max(n, edges))
    for first in range(0, groups, size):
        own = slice(first, first + size)
        part = _part(rows[own], top[own], squares[own], edges)
        for width, steps in enumerate(widths):
            swept = _sweep(part, steps, grids[1])
            for whole, one in zip(found, swept, strict=True):
                whole[width, own] = one
    return found


def _edges(n: int, points: int) -> int:
    """More for longer rows, of which it takes longer to measure an error."""
    wanted = next((edges for most, edges in _EDGES if n <= most), _MOST_EDGES)
    return max(wanted // points, 1) * points if points <= 2 * wanted else wanted


def _part(rows: Singles, largest_few: Singles, squares: Floats, edges: int) -> _Part:
    largest = largest_few[:, -1].astype(np.float64)
    unit = units(largest)[:, None]
    scaled = rows * unit
    top = largest_few[:, -1:] * unit
    top[top == 0] = 1
    position = scaled * (np.float32(edges) / top)
    edge = position.astype(np.intp)
    position -= edge
    inside = position.sum(axis=1, dtype=np.float64)
    inside -= np.einsum("gn,gn->g", position, position)
    edge += np.arange(len(rows))[:, None] * (edges + 2)
    size, at = len(rows) * (edges + 2), edge.ravel()
    beyond = np.bincount(at, position.ravel(), size)
    whole = np.bincount(at, None, size) - beyond
    whole[1:] += beyond[:-1]
    shares = whole.astype(np.float32).reshape(len(rows), edges + 2)
    top_square = np.where(largest > 0, largest, 1) ** 2
    noise = squares / top_square * NOISE + inside / edges**2
    ratio = np.where(largest > 0, (largest * unit[:, 0]) ** 2, 1)
    return _Part(scaled, unit, largest, ratio, shares, noise, _top(largest_few))


def _sweep(part: _Part, steps: int, points: int) -> tuple[Starts, Floats, Floats]:
    grid, every = (steps, points), np.arange(len(part.rows))
    last = _errors(part, every, np.full(every.size, points), grid)
    found = np.full(every.size, points), last.copy()
    tiny = (part.largest > 0) & (part.largest < TINY)
    lowest = _lowest(part, last)
    lowest[tiny] = 0
    first = min(max(int(lowest.min() * points * (1 - 1e-6)), 1), points)
    errors_at_edges = _errors_at_edges(steps, points, part.shares.shape[1])
    bounds = product(part.shares, errors_at_edges[:, first - 1 :])
    zero = part.largest == 0
    if tiny.any() or zero.any():
        bounds[tiny], bounds[zero] = 0, np.inf
    bounds[:, -1] = np.inf  # measured already
    at = bounds.argmin(axis=1)
    hopeful = np.flatnonzero(bounds[every, at] <= _limit(part, last))
    _improve(part, (hopeful, at[hopeful] + first), grid, found)
    bounds[every, at] = np.inf
    groups, k = np.nonzero(bounds <= _limit(part, found[1])[:, None])
    _improve(part, (groups, k + first), grid, found)
    best, least = found
    best[zero] = 1
    scale = part.unit.astype(np.float64)[:, 0] ** 2
    return best, least / scale, last / scale


def _improve(
    part: _Part, tried: tuple[Ranks, Ranks], grid: tuple[int, int], found: tuple[Ranks, Floats]
) -> None:
    """Measures k of groups, and keeps in ``found`` which is best of each and its error."""
    groups, k = tried
    if groups.size == 0:
        return
    error = _errors(part, groups, k, grid)
    again = groups[1:] == groups[:-1]
    if again.any():
        order = np.lexsort((k, error, groups))
        ahead = order[np.append(True, ~again)]
        groups, k, error = groups[ahead], k[ahead], error[ahead]
    best, least = found
    better = (error < least[groups]) | ((error == least[groups]) & (k < best[groups]))
    best[groups[better]], least[groups[better]] = k[better], error[better]


def _limit(part: _Part, least: Floats) -> Singles:
    """The largest bound, in largest², of an error that may be the least."""
    least = least / part.ratio
    off = np.sqrt(least * (_SHIFTED**2 * part.rows.shape[1]))
    return np.asarray((least * NEARLY + part.noise) * _MARGIN + off, np.float32)


def _lowest(part: _Part, least: Floats) -> Floats:
    """The threshold, over the largest magnitude, below which more than ``least`` is clipped off
    the largest few values: the error of these is ``Σ x² - 2·t·Σ x + j·t²`` as long as j exceed t.
    """
    enough = least / part.ratio * _MARGIN + part.rows.shape[1] * NOISE
    lowest = np.zeros(enough.size)
    for j, (mean, mean_square, smallest) in zip(_TOP, part.top, strict=False):
        root = mean - np.sqrt(np.maximum(mean * mean - mean_square + enough / j, 0))
        lowest = np.maximum(lowest, np.minimum(root, smallest))
    return lowest


def _top(largest_few: Singles) -> list[Floats]:
    """Of the largest values, over the largest of all, the mean, the mean square and the smallest,
    ``(3, G)``; of more and more of them."""
    few = largest_few.astype(np.float64)
    few /= np.where(few[:, -1:] > 0, few[:, -1:], 1)
    parts = [few[:, few.shape[1] - j :] for j in _TOP if j <= few.shape[1]]
    return [
        np.stack([x.mean(axis=1), np.einsum("gn,gn->g", x, x) / x.shape[1], x[:, 0]]) for x in parts
    ]


@lru_cache(64)
def _errors_at_edges(steps: int, points: int, edges: int) -> Singles:
    """The squared error of a value at each of ``edges``, of which the last but one is the largest
    magnitude, at each k: ``(edges, points)``, over largest²."""
    edge = np.arange(edges)[:, None] / (edges - 2)
    step = np.arange(1, points + 1) / (points * steps)
    error = edge - np.minimum(np.rint(edge / step), steps) * step
    return np.asarray(error * error, np.float32)


def _errors(part: _Part, groups: Ranks, k: Ranks, grid: tuple[int, int]) -> Floats:
    """The error of each of ``groups`` at the threshold that ``k`` says, in their units."""
    (steps, points), is_last = grid, bool((k == grid[1]).all())
    wanted = k / points * part.largest[groups] / steps
    step = np.clip(wanted, SMALLEST_STEP, LARGEST / steps).astype(np.float32)[:, None]
    step *= part.unit[groups]
    errors, every = np.empty(groups.size), np.array_equal(groups, np.arange(len(part.rows)))
    size = max(1, CACHED // part.rows.shape[1])
    room = np.empty((min(size, groups.size), part.rows.shape[1]), np.float32)
    for first in range(0, groups.size, size):
        own = slice(first, first + size)
        rows = part.rows[own] if every else part.rows[groups[own]]
        level = room[: len(rows)]
        np.divide(rows, step[own], out=level)
        np.rint(level, out=level)
        if not is_last:
            np.clip(level, -steps, steps, out=level)
        level *= step[own]
        np.subtract(rows, level, out=level)
        errors[own] = np.einsum("gn,gn->g", level, level)
    return errors
