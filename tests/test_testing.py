"""The battery: every built-in passes every check, and every check catches its own culprit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest

from calib import testing
from calib.calibrators import Calibrator, make, names
from calib.distribution import Distribution, Floats, Histogram, Samples
from calib.qtypes import QuantType
from calib.testing import CALIBRATOR_CHECKS

SPECS = [
    *("octav", "percentile", "mse", "max", "entropy"),
    *("octav:paper", "octav:paper,iterations=10", "octav:iterations=1", "octav:tolerance=1e-9"),
    *("percentile:99.9", "percentile:99", "percentile:100", "mse:1", "mse:17", "entropy:128"),
]
Check = Callable[[Calibrator], None]


def name_of(check: object) -> str:
    name = check if isinstance(check, str) else getattr(check, "__name__", type(check).__name__)
    return str(name).removeprefix("check_")


every_check = pytest.mark.parametrize("check", CALIBRATOR_CHECKS, ids=name_of)


@every_check
@pytest.mark.parametrize("spec", SPECS)
def test_a_built_in_passes(spec: str, check: Check) -> None:
    check(make(spec))


def test_no_built_in_is_left_out() -> None:
    built_in = [name for name in names() if type(make(name)).__module__.startswith("calib.")]
    assert built_in
    assert set(built_in) <= {spec.partition(":")[0] for spec in SPECS}


def test_every_check_of_the_module_is_in_the_battery() -> None:
    defined = {name: value for name, value in vars(testing).items() if name.startswith("check_")}
    assert list(defined.values()) == list(CALIBRATOR_CHECKS)


# --- one culprit for each check -----------------------------------------------------------------


def negative(dist: Distribution, _: QuantType, /) -> Floats:
    return np.where(dist.max_abs() > dist.max_abs().min(), dist.max_abs(), -1.0)


def above_the_maximum(dist: Distribution, _: QuantType, /) -> Floats:
    return dist.max_abs() * 1.001


def one_for_all_groups(dist: Distribution, _: QuantType, /) -> Floats:
    return dist.max_abs()[:1]


def helpless_before_a_histogram(dist: Distribution, _: QuantType, /) -> Floats:
    return dist.max_abs() * (0 if isinstance(dist, Histogram) else 1)


def fond_of_one(dist: Distribution, _: QuantType, /) -> Floats:
    return np.minimum(dist.max_abs(), 1.0)


def counting_the_groups(dist: Distribution, _: QuantType, /) -> Floats:
    return dist.max_abs() * (1 - dist.groups / 1000)


def looking_at_the_first_value(dist: Distribution, _: QuantType, /) -> Floats:
    if not isinstance(dist, Samples):
        return dist.max_abs()
    first: Floats = np.abs(dist._values[:, 0]).astype(np.float64)
    return np.where(first > 0, first, dist.max_abs())


def dividing_by_the_mean(dist: Distribution, _: QuantType, /) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(dist.max_abs() * dist.mean_abs() / dist.mean_abs())


def upset_by_zero_groups(dist: Distribution, _: QuantType, /) -> Floats:
    return dist.max_abs() * (0.5 if (dist.max_abs() == 0).any() else 1)


def swinging_on_equal_magnitudes(dist: Distribution, _: QuantType, /) -> Floats:
    """One update from the mean without a guard: nothing lies above it."""
    mean = dist.mean_abs() * dist.count() / np.maximum(dist.tail(np.zeros(dist.groups)).count, 1)
    return dist.tail(mean * (1 + 1e-6)).sum / dist.count()


def writing_into_the_values(dist: Distribution, _: QuantType, /) -> Floats:
    answer = dist.max_abs()
    if isinstance(dist, Samples):
        dist._values.setflags(write=True)
        dist._values[0, 0] += 1
    return answer


class NeverTwiceTheSame:
    def __init__(self) -> None:
        self.calls = count(1)

    def __call__(self, dist: Distribution, _: QuantType, /) -> Floats:
        return dist.max_abs() * (1 - 1e-9 * next(self.calls))


@dataclass(frozen=True)
class Between:
    """Two thresholds as told."""

    factors: tuple[float, float] = (1.0, 1.0)
    groups: int = 4
    shift: float = 0.0

    def __call__(self, dist: Distribution, _: QuantType, /) -> Floats:
        return dist.max_abs()

    def two_sided(self, dist: Distribution, _bits: int, /) -> tuple[Floats, Floats]:
        low, high = (f * end for f, end in zip(self.factors, dist.extremes(), strict=True))
        return low[: self.groups], high[: self.groups] + self.shift


UNSOUND: list[tuple[Calibrator, str]] = [
    (negative, "is not positive"),
    (above_the_maximum, r"is above max\|x\|"),
    (one_for_all_groups, r"shape \(1,\), expected \(4,\)"),
]
CULPRITS: list[tuple[str, Calibrator, str]] = [
    ("histogram_is_accepted", helpless_before_a_histogram, "from a histogram .* not positive"),
    ("threshold_scales_with_the_tensor", fond_of_one, "threshold of 64·x at .*, expected"),
    ("groups_do_not_touch_each_other", counting_the_groups, "four groups at once at .*, expected"),
    ("order_does_not_matter", looking_at_the_first_value, "after a shuffle at .*, expected"),
    ("all_zero_group_is_finite_and_harmless", dividing_by_the_mean, "is not finite"),
    ("all_zero_group_is_finite_and_harmless", upset_by_zero_groups, "groups beside an all-zero"),
    ("equal_magnitudes_give_a_sound_threshold", swinging_on_equal_magnitudes, "not positive"),
    ("input_is_not_modified", writing_into_the_values, "the values were changed"),
    ("two_thresholds_are_sound", Between(groups=1), r"shapes \(1,\) and \(1,\), expected \(4,\)"),
    ("two_thresholds_are_sound", Between((-1.0, -1.0)), "expected finite ones in order"),
    ("two_thresholds_are_sound", Between((np.nan, 1.0)), "expected finite ones in order"),
    ("two_thresholds_are_sound", Between(shift=1.0), "two thresholds of 64·x at 2 bits"),
    ("same_input_gives_the_same_threshold", NeverTwiceTheSame(), "two calls at"),
]


@pytest.mark.parametrize(("culprit", "message"), UNSOUND, ids=name_of)
def test_an_unsound_threshold_is_caught_and_described(culprit: Calibrator, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_threshold_is_positive_and_at_most_the_maximum(culprit)


@pytest.mark.parametrize(("name", "culprit", "message"), CULPRITS, ids=name_of)
def test_a_culprit_is_caught_by_its_own_check_and_by_no_other(
    name: str, culprit: Calibrator, message: str
) -> None:
    for check in CALIBRATOR_CHECKS:
        if name_of(check) == name:
            with pytest.raises(AssertionError, match=message):
                check(culprit)
        else:
            check(culprit)


def test_every_check_has_a_culprit() -> None:
    own = {name for name, _, _ in CULPRITS}
    assert own | {"threshold_is_positive_and_at_most_the_maximum"} == {
        name_of(check) for check in CALIBRATOR_CHECKS
    }
