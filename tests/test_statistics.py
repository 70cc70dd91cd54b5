"""Values that are hard on statistics, through the whole flow: what is done and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Save, all_bits
from models import Array, Feed, parsed, run, values

from calib import Calibration, Rules, Widths, calibrate_model
from calib.calibrators import names as methods
from calib.errors import DataError, ModelError
from calib.table import TensorRecord

LAYER = """(float[N,6] x) => (float[N,4] y) <float[6,4] w> {
  hidden = Relu(x)
  y = MatMul(hidden, w) }"""
METHODS = [name for name in methods() if name in ("octav", "percentile", "mse", "max", "entropy")]


def calibrated(path: Path, feeds: list[Feed], method: str = "octav") -> Calibration:
    return calibrate_model(path, feeds, Rules(widths=Widths(8, 8), method=method))


def record_of(result: Calibration, name: str) -> TensorRecord:
    (record,) = (r for r in result.table.records if r.name == name)
    return record


def layer(save: Save, weight: Array | None = None) -> Path:
    return save(parsed(LAYER, {} if weight is None else {"w": weight}))


COMPRESSED = """(float[N,6] x, bool[N] kept) => (float[M,4] y) <float[6,4] w> {
  some = Compress<axis=0>(x, kept)
  y = MatMul(some, w) }"""


def test_a_tensor_that_is_empty_in_some_batches_is_calibrated_on_the_others(save: Save) -> None:
    x = values(4, 6)
    none, all_ = np.zeros(4, bool), np.ones(4, bool)
    feeds = [{"x": x, "kept": none}, {"x": x, "kept": all_}, {"x": 9 * x, "kept": none}]
    result = calibrated(save(parsed(COMPRESSED)), feeds)
    record = record_of(result, "some")
    assert record.count == x.size
    assert record.max_abs == np.abs(x).max()


def test_a_tensor_of_which_no_value_is_seen_stays_float_and_is_listed(save: Save) -> None:
    feeds = [{"x": values(4, 6), "kept": np.zeros(4, bool)}]
    result = calibrated(save(parsed(COMPRESSED)), feeds)
    assert [r.name for r in result.table.records] == ["w"]
    reasons = {skipped.name: skipped.reason for skipped in result.table.skipped}
    assert reasons == {"some": "no value of it was seen in the data"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.7, -300.0, 1e-30, 1e30])
def test_a_constant_tensor_is_quantized_and_it_is_said(
    value: float, method: str, save: Save
) -> None:
    path = save(parsed(LAYER.replace("Relu", "Identity")))
    x = np.full((8, 6), value, np.float32)
    result = calibrated(path, [{"x": x}], method)
    record = record_of(result, "hidden")
    assert any(note.startswith("constant") for note in record.notes)
    if value:
        assert record.threshold[0] == pytest.approx(abs(value), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_zeros_are_noted_and_leave_the_others_as_they_are(
    method: str, save: Save
) -> None:
    weight = values(6, 4)
    plain = record_of(calibrated(layer(save, weight), [{"x": values(8, 6)}], method), "w")
    zeroed = weight.copy()
    zeroed[:, 2] = [0, -0.0, 0, 0, -0.0, 0]
    result = calibrated(layer(save, zeroed), [{"x": values(8, 6)}], method)
    record = record_of(result, "w")
    others = [0, 1, 3]
    assert np.array_equal(record.threshold[others], plain.threshold[others])
    assert record.threshold[2] == 1
    assert any("1 of 4 channels: all zero" in note for note in record.notes)
    assert not run(result.output, {"x": values(8, 6)})["y"][:, 2].any()


def test_minus_zero_does_not_make_a_tensor_signed(save: Save) -> None:
    path = save(parsed(LAYER.replace("Relu", "Identity")))
    x = np.abs(values(8, 6))
    x[0] = -0.0
    assert not record_of(calibrated(path, [{"x": x}]), "hidden").qtype.signed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 3e38])
def test_values_of_extreme_magnitude_are_quantized_as_well_as_others(
    magnitude: float, method: str, save: Save
) -> None:
    path = save(parsed("(float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }",
                       {"w": np.eye(6, 4, dtype=np.float32)}))  # fmt: skip
    x = (np.random.default_rng(0).uniform(-1, 1, (64, 6)) * magnitude).astype(np.float32)
    result = calibrated(path, [{"x": x}], method)
    record = record_of(result, "x")
    assert 0 < record.threshold[0] <= np.abs(x).max()
    assert np.isfinite(record.scale).all()
    # At the end of float32's range, scales cannot be smaller than its smallest normal number.
    assert result.comparison.output_sqnr_db > (-1 if magnitude < 1e-36 else 35)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_sample_activation_or_weight(
    what: float, save: Save
) -> None:
    x = values(8, 6)
    x[5, 1] = what
    with pytest.raises(DataError, match=r"'x' holds .* in sample 5"):
        calibrated(layer(save), [{"x": x}])
    overflow = save(parsed(LAYER.replace("Relu", "Exp")))
    with pytest.raises(ModelError, match="activation 'hidden' becomes infinite in the batch"):
        calibrated(overflow, [{"x": np.full((8, 6), 1000, np.float32)}])
    weight = values(6, 4)
    weight[0, 0] = what
    with pytest.raises(ModelError, match="weight 'w' holds NaN or infinity"):
        calibrated(layer(save, weight), [{"x": values(8, 6)}])


def test_sixteen_bits_keep_what_is_there_when_magnitudes_differ_by_channel(save: Save) -> None:
    weight = (values(6, 4) * [1e-20, 1e-3, 1, 1e10]).astype(np.float32)
    path = layer(save, weight)
    feed = {"x": np.abs(values(32, 6))}
    output = calibrate_model(path, [feed], all_bits(16)).output
    found, wanted = run(output, feed)["y"], run(path, feed)["y"]
    assert np.allclose(
        found / np.abs(wanted).max(axis=0), wanted / np.abs(wanted).max(axis=0), atol=1e-3
    )
