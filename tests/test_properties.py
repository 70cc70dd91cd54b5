"""What holds of calibrators, scales and granularities whatever the data, from 1e-30 to 1e30.

The bounds are theorems, not measurements; where rounding blurs one, the comment says how far.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.calibrators import make, thresholds
from calib.counter import Counter
from calib.distribution import Histogram, Samples
from calib.granularity import PerChannel, PerTensor, along_tensor, onnx_axis, to_groups
from calib.qtypes import WIDTHS, QuantType
from calib.quantize import fake_quantize, quantize, scale_from_threshold

Floats = NDArray[np.float32]

by_property = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SPECS = (
    *("octav", "octav:paper", "octav:paper,iterations=10", "max", "mse:20"),
    *("percentile:99.9", "percentile:60", "entropy:64"),
)
every_calibrator = pytest.mark.parametrize("spec", SPECS)
GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
NARROW = [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS if 3 <= bits <= 8]

LARGEST = float(np.finfo(np.float32).max)
HALF = [65504.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25]  # float16: ends, and just beyond them
HARD = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, -1e30, *HALF]
ENDS = [LARGEST, -LARGEST, 2.0**-126, -(2.0**-149)]
# The largest relative distance of a float32 to the nearest bfloat16, of 8 significant bits.
BIN = 2.0**-8


def between(low: float, high: float) -> st.SearchStrategy[float]:
    """Zeros of both signs, and float32 values of that magnitude."""
    low, high = float(np.float32(low)), float(np.float32(high))
    return st.sampled_from([0.0, -0.0, low, -high]) | st.floats(low, high, width=32).flatmap(
        lambda value: st.sampled_from([value, -value])
    )


any_value = st.sampled_from([*map(float, np.array(HARD, np.float32)), *ENDS]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)
usual = between(1e-3, 1e3)


@st.composite
def grouped(draw: st.DrawFn, elements: st.SearchStrategy[float] = any_value) -> Floats:
    """Groups of values, some of them all zero, all the same, or the same but for one."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 30)))
    values = draw(hnp.arrays(np.float32, shape, elements=elements))
    for group in values:
        kind = draw(st.sampled_from(["any", "any", "zero", "constant", "single"]))
        if kind == "zero":
            group[...] = draw(st.sampled_from([0.0, -0.0]))
        elif kind != "any":
            group[...] = draw(elements) if kind == "constant" else 0.0
            group[-1] = draw(elements) if kind == "single" else -group[-1]
    return values


def raw(spec: str, values: NDArray[np.floating], qtype: QuantType) -> NDArray[np.float64]:
    return make(spec)(Samples(values), qtype)


def histogram(values: Floats) -> Histogram:
    counter = Counter()
    counter.update(values)
    return Histogram(counter)


def fitting(values: Floats, qtype: QuantType) -> Floats:
    """Values that the grid is meant for."""
    return values if qtype.signed else np.abs(values)


# --- calibrators ------------------------------------------------------------------------------


@every_calibrator
@by_property
@given(grouped(), st.sampled_from(GRIDS))
def test_a_threshold_is_above_zero_and_at_most_the_maximum(
    spec: str, values: Floats, qtype: QuantType
) -> None:
    values = fitting(values, qtype)
    largest = np.abs(values).max(axis=1).astype(np.float64)
    answer, _ = thresholds(make(spec), Samples(values), qtype)
    zero = largest == 0
    assert (answer[zero] == 1).all()
    assert ((answer > 0) & (answer <= largest))[~zero].all()


@every_calibrator
@by_property
@given(grouped(), st.sampled_from(GRIDS))
def test_so_is_a_threshold_from_counts(spec: str, values: Floats, qtype: QuantType) -> None:
    values = fitting(values, qtype)
    answer, _ = thresholds(make(spec), histogram(values), qtype)
    largest = float(np.abs(values).max())
    assert 0 < answer[0] <= largest or (answer[0] == 1 and largest == 0)


@every_calibrator
@by_property
@given(grouped(between(1e-20, 1e20)), st.integers(-30, 30), st.sampled_from(GRIDS))
def test_a_threshold_scales_with_the_values_to_the_bit(
    spec: str, values: Floats, exponent: int, qtype: QuantType
) -> None:
    values = fitting(values, qtype)
    expected = np.ldexp(raw(spec, values, qtype), exponent)
    assert np.array_equal(raw(spec, np.ldexp(values, exponent), qtype), expected)


@every_calibrator
@by_property
@given(grouped(between(1e-20, 1e20)), st.sampled_from(NARROW))
def test_the_sign_of_a_value_does_not_matter_on_a_symmetric_grid(
    spec: str, values: Floats, qtype: QuantType
) -> None:
    assert np.array_equal(raw(spec, np.abs(values), qtype), raw(spec, -values, qtype))


