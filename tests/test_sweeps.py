"""Thresholds of a sweep that are found without measuring all: against measuring all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib import cells, compiled, rounding, sweeping
from calib.counter import Counter
from calib.distribution import Floats, Histogram, Samples, sweep
from calib.qtypes import QuantType
from calib.ranked import Ranked

Values = NDArray[np.float32]

by_property = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
needs_numba = pytest.mark.skipif(not compiled.enabled(), reason="numba is not installed")
plainly = pytest.mark.parametrize("plain", [False, True])
NARROW = [QuantType(bits, signed=True, narrow=True) for bits in range(2, 9)]
LENGTHS = (1, 2, 9, 34, 68, 136, 544, 1024, 3000)
few_values = st.sampled_from([0.0, 0.5, -1.0, 7.0, 3e-39, -2e38]) | st.floats(-9, 9, width=32)
any_values = hnp.arrays(np.float32, st.integers(1, 200), elements=few_values)


def kinds(n: int) -> Values:
    """Groups of ``n`` values: Gaussian, heavy-tailed, sparse, on a lattice, one value, one that
    sticks out, all zero, tiny, huge."""
    rng = np.random.default_rng(n)
    gaussian = rng.standard_normal((4, n))
    outlier = gaussian[:1] * (np.arange(n) > 0) + 40 * (np.arange(n) == 0)
    rows = [gaussian, gaussian**3, gaussian * (rng.random((4, n)) < 0.3)]
    rows += [np.round(gaussian * 2), np.full((1, n), 0.3), outlier, np.zeros((1, n))]
    rows += [gaussian * 1e-38, gaussian / np.abs(gaussian).max() * 3.4e38]
    return np.concatenate(rows).astype(np.float32)


def counted(*arrays: NDArray[np.floating]) -> list[Counter]:
    made = []
    for array in arrays:
        made.append(Counter())
        made[-1].update(array)
    return made


def activations() -> list[Counter]:
    """Signed, rectified, negative throughout, heavy-tailed, constant, all zero, tiny, huge."""
    x = np.random.default_rng(6).standard_normal(5000).astype(np.float32)
    rest = [np.full(9, 0.7, np.float32), np.zeros(4, np.float32), x * np.float32(1e-39)]
    return counted(x, np.maximum(x, 0), -np.abs(x), x**5, *rest, x * np.float32(8e37))


@plainly
@pytest.mark.parametrize("n", LENGTHS)
def test_no_threshold_has_less_error_than_the_one_that_is_found(
    n: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(compiled, "enabled", lambda: False)
    dist = Samples(kinds(n))
    dist.expect((100, qtype) for qtype in NARROW)
    for qtype in NARROW:
        best = dist.mse(sweep(dist, 100, qtype), qtype)
        np.testing.assert_allclose(dist.mse(dist.least_mse(100, qtype), qtype), best, rtol=2e-5)


def few_groups(seed: int) -> Iterator[Values]:
    """As `kinds`, two to six groups at a time: as many thresholds as groups are soon measured."""
    rng = np.random.default_rng(seed)
    for n in (1, 2, 9, 40, 136):
        groups = kinds(n)
        for size in range(2, 7):
            yield groups[rng.integers(0, len(groups), size)]
            yield rng.standard_normal((size, n)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_groups_do_not_touch_each_other_in_a_sweep(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "enabled", lambda: False)
    for values in few_groups(seed):
        together = Samples(values)
        together.expect((100, qtype) for qtype in NARROW)
        for qtype in NARROW:
            alone = [Samples(row[None]).least_mse(100, qtype)[0] for row in values]
            np.testing.assert_array_equal(together.least_mse(100, qtype), alone)


@pytest.mark.parametrize("n", LENGTHS)
def test_errors_that_a_sweep_measured_are_those_measured_afresh_to_the_bit(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "enabled", lambda: False)
    swept = Samples.stacked([kinds(n), kinds(7), kinds(n)])
    for qtype in NARROW:
        thresholds = np.stack([swept.max_abs(), swept.least_mse(100, qtype), swept.max_abs() / 3])
        afresh = Samples.stacked([kinds(n), kinds(7), kinds(n)]).mse(thresholds, qtype)
        np.testing.assert_array_equal(swept.mse(thresholds, qtype), afresh)


@pytest.mark.parametrize("points", [7, 100, 900])
@pytest.mark.parametrize("n", LENGTHS)
def test_bounds_of_a_sweep_are_not_above_the_errors(n: int, points: int) -> None:
    rows = np.sort(np.abs(kinds(n)), axis=1)
    rows = rows[rows[:, -1] > 1e-30]
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    edges = sweeping._edges(n, points)
    part = sweeping._part(rows[:, ::-1], rows[:, -sweeping.TOP :], squares, edges)
    for steps in (1, 3, 15, 127):
        bounds = part.shares @ sweeping._errors_at_edges(steps, points, edges + 2)
        for k in {1, points // 2, points - 1, points} - {0}:
            every = np.arange(len(rows))
            error = sweeping._errors(part, every, np.full(len(rows), k), (steps, points))
            assert (bounds[:, k - 1] <= sweeping._limit(part, error)).all()
            lowest = sweeping._lowest(part, error)
            assert (lowest * points * (1 - 1e-6) <= k).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_widths_that_are_found_together_are_those_of_each_alone(
    n: int, dtype: type[np.floating]
) -> None:
    with np.errstate(over="ignore"):
        values = np.nan_to_num(kinds(n).astype(dtype))
    together = Samples(values)
    wide = QuantType(16, signed=True, narrow=True)
    together.expect([*((100, qtype) for qtype in NARROW), (7, NARROW[0]), (100, wide)])
    for points, qtype in [*((100, qtype) for qtype in NARROW), (7, NARROW[0]), (3, NARROW[1])]:
        alone = Samples(values).least_mse(points, qtype)
        np.testing.assert_array_equal(together.least_mse(points, qtype), alone)


def test_a_threshold_that_is_found_can_be_changed_without_harm() -> None:
    dist = Samples(kinds(9))
    first = dist.least_mse(100, NARROW[0])
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(dist.least_mse(100, NARROW[0]), kept)


def filled(values: Values) -> rounding.Row:
    """What the kernels know of a group: magnitudes in buckets, and sums from each edge on."""
    n, edges = values.size, min(values.size, 2048) + 1
    row = np.empty(n, np.float32), np.empty(edges, np.uint32), np.empty((3, edges))
    given_ = *row, float(np.abs(values).max())
    rounding._fill(values, np.empty(n, np.uint16), given_)
    return given_


@needs_numba
@by_property
@given(any_values)
def test_buckets_hold_all_magnitudes_in_the_order_of_their_edges(values: Values) -> None:
    row, places, (sums, excess, less), largest = filled(values)
    ascending = np.sort(np.abs(values))
    np.testing.assert_array_equal(np.sort(row), ascending)
    assert (places[0], places[-1], sums[-1]) == (0, row.size, 0)
    edges = np.arange(places.size) * (largest / (places.size - 1))
    for edge, place, total in zip(edges, places, sums, strict=True):
        if largest > 1e-30:
            assert (row[:place] <= edge * (1 + 1e-9)).all()
            assert (row[place:] >= edge * (1 - 1e-9)).all()
        assert total == pytest.approx(row[place:].astype(np.float64).sum(), rel=1e-12)
    if largest > 1e-30:
        expected = np.maximum(ascending - edges[:, None], 0).sum(axis=1)
        np.testing.assert_allclose(excess, expected, rtol=1e-9, atol=1e-9 * float(sums[0]))
    np.testing.assert_allclose(excess[:-1] + less[:-1], excess[1:], atol=1e-12 * float(sums[0]))


@needs_numba
@pytest.mark.parametrize("n", [*LENGTHS, 20_000])
def test_fixed_points_from_buckets_are_those_of_numpy(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, plain = Samples(kinds(n)), Samples(kinds(n))
    found = [fast.fixed_point(noise) for noise in (1.0, 0.1, 1e-3, 1e-6)]
    monkeypatch.setattr(compiled, "enabled", lambda: False)
    for noise, one in zip((1.0, 0.1, 1e-3, 1e-6), found, strict=True):
        np.testing.assert_allclose(one, plain.fixed_point(noise), rtol=1e-11)


@needs_numba
@by_property
@given(any_values, st.sampled_from(NARROW), st.integers(1, 100))
def test_the_error_from_buckets_is_that_of_the_values(
    values: Values, qtype: QuantType, k: int
) -> None:
    row = np.sort(np.abs(values))
    if row[-1] < 1e-30:
        return
    square = float(np.square(row, dtype=np.float64).sum())
    exact = float(k) / 100 * float(row[-1])
    found = rounding._measured(filled(values), square, exact, qtype.steps)
    step = np.float64(np.float32(np.clip(exact / qtype.steps, 2.0**-126, 3.4e38 / qtype.steps)))
    levels = np.clip(np.rint(row / step), 0, qtype.steps)
    expected = float(np.square(row - levels * step).sum())
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-11 * square)


@needs_numba
@pytest.mark.parametrize("n", LENGTHS)
def test_bounds_rule_out_none_that_is_best(n: int) -> None:
    for values in kinds(n):
        group, square = filled(values), float(np.square(values, dtype=np.float64).sum())
        fractions = np.maximum(np.arange(-15, 101), 1) / 100
        lanes = np.empty(96, np.float32), np.empty(16), fractions
        for steps in (1, 3, 7, 127):
            if group[3] > 1e-30:
                best = rounding._least_of_all(group, (steps, 100), lanes)
                found = rounding._least_bounded(group, square, 50, (steps, 100), lanes)
                errors = [
                    rounding._measured(group, square, k / 100 * group[3], steps)
                    for k in (best, found)
                ]
                assert errors[1] == pytest.approx(errors[0], rel=2e-5, abs=1e-10 * square)


@plainly
@pytest.mark.parametrize("points", [1, 2, 37, 100])
@pytest.mark.parametrize("bits", range(2, 9))
def test_on_counts_the_threshold_is_that_of_measuring_all(
    bits: int, points: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(compiled, "enabled", lambda: False)
    for qtype in (QuantType(bits, True), QuantType(bits, True, True), QuantType(bits, False)):
        dist = Histogram(*activations())
        found = dist.least_mse(points, qtype)
        np.testing.assert_array_equal(found, sweep(dist, points, qtype))


@plainly
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thresholds_that_the_largest_scale_does_not_reach_are_measured_as_they_are(
    bits: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(compiled, "enabled", lambda: False)
    qtype, points = QuantType(bits, signed=True), 7
    for seed in range(60):
        x = np.random.default_rng(seed).standard_normal(64) * 1e38
        x = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
        counts = Histogram(Counter.of(x))
        found = counts.least_mse(points, qtype)
        np.testing.assert_array_equal(found, sweep(counts, points, qtype))
        raw = Samples(np.abs(x)[None])
        found = raw.least_mse(points, qtype)
        np.testing.assert_array_equal(found, sweep(Samples(np.abs(x)[None]), points, qtype))
        asked = np.stack([found, raw.max_abs()])
        afresh = Samples(np.abs(x)[None]).mse(asked, qtype)
        np.testing.assert_array_equal(raw.mse(asked, qtype), afresh)


@by_property
@given(st.lists(any_values, min_size=1, max_size=4))
def test_bins_of_both_sides_are_ranked_together(arrays: list[Values]) -> None:
    dist = Histogram(*counted(*arrays))
    order, start = dist._ranked, 0
    for group, counter in enumerate(counted(*arrays)):
        codes, counts = counter.bins()
        bits = (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
        centre = np.abs(np.clip(bits, np.float32(counter.min), np.float32(counter.max)))
        by_size = np.argsort(centre, kind="stable")
        own = slice(start, start + codes.size)
        np.testing.assert_array_equal(order.magnitude[own], centre[by_size])
        for power, sums in enumerate((order.count, order.sum, order.square_sum)):
            assert sums is not None
            total = (centre.astype(np.float64) ** power * counts).sum()
            assert sums[start + group] == pytest.approx(total, rel=1e-12)
            assert sums[start + group + codes.size] == 0
        start += codes.size


@needs_numba
@by_property
@given(st.lists(any_values, min_size=1, max_size=4))
def test_bins_are_prepared_by_the_kernel_as_by_numpy(arrays: list[Values]) -> None:
    dist = Histogram(*counted(*arrays))
    parts: tuple[Floats, NDArray[np.int64]]
    parts = np.stack([*dist._edges, dist._counts]), dist._starts
    with np.errstate(over="ignore"):
        fast, plain = cells._prepared(*parts), cells._plainly_prepared(*parts)
    np.testing.assert_allclose(fast[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(fast[1], plain[1], rtol=1e-12)
    for one, other in zip(fast[2], plain[2], strict=True):
        np.testing.assert_array_equal(one, other)


@needs_numba
def test_groups_ranked_by_the_kernel_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude = np.array([1, 2, 2, 3, 0, 2, 3, 4, 5], np.float32)
    counts = np.arange(1, 10)
    starts = np.array([0, 4, 8, 8, 9])
    fast = Ranked.of_sides(magnitude, counts, starts)
    monkeypatch.setattr(compiled, "enabled", lambda: False)
    plain = Ranked.of_sides(magnitude, counts, starts)
    np.testing.assert_array_equal(fast.magnitude, plain.magnitude)
    np.testing.assert_array_equal(fast.magnitude[:8], [0, 1, 2, 2, 2, 3, 3, 4])
    t = np.array([[0.0, 0.0], [2.0, 2.0], [2.5, 5.0]])
    for one, other in zip(fast.tail(t), plain.tail(t), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("plain", [False, True])
def test_a_fixed_point_may_have_more_noise_than_clipping(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no value is inside, noise has no say: the mean of what is clipped."""
    if plain:
        monkeypatch.setattr(compiled, "enabled", lambda: False)
    assert Samples(np.array([[2.0]], np.float32)).fixed_point(7.0)[0] == 2


@pytest.mark.parametrize("zero_point", [0, 10, 200, 255])
def test_a_sweep_knows_the_levels_above_a_zero_point(zero_point: int) -> None:
    values = np.abs(np.random.default_rng(0).standard_normal((2, 500))).astype(np.float32)
    qtype = QuantType(8, signed=False, zero_point=zero_point)
    found = Samples(values).least_mse(100, qtype)
    np.testing.assert_array_equal(found, sweep(Samples(values), 100, qtype))
