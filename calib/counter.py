"""Counting the values of a tensor in bfloat16 bins, in one pass and bounded memory.

Rounded to bfloat16 there are only 65,536 float values. Counting each needs no range and no
second pass; counts are integers, so the result is the same for any batch size and order, and
merging is addition.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import enabled, kernel, prefetch

N_CODES = 1 << 16
_CACHED = 1 << 12
_CHUNK = 63 * _CACHED  # a lane counts a quarter of them, up to 65,535
_PLAIN_CHUNK = 1 << 19  # longer ones take more memory and gain little
_HIGH = slice(int(sys.byteorder == "little"), None, 2)  # of the halves of numbers of 32 bits
_AHEAD = 1 << 11  # bytes; found best
_TOGETHER = 1 << 8
_MANY = 1 << 16
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
        flat = values.ravel("K")  # in the order of memory
        if flat.dtype == np.float16 and flat.size >= _MANY:
            self._update_half(np.ascontiguousarray(flat).view(np.uint16))
            return
        size = _CHUNK if enabled() else _PLAIN_CHUNK
        for start in range(0, flat.size, size):
            chunk = flat[start : start + size]
            if chunk.dtype != np.float32 or not chunk.flags.c_contiguous:
                with np.errstate(over="ignore"):  # float64 beyond float32 counts as infinite
                    chunk = np.ascontiguousarray(chunk, np.float32)
            if enabled():
                self._update_compiled(chunk)
            else:
                self._update(chunk)

    def _update_compiled(self, chunk: NDArray[np.float32]) -> None:
        bits, lanes = chunk.view(np.uint32), _LOCAL.lanes
        while bits.size:
            done, least, most, n_zero = _count(bits, lanes, self.counts)
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
        counts = np.bincount((bits + np.uint32(0x8000)).view(np.uint16)[_HIGH])
        self.counts[: counts.size] += counts
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


class _Local(threading.local):
    """What each thread counts in before it adds that to a tensor's counts; zero in between. What
    occurs of it is small, so that it stays in the fastest cache."""

    def __init__(self) -> None:
        lanes = np.zeros(N_CODES, [(lane, np.uint16) for lane in "abcd"])
        self.lanes = lanes, lanes.view(np.uint64)


_LOCAL = _Local()


@kernel()
def _count(
    bits: NDArray[np.uint32], lanes: tuple[Any, NDArray[np.uint64]], counts: NDArray[np.int64]
) -> tuple[int, float, float, int]:
    """Counts at most `_CHUNK` float32 values, until some are too large or NaN.

    Args:
        bits: uint32 ``(N,)``.
        lanes: zeros, records of four uint16 ``(65536,)``, and the same as uint64.
        counts: what is added to, int64 ``(65536,)``.

    Returns how many were counted, their minimum and maximum, and how many are zero.
    """
    small, top, high = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(-0x80000000)
    signed, pairs = bits.view(np.int32), bits[: bits.size // 2 * 2].view(np.uint64)
    done = 0
    while done < bits.size:
        stop = min(done + _CACHED, bits.size)
        block, two = bits[done:stop], pairs[done // 2 : stop // 2]
        _add(block, two, lanes[0], np.uint16(1))
        # From the cache by now: counting first hides how long memory takes.
        a, b, c = _ends(block, signed[done:stop])
        if b >= np.uint32(0xFF7F8000) or c >= np.int32(0x7F7F8000):
            _add(block, two, lanes[0], np.uint16(0xFFFF))
            break
        small, top, high = min(small, a), max(top, b), max(high, c)
        done = stop
    counted, words = done, lanes[1]
    n_zero = _four(words[0]) + _four(words[_MINUS_ZERO_CODE])
    if n_zero and small < np.uint32(0x8000):  # then it is also of what rounds to zero
        n_zero = _zeros(bits[:counted])
    for sign, largest in ((0, np.uint32(max(high, np.int32(0)))), (_MINUS_ZERO_CODE, top)):
        _fold(words, counts, (sign, sign + 1))
        _fold(words, counts, (sign + max(_code(small), 1), _code(largest) + 1))
    zero = np.uint32(0) if n_zero else small
    # The largest bits are those of the most negative value, if there is one.
    least = top if top >= np.uint32(0x80000000) else zero
    most = np.uint32(high) if high >= 0 else np.uint32(np.uint32(0x80000000) | zero)
    return counted, _value(least), _value(most), n_zero


@kernel()
def _add(
    bits: NDArray[np.uint32],
    pairs: NDArray[np.uint64],
    lanes: Any,
    times: np.uint16,
) -> None:
    """Adds ``times``, 1 or -1, for each value.

    Of four neighbours each goes to a lane of its own, as repeated codes would wait for each other.
    """
    half, mask = np.uint64(0x800000008000), np.uint64(0xFFFF)
    word, long = np.uint64(16), np.uint64(48)
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    ahead, fours = pairs.ctypes.data + _AHEAD, pairs.size // 4
    for i in range(fours):
        prefetch(ahead + 32 * i)
        n = np.uint64(i) << two  # unsigned: no index is negative
        p, q = pairs[n] + half, pairs[n | one] + half
        r, s = pairs[n | two] + half, pairs[n | three] + half
        lanes[(p >> word) & mask].a += times
        lanes[p >> long].b += times
        lanes[(q >> word) & mask].c += times
        lanes[q >> long].d += times
        lanes[(r >> word) & mask].a += times
        lanes[r >> long].b += times
        lanes[(s >> word) & mask].c += times
        lanes[s >> long].d += times
    for rest in bits[8 * fours :]:
        lanes[_code(rest)].a += times


@kernel()
def _fold(lanes: NDArray[np.uint64], counts: NDArray[np.int64], span: tuple[int, int]) -> None:
    """Moves what was counted of the codes of ``span`` from ``lanes`` to ``counts``."""
    for start in range(span[0], span[1], _TOGETHER):
        stop = min(start + _TOGETHER, span[1])
        if not _any(lanes[start:stop]):
            continue
        for code in range(start, stop):
            counts[code] += _four(lanes[code])
            lanes[code] = np.uint64(0)


@kernel()
def _four(word: np.uint64) -> int:
    """The sum of the numbers of 16 bits in a word."""
    mask, width = np.uint64(0x0000FFFF0000FFFF), np.uint64(16)
    pairs = (word & mask) + ((word >> width) & mask)
    return int(np.uint64(pairs + (pairs << np.uint64(32))) >> np.uint64(32))


@kernel()
def _any(words: NDArray[np.uint64]) -> bool:
    seen = np.uint64(0)
    for i in range(words.size):  # in this form, it is vectorized
        seen = np.uint64(seen | words[i])
    return bool(seen)


@kernel()
def _code(bits: np.uint32) -> int:
    return int(np.uint32(bits + np.uint32(0x8000)) >> np.uint32(16))


@kernel()
def _value(bits: np.uint32) -> float:
    return float(np.uint32(bits).view(np.float32))


@kernel()
def _ends(
    bits: NDArray[np.uint32], signed: NDArray[np.int32]
) -> tuple[np.uint32, np.uint32, np.int32]:
    """The smallest magnitude that is not zero (0x80000000: there is none), the largest bits, and
    the largest as signed."""
    low, top, high = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(-0x80000000)
    for i in range(bits.size):
        b, s = bits[i], signed[i]
        twice = np.uint32(np.uint32(b << np.uint32(1)) - np.uint32(1))  # of zero the largest
        low = twice if twice < low else low
        top = b if b > top else top
        high = s if s > high else high
    return np.uint32((low >> np.uint32(1)) + np.uint32(1)), top, high


@kernel()
def _zeros(bits: NDArray[np.uint32]) -> int:
    """How many values are zero, of either sign."""
    zeros = np.uint32(0)
    for i in range(bits.size):  # in this form, it is vectorized
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        zeros = np.uint32(zeros + (np.uint32(magnitude - np.uint32(1)) >> np.uint32(31)))
    return int(zeros)


@kernel()
def _tally(codes: NDArray[np.uint16], tally: NDArray[np.int64]) -> None:
    for code in codes:
        tally[code] += 1
