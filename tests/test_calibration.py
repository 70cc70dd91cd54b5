"""From observations to thresholds, held against the values themselves."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Load, Save, all_bits, calibrated
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, Feed, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate, calibrate_each, calibrate_with
from calib.calibrators import make, thresholds
from calib.counter import Counter
from calib.distribution import Distribution, Histogram, Samples
from calib.errors import CalibratorError, ObservationsError
from calib.granularity import to_groups
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.qtypes import QuantType
from calib.quantize import fake_quantize
from calib.register import Register
from calib.rules import Reduction, Rules, Widths
from calib.table import CalibrationTable, TensorRecord

METHODS = ("octav", "percentile:99", "mse", "max", "entropy")
# ``hidden`` is the magnitude of x: onnxruntime computes it alike in any batch.
MAGNITUDE = """(float[N,6] x) => (float[N,4] y) <float[6,4] weight> {
  hidden = Abs(x)
  y = MatMul(hidden, weight)
}"""


def record(table: CalibrationTable, name: str) -> TensorRecord:
    return next(r for r in table.records if r.name == name)


def sqnr_db(reference: Array, other: Array) -> float:
    exact, found = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def from_batches(arrays: Sequence[Array], rules: Rules, keep: int | None = None) -> TensorRecord:
    """The record of ``hidden`` after observing ``arrays`` as batches of x."""
    model = Model(None, "sha", 0, ir.from_proto(parsed(MAGNITUDE)), ())  # type: ignore[arg-type]
    plan = make_plan(model, rules)
    kept = rules.reduction.kept_batches if keep is None else keep
    feeds = [Batch({"x": array.astype(np.float32)}) for array in arrays]
    return record(
        calibrate(model, observe(model, feeds, plan.activations, Observing(kept)), plan, rules),
        "hidden",
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv_bn_relu", "conv_transpose", "tied_transposed", "attention"])
def test_weights_are_calibrated_on_their_values_and_measured_on_the_grid(
    name: str, method: str, load: Load
) -> None:
    model = load(name)
    for bits in (3, 8, 16):
        rules = Rules(Widths(bits, bits, bits), method)
        table, _ = calibrated(model, rules)
        for made in table.records:
            if made.spec.kind != "weight":
                continue
            values_ = model.weight(made.name)
            groups = to_groups(values_, made.spec.granularity)
            assert made.qtype == QuantType(bits, signed=True, narrow=True)
            expected, _ = thresholds(make(method), Samples(groups), made.qtype)
            np.testing.assert_array_equal(made.threshold, expected)
            np.testing.assert_allclose(made.scale, made.threshold / made.qtype.qmax, rtol=1e-6)
            quantized = fake_quantize(values_, made.scale, made.qtype, made.spec.granularity)
            assert made.sqnr_db == pytest.approx(sqnr_db(values_, quantized), abs=0.02)
            assert (made.max_abs, made.count) == (np.abs(values_).max(), values_.size)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_calibrated_on_counters_and_measured_well(
    method: str, bits: int, load: Load
) -> None:
    model = load("gemm_activation")
    feed: Feed = {"x": values(400, 6), "z": values(400, 5)}
    table, _ = calibrated(model, Rules(Widths(bits, bits, bits), method), feed)
    made, hidden = record(table, "hidden"), np.maximum(feed["x"], 0)
    assert made.qtype == QuantType(bits, signed=False)
    assert (made.max_abs, made.count) == (hidden.max(), hidden.size)
    exact, _ = thresholds(make(method), Samples(hidden.reshape(1, -1)), made.qtype)
    assert made.threshold[0] == pytest.approx(exact[0], rel=0.02 if method != "entropy" else 0.5)
    quantized = fake_quantize(hidden, made.scale, made.qtype, made.spec.granularity)
    assert made.sqnr_db == pytest.approx(sqnr_db(hidden, quantized), abs=0.1)


def test_activations_are_unsigned_only_where_no_value_is_negative(load: Load) -> None:
    table, _ = calibrated(load("conv_bias"), all_bits(4))
    signs = {r.name: (r.qtype.signed, r.qtype.narrow) for r in table.records}
    assert signs == {
        "image": (True, False), "hidden": (False, False), "inner": (False, False),
        "kernel1": (True, True), "kernel2": (True, True), "kernel3": (True, True),
    }  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 59), max_size=5).map(sorted),
    st.permutations(range(60)),
    st.sampled_from(METHODS),
    st.sampled_from([2, 4, 8, 16]),
)
def test_pooled_thresholds_do_not_depend_on_order_or_batches(
    ends: list[int], order: list[int], method: str, bits: int
) -> None:
    x, rules = values(60, 6, seed=3), Rules(Widths(bits, bits, bits), method)
    whole = from_batches([x], rules)
    cut = from_batches(np.split(x[order], ends), rules)
    assert whole.threshold.tobytes() == cut.threshold.tobytes()
    assert whole.scale.tobytes() == cut.scale.tobytes()
    assert (whole.sqnr_db, whole.notes) == (cut.sqnr_db, cut.notes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_mean_is_that_of_the_thresholds_of_the_first_batches_alone(method: str, n: int) -> None:
    batches = [values(20, 6, seed=s) * (1 + s) for s in range(5)]
    alone = [from_batches([b], Rules(Widths(4, 4, 4), method)).threshold for b in batches]
    rules = Rules(Widths(4, 4, 4), method, reduction=Reduction("mean", n))
    for keep in (n, 5):
        made = from_batches(batches, rules, keep)
        np.testing.assert_allclose(made.threshold, np.mean(alone[:n], axis=0), rtol=1e-12)


def test_the_mean_of_fewer_batches_than_asked_for_is_that_of_all() -> None:
    batches = [values(20, 6, seed=s) for s in range(3)]
    rules = Rules(method="max", reduction=Reduction("mean", 5))
    expected = np.mean([np.abs(b).max() for b in batches])
    assert from_batches(batches, rules).threshold == pytest.approx(expected, rel=1e-12)


def test_batches_that_are_all_zero_are_left_out_of_the_mean_and_a_note_says_so() -> None:
    batches: list[Array] = [values(20, 6), np.zeros((20, 6)), 3 * values(20, 6)]
    made = from_batches(batches, Rules(method="max", reduction=Reduction("mean")))
    assert made.threshold[0] == pytest.approx(2 * np.abs(values(20, 6)).max(), rel=1e-6)
    assert "all zero in 1 batches: left out of the mean" in made.notes


def test_the_mean_needs_counters_of_single_batches() -> None:
    rules = Rules(reduction=Reduction("mean", 2))
    message = (
        "the observations keep counters of 0 single batches, --reduce mean needs 2: observe again "
        "with it and --save-observations"
    )
    with pytest.raises(ObservationsError, match=f"^{message}$"):
        from_batches([values(4, 6)], rules, keep=0)


def test_a_mean_of_more_batches_than_were_kept_is_not_taken_silently() -> None:
    """Four batches were seen, two kept: a mean of three cannot be had."""
    batches = [values(20, 6, seed=s) for s in range(4)]
    rules = Rules(reduction=Reduction("mean", 3))
    try:
        made = from_batches(batches, rules, keep=2)
    except ObservationsError:
        return
    assert any("batches" in note for note in made.notes)


@pytest.mark.parametrize("reduction", [Reduction(), Reduction("mean")])
@pytest.mark.parametrize("method", METHODS)
def test_an_activation_that_is_zero_throughout_is_noted_and_harmless(
    method: str, reduction: Reduction
) -> None:
    made = from_batches([np.zeros((9, 6))] * 2, Rules(method=method, reduction=reduction))
    assert made.threshold.tolist() == [1.0]
    assert made.sqnr_db is None
    assert any("all zero: no threshold exists, 1 is used" in note for note in made.notes)
    assert "constant: it held one value throughout" in made.notes


@pytest.mark.parametrize("value", [0.7, -300.0, 1e-30])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_activation_is_noted_and_kept(method: str, value: float) -> None:
    rules = Rules(Widths(8, 8), method)
    made = from_batches([np.full((50, 6), value)], rules)
    assert "constant: it held one value throughout" in made.notes
    assert 0 < made.threshold[0] <= abs(np.float32(value))
    array = np.full((1,), abs(value), np.float32)
    kept = fake_quantize(array, made.scale, made.qtype, made.spec.granularity)
    assert kept[0] == pytest.approx(abs(value), rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_of_zeros_is_noted_and_leaves_the_others_alone(method: str, save: Save) -> None:
    weight = values(6, 4)
    full, _ = calibrated(load_model(save(parsed(MAGNITUDE))), Rules(method=method))
    weight[:, 2] = 0
    table, _ = calibrated(
        load_model(save(parsed(MAGNITUDE, {"weight": weight}))), Rules(method=method)
    )
    made, before = record(table, "weight"), record(full, "weight")
    assert made.threshold[2] == 1
    np.testing.assert_array_equal(made.threshold[[0, 1, 3]], before.threshold[[0, 1, 3]])
    assert any(note.startswith("1 of 4 channels: all zero") for note in made.notes)


def test_a_weight_that_is_on_the_grid_has_no_error_and_a_note_says_so(save: Save) -> None:
    weight = np.arange(-12, 12, dtype=np.float32).reshape(6, 4) % 8
    weight[0] = 7
    model = load_model(save(parsed(MAGNITUDE, {"weight": weight})))
    made = record(calibrated(model, Rules(Widths(4, 8, 4), "max"))[0], "weight")
    assert (made.sqnr_db, made.notes) == (None, ("no quantization error at all",))


def test_above_eight_bits_the_source_of_the_figures_is_noted() -> None:
    note = "sqnr_db from the noise model: the counters are too coarse above 8 bits"
    x = values(500, 6)
    for bits in (4, 8, 16):
        made = from_batches([x], Rules(Widths(bits, bits, bits)))
        assert (note in made.notes) == (bits == 16)
    for reduction in (Reduction(), Reduction("mean")):
        snapped = from_batches([x], Rules(Widths(16, 16, 16), reduction=reduction))
        assert snapped.threshold[0] == np.abs(x).max()
    assert snapped.sqnr_db == pytest.approx(
        sqnr_db(np.abs(x), fake_quantize(np.abs(x), snapped.scale, snapped.qtype,
                                         snapped.spec.granularity)), abs=0.5)  # fmt: skip


def test_weights_may_have_a_method_of_their_own(load: Load) -> None:
    rules = dataclasses.replace(all_bits(4), method="octav", weight_method="max")
    table, feed = calibrated(load("conv_bias"), rules)
    largest = np.abs(load("conv_bias").weight("kernel2")).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(record(table, "kernel2").threshold, largest)
    assert record(table, "image").threshold[0] < np.abs(feed["image"]).max()


def test_an_activation_without_a_single_value_is_skipped_with_the_reason(load: Load) -> None:
    model, rules = load("conv_bias"), all_bits(4)
    plan = make_plan(model, rules)
    seen = Counter()
    seen.update(values(8))
    counters = {"image": seen, "hidden": Counter(), "inner": seen}
    table = calibrate(model, Observations(model.sha256, 1, counters), plan, rules)
    assert [(s.name, s.reason) for s in table.skipped] == [
        ("hidden", "no value of it was seen in the data")
    ]
    assert "hidden" not in {r.name for r in table.records}


def test_activations_that_were_not_observed_are_named(load: Load) -> None:
    model, rules = load("conv_bias"), all_bits(4)
    seen = Counter()
    seen.update(values(8))
    with pytest.raises(ObservationsError) as caught:
        calibrate(
            model, Observations(model.sha256, 1, {"hidden": seen}), make_plan(model, rules), rules
        )
    assert str(caught.value) == (
        "activation 'image' and 1 others were not observed: observe again with the present "
        "--target, --only, --exclude and --op-types"
    )


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_a_calibrator_that_fails_is_named_with_the_tensor(
    kind: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(dist: Distribution, _qtype: QuantType, /) -> Array:
        if isinstance(dist, Histogram) == (kind == "activation"):
            raise ZeroDivisionError("oh\nno")
        return dist.max_abs()

    monkeypatch.setattr("calib.calibration.make", lambda _spec: broken)
    name = "kernel1" if kind == "weight" else "image"
    message = rf"'{name}': {re.escape(repr(broken))} failed: oh no"
    with pytest.raises(CalibratorError, match=f"^{message}$"):
        calibrated(load("conv_bias"), all_bits(4))


def test_the_samples_and_the_model_are_told(load: Load) -> None:
    table, feed = calibrated(load("conv_bias"), all_bits(4))
    assert table.model_sha256 == load("conv_bias").sha256
    assert table.n_samples == len(feed["image"]) == 16


@pytest.mark.parametrize("reduction", [Reduction(), Reduction("mean", 2)])
def test_many_tables_at_once_are_those_of_each_alone(load: Load, reduction: Reduction) -> None:
    model = load("conv_bias")
    some = (Rules(Widths(b, b), m, reduction=reduction) for m in METHODS for b in (2, 8, 16))
    jobs = [(make_plan(model, rules), rules) for rules in some]
    feeds = [Batch({"image": values(4, 3, 6, 6, seed=seed)}) for seed in range(3)]
    seen = observe(model, feeds, jobs[0][0].activations, Observing(reduction.kept_batches))
    together = calibrate_each(model, seen, jobs)
    for (plan, rules), table in zip(jobs, together, strict=True):
        alone = calibrate(model, seen, plan, rules)
        assert json.dumps(table.to_json()) == json.dumps(alone.to_json())


@pytest.mark.parametrize("reduction", [Reduction(), Reduction("mean", 2)])
def test_what_is_little_and_asked_less_goes_along_with_more_and_is_answered_the_same(
    reduction: Reduction, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("conv_bias")  # of its three layers, the first and the last have 8 bits
    some = (Rules(Widths(b, b), m, reduction=reduction) for m in METHODS for b in (3, 8))
    jobs = [(make_plan(model, rules), rules) for rules in some]
    feeds = [Batch({"image": values(4, 3, 6, 6, seed=seed)}) for seed in range(3)]
    seen = observe(model, feeds, jobs[0][0].activations, Observing(reduction.kept_batches))
    found, stacks, made = [], list[list[int]](), Register.stacks

    def noted(register: Register, *given: Any) -> Any:
        stacks.append([len(stack) for stack, _ in made(register, *given)])
        return made(register, *given)

    monkeypatch.setattr(Register, "stacks", noted)
    for little in (0, 1 << 16):
        monkeypatch.setattr("calib.calibration._LITTLE", little)
        found.append([table.to_json() for table in calibrate_each(model, seen, jobs)])
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert sum(stacks[0]) == sum(stacks[1])
    assert len(stacks[0]) > len(stacks[1])


def test_of_many_tables_the_one_that_fails_names_the_tensor(load: Load) -> None:
    model, rules = load("conv_bias"), all_bits(4)
    seen = Counter()
    seen.update(values(8))
    plan = make_plan(model, rules)
    observations = Observations(model.sha256, 1, dict.fromkeys(plan.activations, seen))

    def broken(dist: Distribution, _qtype: QuantType, /) -> Array:
        if dist.groups == 1:
            return dist.max_abs()
        raise ValueError("no")

    calibrators = {spec.name: broken for spec in plan.specs}
    with pytest.raises(CalibratorError, match=r"^'kernel1': .*failed: no$"):
        calibrate_with(model, observations, plan, rules, calibrators)


def test_a_third_party_s_calibrator_sees_one_tensor_at_a_time_in_one_thread(load: Load) -> None:
    model = load("conv_bn_relu")
    rules = Rules()
    plan = make_plan(model, rules)
    feed = {"image": values(8, 3, 6, 6)}
    seen = observe(model, [Batch(feed)], plan.activations)
    asked: list[tuple[int, str]] = []

    def largest(dist: Distribution, _qtype: QuantType, /) -> np.ndarray[Any, Any]:
        asked.append((dist.groups, threading.current_thread().name))
        return np.full(dist.groups, dist.max_abs().max())  # groups mixed up

    calibrators = {spec.name: largest for spec in plan.specs}
    table = calibrate_with(model, seen, plan, rules, calibrators)
    main = threading.current_thread().name
    assert sorted(asked) == sorted((r.threshold.size, main) for r in table.records)
    for found in table.records:
        if found.spec.kind == "activation":
            assert found.threshold == found.max_abs
