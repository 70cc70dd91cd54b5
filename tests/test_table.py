"""The calibration table: plain values that strict JSON can hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import Load, all_bits, calibrated
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS

from calib.errors import ModelError
from calib.granularity import PerChannel, PerTensor
from calib.graph import Skipped
from calib.planning import TensorSpec
from calib.qtypes import QuantType
from calib.rules import Rules, Selection
from calib.table import SCHEMA, CalibrationTable, TensorRecord, decibels, dumps

FIELDS = {
    "name", "kind", "bits", "signed", "granularity", "threshold", "scale", "zero_point",
    "max_abs", "sqnr_db", "notes",
}  # fmt: skip
POSITIVE = st.floats(1e-30, 1e30)


def record(name: str, sqnr_db: float | None, *thresholds: float) -> TensorRecord:
    granularity = PerTensor() if len(thresholds) < 2 else PerChannel(0)
    threshold = np.array(thresholds or [1.0])
    spec = TensorSpec(name, "weight", 4, granularity, ("layer",))
    scale = (threshold / 7).astype(np.float32)
    return TensorRecord(spec, QuantType(4, True, True), threshold, scale, 2.0, 9, sqnr_db)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_strict_json_with_a_row_for_every_tensor(name: str, load: Load) -> None:
    rules = Rules(selection=Selection(exclude="second")) if name == "conv_bias" else all_bits(4)
    table, _ = calibrated(load(name), rules)
    document = table.with_manifest({"options": {"x": 1}}).to_json()
    read = json.loads(dumps(document), parse_constant=pytest.fail)
    assert read == document
    assert read["schema"] == SCHEMA
    assert read["options"] == {"x": 1}
    assert read["n_samples"] == table.n_samples
    assert [row["name"] for row in read["tensors"]] == [r.name for r in table.records]
    assert read["skipped"] == [{"name": s.name, "reason": s.reason} for s in table.skipped]
    for row, made in zip(read["tensors"], table.records, strict=True):
        assert set(row) >= FIELDS
        assert (row["kind"], row["bits"]) == (made.spec.kind, made.spec.bits)
        assert (row["signed"], row["zero_point"]) == (made.qtype.signed, 0)
        assert np.array_equal(np.ravel(row["threshold"]), made.threshold)
        assert np.array_equal(np.float32(np.ravel(row["scale"])), made.scale)
        per_channel = isinstance(made.spec.granularity, PerChannel)
        assert isinstance(row["threshold"], list) == isinstance(row["scale"], list) == per_channel
        assert row["granularity"].startswith("per-channel(axis=" if per_channel else "per-tensor")


def test_one_channel_is_a_list_still() -> None:
    one = record("w", None, 1.0)
    spec = TensorSpec("w", "weight", 4, PerChannel(0), ())
    single = TensorRecord(spec, one.qtype, one.threshold, one.scale, 2.0, 9, None)
    assert (one.to_json()["threshold"], single.to_json()["threshold"]) == (1.0, [1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_never_written(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"a": [bad]})


def test_json_can_be_indented_for_people() -> None:
    assert dumps({"a": 1}) == '{"a": 1}'
    assert dumps({"a": 1}, indent=2) == '{\n  "a": 1\n}'


@given(st.lists(st.none() | st.floats(-50, 150), max_size=8), st.integers(0, 9))
def test_the_worst_records_are_those_of_lowest_sqnr_where_one_is_known(
    sqnrs: list[float | None], n: int
) -> None:
    records = tuple(record(str(i), db) for i, db in enumerate(sqnrs))
    worst = CalibrationTable("", 1, records, ()).worst(n)
    assert [r.sqnr_db for r in worst] == sorted(db for db in sqnrs if db is not None)[:n]


def test_another_models_table_is_refused(load: Load) -> None:
    model = load("tied")
    table = CalibrationTable("f" * 64, 1, (), ())
    with pytest.raises(ModelError) as caught:
        table.check_model(model)
    assert str(caught.value) == (
        f"{model.path}: the calibration table belongs to another model (sha256 ffffffffffff..., "
        f"this one {model.sha256[:12]}...)"
    )
    CalibrationTable(model.sha256, 1, (), ()).check_model(model)


def test_a_manifest_is_put_on_a_copy() -> None:
    skipped = (Skipped("node", "too odd"),)
    table = CalibrationTable("", 1, (record("w", 3.0),), skipped)
    manifest: dict[str, object] = {"options": {}}
    other = table.with_manifest(manifest)
    manifest["late"] = {}
    assert (dict(table.manifest), dict(other.manifest)) == ({}, {"options": {}})
    assert (other.records, other.skipped) == (table.records, table.skipped)


@given(POSITIVE, POSITIVE)
def test_decibels_are_ten_times_the_logarithm(signal: float, noise: float) -> None:
    found = decibels(signal, noise)
    assert found is not None
    assert found == pytest.approx(10 * (math.log10(signal) - math.log10(noise)), abs=1e-9)


def test_without_signal_or_noise_there_are_no_decibels() -> None:
    assert decibels(0, 1) is decibels(1, 0) is decibels(0, 0) is None
