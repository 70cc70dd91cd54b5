"""Counting: the same integers as a loop over single values, whatever the batches."""

from __future__ import annotations

import math
import struct
from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib import bincounts, compiled, counting
from calib.counter import Counter, all_bins, update_all
from calib.counting import CACHED, N_CODES

Floats = NDArray[np.float32]

needs_numba = pytest.mark.skipif(not compiled.enabled(), reason="numba is not installed")
by_property = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LARGEST = float(np.finfo(np.float32).max)
LARGEST_BFLOAT16 = float(np.uint32(0x7F7F0000).view(np.float32))
# Zeros, subnormals, ones, bin edges, the ends of bfloat16 and float32, infinities, NaNs.
HARD_BITS = [
    *(0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x0000FFFF, 0x007FFFFF, 0x00800000),
    *(0x3F7F7FFF, 0x3F7F8000, 0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F818000),
    *(0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000),
    *(0x7FFF8000, 0x7FFFFFFF),
]
HARD_BITS += [bits | 0x80000000 for bits in HARD_BITS]

some_bits = st.one_of(st.sampled_from(HARD_BITS), st.integers(0, 0xFFFFFFFF))
arrays_of_any_bits = st.lists(some_bits, max_size=60).map(lambda bits: from_bits(*bits))


@pytest.fixture(
    autouse=True,
    scope="module",
    params=[*(pytest.param(way, marks=needs_numba) for way in ("numba", "packing")), "numpy"],
)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for all ways to count; one drops zeros first, fast or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.counter.enabled", lambda: request.param != "numpy")
        patch.setattr("calib.counting.packs", lambda: request.param == "packing")
        patch.setattr("calib.counting._LOCAL", counting._Local())
        yield


def from_bits(*bits: int) -> Floats:
    return np.array(bits, np.uint32).view(np.float32)


def counted(*arrays: NDArray[np.floating]) -> Counter:
    counter = Counter()
    for array in arrays:
        counter.update(array)
    return counter


def everything(counter: Counter) -> tuple[object, ...]:
    """All that a counter knows, comparable."""
    codes = np.flatnonzero(counter.counts)
    counts = dict(zip(codes.tolist(), counter.counts[codes].tolist(), strict=True))
    special = (counter.n_zero, counter.n_nan, counter.n_inf)
    return counts, counter.min, counter.max, special


