"""Kernels that count float32 values in bfloat16 bins, see `calib.counter`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.compiled import PACKED, kernel, pack, packs, prefetch, words_at

N_CODES = 1 << 16
MINUS_ZERO_CODE = 0x8000
CACHED = 1 << 12
_CHUNK = 63 * CACHED  # a lane counts a quarter of them, and 7 of a packed block: up to 65,535
_AHEAD = 1 << 11  # bytes; found best
_MANY_ZEROS = CACHED // 6  # of a block: the next one is then counted without them
_TOGETHER = 1 << 8
_LARGEST_BFLOAT16 = float(np.uint32(0x7F7F0000).view(np.float32))

# How many of the values were counted, the least and the largest of these, and how many are zero.
Counted = tuple[int, float, float, int]


def count_each(
    arrays: Sequence[NDArray[np.float32]], counts: Sequence[NDArray[np.int64]]
) -> list[Counted]:
    """Counts all values of each of ``arrays``, until some are too large or NaN.

    One call for many: between two there would be a time without the interpreter's lock, and then
    one of waiting for it.

    Args:
        arrays: contiguous, ``(N,)`` each.
        counts: what is added to, int64 ``(65536,)`` each.
    """
    places = [
        (_address(array), array.size, _address(own))
        for array, own in zip(arrays, counts, strict=True)
    ]
    found = np.empty((len(arrays), 4))
    _count_each(np.array(places, np.int64), _LOCAL.lanes, found)
    return [(int(n), least, most, int(n_zero)) for n, least, most, n_zero in found.tolist()]


def bins_of(
    counts: Sequence[NDArray[np.int64]], extremes: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The codes of which ``counts`` hold something, the positive and then the negative ones of
    each, how often each occurs, both ``(N,)``, and where these sides begin and end, ``(2K + 1,)``.

    Args:
        counts: K of them, int64 ``(65536,)`` each.
        extremes: the least and the largest value counted in each, ``(K, 2)``.
    """
    return _bins_of(np.array([_address(own) for own in counts], np.int64), extremes)


@kernel()
def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)  # compiled, it takes a tenth of the time


_Lanes = tuple[Any, NDArray[np.uint64], NDArray[np.uint32]]


class _Local(threading.local):
    """What each thread works in. It counts in ``lanes`` before it adds that to a tensor's counts;
    zero in between. What occurs of them is small, so that it stays in the fastest cache."""

    @cached_property  # not before it is needed, which would import numba
    def lanes(self) -> _Lanes:
        """Records of four uint16 ``(65536,)``, the same as uint64, and room for what is not zero of
        a block; none where zeros cannot be dropped fast."""
        lanes = np.zeros(N_CODES, [(lane, np.uint16) for lane in "abcd"])
        room = np.empty(CACHED if packs() else 0, np.uint32)
        return lanes, lanes.view(np.uint64), room


_LOCAL = _Local()


@kernel()
def _count_each(places: NDArray[np.int64], lanes: _Lanes, found: NDArray[np.float64]) -> None:
    """As `count_each`: from addresses of values, how many these are, and addresses of counts,
    ``(K, 3)``, to what is found, ``(K, 4)``."""
    for number in range(places.shape[0]):
        bits = words_at(places[number, 0], places[number, 1])
        counts = words_at(places[number, 2], 2 * N_CODES).view(np.int64)
        done, least, most, n_zero = 0, np.inf, -np.inf, 0
        while done < bits.size:
            part = bits[done : min(done + _CHUNK, bits.size)]
            n, low, high, zeros = _count(part, lanes, counts)
            if n > 0:
                least, most, n_zero = min(least, low), max(most, high), n_zero + zeros
            done += n
            if n < part.size:
                break
        found[number, 0], found[number, 1] = done, least
        found[number, 2], found[number, 3] = most, n_zero


