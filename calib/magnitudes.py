"""What the values of a group are together: the largest magnitude, squares in sum; and the squared
error of quantizing them, in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import kernel
from calib.ranked import Floats

Singles = NDArray[np.float32]
Starts = NDArray[np.int64]

_REORDERED: Any = {"reassoc", "nnan", "nsz"}
CACHED = 1 << 15  # values
NEARLY, NOISE = 1 + 2e-5, 1e-12
TINY = 1e-30  # below, the smallest scale may be larger than the one wanted
SMALLEST_STEP = 2.0**-126
LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-7)


def units(largest: Floats) -> Singles:
    """For each group a power of two near ``1 / largest``, so that squares stay within float32."""
    _, exponent = np.frexp(largest)
    power: Singles = np.ldexp(np.float32(1), np.clip(-exponent, -127, 126))
    return power


def plain_squared_errors(piece: Singles, steps: Singles, levels: Singles, unit: Singles) -> Floats:
    """As `squared_errors`, of a ``piece`` ``(G, N)``, in NumPy: in parts that stay in the cache."""
    errors = np.empty(steps.shape)
    rows = max(1, CACHED // max(piece.shape[1], 1))
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
