"""OCTAV against the paper's recursion in a plain loop, and against its exact fixed point."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.calibrators.octav import Octav
from calib.counter import Counter
from calib.distribution import Histogram, Samples
from calib.errors import OptionError
from calib.qtypes import WIDTHS, QuantType

Values = NDArray[np.float32]

by_property = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TO_EIGHT = [bits for bits in WIDTHS if bits <= 8]
GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=repr)
to_eight = pytest.mark.parametrize("bits", TO_EIGHT)
shapes = pytest.mark.parametrize("shape", ["gaussian", "laplace"])

few_values = st.sampled_from([0.0, 0.5, -1.0, 7.0]) | st.floats(-100, 100, width=32)
tensors = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=few_values.filter(lambda value: value == 0 or abs(value) > 1e-30),
)


@cache
def drawn(shape: str) -> Values:
    """One value from each of 60,000 equally likely intervals: no outliers, no luck."""
    rng = np.random.default_rng(0)
    u = rng.permutation((np.arange(60_000) + rng.uniform(0.01, 0.99, 60_000)) / 60_000)
    if shape == "gaussian":
        values = np.array([NormalDist().inv_cdf(p) for p in u.tolist()], np.float32)
    else:
        values = (np.sign(u - 0.5) * -np.log1p(-2 * np.abs(u - 0.5))).astype(np.float32)
    values.setflags(write=False)
    return values


def octav(values: Values, qtype: QuantType, calibrator: Octav | None = None) -> float:
    answer = (calibrator or Octav())(Samples(values[None]), qtype)
    assert answer.shape == (1,)
    assert answer.dtype == np.float64
    return float(answer[0])


def kappa_of(steps: float) -> float:
    return 1 / (12 * steps**2)


def steps_of(qtype: QuantType) -> int:
    return int(2 ** (qtype.bits - 1) - 1 if qtype.signed else 2**qtype.bits - 1)


def recursion(values: Values, kappa: float, updates: int) -> float:
    """Equation 6 of the paper, with the guard of method.md: nothing clipped is the maximum."""
    magnitude = np.abs(values.astype(np.float64))
    magnitude = magnitude[magnitude > 0]
    s = magnitude.mean()
    for _ in range(updates):
        above = magnitude[magnitude > s]
        if above.size == 0:
            return float(magnitude.max())
        before, s = s, above.sum() / (kappa * (magnitude.size - above.size) + above.size)
        if s == before:
            break
    return float(s)


def exact_fixed_point(values: Values, kappa: float) -> float:
    """Where h(s) = s·(κ·In + Out) - Tail changes sign, found by looking between all values."""
    magnitude = np.sort(np.abs(values.astype(np.float64)))
    magnitude = magnitude[magnitude > 0]
    if magnitude.size == 0:
        return 0.0
    for inside in range(magnitude.size):
        above = magnitude[inside:]
        root = above.sum() / (kappa * inside + above.size)
        if root < above[0]:  # h is linear below the next value: its root, or the last jump
            return float(max(root, magnitude[inside - 1] if inside else 0.0))
    return float(magnitude[-1])


def h(values: Values, s: float, kappa: float) -> float:
    magnitude = np.abs(values[values != 0].astype(np.float64))
    above = magnitude[magnitude > s]
    return float(s * (kappa * (magnitude.size - above.size) + above.size) - above.sum())


@shapes
@to_eight
@pytest.mark.parametrize("grid", ["narrow", "full", "unsigned"])
def test_the_threshold_is_where_the_papers_recursion_ends(shape: str, bits: int, grid: str) -> None:
    qtype = QuantType(bits, signed=grid != "unsigned", narrow=grid == "narrow")
    values = drawn(shape) if qtype.signed else np.abs(drawn(shape))
    expected = recursion(values, kappa_of(steps_of(qtype)), updates=500)
    assert octav(values, qtype) == pytest.approx(expected, rel=1e-5)


@by_property
@given(tensors, st.sampled_from(GRIDS))
def test_the_threshold_is_the_exact_fixed_point_of_any_values(
    values: Values, qtype: QuantType
) -> None:
    expected = exact_fixed_point(values, kappa_of(steps_of(qtype)))
    assert octav(values, qtype) == pytest.approx(expected, rel=1e-5)


@shapes
@grids
def test_h_changes_its_sign_at_the_threshold(shape: str, qtype: QuantType) -> None:
    values, kappa = drawn(shape), kappa_of(steps_of(qtype))
    threshold = octav(values, qtype)
    assert h(values, threshold * (1 - 1e-5), kappa) < 0 < h(values, threshold * (1 + 1e-5), kappa)


@shapes
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("narrow", [True, False])
def test_the_error_is_close_to_that_of_the_exhaustive_sweep(
    shape: str, bits: int, narrow: bool
) -> None:
    qtype = QuantType(bits, signed=True, narrow=narrow)
    values = drawn(shape)
    dist = Samples(values[None])
    sweep = dist.mse(np.linspace(0.002, 1, 500)[:, None] * dist.max_abs(), qtype).min()
    mine = dist.mse(np.array([octav(values, qtype)]), qtype)[0]
    # The full range has one more level below, which the noise model does not know of.
    assert mine <= sweep * (1.005 if narrow else 1.05)


@pytest.mark.parametrize(("bits", "percent"), [(2, 37.0), (3, 4.9), (4, 0.84)])
def test_the_papers_kappa_costs_what_the_method_notes_say(bits: int, percent: float) -> None:
    qtype = QuantType(bits, signed=True, narrow=True)
    values = drawn("gaussian")
    matched, paper = (octav(values, qtype, Octav(kappa)) for kappa in ("grid", "paper"))
    errors = Samples(values[None]).mse(np.array([[matched], [paper]]), qtype).ravel()
    assert 100 * (errors[1] / errors[0] - 1) == pytest.approx(percent, rel=0.15)


@shapes
@to_eight
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("updates", [1, 10])
def test_the_papers_ten_updates_with_its_kappa_are_reproduced(
    shape: str, bits: int, signed: bool, updates: int
) -> None:
    values = drawn(shape) if signed else np.abs(drawn(shape))
    kappa = 4.0**-bits / (3 if signed else 12)
    mine = octav(values, QuantType(bits, signed), Octav("paper", iterations=updates))
    assert mine == pytest.approx(recursion(values, kappa, updates), rel=1e-12)


def test_ten_updates_at_eight_bits_stop_below_the_fixed_point() -> None:
    values, qtype = drawn("gaussian"), QuantType(8, signed=True)
    ten, settled = octav(values, qtype, Octav(iterations=10)), octav(values, qtype)
    assert 0.96 < ten / settled < 0.9995


def test_a_coarser_tolerance_stops_earlier_and_stays_close() -> None:
    values, qtype = drawn("laplace"), QuantType(8, signed=True)
    coarse, fine = octav(values, qtype, Octav(tolerance=0.05)), octav(values, qtype)
    assert coarse != fine
    assert coarse == pytest.approx(fine, rel=0.2)


@grids
@pytest.mark.parametrize("n", [1, 2, 50, 1000])
@pytest.mark.parametrize("magnitude", [0.7, 1.0, 1e-30, 3e38])
def test_equal_magnitudes_are_the_threshold(qtype: QuantType, n: int, magnitude: float) -> None:
    values = np.full(n, magnitude, np.float32)
    values[::2] *= -1
    expected = float(np.float32(magnitude))
    for calibrator in (Octav(), Octav(iterations=9), Octav("paper", iterations=10)):
        threshold = octav(values, qtype, calibrator)
        assert threshold == pytest.approx(expected, rel=1e-5)
        assert threshold <= expected * (1 + 1e-12)


@grids
def test_a_single_value_beside_zeros_is_the_threshold(qtype: QuantType) -> None:
    values = np.zeros(300, np.float32)
    values[123] = -0.3
    assert octav(values, qtype) == pytest.approx(0.3, rel=1e-5)


@grids
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("ratio", [1.001, 2.0, 1000.0])
def test_two_magnitudes_have_the_exact_fixed_point(
    qtype: QuantType, share: float, ratio: float
) -> None:
    values = np.full(1000, 0.3, np.float32)
    values[: int(1000 * share)] *= np.float32(ratio)
    expected = exact_fixed_point(values, kappa_of(steps_of(qtype)))
    assert expected * (1 + 1e-6) > 0.3
    assert octav(values, qtype) == pytest.approx(expected, rel=1e-5)


@grids
@pytest.mark.parametrize("calibrator", [Octav(), Octav("paper", iterations=10)], ids=repr)
def test_all_zeros_have_no_threshold(qtype: QuantType, calibrator: Octav) -> None:
    assert octav(np.zeros(5, np.float32), qtype, calibrator) == 0


@by_property
@given(tensors, st.integers(1, 500), st.sampled_from(GRIDS))
def test_zeros_do_not_move_the_threshold(values: Values, zeros: int, qtype: QuantType) -> None:
    padded = np.concatenate([values, np.zeros(zeros, np.float32), [np.float32(-0.0)]])
    for calibrator in (Octav(), Octav("paper", iterations=10)):
        expected = octav(values, qtype, calibrator)
        assert octav(padded, qtype, calibrator) == pytest.approx(expected, rel=1e-12)


@by_property
@given(tensors, st.integers(-20, 20), st.sampled_from(GRIDS))
def test_the_threshold_scales_with_the_values_and_ignores_their_sign(
    values: Values, exponent: int, qtype: QuantType
) -> None:
    expected = octav(values, qtype) * 2.0**exponent
    assert octav(np.ldexp(values, exponent), qtype) == expected
    assert octav(np.ldexp(-values, exponent), qtype) == expected


@by_property
@given(tensors, st.sampled_from(GRIDS), st.sampled_from([0, 1, 3, 10]))
def test_the_threshold_is_never_above_the_maximum_nor_below_zero(
    values: Values, qtype: QuantType, iterations: int
) -> None:
    threshold = octav(values, qtype, Octav(iterations=iterations))
    largest = float(np.abs(values).max())
    assert (0 < threshold <= largest * (1 + 1e-12)) or threshold == largest == 0


@shapes
@to_eight
def test_counts_give_the_threshold_of_the_values_within_a_bin(shape: str, bits: int) -> None:
    values, qtype = drawn(shape), QuantType(bits, signed=True)
    counter = Counter()
    counter.update(values)
    counted = Octav()(Histogram(counter), qtype)
    assert counted[0] == pytest.approx(octav(values, qtype), rel=2.0**-9)


def test_a_wider_grid_never_clips_more() -> None:
    values = drawn("laplace")
    found = [octav(values, QuantType(bits, signed=True)) for bits in WIDTHS]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Octav("tensor"), "octav: kappa must be 'grid' or 'paper', got 'tensor'"),
        (lambda: Octav(tolerance=0), "octav: tolerance must be in (0, 1), got 0"),
        (lambda: Octav(tolerance=1), "octav: tolerance must be in (0, 1), got 1"),
        (lambda: Octav(tolerance=-1e-6), "octav: tolerance must be in (0, 1), got -1e-06"),
        (lambda: Octav(tolerance=np.nan), "octav: tolerance must be in (0, 1), got nan"),
        (lambda: Octav(iterations=-1), "octav: iterations must not be negative, got -1"),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(make: type[Octav], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert str(caught.value) == message


# --- from a start that is close -----------------------------------------------------------------


def of_kind(kind: str, n: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, n) if kind == "uniform" else rng.standard_normal(n)
    changes = {
        "heavy": values**3,
        "half zero": np.maximum(values, 0),
        "few levels": np.rint(2 * values),
        "equal": np.sign(values) * 0.7,
    }
    return changes.get(kind, values).astype(np.float32)


kinds = st.sampled_from(["gaussian", "uniform", "heavy", "half zero", "few levels", "equal"])
factors = st.floats(0.5, 2) | st.sampled_from([0.0, 0.999, 1.0, 1.001, 1e6])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(kinds, factors), min_size=1, max_size=3),
    st.integers(20, 3000),
    st.sampled_from([q for q in GRIDS if q.bits <= 8]),
)
def test_a_refined_threshold_is_within_a_tenth_of_a_percent(
    groups: list[tuple[str, float]], n: int, qtype: QuantType
) -> None:
    """From starts that are close, and from others: nothing, and above the maximum."""
    values = np.stack([of_kind(kind, n, seed) for seed, (kind, _) in enumerate(groups)])
    expected = Octav()(Samples(values), qtype)
    start = expected * [factor for _, factor in groups]
    found = Octav().refine(Samples(values), qtype, start)
    assert np.allclose(found, expected, rtol=1e-3, atol=0), found / expected - 1


@by_property
@given(tensors, st.floats(0, 1e6), st.sampled_from(GRIDS))
def test_no_start_leads_above_the_maximum_or_to_zero(
    values: Values, start: float, qtype: QuantType
) -> None:
    with_zeros = np.stack([values, np.zeros_like(values)])
    found, of_zeros = Octav().refine(Samples(with_zeros), qtype, np.array([start, start]))
    largest = float(np.abs(values).max())
    assert (0 < found <= largest) or found == largest == 0
    assert of_zeros == 0


@by_property
@given(tensors, st.floats(0, 1e6), st.sampled_from(GRIDS), st.integers(1, 10))
def test_a_number_of_updates_knows_no_start(
    values: Values, start: float, qtype: QuantType, updates: int
) -> None:
    dist, calibrator = Samples(values[None]), Octav("paper", iterations=updates)
    assert calibrator.refine(dist, qtype, np.array([start])) == calibrator(dist, qtype)


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_a_start_from_the_maximum_does_not_stay_there(factor: float) -> None:
    dist, qtype = Samples(drawn("laplace")[None]), QuantType(4, signed=True)
    found = Octav().refine(dist, qtype, factor * dist.max_abs())
    assert found == pytest.approx(Octav()(dist, qtype), rel=1e-3)