@kernel()
def _count(
    bits: NDArray[np.uint32], lanes: _Lanes, counts: NDArray[np.int64]
) -> tuple[int, float, float, int]:
    """Counts at most `_CHUNK` float32 values, until some are too large or NaN.

    Args:
        bits: uint32 ``(N,)``.
        lanes: see `_Local`.
        counts: what is added to, int64 ``(65536,)``.

    Returns how many were counted, their minimum and maximum, and how many are zero.
    """
    small, top, high = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(-0x80000000)
    words, room = lanes[1], lanes[2]
    done, dropped, zeros, packing = 0, 0, 0, False
    while done < bits.size:
        stop = min(done + CACHED, bits.size)
        block = bits[done:stop]
        ahead, pace = block.ctypes.data + _AHEAD, 32
        if packing and block.size == CACHED:
            ahead, pace = block.ctypes.data + 4 * CACHED, 64
            block = room[: _pack_all(block, room)]
        _add(block, lanes[0], np.uint16(1), (ahead, pace))
        # From the cache by now: counting first hides how long memory takes.
        a, b, c = _ends(block, block.view(np.int32))
        if b >= np.uint32(0xFF7F8000) or c >= np.int32(0x7F7F8000):
            _add(block, lanes[0], np.uint16(0xFFFF), (ahead, pace))
            break
        small, top, high = min(small, a), max(top, b), max(high, c)
        dropped += stop - done - block.size
        before, zeros = zeros, dropped + _four(words[0])
        packing = room.size > 0 and zeros - before > _MANY_ZEROS
        done = stop
    counts[0] += dropped  # high is not below 0: packing begins behind values of code 0
    n_zero = dropped + _four(words[0]) + _four(words[MINUS_ZERO_CODE])
    if n_zero and small < np.uint32(0x8000):  # then it is also of what rounds to zero
        n_zero = _zeros(bits[:done])
    for sign, largest in ((0, np.uint32(max(high, np.int32(0)))), (MINUS_ZERO_CODE, top)):
        _fold(words, counts, (sign, sign + 1))
        _fold(words, counts, (sign + max(_code(small), 1), _code(largest) + 1))
    zero = np.uint32(0) if n_zero else small
    # The largest bits are those of the most negative value, if there is one.
    least = top if top >= np.uint32(0x80000000) else zero
    most = np.uint32(high) if high >= 0 else np.uint32(np.uint32(0x80000000) | zero)
    return done, _value(least), _value(most), n_zero


@kernel()
def _pack_all(bits: NDArray[np.uint32], room: NDArray[np.uint32]) -> int:
    """Writes what is not 0 of `CACHED` ``bits`` to ``room``, and says how many these are."""
    source, start = bits.ctypes.data, room.ctypes.data
    target = start
    for at in range(source, source + 4 * CACHED, 4 * PACKED):
        target += 4 * pack(at, target)
    return (target - start) // 4


@kernel()
def _add(bits: NDArray[np.uint32], lanes: Any, times: np.uint16, reading: tuple[int, int]) -> None:
    """Adds ``times``, 1 or -1, for each value.

    Meanwhile the cache is ``reading``: from an address on, so many bytes with every eight values.
    Of four neighbours each goes to a lane of its own, as repeated codes would wait for each other.
    """
    half, mask = np.uint64(0x800000008000), np.uint64(0xFFFF)
    word, long = np.uint64(16), np.uint64(48)
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    pairs, (ahead, pace) = bits[: bits.size // 2 * 2].view(np.uint64), reading
    fours = pairs.size // 4
    for i in range(fours):
        prefetch(ahead + pace * i)
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
        words, own = lanes[start:stop], counts[start:stop]
        if _any(words):
            for i in range(words.size):  # in this form, it is vectorized
                own[i] += _four(words[i])
                words[i] = np.uint64(0)


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
def _bins_of(
    places: NDArray[np.int64], extremes: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    starts = np.zeros(2 * places.size + 1, np.int64)
    for side in range(starts.size - 1):
        n = 0
        own = _of_side(places, extremes, side)
        for code in range(own.size):  # in this form, it is vectorized
            n += own[code] != 0
        starts[side + 1] = starts[side] + n
    codes, times = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    for side in range(starts.size - 1):
        own, at = _of_side(places, extremes, side), starts[side]
        for start in range(0, own.size, _TOGETHER):
            stop = min(start + _TOGETHER, own.size)
            if _any(own[start:stop].view(np.uint64)):
                for code in range(start, stop):
                    if own[code]:
                        codes[at], times[at] = code + side % 2 * MINUS_ZERO_CODE, own[code]
                        at += 1
    return codes, times, starts


@kernel()
def _of_side(
    places: NDArray[np.int64], extremes: NDArray[np.float64], side: int
) -> NDArray[np.int64]:
    """The counts of codes of one sign up to the extreme one: behind it, nothing is."""
    counts = words_at(places[side // 2], 2 * N_CODES).view(np.int64)
    extreme = extremes[side // 2, 0] * -1.0 if side % 2 else extremes[side // 2, 1]
    most = np.float32(min(extreme, _LARGEST_BFLOAT16) if extreme > 0 else 0.0)  # and of -0 not -0
    first = side % 2 * MINUS_ZERO_CODE
    return counts[first : first + _code(most.view(np.uint32)) + 1]


@kernel()
def tally(codes: NDArray[np.uint16], tally: NDArray[np.int64]) -> None:
    """Adds how often each of ``codes`` ``(N,)`` is there to int64 ``(65536,)``."""
    for code in codes:
        tally[code] += 1
