"""Every method at every width from one pass: rows are what octav-calibrate would give."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import load_digits
from conftest import Save
from models import parsed, values
from survey_models import (
    BARE,
    DATA,
    LINEAR,
    MODEL,
    SPLIT,
    arrays,
    row_of,
    thresholds,
)

from calib import calibrators
from calib.calibrators import Calibrator
from calib.distribution import Distribution, Floats
from calib.errors import CalibratorError, ModelError, OptionError
from calib.pipeline import calibrate_model
from calib.qtypes import QuantType
from calib.rules import Reduction, Rules, Selection, TensorRule, Widths
from calib.survey import Candidates, Survey, gain
from calib.surveying import compare_methods


@pytest.fixture
def linear(save: Save) -> Path:
    return save(parsed(LINEAR))


@pytest.fixture(scope="module")
def survey() -> Survey:
    """Of the digits model, with everything in it."""
    return compare_methods(
        MODEL, DATA, Candidates(bits=(8, 3), methods=("octav", "max")), run=SPLIT
    )


# --- rows ---------------------------------------------------------------------------------------


def test_rows_stand_by_width_in_the_order_of_the_candidates(survey: Survey) -> None:
    assert [(row.method, row.bits) for row in survey.rows] == [
        ("octav", 8),
        ("max", 8),
        ("octav", 3),
        ("max", 3),
    ]


@pytest.mark.parametrize(("method", "bits"), [("octav", 3), ("max", 3), ("octav", 8), ("max", 8)])
def test_a_row_is_what_octav_calibrate_gives(
    survey: Survey, tmp_path: Path, method: str, bits: int
) -> None:
    rules = Rules(widths=Widths(bits, bits), method=method)
    made = calibrate_model(MODEL, DATA, rules, tmp_path / "q.onnx", SPLIT)
    row = row_of(survey, method, bits)
    assert thresholds(row.table) == thresholds(made.table)
    assert row.comparison == made.comparison
    assert row.sqnr_db == made.comparison.output_sqnr_db
    assert survey.held_out
    assert made.held_out


def test_the_gain_is_what_a_method_has_above_max(survey: Survey) -> None:
    for row in survey.rows:
        base = row_of(survey, "max", row.bits).sqnr_db
        assert row.gain_db is not None
        assert row.sqnr_db is not None
        assert base is not None
        assert row.gain_db == row.sqnr_db - base
        assert row.seconds > 0
    assert row_of(survey, "max", 3).gain_db == 0


def test_without_max_there_is_nogain(linear: Path) -> None:
    candidates = Candidates(bits=(4,), methods=("octav", "mse"), sensitivity=False)
    assert [row.gain_db for row in compare_methods(linear, arrays(), candidates).rows] == [None] * 2


def test_integer_outputs_have_no_sqnr(save: Save) -> None:
    path = save(
        parsed("""(float[N,6] x) => (int64[N] y) <float[6,4] w> {
      a = MatMul(x, w)
      y = ArgMax<axis=1, keepdims=0>(a) }""")
    )
    found = compare_methods(path, arrays(), Candidates(bits=(4,), methods=("octav", "max")))
    assert [row.sqnr_db for row in found.rows] == [None] * 2
    assert [row.gain_db for row in found.rows] == [None] * 2
    assert (found.sensitivity, found.proposals) == (None, ())
    assert "sensitivity was not measured: no output of the model is floating-point" in found.notes


def test_where_nothing_is_lost_nothing_is_gained() -> None:
    assert gain(math.inf, math.inf) == 0.0
    assert gain(math.inf, 3.0) == math.inf
    assert gain(None, 3.0) is None


@pytest.mark.parametrize(
    "rules",
    [
        Rules(widths=Widths(edge=3), weight_granularity="per-tensor"),
        Rules(selection=Selection(exclude="shortcut")),
        Rules(overrides=(TensorRule("conv", kind="activation", bits=5, method="max"),)),
        Rules(reduction=Reduction("mean", 3)),
        Rules(widths=Widths(2, 6), method="entropy", weight_method="mse"),
    ],
    ids=["edges", "exclude", "rule", "mean", "overruled"],
)
def test_rules_of_the_user_hold_in_every_row(tmp_path: Path, rules: Rules) -> None:
    candidates = Candidates((3,), ("octav",), sensitivity=False)
    found = compare_methods(MODEL, DATA, candidates, rules, SPLIT)
    for row in found.rows:
        widths = Widths(row.bits, row.bits, rules.widths.edge)
        own = replace(rules, widths=widths, method=row.method, weight_method=None)
        made = calibrate_model(MODEL, DATA, own, tmp_path / "q.onnx", replace(SPLIT, force=True))
        assert thresholds(row.table) == thresholds(made.table)
        assert row.comparison == made.comparison


def test_first_and_last_layers_have_8_bits_unless_told_otherwise(linear: Path) -> None:
    for edge, wanted in ((None, 8), (3, 3)):
        found = compare_methods(linear, arrays(), BARE, Rules(widths=Widths(edge=edge)))
        records = row_of(found, "octav", 3).table.records
        assert {record.qtype.bits for record in records} == {wanted}


# --- what fails ---------------------------------------------------------------------------------


def failing(_dist: Distribution, qtype: QuantType, /) -> Floats:
    if qtype.bits == 3:
        raise ValueError("three is\ntoo few")
    return np.ones(_dist.groups)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Calibrator:
    monkeypatch.setitem(calibrators._BUILT_IN, "failing", failing)
    return failing


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("methods", [("failing", "octav"), ("octav", "failing")])
def test_a_method_that_fails_is_a_note_and_the_others_stay(
    linear: Path, methods: tuple[str, ...]
) -> None:
    rules = Rules(widths=Widths(edge=3))
    found = compare_methods(linear, arrays(), Candidates((3,), methods), rules)
    assert [row.method for row in found.rows] == ["octav"]
    (note,) = [note for note in found.notes if "failing at 3 bits" in note]
    assert "three is" in note
    assert found.detailed == ("octav", 3)
    assert found.sensitivity is not None
    assert found.confidence is not None


@pytest.mark.usefixtures("plugin")
def test_where_every_method_fails_that_is_an_error(linear: Path) -> None:
    candidates = Candidates((3,), ("failing",))
    with pytest.raises(CalibratorError, match=r"failing at 3 bits: .*three is"):
        compare_methods(linear, arrays(), candidates, Rules(widths=Widths(edge=3)))


@pytest.mark.usefixtures("plugin")
def test_details_are_about_the_lowest_width_that_works(linear: Path) -> None:
    rules = Rules(
        widths=Widths(edge=None), overrides=(TensorRule("first", bits=None, method="max"),)
    )
    candidates = Candidates((3, 4), ("failing",))
    found = compare_methods(linear, arrays(), candidates, replace(rules, widths=Widths(edge=4)))
    assert [row.bits for row in found.rows] == [3, 4]


def test_a_row_that_onnxruntime_cannot_run_is_a_note(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.reference import Reference

    plain, seen = Reference.compare, 0

    def compare(self: Reference, quantized: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 1:
            raise ModelError("onnxruntime cannot load the model")
        return plain(self, quantized)

    monkeypatch.setattr(Reference, "compare", compare)
    found = compare_methods(linear, arrays(), BARE)
    first, *others = found.rows
    assert (first.comparison, first.sqnr_db, first.gain_db) == (None, None, None)
    assert first.notes == ("octav at 3 bits: onnxruntime cannot load the model",)
    assert first.notes[0] in found.notes
    assert all(row.comparison is not None for row in others)


def test_a_quantized_model_that_gives_nan_is_a_note(save: Save) -> None:
    x, w = np.abs(values(32, 6)), np.abs(values(6, 4)) + np.float32(0.01)
    shift = np.full(4, (x @ w).min() * 0.999, np.float32)
    path = save(
        parsed(
            """(float[N,6] x) => (float[N,4] y) {
      a = MatMul(x, w)
      b = Sub(a, shift)
      y = Sqrt(b) }""",
            {"w": w, "shift": shift},
        )
    )
    candidates = Candidates((2, 16), ("octav",))
    found = compare_methods(path, [{"x": x}], candidates, Rules(widths=Widths(edge=2)))
    assert any("octav at 2 bits: output 'y'" in note and "NaN" in note for note in found.notes)
    assert found.sensitivity is not None


# --- candidates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "methods", "message"),
    [
        ((4, 8, 4), ("max",), "bits: 4 is given twice"),
        ((4,), ("max", "octav", "max"), "methods: max is given twice"),
        ((), ("max",), "bits must not be empty"),
        ((4,), (), "methods must not be empty"),
        ((9,), ("max",), "bits must be one of 2 to 8 or 16, got 9"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(
    bits: tuple[int, ...], methods: tuple[str, ...], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        Candidates(bits, methods)
    assert message in str(caught.value)


def test_an_unknown_method_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(CalibratorError, match="No calibrator named 'octave'"):
        Candidates(methods=("octave",))


def test_the_data_of_the_digits_is_what_the_rows_were_compared_on(survey: Survey) -> None:
    images, labels = load_digits()
    assert len(images) == 796
    row = row_of(survey, "octav", 8)
    assert row.comparison is not None
    assert row.comparison.n_samples == len(labels) - 256
    assert row.comparison.top1 is not None
