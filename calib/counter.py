"""Counting the values of a tensor in bfloat16 bins, in one pass and bounded memory.

Rounded to bfloat16 there are only 65,536 float values. Counting each needs no range and no
second pass; counts are integers, so the result is the same for any batch size and order, and
merging is addition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N_CODES = 1 << 16
_CHUNK = 1 << 18
_MINUS_ZERO = np.uint32(0x80000000)
_MINUS_ZERO_CODE = 0x8000
_ABOVE_BFLOAT16 = float(np.uint32(0x7F7F8000).view(np.float32))
_LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)


class Counter:
    """Counts of one tensor's values, with exact minimum, maximum, zeros, NaN and infinities.

    Attributes:
        counts: int64 ``(65536,)``; index ``(bits + 0x8000) >> 16`` of the float32 bits, finite
            values only. Values beyond the largest bfloat16 count as that one.
        min, max: smallest and largest finite value; ``inf`` and ``-inf`` before the first.
        n_zero, n_nan, n_inf: exact numbers of zeros (either sign), NaNs and infinities.
    """

    __slots__ = ("counts", "max", "min", "n_inf", "n_nan", "n_zero")

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(N_CODES, np.int64)
        self.min = float("inf")
        self.max = float("-inf")
        self.n_zero = 0
        self.n_nan = 0
        self.n_inf = 0

    @property
    def n_finite(self) -> int:
        """How many finite values were counted."""
        return int(self.counts.sum())

    def update(self, values: NDArray[np.floating]) -> None:
        """Counts all of ``values``: any shape, float32, or converted to it."""
        with np.errstate(over="ignore"):  # float64 beyond float32 counts as infinite
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self._update(flat[start : start + _CHUNK])

    def _update(self, chunk: NDArray[np.float32]) -> None:
        low, high = chunk.min(), chunk.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            nan = np.isnan(chunk)
            finite = np.isfinite(chunk)
            self.n_nan += int(nan.sum())
            self.n_inf += int(chunk.size - finite.sum() - nan.sum())
            chunk = chunk[finite]
            if chunk.size == 0:
                return
            low, high = chunk.min(), chunk.max()
        self.min = min(self.min, float(low))
        self.max = max(self.max, float(high))
        if max(-float(low), float(high)) >= _ABOVE_BFLOAT16:
            chunk = np.clip(chunk, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
        bits = chunk.view(np.uint32)
        codes = (bits + np.uint32(0x8000)) >> np.uint32(16)
        counts = np.bincount(codes)
        self.counts[: counts.size] += counts
        if counts[0]:
            self.n_zero += chunk.size - int(np.count_nonzero(bits))
        if counts.size > _MINUS_ZERO_CODE and counts[_MINUS_ZERO_CODE]:
            self.n_zero += int(np.count_nonzero(bits == _MINUS_ZERO))

    def merge(self, other: Counter) -> None:
        """Adds what ``other`` has counted; neither order nor grouping of merges matters."""
        self.counts += other.counts
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self.n_zero += other.n_zero
        self.n_nan += other.n_nan
        self.n_inf += other.n_inf
