"""Compiled kernels against NumPy, stacked tensors against single ones, and sums over cells against
the integral of the error over every bin."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib import compiled
from calib.calibrators.octav import Octav
from calib.counter import Counter
from calib.distribution import Distribution, Floats, Histogram, Samples, sweep
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold

Values = NDArray[np.float32]

by_property = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
few_values = st.sampled_from([0.0, 0.5, -1.0, 7.0]) | st.floats(-100, 100, width=32)
normal = few_values.filter(lambda value: value == 0 or abs(value) > 1e-30)
groups_of_values = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=normal
)
GRIDS = [QuantType(bits, signed=True, narrow=True) for bits in range(2, 9)]
GRIDS += [QuantType(bits, signed=False) for bits in range(2, 9)]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=repr)
needs_numba = pytest.mark.skipif(not compiled.enabled(), reason="numba is not installed")


def tensors() -> list[Values]:
    """Weights of several shapes: Gaussian, heavy-tailed, sparse, constant, all zero, tiny."""
    rng = np.random.default_rng(5)
    heavy = rng.standard_normal((7, 700)) ** 3
    sparse = rng.standard_normal((4, 33)) * (rng.random((4, 33)) < 0.2)
    rest = np.array([[0.3, -0.3], [0.0, 0.0]])
    gaussian = rng.standard_normal((20, 144))
    tiny = rng.standard_normal((3, 600)) * 1e-37
    return [array.astype(np.float32) for array in (gaussian, heavy, sparse, rest, tiny)]


def counters() -> list[Counter]:
    """Of activations: signed, rectified, negative throughout, constant, all zero."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal(5000).astype(np.float32)
    arrays = [x, np.maximum(x, 0), -np.abs(x), np.full(9, 0.7, np.float32), np.zeros(4, np.float32)]
    made = []
    for array in arrays:
        made.append(Counter())
        made[-1].update(array)
    return made


def answers(dist: Distribution, qtype: QuantType) -> list[Floats]:
    """Everything that a distribution is asked for, except thresholds of a sweep."""
    assert isinstance(dist, Samples | Histogram)
    largest = dist.max_abs()
    t = np.array([[0.0], [0.1], [0.4], [1.0]]) * largest
    tail = dist.tail(t)
    quantiles = [dist.quantile(q) for q in (0.0, 0.5, 0.999, 1.0)]
    fixed = dist.fixed_point(qtype.rounding_noise)
    means = [dist.mean_abs(), dist.rms(), dist.mse(t, qtype)]
    return [dist.count(), largest, tail.count, tail.sum, *quantiles, fixed, *means]