@every_calibrator
@by_property
@given(grouped(between(1e-20, 1e20)), st.randoms(use_true_random=False), st.sampled_from(GRIDS))
def test_the_order_of_the_values_does_not_matter(
    spec: str, values: Floats, random: Callable[[], float], qtype: QuantType
) -> None:
    values = fitting(values, qtype)
    order = list(range(values.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    expected, answer = raw(spec, values, qtype), raw(spec, values[:, order], qtype)
    if spec.startswith("mse"):  # of thresholds that are equally good, rounding may choose another
        expected, answer = (Samples(values).mse(t, qtype) for t in (expected, answer))
        assert np.allclose(answer, expected, rtol=1e-9, atol=0)
    else:
        assert np.array_equal(answer, expected)


@every_calibrator
@by_property
@given(grouped(between(1e-20, 1e20)), st.sampled_from(GRIDS))
def test_groups_get_the_thresholds_that_they_get_alone(
    spec: str, values: Floats, qtype: QuantType
) -> None:
    values = fitting(values, qtype)
    alone = np.concatenate([raw(spec, group[None], qtype) for group in values])
    # OCTAV goes on until all groups have settled to 1e-6.
    assert np.allclose(raw(spec, values, qtype), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("mse")])
@by_property
@given(hnp.arrays(np.float16, (2, 20), elements=st.floats(-65504, 65504, width=16)))
def test_half_precision_gives_the_thresholds_of_the_same_values_in_single(
    spec: str, values: NDArray[np.float16]
) -> None:
    qtype = QuantType(4, signed=True, narrow=True)
    expected = raw(spec, values.astype(np.float32), qtype)
    assert np.allclose(raw(spec, values, qtype), expected, rtol=1e-9, atol=0)


# --- OCTAV ------------------------------------------------------------------------------------


@by_property
@given(grouped(between(1e-12, 1e12)), st.sampled_from(NARROW))
def test_octav_costs_at_most_three_times_what_the_noise_model_says_of_the_maximum(
    values: Floats, qtype: QuantType
) -> None:
    """``J(s) = κ s² In(s) + Σ(|x| - s)²`` grows from the fixed point on, and no rounding error is
    above half a step, so that none costs more than 3 κ s²: the MSE is at most ``3 J(max)``."""
    dist = Samples(values)
    largest = dist.max_abs()
    bound = 3 * qtype.rounding_noise * largest**2 * (values != 0).mean(axis=1)
    threshold, _ = thresholds(make("octav"), dist, qtype)
    # 1e-4: the threshold is found to 1e-6, and float32 rounds the values that are written.
    assert (dist.mse(threshold, qtype) <= bound * (1 + 1e-4) + 1e-60).all()


SHAPES: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "gaussian": lambda rng: rng.standard_normal(4000),
    "laplace": lambda rng: rng.laplace(size=4000),
    "uniform": lambda rng: rng.uniform(-1, 1, 4000),
    "relu": lambda rng: np.maximum(rng.standard_normal(4000), 0),
}


@pytest.mark.parametrize("shape", SHAPES)
@by_property
@given(st.integers(0, 10**6), st.integers(-90, 90), st.sampled_from(NARROW))
def test_octav_is_never_a_tenth_worse_than_the_maximum_on_data_without_far_outliers(
    shape: str, seed: int, exponent: int, qtype: QuantType
) -> None:
    """Where most values lie far below a step, as beside a far outlier, the noise model charges
    them too much, and only the bound above holds."""
    values = SHAPES[shape](np.random.default_rng(seed)).astype(np.float32)
    dist = Samples(np.ldexp(values, exponent)[None])
    octav, largest = (dist.mse(make(spec)(dist, qtype), qtype)[0] for spec in ("octav", "max"))
    assert octav <= 1.1 * largest


@by_property
@given(grouped(between(1e-12, 1e12)), st.sampled_from(GRIDS))
def test_the_sweep_is_never_worse_than_the_maximum(values: Floats, qtype: QuantType) -> None:
    dist = Samples(fitting(values, qtype))
    swept, largest = (dist.mse(make(spec)(dist, qtype), qtype) for spec in ("mse:20", "max"))
    assert (swept <= largest).all()


@by_property
@given(grouped(), st.booleans())
def test_a_wider_grid_never_clips_more(values: Floats, signed: bool) -> None:
    grids = [QuantType(bits, signed) for bits in WIDTHS]
    answers = [raw("octav", fitting(values, qtype), qtype) for qtype in grids]
    for narrower, wider in pairwise(answers):
        assert (wider >= narrower * (1 - 1e-5)).all()


