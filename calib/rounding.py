"""The squared error of quantizing raw values, in the arithmetic of `calib.quantize`, fast.

Groups lie behind one another as in `calib.ranked`. Above 8 bits float32 sums are too coarse, and
NumPy does it in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import kernel
from calib.magnitudes import LARGEST, NEARLY, NOISE, SMALLEST_STEP, TINY, Singles, Starts
from calib.ranked import Floats

# Sums may be reordered, but ``x - level·step`` is not one operation: on the grid it is exactly 0.
_REORDERED: Any = {"reassoc", "nnan", "nsz"}
_CONTRACTED: Any = {*_REORDERED, "contract"}
_EDGES = 2048
_MASK = _EDGES - 1
_LESS = 1 - 1e-12  # so that no magnitude is on the last edge
_FEW = 32
_A_LEVEL = 32  # as many values are gone through in the time that one takes
_A_BUCKET = 24  # the same, of a level that is looked up among the buckets
_A_CALL = 40  # and of beginning
_SLACK, _OFF = 2e-4, 4e-5

Grid = tuple[int, int]
Places = NDArray[np.uint32]
# A group of magnitudes in E buckets that are equally wide, one behind another; for each of E + 1
# edges the place of the first magnitude from there on, and the sum of all these; and the largest.
Row = tuple[Singles, Places, Floats, float]


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
    best = np.full((steps.size, largest.size), points)
    longest = np.diff(starts).max()
    room, codes = np.empty(longest, np.float32), np.empty(longest, np.uint16)
    places, sums = np.empty(_EDGES + 1, np.uint32), np.empty(_EDGES + 1)
    lines = np.empty((2, _EDGES + 1))
    for group in range(largest.size):
        row = values[starts[group] : starts[group + 1]]
        if largest[group] == 0:
            best[:, group] = 1
            continue
        edges = min(row.size, _EDGES)
        given = room[: row.size], places[: edges + 1], sums[: edges + 1], largest[group]
        _fill(row, codes[: row.size], given)
        for number in range(noises.size):
            found[number, group] = _fixed_point(given, noises[number])
        most = row.size // _A_LEVEL if largest[group] > TINY else 0
        if steps.size and most >= steps.min():
            _set_lines(given, lines[:, : edges + 1])
        for width in range(steps.size):
            guess = int(np.rint(found[width, group] / largest[group] * points))
            k = min(max(guess, 1), points)
            if steps[width] <= most:
                grid = squares[group], k, steps[width], points
                best[width, group] = _least_bounded(given, lines[:, : edges + 1], grid)
            else:
                best[width, group] = _least_error(given, k, (steps[width], points))
    return found, best


@kernel()
def _fill(values: Singles, code: NDArray[np.uint16], filled: Row) -> None:
    row, place, total, largest = filled
    last = np.int32(place.size - 2)
    per_width = _LESS * (last + 1) / largest if largest > TINY else 0.0
    for at in range(row.size):
        code[at] = min(max(np.int32(abs(values[at]) * per_width), np.int32(0)), last)
    place[:], total[:] = 0, 0
    for at in range(row.size):
        place[code[at]] += np.uint32(1)
        total[code[at]] += abs(values[at])
    rest, end = 0.0, np.uint32(row.size)
    for edge in range(last, -1, -1):
        rest += total[edge]
        total[edge] = rest
        own = place[edge]
        place[edge] = end  # where each ends, until they are filled
        end -= own
    place[last + 1] = row.size
    for at in range(row.size):
        place[code[at]] -= np.uint32(1)
        row[place[code[at]]] = abs(values[at])


@kernel()
def _fixed_point(filled: Row, noise: float) -> float:
    row, place, total, largest = filled
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
def _set_lines(values: Row, lines: Floats) -> None:
    """Sets the sums of ``x - t`` over the values above each edge t, and how much each is less than
    the next."""
    row, place, total, largest = values
    edges = place.size - 1
    for edge in range(edges + 1):
        above = row.size - np.int64(place[edge])
        lines[0, edge] = total[edge] - edge * (largest / edges) * above
    lines[1, :edges], lines[1, edges] = lines[0, 1:] - lines[0, :edges], 0.0


@kernel()
def _least_bounded(values: Row, lines: Floats, given: tuple[float, int, int, int]) -> int:
    """The k with the least error, of several the smallest: from the largest down, until what is
    clipped is more; only what bounds do not rule out is measured.

    Where levels are few, the error is that of the sums, and values are only gone through where
    two are too close to tell.
    """
    (row, place, _, largest), (square, best, steps, points) = values, given
    excess, slope = lines[0], lines[1]
    by_sums, edges = _A_BUCKET * steps <= row.size + _A_CALL, excess.size - 1
    noise = square * max(NOISE, row.size * 1e-16)
    per_k, less = edges / points, 4 * largest / points
    least = _measured(values, best, (square, steps, points, np.inf))
    clipped, second, start = 0.0, np.inf, best
    for top in range(points, 0, -4):
        enough = least * NEARLY + noise
        for k in range(top, max(top - 4, 0), -1):
            step = k / (points * steps)
            bound = square - 2 * largest * step * _gain(excess, slope, step * edges, steps)
            if bound > enough or k == start:
                continue
            error = _measured(values, k, (square, steps, points, least))
            second = min(second, max(error, least))
            if error < least or (error == least and k < best):
                best, least = k, error
        # Four thresholds further, what is clipped has grown by this at least.
        edge = min(int(top * per_k) + 1, edges)
        clipped += less * (2 * excess[edge] + less * (row.size - np.int64(place[edge])))
        if clipped > enough:
            break
    if by_sums and second <= least * NEARLY + noise:
        return _least_error(values, best, (steps, points))
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
def _measured(values: Row, k: int, given: tuple[float, int, int, float]) -> float:
    """The squared error of k, by whichever way is faster."""
    (row, place, total, largest), (square, steps, points, enough) = values, given
    if _A_BUCKET * steps > row.size + _A_CALL:
        unit = np.float32(1 / min(max(largest, 1e-36), 1e36))
        limits = steps, unit, enough * np.float64(unit) ** 2
        return _error_up_to(values, k / points * largest, limits)[0] / np.float64(unit) ** 2
    threshold = k / points * largest / steps
    step = np.float64(np.float32(min(max(threshold, SMALLEST_STEP), LARGEST / steps)))
    edges = place.size - 1
    gain, per_width = 0.0, edges / largest
    for level in range(steps):
        boundary = (level + 0.5) * step
        edge = min(int(boundary * per_width), edges - 1)
        gain += total[edge + 1] - boundary * (row.size - np.int64(place[edge + 1]))
        for at in range(place[edge], place[edge + 1]):
            gain += max(row[at] - boundary, 0.0)
    return square - 2 * step * gain


@kernel()
def _least_error(values: Row, start: int, grid: Grid) -> int:
    points, largest = grid[1], values[3]
    unit = np.float32(1 / min(max(largest, 1e-36), 1e36))
    least, _ = _error_up_to(values, start / points * largest, (grid[0], unit, np.inf))
    best = start
    for k in range(start + 1, points + 1):
        error, _ = _error_up_to(values, k / points * largest, (grid[0], unit, least))
        if error < least:
            best, least = k, error
    for k in range(start - 1, 0, -1):
        error, clipped = _error_up_to(values, k / points * largest, (grid[0], unit, least))
        if error <= least:
            best, least = k, error
        if clipped > least:  # and that of smaller thresholds is larger still
            break
    return best


@kernel()
def _error_up_to(
    values: Row, threshold: float, limits: tuple[int, np.float32, float]
) -> tuple[float, float]:
    """The squared error of the values, infinite above ``enough``, the last of ``limits``, and that
    of those for certain clipped."""
    (row, place, _, largest), (steps, unit, enough) = values, limits
    edges, inside, outside = place.size - 1, 0, row.size
    if largest > TINY:
        edge = min(int(threshold * (_LESS * edges / largest)), edges - 1)
        inside, outside = int(place[edge]), int(place[edge + 1])
    step = np.float32(min(max(threshold / steps, SMALLEST_STEP), LARGEST / steps))
    high = np.float32(steps)
    clipped = float(_error(row[outside:], step, -high, high, unit))
    total = clipped + float(_error(row[inside:outside], step, -high, high, unit))
    square = (np.float64(step) * unit) ** 2
    if total > enough or _hopeless(row[:inside], step, square, (total, enough)):
        return np.inf, clipped
    for at in range(0, inside, 256):
        total += float(_error(row[at : min(at + 256, inside)], step, -high, high, unit))
    return total, clipped


@kernel()
def _hopeless(row: Singles, step: np.float32, square: float, limits: tuple[float, float]) -> bool:
    """Whether the error of what is not clipped adds more to the first of ``limits`` than the other
    allows, for certain; in a simpler arithmetic, in which each value's is off by ``_OFF`` steps:

        (√a + d)² ≤ a·(1 + η) + d²·(1 + 1/η),   d² = n·(_OFF·step)²,   η = _SLACK
    """
    (total, enough), at = limits, row.size
    inverse = np.float32(1) / step
    enough += enough * _SLACK + at * square * (_OFF * _OFF * (1 + 1 / _SLACK))
    while at > 0 and total <= enough:
        total += square * float(_fractions(row[max(at - 256, 0) : at], inverse))
        at -= 256
    return total > enough


@kernel(fastmath=_CONTRACTED)
def _fractions(row: Singles, inverse: np.float32) -> np.floating[Any]:
    """The sum of squares of how far ``row`` is from whole steps."""
    total = np.float32(0)
    for at in range(row.size):
        level = row[at] * inverse
        error = level - np.rint(level)
        total += error * error
    return total
