"""onnxruntime's own calibrators: their ranges, on our grid, in tables that can be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, all_bits
from models import MODELS, feed_for, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.capture import Runtime
from calib.counter import Counter
from calib.data import open_data
from calib.distribution import Histogram
from calib.errors import DataError, ModelError, OptionError
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.observing import observe
from calib.planning import Plan, make_plan
from calib.rivals import RIVALS, Ranges, rival_ranges, rival_table
from calib.table import CalibrationTable
from calib.verification import verify
from calib.write import write_qdq

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"
N_SAMPLES = 100  # three feeds of 32 and one of 4
MINMAX, ENTROPY, PERCENTILE = RIVALS

Batches = Callable[[], Iterator[Batch]]


@dataclasses.dataclass
class Digits:
    model: Model
    batches: Batches
    plan: Plan
    observations: Observations
    ranges: dict[str, Ranges]


@pytest.fixture(scope="module")
def digits() -> Digits:
    model = load_model(DIGITS / "digits.onnx")
    data, plan = open_data(model, DIGITS / "digits.npz"), make_plan(model, all_bits(4))

    def batches() -> Iterator[Batch]:
        return iter(data.batches(0, N_SAMPLES))

    observations = observe(model, batches(), plan.activations)
    ranges = rival_ranges(model, batches, plan.activations)
    return Digits(model, batches, plan, observations, ranges)


def largest(counter: Counter) -> float:
    return max(abs(counter.min), abs(counter.max))


def thresholds(table: CalibrationTable) -> dict[str, float]:
    return {r.name: float(r.threshold.max()) for r in table.records if r.spec.kind == "activation"}


def test_each_calibrator_gives_a_range_for_exactly_the_activations_asked_for(
    digits: Digits,
) -> None:
    assert list(digits.ranges) == list(RIVALS)
    for ranges in digits.ranges.values():
        assert sorted(ranges) == sorted(digits.plan.activations)
    (one,) = rival_ranges(digits.model, digits.batches, ["image"], methods=[MINMAX]).values()
    assert list(one) == ["image"]


def test_minmax_is_the_exact_maximum_of_our_observations(digits: Digits) -> None:
    ranges = digits.ranges[MINMAX]
    for name, counter in digits.observations.counters.items():
        low, high = ranges[name]
        assert high == -low == pytest.approx(largest(counter), rel=1e-5)
    table = rival_table(digits.model, digits.observations, digits.plan, ranges, MINMAX)
    ours = {name: largest(counter) for name, counter in digits.observations.counters.items()}
    assert thresholds(table) == pytest.approx(ours, rel=1e-5)


def test_percentile_is_ours_at_the_same_percentage_but_for_a_bin(digits: Digits) -> None:
    rules = dataclasses.replace(all_bits(4), method="percentile:99.999")
    plan = make_plan(digits.model, rules)
    ours = thresholds(calibrate(digits.model, digits.observations, plan, rules))
    table = rival_table(
        digits.model, digits.observations, digits.plan, digits.ranges[PERCENTILE], PERCENTILE
    )
    for name, found in thresholds(table).items():
        width = largest(digits.observations.counters[name]) / 2048
        rounding = found * 2**-8  # of a bfloat16 code of ours
        assert abs(found - ours[name]) <= 2 * width + rounding


def test_entropy_is_positive_and_at_most_the_maximum(digits: Digits) -> None:
    table = rival_table(
        digits.model, digits.observations, digits.plan, digits.ranges[ENTROPY], ENTROPY
    )
    found = thresholds(table)
    for name, counter in digits.observations.counters.items():
        assert 0 < found[name] <= largest(counter) * (1 + 1e-6)
    assert any(found[n] < 0.9 * largest(c) for n, c in digits.observations.counters.items())


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_has_their_thresholds_our_maximum_for_weights_and_can_be_written(
    bits: int, method: str, digits: Digits, tmp_path: Path
) -> None:
    plan = make_plan(digits.model, all_bits(bits))
    ranges = digits.ranges[method]
    table = rival_table(digits.model, digits.observations, plan, ranges, method)
    assert table.n_samples == N_SAMPLES
    assert [r.name for r in table.records] == [spec.name for spec in plan.specs]
    rules = dataclasses.replace(all_bits(bits), weight_method="max")
    ours = calibrate(digits.model, digits.observations, make_plan(digits.model, rules), rules)
    for made, own in zip(table.records, ours.records, strict=True):
        assert made.qtype == own.qtype
        assert made.spec.granularity == own.spec.granularity
        if made.spec.kind == "weight":
            assert made.spec.method == "max"
            np.testing.assert_array_equal(made.threshold, own.threshold)
            assert made.sqnr_db == own.sqnr_db
        else:
            assert made.spec.method == method
            low, high = ranges[made.name]
            assert made.threshold[0] == pytest.approx(max(-low, high), rel=1e-5)
            dist = Histogram(digits.observations.counters[made.name])
            noise = dist.mse(made.threshold, made.qtype)[0]
            assert made.sqnr_db == pytest.approx(10 * np.log10(dist.rms()[0] ** 2 / noise))
    path = tmp_path / "out.onnx"
    quantized = write_qdq(digits.model, table)
    quantized.save(path)
    verify(digits.model, quantized, path, next(digits.batches()), Runtime())


def test_nothing_is_printed_or_left_behind(
    digits: Digits,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rival_ranges(digits.model, digits.batches, digits.plan.activations)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_the_ranges_that_were_observed(name: str, load: Load) -> None:
    model = load(name)
    plan = make_plan(model, all_bits(8))
    feed = feed_for(MODELS[name](), n=4)
    seen = observe(model, [Batch(feed)], plan.activations)
    found = rival_ranges(model, lambda: [Batch(feed)], plan.activations, methods=[MINMAX])
    assert sorted(found[MINMAX]) == sorted(plan.activations)
    for tensor, (low, high) in found[MINMAX].items():
        counter = seen.counters[tensor]
        expected = largest(counter)
        assert max(-low, high) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("most_inline_bytes", [0, 1_500_000_000])
def test_external_data_is_found(
    most_inline_bytes: int, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.rivals._MOST_INLINE_BYTES", most_inline_bytes)
    path = tmp_path / "digits.onnx"
    onnx.save(onnx.load(DIGITS / "digits.onnx"), path, save_as_external_data=True, size_threshold=0)
    model = load_model(path)
    ranges = rival_ranges(model, digits.batches, digits.plan.activations, methods=[MINMAX])
    assert ranges[MINMAX] == digits.ranges[MINMAX]
    kernel = next(spec.name for spec in digits.plan.specs if spec.kind == "weight")
    np.testing.assert_array_equal(model.weight(kernel), digits.model.weight(kernel))


@pytest.mark.parametrize("top", [1.001, 1.999, 0.02, 3e4])
@pytest.mark.parametrize("method", RIVALS)
def test_float16_has_ranges_from_fewer_bins(method: str, top: float) -> None:
    text = """(float16[N,4] x) => (float16[N,4] y) {
      inner = Relu(x)
      y = Add(inner, x)
    }"""
    model = Model(Path("m"), "", 0, ir.from_proto(parsed(text)), ())
    x = np.linspace(-top, top, 800).reshape(-1, 4).astype(np.float16)
    ranges = rival_ranges(model, lambda: [Batch({"x": x})], ["inner", "x"], methods=[method])
    for low, high in ranges[method].values():
        assert 0 < max(abs(low), abs(high)) <= x.max()


def test_states_are_fed_back_to_their_calibrators_too() -> None:
    text = """(float[1,4] x, float[1,4] state) => (float[1,4] y, float[1,4] next)
    <float[4,4] weight> {
      next = Add(x, state)
      y = MatMul(next, weight)
    }"""
    model = Model(Path("m"), "", 0, ir.from_proto(parsed(text)), (), {"state": "next"})
    steps = [Batch({"x": np.abs(values(1, 4, seed=n))}, restart=n == 0) for n in range(6)]
    names = ["next"]
    seen = observe(model, steps, names)
    for method in (MINMAX, PERCENTILE):
        (low, high) = rival_ranges(model, lambda: steps, names, methods=[method])[method]["next"]
        assert max(-low, high) == pytest.approx(largest(seen.counters["next"]), rel=1e-3)


def test_an_activation_without_a_range_stays_float_with_the_reason(digits: Digits) -> None:
    ranges = {n: r for n, r in digits.ranges[MINMAX].items() if n != "image"}
    table = rival_table(digits.model, digits.observations, digits.plan, ranges, MINMAX)
    assert "image" not in {r.name for r in table.records}
    (skipped,) = (s for s in table.skipped if s.name == "image")
    assert skipped.reason == "onnxruntime:minmax gives no range for it"


def test_a_threshold_above_the_observed_maximum_is_noted(digits: Digits) -> None:
    ranges = {**digits.ranges[MINMAX], "image": (-3.0, 2.0)}
    table = rival_table(digits.model, digits.observations, digits.plan, ranges, MINMAX)
    record = next(r for r in table.records if r.name == "image")
    assert record.threshold[0] == record.max_abs
    assert "the calibrator's threshold is above the maximum: the maximum is used" in record.notes


# --- errors ---------------------------------------------------------------------------------------


def test_another_name_is_refused(digits: Digits) -> None:
    with pytest.raises(OptionError) as caught:
        rival_ranges(digits.model, digits.batches, ["image"], methods=["onnxruntime:mse"])
    assert str(caught.value) == (
        "no calibrator 'onnxruntime:mse' of onnxruntime's, only onnxruntime:minmax, "
        "onnxruntime:entropy, onnxruntime:percentile"
    )


@pytest.mark.parametrize("method", RIVALS)
def test_what_onnxruntime_raises_is_one_line(method: str, digits: Digits) -> None:
    wrong = Batch({"image": values(2, 1, 3, 3)})
    with pytest.raises(ModelError) as caught:
        rival_ranges(digits.model, lambda: [wrong], ["image"], methods=[method])
    message = str(caught.value)
    assert message.startswith(f"{method} fails on this model or data: ")
    assert "\n" not in message


@pytest.mark.parametrize("method", RIVALS)
def test_no_data_is_one_line(method: str, digits: Digits) -> None:
    with pytest.raises(DataError, match=r"^the calibration data holds no samples$"):
        rival_ranges(digits.model, list, ["image"], methods=[method])
