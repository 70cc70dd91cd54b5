"""Samples against plain NumPy; Histogram against Samples of the same values."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Distribution, Floats, Histogram, Samples
from calib.granularity import PerChannel
from calib.qtypes import WIDTHS, QuantType
from calib.quantize import fake_quantize, scale_from_threshold

Values = NDArray[np.float32]

by_property = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=repr)
LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
# Half the spacing of bfloat16, relative to the smallest mantissa: how far a bin reaches.
BIN = 2.0**-8

few_values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.75]), st.floats(-9, 9, width=32))
shapes_of_groups = st.tuples(st.integers(1, 5), st.integers(1, 20))
small_groups = hnp.arrays(np.float32, shapes_of_groups, elements=few_values)
normal = few_values.filter(lambda value: value == 0 or abs(value) > 1e-30)
tensors = hnp.arrays(np.float32, st.integers(1, 40), elements=normal)


def histogram(values: Values) -> Histogram:
    counter = Counter()
    counter.update(values)
    return Histogram(counter)


def smooth(shape: str, n: int = 60_000) -> Values:
    """One value from each of ``n`` equally likely intervals, so that every bin has its share."""
    rng = np.random.default_rng(0)
    u = rng.permutation((np.arange(n) + rng.uniform(0.01, 0.99, n)) / n)
    if shape == "uniform":
        drawn = 4 * u - 1
    elif shape == "laplace":
        drawn = np.sign(u - 0.5) * -np.log1p(-2 * np.abs(u - 0.5))
    else:
        drawn = np.array([NormalDist().inv_cdf(p) for p in u.tolist()])
    if shape == "rectified":
        drawn = np.maximum(drawn, 0)
    return drawn.astype(np.float32)


shapes = pytest.mark.parametrize("shape", ["gaussian", "laplace", "rectified", "uniform"])


def rows() -> Values:
    """Five groups: Gaussian, heavy-tailed, sparse, constant, and all zero."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((5, 301))
    values[1] **= 3
    values[2] *= rng.random(301) < 0.1
    values[3:] = [[-0.7], [0.0]]
    return values.astype(np.float32)


def written_mse(values: Values, t: Floats, qtype: QuantType) -> Floats:
    """What the written QDQ pair does to every group, in float64."""
    scale = scale_from_threshold(t, qtype)
    back = fake_quantize(values, scale, qtype, PerChannel(0))
    return np.asarray(((back.astype(np.float64) - values) ** 2).mean(axis=1))


def in_its_unit(dist: Distribution, t: Floats) -> list[Floats]:
    """The answers that are in the unit of the values."""
    quantiles = [dist.quantile(q) for q in (0.01, 0.5, 0.99, 1.0)]
    return [dist.max_abs(), dist.mean_abs(), dist.rms(), *quantiles, dist.tail(t).sum]


# --- Samples ------------------------------------------------------------------------------------


@by_property
@given(small_groups)
def test_samples_answer_what_numpy_answers(values: Values) -> None:
    dist, magnitude = Samples(values), np.abs(values.astype(np.float64))
    assert dist.groups == values.shape[0]
    assert dist.has_negative == bool((values < 0).any())
    assert np.array_equal(dist.count(), [values.shape[1]] * values.shape[0])
    assert np.array_equal(dist.max_abs(), magnitude.max(axis=1))
    assert np.allclose(dist.mean_abs(), magnitude.mean(axis=1), rtol=1e-12, atol=0)
    assert np.allclose(dist.rms(), np.sqrt((magnitude**2).mean(axis=1)), rtol=1e-12, atol=0)
    answers = [dist.count(), dist.max_abs(), dist.mean_abs(), dist.rms(), dist.quantile(0.5)]
    assert {(a.dtype.name, a.shape) for a in answers} == {("float64", (values.shape[0],))}


@by_property
@given(small_groups, st.floats(0, 1) | st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]))
def test_a_quantile_is_the_inverted_distribution_function_of_the_magnitudes(
    values: Values, q: float
) -> None:
    n = values.shape[1]
    if abs(q * n - round(q * n)) < 1e-9:  # q·n is meant to be this integer: say so to NumPy
        q = max(0.0, np.nextafter(round(q * n) / n, 0))
    expected = np.quantile(np.abs(values), q, axis=1, method="inverted_cdf")
    assert np.array_equal(Samples(values).quantile(q), expected)


