"""Counting the values of a tensor in bfloat16 bins, in one pass and bounded memory.

Rounded to bfloat16 there are only 65,536 float values. Counting each needs no range and no
second pass; counts are integers, so the result is the same for any batch size and order, and
merging is addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import enabled, kernel

N_CODES = 1 << 16
_LANES = 2
_CHUNK = 1 << 18
_CACHED = 1 << 12
_MANY = 1 << 16
_FULL = (1 << 32) - 1
_MINUS_ZERO = np.uint32(0x80000000)
_MINUS_ZERO_CODE = 0x8000
_ABOVE_BFLOAT16 = float(np.uint32(0x7F7F8000).view(np.float32))
_LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)


class Counter:
    """Counts of one tensor's values, with exact minimum, maximum, zeros, NaN and infinities.

    Attributes:
        min, max: smallest and largest finite value; ``inf`` and ``-inf`` before the first.
        n_zero, n_nan, n_inf: exact numbers of zeros (either sign), NaNs and infinities.
    """

    __slots__ = ("_counts", "_in_lanes", "_lanes", "max", "min", "n_inf", "n_nan", "n_zero")

    def __init__(self) -> None:
        # Memory that is never touched is never there: most codes are of no value that occurs.
        self._counts: NDArray[np.int64] = np.zeros(N_CODES, np.int64)
        # Those of compiled code, small: the tables of all tensors of a model compete for a cache.
        self._lanes: NDArray[np.uint32] | None = None
        self._in_lanes = 0
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

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 ``(65536,)``; index ``(bits + 0x8000) >> 16`` of the float32 bits, finite values
        only. Values beyond the largest bfloat16 count as that one."""
        if self._lanes is not None and self._in_lanes:
            for codes in self._used():
                _fold(self._lanes[:, codes], self._counts[codes])
            self._in_lanes = 0
        return self._counts

    def bins(self) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """The codes that were counted, ascending, and how often each: intp and int64 ``(N,)``."""
        counts = self.counts
        codes = np.concatenate([used.start + counts[used].nonzero()[0] for used in self._used()])
        return codes, counts[codes]

    def _used(self) -> tuple[slice, slice]:
        """Codes up to those of the extremes, positive and negative: behind them, nothing is."""
        bounds = np.abs(np.clip([self.max, -self.min], 0, _LARGEST_BFLOAT16).astype(np.float32))
        largest, lowest = (bounds.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
        return slice(0, int(largest) + 1), slice(
            _MINUS_ZERO_CODE, _MINUS_ZERO_CODE + int(lowest) + 1
        )

    @property
    def n_finite(self) -> int:
        """How many finite values were counted."""
        return int(self.counts.sum())

    def update(self, values: NDArray[Any]) -> None:
        """Counts all of ``values``: any shape, float32, float16, or converted to float32."""
        flat = values.reshape(-1)
        if flat.dtype == np.float16 and flat.size >= _MANY:
            self._update_half(np.ascontiguousarray(flat).view(np.uint16))
            return
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if chunk.dtype != np.float32 or not chunk.flags.c_contiguous:
                with np.errstate(over="ignore"):  # float64 beyond float32 counts as infinite
                    chunk = np.ascontiguousarray(chunk, np.float32)
            if enabled():
                self._update_compiled(chunk)
            else:
                self._update(chunk)

    def _update_compiled(self, chunk: NDArray[np.float32]) -> None:
        if self._lanes is None:
            self._lanes = np.zeros((_LANES, N_CODES), np.uint32)
        if self._in_lanes + chunk.size > _FULL:
            _ = self.counts
        self._in_lanes += chunk.size
        bits = chunk.view(np.uint32)
        while bits.size:
            even = bits[: bits.size // 2 * 2]
            done, least, most, n_zero = _count(
                bits, bits.view(np.int32), even.view(np.uint64), self._lanes
            )
            if done:
                self.min, self.max = min(self.min, least), max(self.max, most)
                self.n_zero += n_zero
            if done == bits.size:
                return
            self._update(bits[done : done + _CACHED].view(np.float32))
            bits = bits[done + _CACHED :]

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
        self._counts[: counts.size] += counts
        if counts[0]:
            self.n_zero += chunk.size - int(np.count_nonzero(bits))
        if counts.size > _MINUS_ZERO_CODE and counts[_MINUS_ZERO_CODE]:
            self.n_zero += int(np.count_nonzero(bits == _MINUS_ZERO))

    def _update_half(self, bits: NDArray[np.uint16]) -> None:
        """Counts float16 values as what they are, to convert each but once."""
        if enabled():
            tally = np.zeros(N_CODES, np.int64)
            _tally(bits, tally)
        else:
            tally = np.bincount(bits, minlength=N_CODES)
        found = np.flatnonzero(tally)
        values, times = found.astype(np.uint16).view(np.float16).astype(np.float32), tally[found]
        finite = np.isfinite(values)
        self.n_nan += int(times[np.isnan(values)].sum())
        self.n_inf += int(times[np.isinf(values)].sum())
        self.n_zero += int(times[values == 0].sum())
        values, times = values[finite], times[finite]
        if values.size:
            self.min = min(self.min, float(values.min()))
            self.max = max(self.max, float(values.max()))
            codes = (values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
            np.add.at(self._counts, codes, times)

    def merge(self, other: Counter) -> None:
        """Adds what ``other`` has counted; neither order nor grouping of merges matters."""
        counts = other.counts
        for codes in other._used():
            self._counts[codes] += counts[codes]
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self.n_zero += other.n_zero
        self.n_nan += other.n_nan
        self.n_inf += other.n_inf


@kernel()
def _count(
    bits: NDArray[np.uint32],
    signed: NDArray[np.int32],
    pairs: NDArray[np.uint64],
    lanes: NDArray[np.uint32],
) -> tuple[int, float, float, int]:
    """Counts float32 values, given as their bits thrice, until some that are too large or NaN.

    Neighbours go to different lanes, as repeated codes would wait for each other.

    Returns how many were counted, their minimum and maximum, and how many are zero.
    """
    low, top, high = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(-0x80000000)
    n_zero = np.int64(0)
    done, near_zero = 0, _near_zero(lanes)
    while done < bits.size:
        stop = min(done + _CACHED, bits.size)
        _add(bits, pairs, (done, stop), lanes, np.uint32(1))
        # From the cache by now: counting first hides how long memory takes.
        a, b, c = _ends(bits[done:stop], signed[done:stop])
        if b >= np.uint32(0xFF7F8000) or c >= np.int32(0x7F7F8000):
            _add(bits, pairs, (done, stop), lanes, np.uint32(0xFFFFFFFF))
            break
        low, top, high = min(low, a), max(top, b), max(high, c)
        if _near_zero(lanes) != near_zero:
            near_zero = _near_zero(lanes)
            n_zero += _zeros(bits[done:stop])
        done = stop
    # The largest bits are those of the most negative value, if there is one.
    least = top if top >= np.uint32(0x80000000) else low
    most = np.uint32(high) if high >= 0 else low
    return done, _value(least), _value(most), int(n_zero)


@kernel()
def _add(
    bits: NDArray[np.uint32],
    pairs: NDArray[np.uint64],
    span: tuple[int, int],
    lanes: NDArray[np.uint32],
    times: np.uint32,
) -> None:
    """Adds ``times``, 1 or -1, for each value of ``span``."""
    half, word, long = np.uint64(0x800000008000), np.uint64(16), np.uint64(48)
    mask = np.uint64(0xFFFF)
    for two in pairs[span[0] // 2 : span[1] // 2]:
        pair = two + half
        lanes[0, (pair >> word) & mask] += times
        lanes[1, pair >> long] += times
    if span[1] % 2:
        lanes[0, np.uint32(bits[span[1] - 1] + np.uint32(0x8000)) >> np.uint32(16)] += times


@kernel()
def _fold(lanes: NDArray[np.uint32], counts: NDArray[np.int64]) -> None:
    """Moves what was counted in ``lanes`` to ``counts``."""
    for code in range(len(counts)):
        if lanes[0, code] or lanes[1, code]:
            counts[code] += lanes[0, code] + np.int64(lanes[1, code])
            lanes[0, code] = lanes[1, code] = 0


@kernel()
def _value(bits: np.uint32) -> float:
    return float(np.uint32(bits).view(np.float32))


@kernel()
def _ends(
    bits: NDArray[np.uint32], signed: NDArray[np.int32]
) -> tuple[np.uint32, np.uint32, np.int32]:
    """The smallest bits, the largest, and the largest as signed."""
    low, top, high = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(-0x80000000)
    for i in range(bits.size):
        b, s = bits[i], signed[i]
        low = b if b < low else low
        top = b if b > top else top
        high = s if s > high else high
    return low, top, high


@kernel()
def _near_zero(lanes: NDArray[np.uint32]) -> np.uint32:
    """What has counted zeros, and magnitudes that round to zero; it grows with each."""
    positive, negative = lanes[0, 0] + lanes[1, 0], lanes[0, 0x8000] + lanes[1, 0x8000]
    return np.uint32(positive + negative)


@kernel()
def _zeros(bits: NDArray[np.uint32]) -> np.int64:
    """How many values are zero, of either sign."""
    zeros = np.uint32(0)
    for i in range(bits.size):  # in this form, it is vectorized
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        zeros = np.uint32(zeros + (np.uint32(magnitude - np.uint32(1)) >> np.uint32(31)))
    return np.int64(zeros)


@kernel()
def _tally(codes: NDArray[np.uint16], tally: NDArray[np.int64]) -> None:
    for code in codes:
        tally[code] += 1
