"""Counting the values of a tensor in bfloat16 bins, in one pass and bounded memory.

Rounded to bfloat16 there are only 65,536 float values. Counting each needs no range and no
second pass; counts are integers, so the result is the same for any batch size and order, and
merging is addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib import bincounts
from calib.compiled import enabled
from calib.counting import (
    CACHED,
    MINUS_ZERO_CODE,
    N_CODES,
    Counted,
    bins_of,
    count_each,
    tally,
)

_MANY = 1 << 16
_MINUS_ZERO = np.uint32(0x80000000)
_HALF = np.uint32(0x8000)
_ABOVE_BITS = np.uint32(0x7F7F8000)
_ABOVE_BFLOAT16 = float(_ABOVE_BITS.view(np.float32))
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
        # Memory that is never touched is never there: most codes are of no value that occurs.
        self.counts: NDArray[np.int64] = np.zeros(N_CODES, np.int64)
        self.min = float("inf")
        self.max = float("-inf")
        self.n_zero = 0
        self.n_nan = 0
        self.n_inf = 0

    @classmethod
    def of(cls, values: NDArray[Any]) -> Counter:
        """All of ``values``, counted."""
        counter = cls()
        counter.update(values)
        return counter

    def bins(self) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """The codes that were counted, ascending, and how often each: intp and int64 ``(N,)``."""
        found = [used.start + self.counts[used].nonzero()[0] for used in self._used()]
        codes = np.concatenate(found)
        return codes, self.counts[codes]

    def _used(self) -> tuple[slice, slice]:
        """Codes up to those of the extremes, positive and negative: behind them, nothing is."""
        bounds = np.abs(np.clip([self.max, -self.min], 0, _LARGEST_BFLOAT16).astype(np.float32))
        largest, lowest = (bounds.view(np.uint32) + _HALF) >> np.uint32(16)
        return slice(0, int(largest) + 1), slice(MINUS_ZERO_CODE, MINUS_ZERO_CODE + int(lowest) + 1)

    @property
    def n_finite(self) -> int:
        """How many finite values were counted."""
        return int(self.counts.sum())

    def update(self, values: NDArray[Any]) -> None:
        """Counts all of ``values``: any shape, float32, float16, or converted to float32."""
        update_all((self,), (values,))

    def _update_converted(self, flat: NDArray[Any]) -> None:
        """As `update`, in parts that are converted if need be."""
        if flat.dtype == np.float16 and flat.size >= _MANY:
            self._update_half(flat.view(np.uint16))
            return
        for start in range(0, flat.size, bincounts.LONGEST):
            chunk = flat[start : start + bincounts.LONGEST]
            if chunk.dtype != np.float32 or not chunk.flags.aligned:
                with np.errstate(over="ignore"):  # float64 beyond float32 counts as infinite
                    chunk = np.require(chunk, np.float32, "A")
            if enabled():
                self.update(chunk)
            else:
                self._update(chunk)

    def _add(self, flat: NDArray[np.float32], counted: Counted) -> None:
        """Notes what was ``counted`` of ``flat``, and counts the rest."""
        done = 0
        while True:
            n, least, most, n_zero = counted
            self.min, self.max = min(self.min, least), max(self.max, most)
            self.n_zero += n_zero
            if (done := done + n) == flat.size:
                return
            self._update(flat[done : done + CACHED])
            done = min(done + CACHED, flat.size)
            (counted,) = count_each([flat[done:]], [self.counts])

    def _update(self, chunk: NDArray[np.float32]) -> None:
        bits = chunk.view(np.uint32)
        if (top := bits.max()) < _ABOVE_BITS:
            self._update_positive(bits, top)
        else:
            self._update_any(chunk)

    def _update_positive(self, bits: NDArray[np.uint32], top: np.uint32) -> None:
        """Counts values that are not negative, nor -0, of which ``top`` are the largest bits."""
        n_zero = -int(self.counts[0])
        least = bincounts.add_positive(self.counts, bits, top)
        n_zero += int(self.counts[0])
        if n_zero and least < _HALF:  # then this may also be of what rounds to zero
            n_zero = bits.size - int(np.count_nonzero(bits))
        self.n_zero += n_zero
        least = 0 if n_zero else least
        self.min = min(self.min, float(np.uint32(least).view(np.float32)))
        self.max = max(self.max, float(top.view(np.float32)))

    def _update_any(self, chunk: NDArray[np.float32]) -> None:
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
        before = self.counts[0], self.counts[MINUS_ZERO_CODE]
        bincounts.add(self.counts, bits)
        if self.counts[0] != before[0]:
            self.n_zero += chunk.size - int(np.count_nonzero(bits))
        if self.counts[MINUS_ZERO_CODE] != before[1]:
            self.n_zero += int(np.count_nonzero(bits == _MINUS_ZERO))

    def _update_half(self, bits: NDArray[np.uint16]) -> None:
        """Counts float16 values as what they are, to convert each but once."""
        if enabled():
            counts = np.zeros(N_CODES, np.int64)
            tally(bits, counts)
        else:
            counts = np.bincount(bits, minlength=N_CODES)
        found = np.flatnonzero(counts)
        values, times = found.astype(np.uint16).view(np.float16).astype(np.float32), counts[found]
        finite = np.isfinite(values)
        self.n_nan += int(times[np.isnan(values)].sum())
        self.n_inf += int(times[np.isinf(values)].sum())
        self.n_zero += int(times[values == 0].sum())
        values, times = values[finite], times[finite]
        if values.size:
            self.min = min(self.min, float(values.min()))
            self.max = max(self.max, float(values.max()))
            codes = (values.view(np.uint32) + _HALF) >> np.uint32(16)
            np.add.at(self.counts, codes, times)

    def merge(self, other: Counter) -> None:
        """Adds what ``other`` has counted; neither order nor grouping of merges matters."""
        for codes in other._used():
            self.counts[codes] += other.counts[codes]
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self.n_zero += other.n_zero
        self.n_nan += other.n_nan
        self.n_inf += other.n_inf


def update_all(counters: Sequence[Counter], arrays: Sequence[NDArray[Any]]) -> None:
    """Has each of ``counters`` count its array, as `Counter.update`; sooner than one by one."""
    own: list[Counter] = []  # of a generic type, one would cost more than counting little
    flat: list[NDArray[np.float32]] = []
    for counter, values in zip(counters, arrays, strict=True):
        array = values.ravel("K")  # in the order of memory
        if enabled() and array.dtype == np.float32 and array.flags.aligned:
            own.append(counter)
            flat.append(array)
        else:
            counter._update_converted(array)
    if own:
        found = count_each(flat, [counter.counts for counter in own])
        for counter, array, counted in zip(own, flat, found, strict=True):
            counter._add(array, counted)


def all_bins(
    counters: Sequence[Counter],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The codes that each of K ``counters`` has counted, positive and then negative ones, how often
    each, int64 ``(N,)``, and where each of these sides begins and ends, ``(2K + 1,)``."""
    if enabled():
        extremes = np.array([[counter.min, counter.max] for counter in counters])
        return bins_of([counter.counts for counter in counters], extremes)
    bins = [counter.bins() for counter in counters]
    ends = [(codes.searchsorted(MINUS_ZERO_CODE), codes.size) for codes, _ in bins]
    lengths = [n for first, both in ends for n in (first, both - first)]
    codes, counts = (np.concatenate(part) for part in zip(*bins, strict=True))
    return codes, counts, np.cumsum([0, *lengths])