@pytest.mark.parametrize("n", [10, 100, 1000, 10_000, 99_990])
def test_a_quantile_that_falls_on_a_rank_is_not_pushed_past_it_by_rounding(n: int) -> None:
    dist = Samples(np.arange(1, n + 1, dtype=np.float32)[None])
    for per_mille in range(1, 1001, 1 if n <= 1000 else 111):
        rank = -(-n * per_mille // 1000)
        assert dist.quantile(per_mille / 1000)[0] == rank


@by_property
@given(small_groups, st.data())
def test_a_tail_is_what_lies_strictly_above_for_thresholds_of_any_leading_shape(
    values: Values, data: st.DataObject
) -> None:
    groups = values.shape[0]
    leading = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    on_a_value = st.sampled_from(np.abs(values).ravel().tolist())
    any_t = st.floats(0, 10) | on_a_value
    t = data.draw(hnp.arrays(np.float64, (*leading, groups), elements=any_t))
    tail = Samples(values).tail(t)
    magnitude = np.abs(values.astype(np.float64))
    above = magnitude > t[..., None]
    assert tail.count.shape == tail.sum.shape == t.shape
    assert np.array_equal(tail.count, above.sum(axis=-1))
    assert np.allclose(tail.sum, np.where(above, magnitude, 0).sum(axis=-1), rtol=1e-12, atol=0)
    excess = np.where(above, (magnitude - t[..., None]) ** 2, 0).sum(axis=-1)
    assert np.allclose(Samples(values).squared_excess(t), excess, rtol=1e-9, atol=1e-11)


@grids
def test_the_error_of_samples_is_that_of_the_written_pair(qtype: QuantType) -> None:
    values = rows()
    thresholds = np.array([0.03, 0.3, 0.7, 1.0, 2.9, 30.0])[:, None] * [1.0, 2.0, 0.5, 1.0, 1.0]
    measured = Samples(values).mse(thresholds, qtype)
    expected = np.stack([written_mse(values, t, qtype) for t in thresholds])
    assert measured.shape == (6, 5)
    assert np.allclose(measured, expected, rtol=1e-6, atol=0)
    one_row = Samples(values).mse(thresholds[2], qtype)
    assert one_row.shape == (5,)
    assert np.array_equal(one_row, measured[2])


@grids
def test_a_threshold_of_zero_costs_the_mean_square(qtype: QuantType) -> None:
    values = rows()
    for dist in (Samples(values), histogram(values[0])):
        zero = np.zeros((2, dist.groups))
        expected = np.broadcast_to(dist.rms() ** 2, zero.shape)
        assert np.allclose(dist.mse(zero, qtype), expected, rtol=1e-6, atol=0)


def test_a_value_that_stands_for_many_counts_as_many() -> None:
    rng = np.random.default_rng(2)
    values, counts = rng.standard_normal((3, 40)), rng.integers(1, 9, (3, 40))
    counts[:, -1] += 400 - counts.sum(axis=1)
    repeated = [np.repeat(v, c) for v, c in zip(values, counts, strict=True)]
    dist, plain = Samples(values, counts), Samples(np.stack(repeated))
    t, qtype = np.array([[0.3] * 3, [1.5] * 3]), QuantType(4, signed=True)
    assert np.array_equal(dist.tail(t).count, plain.tail(t).count)
    assert np.array_equal(dist.count(), plain.count())
    for mine, expected in zip(in_its_unit(dist, t), in_its_unit(plain, t), strict=True):
        assert np.allclose(mine, expected, rtol=1e-12, atol=0)
    assert np.allclose(dist.squared_excess(t), plain.squared_excess(t), rtol=1e-12, atol=0)
    assert np.allclose(dist.mse(t, qtype), plain.mse(t, qtype), rtol=1e-12, atol=0)


def test_samples_leave_their_values_alone() -> None:
    values = rows()
    before = values.tobytes()
    values.setflags(write=False)
    dist = Samples(values)
    dist.mse(np.ones(5), QuantType(4, signed=True))
    dist.quantile(0.5)
    dist.tail(np.ones(5))
    assert values.tobytes() == before


# --- Histogram ----------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_error_from_counts_is_within_a_fifth_of_a_percent(shape: str, bits: int) -> None:
    values = smooth(shape)
    samples, counted = Samples(values[None]), histogram(values)
    t = np.array([0.05, 0.2, 0.4, 0.6, 1.0])[:, None] * samples.max_abs()
    for qtype in (QuantType(bits, counted.has_negative), QuantType(bits, True, narrow=True)):
        assert np.allclose(counted.mse(t, qtype), samples.mse(t, qtype), rtol=2e-3, atol=0)


@shapes
def test_counts_know_the_number_the_sign_and_the_maximum_exactly(shape: str) -> None:
    values = smooth(shape)
    samples, counted = Samples(values[None]), histogram(values)
    assert counted.groups == 1
    assert counted.has_negative == samples.has_negative
    assert np.array_equal(counted.count(), samples.count())
    assert np.array_equal(counted.max_abs(), samples.max_abs())
    assert np.allclose(counted.mean_abs(), samples.mean_abs(), rtol=1e-4, atol=0)
    assert np.allclose(counted.rms(), samples.rms(), rtol=1e-4, atol=0)


@by_property
@given(tensors, st.floats(0, 1), st.floats(1e-20, 10))
def test_counts_are_never_further_off_than_a_bin(values: Values, q: float, t: float) -> None:
    samples, counted = Samples(values[None]), histogram(values)
    assert np.allclose(counted.quantile(q), samples.quantile(q), rtol=BIN, atol=0)
    assert counted.quantile(q) <= counted.max_abs()
    below, above = np.array([t * (1 - 2 * BIN)]), np.array([t * (1 + 2 * BIN)])
    tail = counted.tail(np.array([t]))
    assert samples.tail(above).count <= tail.count <= samples.tail(below).count
    assert samples.tail(above).sum * (1 - BIN) <= tail.sum * (1 + 1e-12)
    assert tail.sum <= samples.tail(below).sum * (1 + BIN)
    assert counted.tail(np.zeros(1)).count == np.count_nonzero(values)


@shapes
def test_above_eight_bits_the_error_is_the_noise_model(shape: str) -> None:
    """Also of values far below a step, which have less of it: it is a model."""
    values = np.concatenate([smooth(shape), np.full(60_000, 1e-9, np.float32)])
    counted, qtype = histogram(values), QuantType(16, signed=True)
    magnitude = np.abs(values.astype(np.float64))
    assert qtype.bits > HISTOGRAM_BITS
    for t in np.array([0.1, 0.5, 1.0]) * magnitude.max():
        inside, clipped = (magnitude > 0) & (magnitude <= t), magnitude[magnitude > t] - t
        noise = t**2 / 12 / 32767**2
        expected = (noise * inside.sum() + (clipped**2).sum()) / values.size
        assert counted.mse(np.array([t]), qtype)[0] == pytest.approx(expected, rel=5e-3)
    assert counted.mse(np.full((3, 2, 1), 0.4), qtype).shape == (3, 2, 1)


def test_only_a_threshold_in_the_top_bin_snaps_to_the_maximum() -> None:
    for values in ([0.1, 1.001, 1.002], [-1.002, 0.1, 0.9], [-1.0015, 0.3, 1.002]):
        counted = histogram(np.array(values, np.float32))
        largest = counted.max_abs()[0]
        t = np.array([0.05, 0.9, 0.99, 0.9999, 1.0005, largest, 2.0])
        top = [largest] * 4
        assert counted.snap(t[:, None]).ravel().tolist() == [0.05, 0.9, 0.99, *top]


@pytest.mark.parametrize(
    "values", [[0.0], [1e-41, -2e-41], [1e-38, 0.5], [LARGEST, 1.0], [-LARGEST, LARGEST]]
)
def test_snapping_works_at_both_ends_of_the_format(values: list[float]) -> None:
    counted = histogram(np.array(values, np.float32))
    largest = counted.max_abs()
    assert counted.snap(largest) == largest
    if largest == 0 or largest > TINY:  # below, a single bin reaches down to 0
        assert counted.snap(largest * 0.9999) == largest
        assert counted.snap(largest / 2) == largest / 2


# --- both ---------------------------------------------------------------------------------------


def both(values: Values) -> list[Distribution]:
    return [Samples(values[None]), histogram(values)]


@pytest.mark.parametrize("constant", [0.7, -0.7, 1.0, 1e-30, -1e30, LARGEST])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_is_known_exactly(constant: float, bits: int) -> None:
    values = np.full(50, constant, np.float32)
    exact = np.array([abs(float(values[0]))])
    qtype = QuantType(bits, signed=constant < 0, narrow=constant < 0)
    for dist in both(values):
        for answer in (dist.max_abs(), dist.quantile(0.01), dist.quantile(1.0)):
            assert answer == exact
        assert np.allclose([dist.mean_abs(), dist.rms()], exact, rtol=1e-12, atol=0)
        assert dist.tail(exact).count == 0
        assert dist.tail(exact * 0.9999).count == 50
        assert np.allclose(dist.mse(exact / 2, qtype), exact**2 / 4, rtol=1e-6, atol=0)
        assert dist.mse(exact, qtype) <= (exact * 1e-6) ** 2


def test_groups_of_zeros_have_nothing_above_zero_and_no_error() -> None:
    for dist in (Samples(np.zeros((2, 9), np.float32)), histogram(np.zeros(9, np.float32))):
        zeros = np.zeros(dist.groups)
        for answer in (*in_its_unit(dist, zeros), dist.tail(zeros).count):
            assert np.array_equal(answer, zeros)
        for qtype in (QuantType(4, signed=True), QuantType(16, signed=False)):
            for t in (zeros, zeros + 1):
                assert np.array_equal(dist.mse(t, qtype), zeros)


def test_zeros_of_either_sign_cost_nothing() -> None:
    values = np.array([0.0, -0.0, -0.0, 1.0, -1.0], np.float32)
    for dist in both(values):
        for bits in (2, 8, 16):
            error = dist.mse(np.array([0.5]), QuantType(bits, signed=True, narrow=True))
            assert error[0] == pytest.approx(0.25 * 2 / 5, rel=0.01)


@grids
@pytest.mark.parametrize("exponent", [-100, 100])  # 7.9e-31 and 1.3e30
def test_answers_scale_with_the_values(qtype: QuantType, exponent: int) -> None:
    """By a power of two, so that nothing rounds and equality is exact."""
    values, factor = smooth("gaussian", 500), 2.0**exponent
    t = np.array([[0.2], [1.0], [2.9]])
    for plain, scaled in zip(both(values), both(np.ldexp(values, exponent)), strict=True):
        pairs = zip(in_its_unit(plain, t), in_its_unit(scaled, t * factor), strict=True)
        for one, other in pairs:
            assert np.array_equal(other, one * factor)
        assert np.array_equal(scaled.tail(t * factor).count, plain.tail(t).count)
        errors = scaled.mse(t * factor, qtype) / factor / factor
        assert np.allclose(errors, plain.mse(t, qtype), rtol=1e-6, atol=0)


@grids
def test_values_near_the_largest_float_have_finite_answers(qtype: QuantType) -> None:
    values = np.array([LARGEST, LARGEST / 2, 1.0, 0.0], np.float32)
    for dist in both(values):
        assert dist.max_abs() == LARGEST
        assert dist.rms()[0] == pytest.approx(LARGEST * (1.25 / 4) ** 0.5, rel=2 * BIN)
        unclipped, clipped = dist.mse(np.array([[LARGEST], [1.0]]), qtype).ravel()
        assert unclipped <= (LARGEST / qtype.steps) ** 2 / 4
        assert clipped == pytest.approx(LARGEST**2 * 1.25 / 4, rel=4 * BIN)


@grids
@pytest.mark.parametrize("magnitude", [1e-44, 1e-41, 1e-38, 1e-30, 1e-20])
def test_the_error_of_tiny_values_is_that_of_the_written_pair(
    qtype: QuantType, magnitude: float
) -> None:
    values = (rows()[:3].astype(np.float64) * magnitude).astype(np.float32)
    t = np.abs(values).max(axis=1).astype(np.float64)
    expected = written_mse(values, t, qtype)
    assert np.allclose(Samples(values).mse(t, qtype), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_counts_of_tiny_values_know_that_no_scale_is_subnormal(bits: int) -> None:
    values, qtype = smooth("gaussian") * np.float32(1e-38), QuantType(bits, signed=True)
    counted = histogram(values)
    expected = written_mse(values[None], counted.max_abs(), qtype)
    assert np.allclose(counted.mse(counted.max_abs(), qtype), expected, rtol=0.01, atol=0)
