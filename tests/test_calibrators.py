"""Calibrators by name and parameters, and what thresholds() makes of their answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from calib.calibrators import Calibrator, make, names, thresholds
from calib.calibrators.entropy import Entropy
from calib.calibrators.max import Max
from calib.calibrators.mse import Mse
from calib.calibrators.octav import Octav
from calib.calibrators.percentile import Percentile
from calib.distribution import Distribution, Floats, Samples
from calib.errors import CalibratorError, DataError, OptionError
from calib.qtypes import QuantType

BUILT_IN = ("octav", "percentile", "mse", "max", "entropy")
INT4 = QuantType(4, signed=True)


# --- names and specs ----------------------------------------------------------------------------


def test_the_built_in_names_come_first() -> None:
    assert names()[:5] == BUILT_IN


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("octav", Octav()),
        ("octav:", Octav()),
        ("octav:paper", Octav(kappa="paper")),
        ("octav:kappa=paper,iterations=10", Octav(kappa="paper", iterations=10)),
        ("octav:kappa= paper ", Octav(kappa="paper")),
        ("octav:paper,tolerance=1e-3", Octav(kappa="paper", tolerance=1e-3)),
        ("percentile", Percentile(99.99)),
        ("percentile:99.9", Percentile(99.9)),
        ("percentile:percentile=100", Percentile(100.0)),
        ("mse", Mse(100)),
        ("mse:200", Mse(200)),
        ("mse:points= 200 ", Mse(200)),
        ("max", Max()),
        ("entropy", Entropy(2048)),
        ("entropy:bins=512", Entropy(512)),
    ],
)
def test_a_spec_names_a_calibrator_and_its_parameters(spec: str, expected: object) -> None:
    assert make(spec) == expected


AVAILABLE = "Available: octav, percentile, mse, max, entropy"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("octave", f"No calibrator named 'octave'. Did you mean 'octav'? {AVAILABLE}"),
        ("percentil:9", f"No calibrator named 'percentil'. Did you mean 'percentile'? {AVAILABLE}"),
        ("xyz", f"No calibrator named 'xyz'. {AVAILABLE}"),
        ("", f"No calibrator named ''. {AVAILABLE}"),
    ],
)
def test_an_unknown_name_is_answered_with_what_exists(spec: str, message: str) -> None:
    """Plug-ins of the environment may follow the built-in names."""
    with pytest.raises(CalibratorError) as caught:
        make(spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mse:steps=3", "mse:steps=3: no parameter 'steps'; allowed: points"),
        (
            "octav:paper,10",
            "octav:paper,10: no parameter '10'; allowed: kappa, tolerance, iterations",
        ),
        ("mse:many", "mse:many: points must be a whole number, got 'many'"),
        ("mse:1.5", "mse:1.5: points must be a whole number, got '1.5'"),
        ("mse:points=", "mse:points=: points must be a whole number, got ''"),
        ("percentile:high", "percentile:high: percentile must be a number, got 'high'"),
        ("mse:0", "mse: points must be at least 1, got 0"),
        ("octav:iterations=-1", "octav: iterations must not be negative, got -1"),
        ("entropy:1", "entropy: bins must be at least 2, got 1"),
    ],
)
def test_a_parameter_that_is_unknown_or_refused_is_named(spec: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make(spec)
    assert str(caught.value) == message


def test_a_calibrator_without_parameters_says_so() -> None:
    with pytest.raises(OptionError, match=r"^max takes no parameters, got '3'$"):
        make("max:3")


# --- thresholds() -------------------------------------------------------------------------------


def says(answer: object) -> Calibrator:
    """A calibrator that answers this, whatever it is asked."""

    def calibrator(_dist: Distribution, _qtype: QuantType, /) -> Floats:
        return answer  # type: ignore[return-value]

    return calibrator


def three_groups() -> Samples:
    return Samples(np.array([[1.0, -2.0], [0.5, 0.25], [4.0, 0.0]], np.float32))


def test_a_sound_answer_is_kept_without_a_note() -> None:
    answer, notes = thresholds(says([2.0, 0.1, 4.0]), three_groups(), INT4)
    assert answer.dtype == np.float64
    assert (answer.tolist(), notes) == ([2.0, 0.1, 4.0], ())


def test_an_answer_a_rounding_error_above_the_maximum_becomes_it_without_a_note() -> None:
    answer, notes = thresholds(says([2 * (1 + 1e-12), 0.5, 4.0]), three_groups(), INT4)
    assert (answer.tolist(), notes) == ([2.0, 0.5, 4.0], ())


ZERO = "all zero: no threshold exists, 1 is used"
MISSING = "the calibrator found no threshold: the maximum is used"
ABOVE = "the calibrator's threshold is above the maximum: the maximum is used"


@pytest.mark.parametrize(
    ("answer", "values", "expected", "note"),
    [
        ([2.0, 0.0, 0.0], None, [2.0, 0.5, 4.0], f"2 of 3 channels: {MISSING}"),
        ([9.0, 0.5, 1.0], None, [2.0, 0.5, 1.0], f"1 of 3 channels: {ABOVE}"),
        ([0.0, 1.0], [[0.0, -0.0], [1.0, 0.0]], [1.0, 1.0], f"1 of 2 channels: {ZERO}"),
        ([7.0, 1.0], [[0.0, 0.0], [1.0, 0.0]], [1.0, 1.0], f"1 of 2 channels: {ZERO}"),
        ([0.0], [[3.0, -1.0]], [3.0], MISSING),
        ([3.5], [[3.0, -1.0]], [3.0], ABOVE),
        ([0.0], [[0.0, 0.0]], [1.0], ZERO),
    ],
)
def test_what_cannot_be_written_is_replaced_and_noted(
    answer: list[float], values: list[list[float]] | None, expected: list[float], note: str
) -> None:
    dist = three_groups() if values is None else Samples(np.array(values, np.float32))
    safe, notes = thresholds(says(answer), dist, INT4)
    assert safe.tolist() == expected
    assert notes == (note,)


def test_every_kind_of_replacement_has_its_own_note() -> None:
    dist = Samples(np.array([[0.0], [2.0], [3.0], [5.0]], np.float32))
    safe, notes = thresholds(says([0.0, 0.0, 9.0, 4.0]), dist, INT4)
    assert safe.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert notes == tuple(f"1 of 4 channels: {text}" for text in (ZERO, MISSING, ABOVE))


@pytest.mark.parametrize("answer", [1.0, [1.0], [[1.0, 1.0, 1.0]], [1.0] * 4, []])
def test_an_answer_of_the_wrong_shape_is_refused(answer: object) -> None:
    shape = np.shape(np.asarray(answer))
    with pytest.raises(CalibratorError, match=r"returned shape .*, it must be \(3,\)$") as caught:
        thresholds(says(answer), three_groups(), INT4)
    assert f"returned shape {shape}, " in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9])
def test_nan_infinity_and_negative_answers_are_refused(bad: float) -> None:
    with pytest.raises(CalibratorError, match=r"returned NaN, infinity or a negative threshold$"):
        thresholds(says([1.0, bad, 1.0]), three_groups(), INT4)


@pytest.mark.parametrize("answer", ["high", None, [1.0, "x", 2.0], object()])
def test_an_answer_that_is_no_number_is_an_error_of_the_calibrator(answer: object) -> None:
    with pytest.raises(CalibratorError):
        thresholds(says(answer), three_groups(), INT4)


def raising(error: Exception) -> Callable[[Distribution, QuantType], Floats]:
    def broken(_dist: Distribution, _qtype: QuantType, /) -> Floats:
        raise error

    return broken


def test_a_calibrator_that_raises_is_reported_in_one_line_with_its_cause() -> None:
    cause = ZeroDivisionError("no\n  values")
    with pytest.raises(CalibratorError, match=r"broken.* failed: no values$") as caught:
        thresholds(raising(cause), three_groups(), INT4)
    assert caught.value.__cause__ is cause


def test_an_error_of_this_library_passes_unchanged() -> None:
    with pytest.raises(DataError, match=r"^as it was$"):
        thresholds(raising(DataError("as it was")), three_groups(), INT4)
