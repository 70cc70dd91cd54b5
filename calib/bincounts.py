"""Counting float32 values in bfloat16 bins with NumPy, see `calib.counter`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.counting import MINUS_ZERO_CODE, N_CODES

LONGEST = 1 << 16  # what is made of so many values stays in a cache
_TWO = 1 << 14  # values; of so many, two tables pay
_HALF, _WORD, _ONE = np.uint32(0x8000), np.uint32(16), np.uint32(1)
_SIGN = np.uint32(0x80000000)


class _Workspace:
    """What is written again and again: new memory would take longer than what is done in it.

    Attributes:
        table: counts of codes of either sign, ``(2, 32768)``; zero in between.
    """

    def __init__(self) -> None:
        self.table = np.zeros((2, MINUS_ZERO_CODE), np.int64)
        self.words = np.empty(LONGEST, np.uint32)
        self.codes = np.empty(LONGEST, np.intp)
        self.turning = np.full(LONGEST, _HALF)
        self.turning[1::2] += _SIGN

    def codes_of(self, bits: NDArray[np.uint32], *, turning: bool = False) -> NDArray[np.intp]:
        """The codes of ``bits``; of every other one that of the other sign, if ``turning``."""
        n = bits.size
        words, codes = self.words[:n], self.codes[:n]
        np.add(bits, self.turning[:n] if turning else _HALF, out=words)
        np.right_shift(words, _WORD, out=words)
        codes[:] = words
        return codes

    def least_but_zero(self, bits: NDArray[np.uint32]) -> int:
        """The least of ``bits`` that are not 0; 0 if all are."""
        less = np.subtract(bits, _ONE, out=self.words[: bits.size])  # of 0 the largest
        return (int(less.min()) + 1) % (1 << 32)


_FREE: list[_Workspace] = []  # one that is in use where an exception comes does not return


def add(counts: NDArray[np.int64], bits: NDArray[np.uint32]) -> None:
    """Counts values that bfloat16 does not round to infinity.

    Args:
        counts: what is added to, int64 ``(65536,)``.
        bits: of at most `LONGEST` values, ``(N,)``.
    """
    own = _taken()
    # Unlike numpy.bincount, it neither looks for extremes nor makes a table.
    np.add.at(counts, own.codes_of(bits), 1)
    _FREE.append(own)


def add_positive(counts: NDArray[np.int64], bits: NDArray[np.uint32], top: np.uint32) -> int:
    """As `add`, of one or more values that are neither negative nor -0; ``top`` is the largest.

    Returns the least of the bits that are not 0; 0 if all are.
    """
    own = _taken()
    least = own.least_but_zero(bits)
    if bits.size < _TWO:
        np.add.at(counts, own.codes_of(bits), 1)
    else:  # many are zero, and equal codes wait for each other: hence two tables
        np.add.at(own.table.reshape(N_CODES), own.codes_of(bits, turning=True), 1)
        first, last = ((n + int(_HALF)) >> int(_WORD) for n in (least, int(top)))
        for start, stop in ((0, 1), (max(first, 1), last + 1)):
            one, other = tables = own.table[:, start:stop]
            counts[start:stop] += one
            counts[start:stop] += other
            tables.fill(0)
    _FREE.append(own)
    return least


def _taken() -> _Workspace:
    try:
        return _FREE.pop()
    except IndexError:
        return _Workspace()
