"""A tensor's histogram, and its error against the threshold, held against the raw values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Save
from hypothesis import given
from hypothesis import strategies as st
from models import Array, parsed, values
from numpy.typing import NDArray

from calib.calibrators import make
from calib.counter import Counter
from calib.curves import Profile, minima_of, profiles
from calib.distribution import Samples
from calib.granularity import PerChannel, to_groups
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.planning import make_plan
from calib.qtypes import QuantType
from calib.quantize import fake_quantize, scale_from_threshold
from calib.rules import Rules, Widths

WIDTHS = (2, 3, 4, 6, 8)
LINEAR = """(float[N,6] x) => (float[N,5] y) { y = MatMul(x, weight) }"""

Floats = NDArray[np.float32]


def profiled(
    save: Save,
    seen: Array,
    weight: Floats | None = None,
    widths: Sequence[int] | None = WIDTHS,
    rules: Rules | None = None,
) -> dict[str, Profile]:
    """Profiles of ``x`` and ``weight``; values of ``x`` may have any shape."""
    model = load_model(save(parsed(LINEAR, {"weight": values(6, 5) if weight is None else weight})))
    specs = make_plan(model, rules or Rules(widths=Widths(4, 4, 4))).specs
    found = profiles(model, counted(model, seen), specs, widths)
    return {profile.name: profile for profile in found}


def counted(model: Model, seen: Array) -> Observations:
    counter = Counter()
    counter.update(seen)
    return Observations(model.sha256, 1, {"x": counter})


def error(raw: Array, threshold: float, qtype: QuantType) -> float:
    """Of really quantizing ``raw`` with one threshold."""
    scale = scale_from_threshold(np.array([threshold]), qtype)
    written = fake_quantize(raw.reshape(1, -1), scale, qtype, PerChannel(0))
    return float(np.square(written.astype(np.float64) - raw.reshape(1, -1)).mean())


def modelled(raw: Array, threshold: float, qtype: QuantType) -> float:
    """J of OCTAV's equation 4, as it stands in method.md, section 1.1."""
    x = np.abs(raw.astype(np.float64)).ravel()
    inside = np.mean((x > 0) & (x <= threshold))
    clipped = np.mean(np.where(x > threshold, x - threshold, 0.0) ** 2)
    return float(threshold**2 / (12 * qtype.steps**2) * inside + clipped)


DATA: dict[str, Floats] = {
    "gaussian": values(20_000, scale=2),
    "half zero": np.maximum(values(20_000, seed=1), 0),
    "uniform": np.random.default_rng(2).uniform(0, 6, 20_000).astype(np.float32),
    "laplace": np.random.default_rng(3).laplace(size=20_000).astype(np.float32),
}


# --- the histogram ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_the_histogram_counts_every_value_from_zero_to_the_largest(save: Save, name: str) -> None:
    profile = profiled(save, DATA[name])["x"]
    assert profile.counts.sum() == DATA[name].size
    assert len(profile.edges) == len(profile.counts) + 1
    assert profile.edges[0] == 0
    assert profile.edges[-1] == np.abs(DATA[name]).max()
    assert (np.diff(profile.edges) > 0).all()
    assert profile.signed == bool((DATA[name] < 0).any())


def test_the_histogram_is_numpys_but_for_values_at_the_edges(save: Save) -> None:
    raw = DATA["laplace"]
    profile = profiled(save, raw)["x"]
    exact, _ = np.histogram(np.abs(raw), profile.edges)
    assert np.abs(np.cumsum(exact) - np.cumsum(profile.counts)).max() < 0.01 * raw.size


def test_the_histogram_of_a_weight_holds_each_channel_relative_to_its_largest(save: Save) -> None:
    weight = values(6, 5) * np.array([1, 1e-3, 50, 1, 1], np.float32)
    profile = profiled(save, DATA["gaussian"], weight)["weight"]
    assert profile.relative
    assert profile.largest == pytest.approx(np.abs(weight).max(axis=0))
    assert profile.counts.sum() == weight.size
    assert profile.edges[-1] == 1
    assert profile.counts[-1] >= 5  # the largest of every channel


def test_a_per_tensor_weight_is_not_relative(save: Save) -> None:
    rules = Rules(weight_granularity="per-tensor")
    weight = values(6, 5)
    profile = profiled(save, DATA["gaussian"], weight, rules=rules)["weight"]
    assert not profile.relative
    assert profile.largest.tolist() == [1]
    assert profile.edges[-1] == np.abs(weight).max()