@needs_numba
@grids
def test_kernels_and_numpy_answer_the_same(
    qtype: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in (lambda: Samples.stacked(tensors()), lambda: Histogram(*counters())):
        fast, swept = answers(make(), qtype), make().least_mse(100, qtype)
        with monkeypatch.context() as plain:
            plain.setattr(compiled, "enabled", lambda: False)
            for one, other in zip(fast, answers(make(), qtype), strict=True):
                np.testing.assert_allclose(one, other, rtol=2e-6, atol=0)
            dist = make()
            best = dist.mse(sweep(dist, 100, qtype), qtype)
            for found in (swept, dist.least_mse(100, qtype)):
                np.testing.assert_allclose(dist.mse(found, qtype), best, rtol=1e-5, atol=0)


@grids
def test_stacked_tensors_are_answered_as_each_alone(qtype: QuantType) -> None:
    pairs: list[tuple[Distribution, list[Distribution]]] = [
        (Samples.stacked(tensors()), [Samples(values) for values in tensors()]),
        (Histogram(*counters()), [Histogram(counter) for counter in counters()]),
    ]
    for together, alone in pairs:
        single = zip(*(answers(dist, qtype) for dist in alone), strict=True)
        for one, others in zip(answers(together, qtype), single, strict=True):
            np.testing.assert_array_equal(one, np.concatenate(others, axis=-1))
        assert isinstance(together, Samples | Histogram)
        swept = [sweep(dist, 50, qtype) for dist in alone]
        errors = together.mse(together.least_mse(50, qtype), qtype)
        expected = together.mse(np.concatenate(swept), qtype)
        np.testing.assert_allclose(errors, expected, rtol=1e-5, atol=0)


@by_property
@given(groups_of_values, st.sampled_from(GRIDS))
def test_the_fixed_point_is_where_the_recursion_ends(values: Values, qtype: QuantType) -> None:
    found = Samples(values).fixed_point(qtype.rounding_noise)
    recursion = Octav(tolerance=2e-6)(Samples(values), qtype)
    np.testing.assert_allclose(found, recursion, rtol=1e-4)


@by_property
@given(groups_of_values, st.sampled_from(GRIDS), st.integers(1, 60))
def test_no_threshold_of_the_sweep_has_less_error_than_the_one_that_is_found(
    values: Values, qtype: QuantType, points: int
) -> None:
    values = values if qtype.signed else np.abs(values)
    dist = Samples(values)
    errors = dist.mse(np.arange(1, points + 1)[:, None] / points * dist.max_abs(), qtype)
    found = dist.mse(dist.least_mse(points, qtype), qtype)
    np.testing.assert_allclose(found, errors.min(axis=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_threshold_that_is_found_is_that_of_the_sweep_also_where_several_are_as_good(
    bits: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(compiled, "enabled", lambda: False)
    qtype, rng = QuantType(bits, signed=True, narrow=True), np.random.default_rng(7)
    ternary = rng.integers(-1, 2, (3, 4096)) * np.array([[0.5], [3.0], [1e-20]])
    lattice = rng.integers(-15, 16, (3, 4096)) / 16
    heavy = rng.standard_cauchy((3, 4096))
    for values in (array.astype(np.float32) for array in (ternary, lattice, heavy)):
        dist = Samples(values)
        np.testing.assert_array_equal(dist.least_mse(100, qtype), sweep(dist, 100, qtype))


def error_of_every_bin(counter: Counter, t: float, qtype: QuantType) -> float:
    """The mean squared error of values that spread evenly over their bin, by the antiderivative
    of the squared error: continuous, so that clipping is included."""
    codes = np.flatnonzero(counter.counts)
    centre = (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    bits = codes.astype(np.uint32) << np.uint32(16)
    half = np.where(centre == 0, 0, 0x8000).astype(np.uint32)
    edges = np.stack([(bits - half).view(np.float32), (bits + half).view(np.float32)])
    edges = np.clip(np.sort(edges.astype(np.float64), axis=0), counter.min, counter.max)
    step = float(scale_from_threshold(np.array(t), qtype))
    low, high = edges / step

    def level(x: Floats) -> Floats:
        return np.clip(np.rint(x), qtype.qmin, qtype.qmax)

    def integral(x: Floats) -> Floats:
        return np.asarray(level(x) / 12 + (x - level(x)) ** 3 / 3)

    width = np.where(high > low, high - low, 1.0)
    spread = (integral(high) - integral(low)) / width
    square = np.where(high > low, spread, (low - level(low)) ** 2)
    return float(square @ counter.counts[codes] * step**2 / counter.counts.sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.77, 1.0, 3.0])
def test_the_error_from_cells_is_that_of_every_bin(bits: int, fraction: float) -> None:
    for counter in counters()[:3]:
        dist, signed = Histogram(counter), counter.min < 0
        t = fraction * dist.max_abs()
        for qtype in (QuantType(bits, signed), QuantType(bits, signed=True, narrow=True)):
            expected = error_of_every_bin(counter, float(t[0]), qtype)
            assert dist.mse(t, qtype)[0] == pytest.approx(expected, rel=1e-9)


@needs_numba
def test_where_numba_is_told_not_to_compile_numpy_works() -> None:
    code = (
        "import numpy as np; from calib import compiled; from calib.counter import Counter\n"
        "print(compiled.enabled(), Counter.of(np.ones(5, np.float32)).n_finite)"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", "5"]


_TABLE = np.arange(4.0)


@compiled.kernel()
def _looked_up(at: int) -> float:
    return float(_TABLE[at])


@needs_numba
def test_a_kernel_may_read_an_array_of_its_module() -> None:
    assert _looked_up(2) == 2.0