def one_by_one(values: Floats) -> tuple[object, ...]:
    """The definition, in Python integers: no array, no wrap-around."""
    counts: Tally[int] = Tally()
    finite: list[float] = []
    n_zero = n_nan = n_inf = 0
    for value in values:
        (bits,) = struct.unpack("<I", value.tobytes())
        sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
        if magnitude > 0x7F800000:
            n_nan += 1
        elif magnitude == 0x7F800000:
            n_inf += 1
        else:
            n_zero += magnitude == 0
            finite.append(struct.unpack("<f", struct.pack("<I", bits))[0])
            rounded = min((magnitude + 0x8000) // 0x10000, 0x7F7F)
            counts[sign // 0x10000 + rounded] += 1
    low, high = min(finite, default=math.inf), max(finite, default=-math.inf)
    return dict(sorted(counts.items())), low, high, (n_zero, n_nan, n_inf)


@by_property
@given(arrays_of_any_bits)
def test_counts_equal_those_of_a_loop_over_single_values(values: Floats) -> None:
    counter = counted(values)
    assert everything(counter) == one_by_one(values)
    assert counter.counts.dtype == np.int64
    assert counter.counts.shape == (N_CODES,)
    assert counter.n_finite + counter.n_nan + counter.n_inf == values.size


@pytest.mark.parametrize("bits", HARD_BITS, ids=hex)
def test_every_hard_value_alone_and_beside_a_one_is_counted_right(bits: int) -> None:
    for values in (from_bits(bits), from_bits(bits, bits, 0x3F800000)):
        assert everything(counted(values)) == one_by_one(values)


@by_property
@given(arrays_of_any_bits, st.data())
def test_any_order_and_any_batches_give_identical_counts(
    values: Floats, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(values.size)))
    cuts = data.draw(st.lists(st.integers(0, values.size), max_size=6).map(sorted))
    edges = [0, *cuts, values.size]
    batches = [values[list(order[start:stop])] for start, stop in pairwise(edges)]
    assert everything(counted(*batches)) == everything(counted(values))


@by_property
@given(st.lists(arrays_of_any_bits, min_size=3, max_size=3))
def test_merging_is_addition_in_any_order_and_grouping(parts: list[Floats]) -> None:
    def merged(*groups: tuple[Floats, ...]) -> Counter:
        total = Counter()
        for group in groups:
            part = Counter()
            for values in group:
                part.merge(counted(values))
            total.merge(part)
        return total

    a, b, c = parts
    expected = everything(counted(np.concatenate(parts)))
    assert everything(merged((a,), (b,), (c,))) == expected
    assert everything(merged((c,), (a,), (b,))) == expected
    assert everything(merged((a,), (b, c))) == expected
    assert everything(merged((a, b), (c,))) == expected


def test_merging_leaves_the_other_counter_as_it_was() -> None:
    mine, other = counted(from_bits(0x3F800000)), counted(from_bits(0xFF800000, 0x80000000))
    before = everything(other)
    mine.merge(other)
    mine.update(np.ones(3, np.float32))
    assert everything(other) == before


def test_nothing_counted_is_nothing_known() -> None:
    nothing: tuple[object, ...] = ({}, math.inf, -math.inf, (0, 0, 0))
    assert everything(Counter()) == nothing
    assert everything(counted(np.empty(0, np.float32), np.empty((3, 0), np.float64))) == nothing
    assert everything(counted(np.full(5, np.nan, np.float32)))[:3] == nothing[:3]


@pytest.mark.parametrize("bits", [0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF8000, 0x7F800001, 0xFF800001])
def test_a_nan_of_any_bits_is_a_nan_and_no_value(bits: int) -> None:
    counter = counted(from_bits(bits, 0x40000000, bits))
    assert (counter.n_nan, counter.n_inf, counter.n_finite) == (2, 0, 1)
    assert (counter.min, counter.max) == (2.0, 2.0)
    assert counter.counts[0] == 0


def test_infinities_are_counted_and_are_no_extremes() -> None:
    counter = counted(np.array([np.inf, -np.inf, -np.inf, 3.0, -7.0], np.float32))
    assert (counter.n_inf, counter.n_nan, counter.n_finite) == (3, 0, 2)
    assert (counter.min, counter.max) == (-7.0, 3.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [3.3961e38, 3.4e38, LARGEST])
def test_values_above_the_largest_bfloat16_count_there_and_keep_their_extreme(
    sign: int, magnitude: float
) -> None:
    counter = counted(np.array([sign * magnitude], np.float32))
    code = 0x7F7F if sign > 0 else 0xFF7F
    assert np.flatnonzero(counter.counts).tolist() == [code]
    assert counter.n_inf == 0
    assert counter.max == counter.min == float(np.float32(sign * magnitude))
    assert abs(counter.max) > LARGEST_BFLOAT16


def test_zeros_of_either_sign_are_counted_and_subnormals_are_not_zero() -> None:
    counter = counted(np.array([0.0, -0.0, 0.0, 1e-45, -1e-45, 1e-41], np.float32))
    assert counter.n_zero == 3
    assert counter.counts[0x0000] + counter.counts[0x8000] == 6
    assert (counter.min, counter.max) == (float(np.float32(-1e-45)), float(np.float32(1e-41)))


@by_property
@given(hnp.arrays(np.float32, 40, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_a_value_is_counted_at_its_nearest_bfloat16(values: Floats) -> None:
    """ml_dtypes rounds the same way, except for ties, which it rounds to even."""
    not_tied = values[values.view(np.uint32) & 0xFFFF != 0x8000]
    nearest = not_tied.astype(ml_dtypes.bfloat16).view(np.uint16)
    expected = np.bincount(nearest, minlength=N_CODES)
    assert np.array_equal(counted(not_tied).counts, expected)


def test_half_precision_is_counted_at_its_exact_values() -> None:
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    both = np.concatenate([values, -values])
    assert everything(counted(both)) == everything(counted(both.astype(np.float32)))
    assert counted(both).n_zero == 2


def test_double_precision_is_rounded_to_single_first() -> None:
    values = np.random.default_rng(0).standard_normal(500) * np.logspace(-30, 30, 500)
    counter = counted(values)
    assert everything(counter) == one_by_one(values.astype(np.float32))
    assert counter.max == float(np.float32(values.max()))


def test_layout_does_not_matter_and_nothing_is_written() -> None:
    values = np.random.default_rng(1).standard_normal((40, 30, 5)).astype(np.float32)
    values[3, :, 2] = [np.nan, np.inf, 3.4e38] * 10
    expected = everything(counted(values.ravel()))
    before = values.tobytes()
    values.setflags(write=False)
    assert everything(counted(values)) == expected
    assert everything(counted(values.transpose(2, 0, 1))) == expected
    assert everything(counted(values[::-1], np.empty((0, 3), np.float32))) == expected
    assert everything(counted(values[::2], values[1::2])) == expected
    assert values.tobytes() == before


@by_property
@given(st.lists(arrays_of_any_bits, max_size=6))
def test_arrays_that_are_counted_together_are_counted_as_one_by_one(arrays: list[Floats]) -> None:
    together = [Counter() for _ in arrays]
    for _ in range(2):
        update_all(together, arrays)
    alone = [counted(array, array) for array in arrays]
    assert [*map(everything, together)] == [*map(everything, alone)]


def test_arrays_of_every_kind_and_length_are_counted_together() -> None:
    rng = np.random.default_rng(4)
    long = rng.standard_normal((3, 5, 40, 500)).astype(np.float32)
    spoiled = long.copy()
    spoiled[1, 2, ::7, 3] = np.nan
    spoiled[:, 4, 5, 6] = [np.inf, -np.inf, 3.4e38]
    padded = np.frombuffer(b"\0" * 2 + long.tobytes(), np.uint8)[2:]  # at no multiple of 4 bytes
    arrays: list[NDArray[np.floating]] = [
        np.empty((2, 0), np.float32),
        long.transpose(0, 2, 3, 1),
        spoiled,
        long.astype(np.float16),
        long[0].astype(np.float64),
        long.astype(">f4"),
        padded.view(np.float32),
        np.float32(-1.5) * np.ones((), np.float32),
        long[:, ::2],
        np.broadcast_to(long[0, 0, 0], (70, 500)),
    ]
    together = [Counter() for _ in arrays]
    update_all(together, arrays)
    for number, (counter, array) in enumerate(zip(together, arrays, strict=True)):
        expected = Counter()
        for value in np.array_split(array.astype(np.float32).ravel(), 9):
            expected.update(value)
        assert everything(counter) == everything(expected), number
    assert together[2].n_nan == spoiled[1, 2, ::7, 3].size


@pytest.mark.parametrize("n", [16383, 16384, 16385, 65535, 65536, 65537, 70001])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e37])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_values_behind_a_relu_are_counted_as_one_by_one(n: int, scale: float, zeros: float) -> None:
    rng = np.random.default_rng(n)
    values = np.abs(rng.standard_normal(n) * scale).astype(np.float32)
    values[rng.random(n) < zeros] = 0
    assert everything(counted(values)) == one_by_one(values)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_with_many_zeros_and_with_few_are_counted_as_one_by_one(
    seed: int, sign: float
) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.choice([0.0, 0.1, 0.16, 0.17, 0.5, 0.99, 1.0], 12)
    blocks = [
        np.where(rng.random(CACHED) < share, 0, rng.standard_normal(CACHED)) for share in shares
    ]
    values = np.concatenate(blocks).astype(np.float32)[: rng.integers(1, 12 * CACHED)]
    if seed % 2:
        hard = rng.integers(values.size, size=40)
        values[hard] = from_bits(*rng.choice(HARD_BITS, hard.size))
    else:
        values = np.where(values == 0, 0, sign * np.abs(values))
    found = counted(values)
    assert everything(found) == one_by_one(values)
    assert everything(counted(values, values)) == everything(counted(np.tile(values, 2)))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_zeros_of_both_signs_are_told_apart_in_every_block(share: float) -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal(9 * CACHED).astype(np.float32)
    values[rng.random(values.size) < share] = 0
    values[rng.random(values.size) < 0.05] = -0.0
    assert everything(counted(values)) == one_by_one(values)


@needs_numba
@pytest.mark.parametrize(("share", "expected"), [(0.1, False), (0.3, True)])
def test_blocks_behind_one_with_many_zeros_are_packed(
    monkeypatch: pytest.MonkeyPatch, share: float, expected: bool
) -> None:
    monkeypatch.setattr("calib.counter.enabled", lambda: True)
    monkeypatch.setattr("calib.counting.packs", lambda: True)
    monkeypatch.setattr("calib.counting._LOCAL", own := counting._Local())
    rng = np.random.default_rng(7)
    values = rng.uniform(1, 2, 3 * CACHED).astype(np.float32)
    values[rng.random(values.size) < share] = 0
    last = values[2 * CACHED :]
    own.lanes[2].fill(0)
    counted(values)
    n = np.count_nonzero(last)
    assert np.array_equal(own.lanes[2].view(np.float32)[:n], last[last != 0]) == expected


@needs_numba
def test_bins_of_many_counters_are_found_by_the_kernel_as_by_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(3)
    normal = rng.standard_normal(70_000).astype(np.float32)
    arrays = (
        normal,
        np.maximum(normal, 0),
        -np.abs(normal) - 1,
        -np.maximum(normal, 0),  # its largest value is -0
        np.array([0.0, -0.0, 1e-42, -1e-42], np.float32),
        np.array([-0.0], np.float32),
        np.array([-1.0, -0.0, -1e-42], np.float32),
        np.array([LARGEST, -LARGEST, np.nan, np.inf], np.float32),
        np.zeros(0, np.float32),
        (normal.astype(np.float64) * 1e-30).astype(np.float32),
    )
    counters = [counted(array) for array in arrays]
    codes, counts, starts = all_bins(counters)
    monkeypatch.setattr("calib.counter.enabled", lambda: False)
    for one, other in zip((codes, counts, starts), all_bins(counters), strict=True):
        np.testing.assert_array_equal(one, other)
    for number, counter in enumerate(counters):
        own = slice(starts[2 * number], starts[2 * number + 2])
        found = np.zeros_like(counter.counts)
        found[codes[own]] = counts[own]
        np.testing.assert_array_equal(found, counter.counts)
        assert (counts[own] > 0).all()
        assert (codes[starts[2 * number] : starts[2 * number + 1]] < 0x8000).all()
        assert (codes[starts[2 * number + 1] : own.stop] >= 0x8000).all()


@by_property
@given(st.lists(arrays_of_any_bits, min_size=1, max_size=4), st.sampled_from(HARD_BITS))
def test_bins_of_many_counters_are_those_of_each(arrays: list[Floats], hard: int) -> None:
    """Every hard value is also the only one of a counter, and so its least and its largest."""
    counters = [counted(array) for array in (*arrays, from_bits(hard))]
    codes, counts, starts = all_bins(counters)
    for number, counter in enumerate(counters):
        own = slice(starts[2 * number], starts[2 * number + 2])
        expected = np.flatnonzero(counter.counts)
        np.testing.assert_array_equal(codes[own], expected)
        np.testing.assert_array_equal(counts[own], counter.counts[expected])


def test_counting_that_fails_half_way_leaves_nothing_behind_for_the_next() -> None:
    values = np.maximum(np.random.default_rng(6).standard_normal(50_000), 0).astype(np.float32)
    kept = Counter()
    kept.counts.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        bincounts.add_positive(kept.counts, values.view(np.uint32), values.max().view(np.uint32))
    again = np.zeros(N_CODES, np.int64)
    bincounts.add_positive(again, values.view(np.uint32), values.max().view(np.uint32))
    np.testing.assert_array_equal(again, counted(values).counts)


def test_a_counter_for_each_array_is_asked_for() -> None:
    with pytest.raises(ValueError, match="zip"):
        update_all([Counter()], [])


def test_a_single_number_is_an_array_too() -> None:
    assert everything(counted(np.array(2.5, np.float32))) == one_by_one(np.array([2.5], np.float32))


def test_arrays_longer_than_the_inner_chunk_are_counted_whole() -> None:
    """Only some chunks hold NaN, infinity, zeros or values above bfloat16."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal(700_001).astype(np.float32)
    values[[5, 650_000]] = np.nan
    values[300_000:300_003] = 0, -0.0, np.inf
    values[[600_000, 700_000]] = LARGEST, -LARGEST
    counter = counted(values)
    assert everything(counter) == everything(counted(*np.array_split(values, 13)))
    assert (counter.n_zero, counter.n_nan, counter.n_inf) == (2, 2, 1)
    assert (counter.min, counter.max) == (-LARGEST, LARGEST)
    assert counter.n_finite == values.size - 3


@pytest.mark.parametrize("n", [*range((1 << 18) - 9, (1 << 18) + 9), 1_000_003])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -2.0, 1e-42, -1e-42])
def test_any_number_of_equal_values_is_counted(value: float, n: int) -> None:
    """Inner counts are of 16 bits: here all values go to the same."""
    counter = counted(np.full(n, value, np.float32))
    assert counter.counts.max() == counter.n_finite == n
    assert counter.n_zero == (n if value == 0 else 0)
    assert counter.min == counter.max == np.float32(value)


def test_threads_that_count_at_the_same_time_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(rng.integers(1, 400_000)).astype(np.float32) for _ in range(24)]
    for array in arrays[::3]:
        array[rng.integers(array.size, size=3)] = np.nan, np.inf, 0
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(counted, arrays))
    assert [everything(one) for one in found] == [everything(counted(array)) for array in arrays]