@by_property
@given(grouped(between(1e-30, 1e30)), st.floats(1, 1e3, width=32), st.sampled_from(GRIDS))
def test_larger_magnitudes_never_get_a_smaller_threshold(
    values: Floats, factor: float, qtype: QuantType
) -> None:
    """h decreases in every magnitude: one that grows moves the fixed point up, or leaves it."""
    grown = values.copy()
    grown[:, ::2] *= np.float32(factor)
    before, after = (raw("octav", fitting(v, qtype), qtype) for v in (values, grown))
    assert (after >= before * (1 - 1e-5)).all()


# --- counts against values --------------------------------------------------------------------


@by_property
@given(grouped(between(1e-30, 1e30)), st.sampled_from([g for g in GRIDS if g.bits <= 8]))
def test_octav_from_counts_is_within_a_bin_of_octav_from_values(
    values: Floats, qtype: QuantType
) -> None:
    """The fixed point grows with every magnitude and scales with all: values that move by at most
    2⁻⁸ of themselves move it by at most 2⁻⁸ of itself."""
    values = fitting(values, qtype)
    assume(np.abs(values).max() > 0)
    expected = raw("octav", values.reshape(1, -1), qtype)[0]
    counted = make("octav")(histogram(values), qtype)[0]
    assert counted == pytest.approx(expected, rel=BIN * 1.01)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 100.0])
@by_property
@given(grouped(between(1e-30, 1e30)))
def test_a_percentile_from_counts_is_within_a_bin_of_that_from_values(
    percentile: float, values: Floats
) -> None:
    qtype = QuantType(8, signed=True)
    expected = raw(f"percentile:{percentile}", values.reshape(1, -1), qtype)[0]
    counted = make(f"percentile:{percentile}")(histogram(values), qtype)[0]
    assert counted == pytest.approx(expected, rel=BIN * 1.01)


@by_property
@given(grouped())
def test_counts_know_the_maximum_exactly(values: Floats) -> None:
    qtype = QuantType(8, signed=True)
    assert make("max")(histogram(values), qtype)[0] == float(np.abs(values).max())


# --- scales and granularities -----------------------------------------------------------------


@by_property
@given(st.floats(0, LARGEST, width=32, exclude_min=True), st.sampled_from(GRIDS))
def test_any_threshold_makes_a_scale_that_is_normal_and_of_which_no_level_overflows(
    threshold: float, qtype: QuantType
) -> None:
    scale = scale_from_threshold(np.array([threshold]), qtype)
    assert scale.dtype == np.float32
    assert scale[0] >= np.finfo(np.float32).tiny
    levels = np.array([qtype.qmin, qtype.qmax], np.float32) * scale
    assert np.isfinite(levels).all()


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Floats, int]:
    """A tensor of any rank, order in memory and direction, and one of its axes."""
    values = draw(
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=5, max_side=4), elements=any_value)
    )
    flipped = values[tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in values.shape)]
    tensor = flipped.transpose(draw(st.permutations(range(values.ndim))))
    tensor.setflags(write=False)
    return tensor, draw(st.integers(0, tensor.ndim - 1))


@by_property
@given(laid_out())
def test_groups_and_back_is_the_tensor_to_the_bit(layout: tuple[Floats, int]) -> None:
    tensor, axis = layout
    others = [size for at, size in enumerate(tensor.shape) if at != axis]
    groups = to_groups(tensor, PerChannel(axis))
    back = np.moveaxis(groups.reshape(tensor.shape[axis], *others), 0, axis)
    assert back.tobytes() == tensor.tobytes()
    assert to_groups(tensor, PerTensor()).tobytes() == tensor.tobytes()
    assert onnx_axis(PerChannel(axis)) == axis


@by_property
@given(laid_out())
def test_a_number_for_each_group_meets_its_own_values(layout: tuple[Floats, int]) -> None:
    tensor, axis = layout
    largest = np.abs(to_groups(tensor, PerChannel(axis))).max(axis=1)
    others = tuple(at for at in range(tensor.ndim) if at != axis)
    expected = np.abs(tensor).max(axis=others, keepdims=True)
    assert np.array_equal(along_tensor(largest, tensor.shape, PerChannel(axis)), expected)


@by_property
@given(laid_out(), st.sampled_from(GRIDS))
def test_a_channel_is_quantized_as_if_it_were_alone(
    layout: tuple[Floats, int], qtype: QuantType
) -> None:
    tensor, axis = layout
    answer, _ = thresholds(make("max"), Samples(to_groups(tensor, PerChannel(axis))), qtype)
    scale = scale_from_threshold(answer, qtype)
    integers = quantize(tensor, scale, qtype, PerChannel(axis))
    written = fake_quantize(tensor, scale, qtype, PerChannel(axis))
    assert integers.min() >= qtype.qmin
    assert integers.max() <= qtype.qmax
    for channel in range(tensor.shape[axis]):
        part: Floats = np.take(tensor, [channel], axis)
        alone = fake_quantize(part, scale[[channel]], qtype, PerTensor())
        assert np.array_equal(np.take(written, [channel], axis), alone)