# --- the measured error -------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_the_measured_curve_is_the_error_of_really_quantizing(save: Save, name: str) -> None:
    raw = DATA[name]
    for curve in profiled(save, raw)["x"].curves:
        qtype = QuantType(curve.bits, signed=bool((raw < 0).any()))
        # A bfloat16 bin is 0.4 % of its value wide, a step of 8 bits as much of the threshold.
        allowed = 0.02 if curve.bits < 8 else 0.1
        for s, found in list(zip(curve.thresholds, curve.measured, strict=True))[::5]:
            assert found == pytest.approx(error(raw, s, qtype), rel=allowed), (curve.bits, s)


def test_the_measured_curve_of_a_weight_is_that_of_its_channels_divided_by_their_largest(
    save: Save,
) -> None:
    weight = values(400, 5, seed=5) * np.array([1, 1e-3, 50, 1, 0], np.float32)
    text = LINEAR.replace("6", "400")
    model = load_model(save(parsed(text, {"weight": weight})))
    specs = make_plan(model, Rules(widths=Widths(4, 4, 4))).specs
    found = profiles(model, counted(model, DATA["gaussian"]), specs, WIDTHS)
    profile = next(p for p in found if p.name == "weight")
    assert profile.largest[4] == 1  # all zero
    groups = to_groups(weight, PerChannel(1)).astype(np.float64) / profile.largest[:, None]
    for curve in profile.curves:
        qtype = QuantType(curve.bits, signed=True, narrow=True)
        for s, measured in list(zip(curve.thresholds, curve.measured, strict=True))[::7]:
            exact = error(groups.astype(np.float32), s, qtype)
            assert measured == pytest.approx(exact, rel=0.05), (curve.bits, s)


def test_the_curves_reach_from_little_to_the_largest_magnitude(save: Save) -> None:
    for profile in profiled(save, DATA["gaussian"]).values():
        for curve in profile.curves:
            assert (np.diff(curve.thresholds) > 0).all()
            assert curve.thresholds[-1] == pytest.approx(profile.edges[-1], rel=1e-12)
            assert curve.thresholds[0] < 0.01 * profile.edges[-1]


def test_a_tensor_has_one_curve_of_its_own_width_where_none_is_named(save: Save) -> None:
    found = profiled(save, DATA["gaussian"], widths=None, rules=Rules(widths=Widths(3, 5, 6)))
    assert {name: [c.bits for c in p.curves] for name, p in found.items()} == {
        "x": [6],
        "weight": [6],
    }


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_the_modelled_curve_is_octavs_equation_4(save: Save, name: str) -> None:
    raw = DATA[name]
    for curve in profiled(save, raw, widths=(*WIDTHS, 16))["x"].curves:
        qtype = QuantType(curve.bits, signed=bool((raw < 0).any()))
        for s, found in list(zip(curve.thresholds, curve.modelled, strict=True))[:-1:5]:
            # Of rounding noise alone little is left of 16 bits: counts at the tail decide it.
            scale = float(np.square(raw).mean()) * 1e-5
            assert found == pytest.approx(modelled(raw, s, qtype), rel=0.02, abs=scale)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_octavs_threshold_lies_at_the_minimum_of_the_modelled_curve(
    save: Save, name: str, bits: int
) -> None:
    raw = DATA[name]
    (curve,) = profiled(save, raw, widths=(bits,))["x"].curves
    qtype = QuantType(bits, signed=bool((raw < 0).any()))
    octav = float(make("octav")(Samples(raw[None]), qtype)[0])
    best = float(curve.thresholds[curve.modelled.argmin()])
    spacing = curve.thresholds[-1] / curve.thresholds[-2]
    assert 1 / spacing**1.1 <= octav / best <= spacing**1.1


# --- minima -------------------------------------------------------------------------------------


def test_planted_outliers_give_a_second_minimum_and_both_candidates(save: Save) -> None:
    raw = values(100_000, scale=1.0, seed=7)
    raw[:10] = 100.0
    (curve,) = profiled(save, raw, widths=(4,))["x"].curves
    assert curve.second is not None
    small, large = curve.second
    assert small.threshold < 15
    assert large.threshold > 90
    for point in curve.second:
        near = np.argsort(np.abs(curve.thresholds - point.threshold))[:2]
        assert point.mse <= curve.measured[near].min()
    octav = float(make("octav")(Samples(raw[None]), QuantType(4, signed=True))[0])
    assert octav == pytest.approx(small.threshold, rel=0.15)


