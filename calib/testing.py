"""The battery that every calibrator runs, ours and third parties'.

    import pytest
    from calib.testing import CALIBRATOR_CHECKS

    @pytest.mark.parametrize("check", CALIBRATOR_CHECKS)
    def test_my_calibrator(check):
        check(MyCalibrator())

A check raises `AssertionError` saying what was expected of the calibrator and what it did.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calib.calibrators import Calibrator, TwoSided
from calib.counter import Counter
from calib.distribution import Distribution, Floats, Histogram, Samples
from calib.qtypes import QuantType

QTYPES = (
    QuantType(2, signed=True, narrow=True),
    QuantType(4, signed=True, narrow=True),
    QuantType(4, signed=True),
    QuantType(4, signed=False),
    QuantType(8, signed=True, narrow=True),
    QuantType(8, signed=False),
    QuantType(16, signed=True),
)
_RELATIVE = 1e-5


def _values(qtype: QuantType) -> NDArray[np.float32]:
    """Four groups of 600 values: Gaussian, heavy-tailed, nine in ten zero, nearly uniform."""
    rng = np.random.default_rng(7)
    rows = [
        rng.standard_normal(600),
        rng.laplace(size=600),
        rng.standard_normal(600) * (rng.random(600) < 0.1),
        rng.uniform(-1, 1, 600),
    ]
    values = np.stack(rows).astype(np.float32)
    return values if qtype.signed else np.abs(values)


def _close(actual: Floats, expected: Floats, qtype: QuantType, what: str) -> None:
    assert np.allclose(actual, expected, rtol=_RELATIVE, atol=0), (
        f"{what} at {qtype}: {actual}, expected {expected}"
    )


def _is_sound(threshold: Floats, dist: Distribution, qtype: QuantType, what: str) -> None:
    largest = dist.max_abs()
    assert np.shape(threshold) == (dist.groups,), (
        f"{what} at {qtype}: shape {np.shape(threshold)}, expected ({dist.groups},)"
    )
    assert np.all(threshold > 0), f"{what} at {qtype}: {threshold} is not positive"
    assert np.all(threshold <= largest * (1 + _RELATIVE)), (
        f"{what} at {qtype}: {threshold} is above max|x| = {largest}"
    )


def check_threshold_is_positive_and_at_most_the_maximum(calibrator: Calibrator) -> None:
    """One threshold for each group, above 0 and not above max|x|."""
    for qtype in QTYPES:
        dist = Samples(_values(qtype))
        _is_sound(calibrator(dist, qtype), dist, qtype, "threshold")


def check_histogram_is_accepted(calibrator: Calibrator) -> None:
    """The same of a distribution that holds counts, as activations do."""
    for qtype in QTYPES:
        counter = Counter()
        counter.update(_values(qtype)[0])
        dist = Histogram(counter)
        _is_sound(calibrator(dist, qtype), dist, qtype, "threshold from a histogram")


def check_threshold_scales_with_the_tensor(calibrator: Calibrator) -> None:
    """``t(64·x) = 64·t(x)``: a threshold has the unit of the tensor."""
    for qtype in QTYPES:
        values = _values(qtype)
        expected = 64 * calibrator(Samples(values), qtype)
        _close(calibrator(Samples(values * 64), qtype), expected, qtype, "threshold of 64·x")


def check_groups_do_not_touch_each_other(calibrator: Calibrator) -> None:
    """Four groups at once give what each gives alone."""
    for qtype in QTYPES:
        values = _values(qtype)
        together = calibrator(Samples(values), qtype)
        alone = [calibrator(Samples(row[None]), qtype)[0] for row in values]
        _close(together, np.array(alone), qtype, "thresholds of four groups at once")


def check_order_does_not_matter(calibrator: Calibrator) -> None:
    """Shuffled values give the same thresholds."""
    for qtype in QTYPES:
        values = _values(qtype)
        shuffled = np.random.default_rng(1).permutation(values, axis=1)
        expected = calibrator(Samples(values), qtype)
        _close(calibrator(Samples(shuffled), qtype), expected, qtype, "threshold after a shuffle")


def check_all_zero_group_is_finite_and_harmless(calibrator: Calibrator) -> None:
    """A group of zeros gives a finite answer, and leaves the others alone."""
    for qtype in QTYPES:
        values = _values(qtype)
        expected = calibrator(Samples(values), qtype)
        values[1] = 0
        actual = calibrator(Samples(values), qtype)
        assert np.isfinite(actual).all(), f"all-zero group at {qtype}: {actual} is not finite"
        others = [0, 2, 3]
        _close(actual[others], expected[others], qtype, "groups beside an all-zero one")


def check_equal_magnitudes_give_a_sound_threshold(calibrator: Calibrator) -> None:
    """So do groups with one magnitude, and with one value that is not zero."""
    for qtype in QTYPES:
        values = np.full((2, 50), 0.7, np.float32)
        if qtype.signed:
            values[:, ::2] *= -1
        values[1, 1:] = 0
        dist = Samples(values)
        _is_sound(calibrator(dist, qtype), dist, qtype, "threshold of equal magnitudes")


def check_input_is_not_modified(calibrator: Calibrator) -> None:
    """Values may be read-only, and stay as they are."""
    for qtype in QTYPES:
        values = _values(qtype)
        before = values.copy()
        values.setflags(write=False)
        calibrator(Samples(values), qtype)
        assert np.array_equal(values, before), f"the values were changed at {qtype}"


def check_same_input_gives_the_same_threshold(calibrator: Calibrator) -> None:
    """Two calls give the same answer to the bit."""
    for qtype in QTYPES:
        dist = Samples(_values(qtype))
        first, second = calibrator(dist, qtype), calibrator(dist, qtype)
        assert np.array_equal(first, second), f"two calls at {qtype}: {first} and {second}"


def check_two_thresholds_are_sound(calibrator: Calibrator) -> None:
    """Where there are two for each group, they are finite, in order, and scale with the tensor."""
    if not isinstance(calibrator, TwoSided):
        return
    for bits in (2, 4, 8):
        values = _values(QuantType(bits, signed=True)) + np.float32(0.5)
        low, high = map(np.asarray, calibrator.two_sided(Samples(values), bits))
        assert low.shape == high.shape == (len(values),), (
            f"two thresholds at {bits} bits: shapes {low.shape} and {high.shape}, "
            f"expected ({len(values)},)"
        )
        assert np.all((-np.inf < low) & (low < high) & (high < np.inf)), (
            f"two thresholds at {bits} bits: {low} and {high}, expected finite ones in order"
        )
        larger = np.stack(calibrator.two_sided(Samples(values * 64), bits))
        expected = 64 * np.stack([low, high])
        assert np.allclose(larger, expected, rtol=1e-3, atol=1e-3 * (high - low).max()), (
            f"two thresholds of 64·x at {bits} bits: {larger}, expected {expected}"
        )


CALIBRATOR_CHECKS: tuple[Callable[[Calibrator], None], ...] = (
    check_threshold_is_positive_and_at_most_the_maximum,
    check_histogram_is_accepted,
    check_threshold_scales_with_the_tensor,
    check_groups_do_not_touch_each_other,
    check_order_does_not_matter,
    check_all_zero_group_is_finite_and_harmless,
    check_equal_magnitudes_give_a_sound_threshold,
    check_input_is_not_modified,
    check_same_input_gives_the_same_threshold,
    check_two_thresholds_are_sound,
)
