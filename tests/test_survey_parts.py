"""What a survey reads, how often, and its parts besides the rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Save
from models import Array, parsed, values
from survey_models import (
    BARE,
    DATA,
    LINEAR,
    MODEL,
    RUNNING_SUM,
    SPLIT,
    arrays,
    refused,
    row_of,
    thresholds,
)

from calib.errors import DataError, ModelError
from calib.pipeline import calibrate_model
from calib.report.surveyed import survey_document
from calib.rivals import RIVALS, rival_ranges
from calib.rules import Rules, Widths
from calib.run import Run
from calib.survey import Candidates, Survey
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


# --- the data -----------------------------------------------------------------------------------


class Counted:
    """An iterable that says how often, and how far, it was gone through."""

    def __init__(self, batches: list[dict[str, Array]]):
        self.batches, self.passes, self.given = batches, 0, 0

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


def test_observing_goes_over_the_data_once_whatever_is_compared(linear: Path) -> None:
    one, many = Counted(arrays()), Counted(arrays())
    compare_methods(linear, one, Candidates((4,), ("max",), sensitivity=False))
    candidates = Candidates((3, 4, 8), ("octav", "mse", "max"), sensitivity=False)
    compare_methods(linear, many, candidates)
    # Once to observe, once for the float model, once for each row.
    assert (one.passes, many.passes) == (3, 2 + 9)


def test_data_that_can_be_gone_through_once_is_compared_on_its_first_batch(linear: Path) -> None:
    found = compare_methods(linear, iter(arrays()), Candidates((4,), ("octav", "max")))
    again = compare_methods(linear, arrays(), Candidates((4,), ("octav", "max")))
    for row, other in zip(found.rows, again.rows, strict=True):
        assert thresholds(row.table) == thresholds(other.table)
        assert row.comparison is not None
        assert row.comparison.n_samples == 8
    assert found.sensitivity is not None
    assert found.sensitivity.n_samples == 8


def test_onnxruntimes_calibrators_refuse_data_that_can_be_gone_through_once(linear: Path) -> None:
    read = Counted(arrays())
    candidates = Candidates((4,), ("octav",), onnxruntime=True)
    message = refused(linear, iter(read), candidates)
    assert message == "with-onnxruntime needs data that can be gone through again"
    assert read.given == 0, "it says so before it begins"


def test_without_data_there_is_a_warning(linear: Path) -> None:
    found = compare_methods(linear, None, BARE)
    (warning,) = found.warnings
    assert warning.startswith("NO DATA: activations were calibrated, and the models compared on")
    assert not compare_methods(linear, arrays(), BARE).warnings


def test_saved_observations_without_data_say_what_was_made_up(linear: Path, tmp_path: Path) -> None:
    seen = compare_methods(linear, arrays(), BARE).observations
    seen.save(tmp_path / "seen.npz")
    found = compare_methods(linear, None, BARE, run=Run(observations=tmp_path / "seen.npz"))
    assert found.warnings == ("NO DATA: the models were compared on made-up inputs; give --data",)


def test_saved_observations_give_the_same_rows(survey: Survey, tmp_path: Path) -> None:
    survey.observations.save(tmp_path / "seen.npz")
    again = compare_methods(
        MODEL, DATA, survey.candidates, run=Run(observations=tmp_path / "seen.npz")
    )
    assert again.held_out
    for row, other in zip(survey.rows, again.rows, strict=True):
        assert thresholds(row.table) == thresholds(other.table)
        assert row.comparison == other.comparison
    assert again.sensitivity == survey.sensitivity
    assert again.confidence == survey.confidence


def test_sensitivity_is_measured_on_calibration_samples_alone(linear: Path) -> None:
    good, strange = arrays(2), [{"x": 100 * batch["x"]} for batch in arrays(3)]
    candidates = Candidates((3,), ("octav",))
    rules = Rules(widths=Widths(edge=3))
    found = compare_methods(linear, [*good, *strange], candidates, rules, Run(samples=16))
    alone = compare_methods(linear, good, candidates, rules)
    assert found.sensitivity is not None
    assert found.sensitivity.n_samples == 16
    assert found.sensitivity == alone.sensitivity
    assert found.held_out


def test_nan_in_held_out_data_names_the_sample_of_all_data(linear: Path) -> None:
    batches = arrays()
    batches[3]["x"][5, 0] = np.nan
    message = refused(linear, batches, BARE, run=Run(samples=16))
    assert "sample 29" in message


def test_no_samples_are_an_error(linear: Path) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        compare_methods(linear, [], BARE)


def test_state_is_fed_back_in_every_part(save: Save, tmp_path: Path) -> None:
    path = save(parsed(RUNNING_SUM))
    run = Run(feedback={"state": "next"})
    steps = [{"x": step} for step in values(12, 1, 6)]
    rules = Rules(widths=Widths(edge=4))
    found = compare_methods(path, steps, Candidates((4,), ("octav", "max")), rules, run)
    assert found.sensitivity is not None
    for row in found.rows:
        own = Rules(widths=Widths(4, 4, 4), method=row.method)
        made = calibrate_model(path, steps, own, tmp_path / f"{row.method}.onnx", run)
        assert row.comparison == made.comparison
    assert found.sensitivity.base_db == pytest.approx(found.rows[0].sqnr_db, abs=0.01)


# --- the parts ----------------------------------------------------------------------------------


def test_a_model_that_is_too_large_has_no_sensitivity_but_a_note(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.surveying._MOST_BYTES", 100)
    found = compare_methods(linear, arrays(), Candidates((4,), ("octav",)))
    assert found.sensitivity is None
    assert found.proposals == ()
    (note,) = [note for note in found.notes if "sensitivity" in note]
    assert note.startswith("sensitivity was not measured: a model beyond")
    assert found.confidence is not None


def test_confidence_is_there_from_two_batches_on(linear: Path) -> None:
    assert compare_methods(linear, arrays(1), BARE).confidence is None
    found = compare_methods(linear, arrays(2), BARE).confidence
    assert found is not None
    assert found.n_samples == (8, 8)
    assert {tensor.name for tensor in found.tensors} == {"x", "hidden"}


def test_confidence_is_about_the_first_method_at_the_lowest_width(survey: Survey) -> None:
    assert survey.detailed == ("octav", 3)
    assert survey.confidence is not None
    table = row_of(survey, "octav", 3).table
    for tensor in survey.confidence.tensors:
        assert thresholds(table)[tensor.name] == [tensor.all]


def test_proposals_state_what_they_bring_on_the_samples_of_the_rows(survey: Survey) -> None:
    row = row_of(survey, "octav", 3)
    assert survey.wide_bits == 8
    for measured in survey.proposals:
        assert measured.before == row
        before, after = row.comparison, measured.after.comparison
        assert before is not None
        assert after is not None
        assert after.n_samples == before.n_samples == 540
        assert after.output_sqnr_db > before.output_sqnr_db


def test_the_stages_are_timed_and_shown_one_at_a_time(linear: Path) -> None:
    open_bars: list[str] = []
    seen: list[str] = []

    @contextmanager
    def progress(stage: str, _total: int | None) -> Iterator[Any]:
        assert not open_bars, "two bars at once"
        open_bars.append(stage)
        seen.append(stage)
        yield lambda _n: None
        open_bars.pop()

    found = compare_methods(linear, arrays(), BARE, run=Run(progress=progress))
    assert seen == ["observe", "float model", "evaluate"]
    compare_methods(linear, arrays(), Candidates((4,), ("octav",)), run=Run(progress=progress))
    assert seen[3:] == ["observe", "float model", "evaluate", "sensitivity", "proposals"]
    stages = ["load", "observe", "calibrate", "profile", "evaluate", "sensitivity"]
    assert list(found.seconds) == stages


def test_onnxruntimes_own_calibrators_are_rows_of_the_same_table(linear: Path) -> None:
    candidates = Candidates((4, 8), ("octav",), onnxruntime=True, sensitivity=False)
    found = compare_methods(linear, arrays(), candidates, Rules(widths=Widths(edge=4)))
    assert [(row.method, row.bits) for row in found.rows] == [
        (method, bits) for bits in (4, 8) for method in ("octav", *RIVALS)
    ]
    for row in found.rows:
        assert row.sqnr_db is not None
        assert row.seconds > 0


def test_a_calibrator_of_onnxruntimes_that_fails_is_a_note(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranges(*arguments: Any) -> Any:
        if arguments[-1] == (RIVALS[1],):
            raise ModelError("it fails")
        return rival_ranges(*arguments)

    monkeypatch.setattr("calib.surveying.rival_ranges", ranges)
    candidates = Candidates((4,), ("octav",), onnxruntime=True, sensitivity=False)
    found = compare_methods(linear, arrays(), candidates)
    assert [row.method for row in found.rows] == ["octav", RIVALS[0], RIVALS[2]]
    assert f"{RIVALS[1]}: it fails" in found.notes


def test_a_tensor_that_onnxruntime_gives_no_range_for_stays_on_the_page(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranges(*arguments: Any) -> Any:
        (found,) = rival_ranges(*arguments).values()
        return {arguments[-1][0]: {name: found[name] for name in found if name != "hidden"}}

    monkeypatch.setattr("calib.surveying.rival_ranges", ranges)
    candidates = Candidates((4,), ("octav",), onnxruntime=True, sensitivity=False)
    document = survey_document(compare_methods(linear, arrays(), candidates))
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert [result["method"] for result in tensors["hidden"]["results"]] == ["octav"]
    assert len(tensors["x"]["results"]) == 4


def test_a_tensors_curves_are_those_of_the_widths_that_it_has_in_the_rows(survey: Survey) -> None:
    profiles = {profile.name: profile for profile in survey.profiles}
    widths = set()
    for tensor in survey_document(survey)["tensors"]:
        curves = {curve.bits: curve for curve in profiles[tensor["name"]].curves}
        actual = {result["bits"]: result["actual_bits"] for result in tensor["results"]}
        widths.add(tuple(actual.items()))
        assert {curve["bits"]: curve["actual_bits"] for curve in tensor["curves"]} == actual
        for shown in tensor["curves"]:
            measured = curves[shown["actual_bits"]].measured
            assert shown["measured"] == pytest.approx(measured.tolist(), rel=1e-4)
    assert widths == {((8, 8), (3, 8)), ((8, 8), (3, 3))}, "first and last layers have 8 bits"