def test_the_second_minimum_is_seen_in_one_channel_of_a_weight_too(save: Save) -> None:
    weight = values(20_000, 5, scale=0.02, seed=8)
    weight[:8] = 1.0
    text = LINEAR.replace("6", "20000")
    model = load_model(save(parsed(text, {"weight": weight})))
    specs = [s for s in make_plan(model, Rules()).specs if s.kind == "weight"]
    (profile,) = profiles(model, counted(model, weight), specs, (4,))
    assert profile.curves[0].second is not None


def plain(name: str) -> Floats:
    """What real tensors look like, without outliers."""
    rng = np.random.default_rng(4)
    if name == "gaussian":
        return rng.standard_normal(200_000).astype(np.float32)
    if name == "uniform":
        return rng.uniform(-1, 1, 200_000).astype(np.float32)
    if name == "half zero":
        return np.maximum(rng.standard_normal(200_000), 0).astype(np.float32)
    pixels = rng.choice(
        256, 200_000, p=np.bincount(rng.integers(0, 256, 3000), minlength=256) / 3000
    )
    return ((pixels / 255 - 0.45) / 0.22).astype(np.float32)


@pytest.mark.parametrize("name", ["gaussian", "uniform", "half zero", "image"])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_plain_data_has_one_minimum(save: Save, name: str, bits: int) -> None:
    (curve,) = profiled(save, plain(name), widths=(bits,))["x"].curves
    assert curve.second is None


def rise(values_: Sequence[float], start: int, step: int) -> float:
    """The largest value on the way from ``start`` to the first lower one, or to the end: that
    counts as infinite."""
    highest = values_[start]
    i = start + step
    while 0 <= i < len(values_):
        lower = values_[i] < values_[start] if step < 0 else values_[i] <= values_[start]
        if lower:
            return highest
        highest = max(highest, values_[i])
        i += step
    return float("inf")


def brute_force(values_: Sequence[float], barrier: float) -> tuple[int, ...]:
    """Those from which, both ways, one must rise to ``barrier`` times before one gets lower."""
    return tuple(
        i
        for i, value in enumerate(values_)
        if rise(values_, i, -1) >= barrier * value and rise(values_, i, 1) >= barrier * value
    )


@given(
    st.lists(st.integers(1, 60).map(float), min_size=1, max_size=40),
    st.sampled_from([1.02, 1.2, 2.0, 5.0]),
)
def test_the_minima_are_those_of_the_definition(numbers: list[float], barrier: float) -> None:
    assert minima_of(np.array(numbers), barrier) == brute_force(numbers, barrier)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_the_lowest_value_is_always_a_minimum_and_there_is_one(numbers: list[float]) -> None:
    found = minima_of(np.array(numbers))
    assert min(numbers) in [numbers[i] for i in found]
    assert list(found) == sorted(set(found))


def test_nothing_has_no_minima() -> None:
    assert minima_of(np.ones(0)) == ()


# --- odd tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [np.full(100, 3.0), np.full(100, -2.0), np.array([5.0]), np.array([1e-40, 3e38])]
)
def test_a_constant_and_one_value_have_finite_curves(save: Save, raw: NDArray[Any]) -> None:
    profile = profiled(save, raw.astype(np.float32))["x"]
    assert profile.counts.sum() == raw.size
    for curve in profile.curves:
        assert np.isfinite(curve.measured).all()
        assert np.isfinite(curve.modelled).all()
        assert curve.minima


def test_a_tensor_of_zeros_has_no_error_and_no_minimum(save: Save) -> None:
    found = profiled(save, np.zeros(50, np.float32), np.zeros((6, 5), np.float32))
    for name, size in (("x", 50), ("weight", 30)):
        profile = found[name]
        assert profile.counts.tolist() == [size, *[0] * (len(profile.counts) - 1)]
        assert profile.edges[-1] == 1
        for curve in profile.curves:
            assert not curve.measured.any()
            assert not curve.modelled.any()
            assert curve.minima == ()
            assert curve.second is None


def test_an_activation_that_was_never_seen_has_no_profile(save: Save) -> None:
    assert list(profiled(save, np.ones(0, np.float32))) == ["weight"]
