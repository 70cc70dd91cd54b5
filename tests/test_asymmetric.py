"""Grids with a zero point: never worse than symmetric ones, near the best there is, and written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import erf

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.asymmetric import fitted, with_zero_point
from calib.calibrators import Calibrator, make
from calib.counter import Counter
from calib.distribution import Distribution, Floats, Histogram
from calib.errors import CalibratorError
from calib.granularity import PerTensor
from calib.planning import TensorSpec
from calib.qtypes import QuantType
from calib.quantize import fake_quantize, scale_from_threshold
from calib.table import TensorRecord

METHODS = ("octav", "mse", "percentile", "max")
_Z = np.random.default_rng(0).standard_normal(100_000)

DATA = {
    "hardswish": _Z * np.clip(_Z + 3, 0, 6) / 6,
    "gelu": 0.5 * _Z * (1 + np.vectorize(erf)(_Z / 2**0.5)),
    "silu": 2 * _Z / (1 + np.exp(-2 * _Z)),
    "leaky": np.where(_Z > 0, _Z, 0.1 * _Z),
    "shifted": _Z + 1.5,
    "far from 0": _Z + 8,
    "Gaussian": _Z,
    "negative": -np.abs(_Z),
    "positive": np.abs(_Z),
    "few magnitudes": np.random.default_rng(1).choice([-1.0, 0.0, 3.0], 1000),
    "one outlier": np.append(_Z[:1000], 50.0),
    "two values": np.array([-1e-3, 7.0]),
    "tiny": _Z * 1e-36 + 1e-36,
}
all_data = pytest.mark.parametrize("name", DATA)
all_methods = pytest.mark.parametrize("method", METHODS)


@cache
def counted(name: str) -> Counter:
    counter = Counter()
    counter.update(DATA[name].astype(np.float32))
    return counter


@cache
def symmetric(name: str, method: str, bits: int, grid: str = "asymmetric") -> TensorRecord:
    counter = counted(name)
    dist, qtype = Histogram(counter), QuantType(bits, signed=counter.min < 0)
    threshold = make(method)(dist, qtype)
    spec = TensorSpec("x", "activation", bits, PerTensor(), (), method, grid=grid)
    scale = scale_from_threshold(threshold, qtype)
    return TensorRecord(spec, qtype, threshold, scale, float(dist.max_abs()[0]), 1, 1.0)


def shifted(name: str, method: str, bits: int, grid: str = "asymmetric") -> TensorRecord:
    return with_zero_point(symmetric(name, method, bits, grid), make(method), counted(name))


def error(name: str, record: TensorRecord) -> float:
    """Measured on the values themselves."""
    values = DATA[name].astype(np.float32)
    written = fake_quantize(values, record.scale, record.qtype, PerTensor())
    return float(np.square(written.astype(np.float64) - values).sum())


@all_data
@all_methods
def test_a_zero_point_is_never_worse_than_none_by_more_than_1_percent(
    name: str, method: str
) -> None:
    for bits in (2, 3, 4, 6, 8):
        without = error(name, symmetric(name, method, bits))
        for grid in ("asymmetric", "auto"):
            with_one = error(name, shifted(name, method, bits, grid))
            assert with_one <= 1.01 * without + 1e-90, (bits, grid)


@all_data
def test_the_same_holds_of_a_calibrator_that_knows_one_threshold_alone(name: str) -> None:
    without = error(name, symmetric(name, "entropy", 4))
    assert error(name, shifted(name, "entropy", 4)) <= 1.01 * without + 1e-90


@pytest.mark.parametrize("name", ["hardswish", "gelu"])
@pytest.mark.parametrize("method", ["octav", "mse", "percentile", "max"])
def test_activations_with_a_short_negative_side_gain_3_db_at_4_bits(name: str, method: str) -> None:
    gain = error(name, symmetric(name, method, 4)) / error(name, shifted(name, method, 4))
    assert 10 * np.log10(gain) >= 3


@pytest.mark.parametrize("name", ["hardswish", "gelu", "leaky", "shifted", "Gaussian"])
@pytest.mark.parametrize("bits", [3, 4])
def test_octav_with_two_thresholds_is_near_the_best_of_all_grids(name: str, bits: int) -> None:
    dist, best, most = Histogram(counted(name)), np.inf, (1 << bits) - 1
    low, high = -dist.extremes()[0][0], dist.extremes()[1][0]
    for zero_point in range(most + 1):
        qtype = QuantType(bits, signed=False, zero_point=zero_point)
        reach = max(low / max(zero_point, 1), high / max(most - zero_point, 1)) * qtype.steps
        errors = dist.mse(np.linspace(0.01, 1, 300)[:, None] * reach, qtype)
        best = min(best, float(errors.min()))
    found = shifted(name, "octav", bits)
    assert dist.mse(found.threshold, found.qtype)[0] <= 1.02 * best


@all_data
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_max_clips_nothing(name: str, bits: int) -> None:
    record = shifted(name, "max", bits)
    low, high = record.scale[0] * record.qtype.qmin, record.scale[0] * record.qtype.qmax
    # The scale is rounded to float32, half a step may be missing by that.
    slack = record.scale[0] * 0.01
    assert low <= DATA[name].min() + slack
    assert high >= DATA[name].max() - slack


@all_data
@all_methods
def test_0_stays_0_and_the_threshold_is_the_largest_magnitude_represented(
    name: str, method: str
) -> None:
    record = shifted(name, method, 4)
    levels = np.arange(record.qtype.qmin, record.qtype.qmax + 1)
    assert 0 in levels
    largest = np.abs(levels).max() * np.float64(record.scale[0])
    assert largest == pytest.approx(record.threshold[0], rel=1e-6)
    assert not record.qtype.signed


@all_data
@pytest.mark.parametrize("method", ["octav", "mse", "percentile", "max"])
def test_mirrored_data_is_quantized_as_well(name: str, method: str) -> None:
    mirrored = Counter()
    mirrored.update(-DATA[name].astype(np.float32))
    dist, other = Histogram(counted(name)), Histogram(mirrored)
    start = QuantType(4, signed=True), float(dist.max_abs()[0])
    (qtype, threshold), _ = fitted(make(method), dist, [dist], start)
    (other_qtype, other_threshold), _ = fitted(make(method), other, [other], start)
    expected = dist.mse(np.array([threshold]), qtype)
    assert other.mse(np.array([other_threshold]), other_qtype) == pytest.approx(expected, rel=0.02)


def test_auto_keeps_the_symmetric_grid_where_a_zero_point_gains_nothing() -> None:
    for name in ("Gaussian", "positive"):
        record = symmetric(name, "octav", 8, "auto")
        assert with_zero_point(record, make("octav"), counted(name)) is record
    assert shifted("gelu", "octav", 4, "auto").qtype.zero_point > 0


def test_of_all_zeros_the_record_stays_as_it_is() -> None:
    counter = Counter()
    counter.update(np.zeros(5, np.float32))
    spec = TensorSpec("x", "activation", 4, PerTensor(), (), grid="asymmetric")
    ones = np.ones(1)
    record = TensorRecord(spec, QuantType(4, False), ones, ones.astype(np.float32), 0.0, 5, None)
    assert with_zero_point(record, make("octav"), counter) is record


def test_thresholds_of_single_batches_are_averaged() -> None:
    halves = []
    for part in np.split(DATA["shifted"].astype(np.float32), 2):
        halves.append(Counter())
        halves[-1].update(part * (1 + len(halves)))
    pooled = Counter()
    for half in halves:
        pooled.merge(half)
    spec = TensorSpec("x", "activation", 8, PerTensor(), (), "max", grid="asymmetric")
    qtype, one = QuantType(8, signed=True), np.ones(1)
    record = TensorRecord(spec, qtype, one * 99, one.astype(np.float32), 9.0, 5, 1.0)
    found = with_zero_point(record, make("max"), pooled, halves)
    low, high = found.scale[0] * found.qtype.qmin, found.scale[0] * found.qtype.qmax
    assert low == pytest.approx(np.mean([half.min for half in halves]), rel=0.02)
    assert high == pytest.approx(np.mean([half.max for half in halves]), rel=0.02)


def one_sided(dist: Distribution, _qtype: QuantType, /) -> Floats:
    return dist.max_abs()


@dataclass(frozen=True)
class Given:
    """Answers what it is told to."""

    answer: object

    def __call__(self, dist: Distribution, _qtype: QuantType, /) -> Floats:
        return dist.max_abs()

    def two_sided(self, _dist: Distribution, _bits: int, /) -> tuple[Floats, Floats]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def fitted_by(calibrator: Calibrator) -> tuple[tuple[QuantType, float], tuple[str, ...]]:
    dist = Histogram(counted("leaky"))
    return fitted(calibrator, dist, [dist], (QuantType(4, signed=True), float(dist.max_abs()[0])))


def test_a_calibrator_of_one_threshold_has_it_cut_at_the_extremes() -> None:
    (qtype, _), notes = fitted_by(one_sided)
    assert notes == (
        "the calibrator knows no two thresholds: its one, cut at the extremes, is used",
    )
    assert 0 < qtype.zero_point < 4


def test_no_thresholds_are_the_extremes() -> None:
    _, notes = fitted_by(Given((np.zeros(1), np.zeros(1))))
    assert "the calibrator found no thresholds: the extremes are used" in notes


def vector(*values: float) -> NDArray[np.float64]:
    return np.array(values)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ValueError("no"), "failed: no"),
        (
            (vector(1, 2), vector(1)),
            r"returned shapes \(2,\) and \(1,\), they must be \(1,\)",
        ),
        (
            (vector(np.nan), vector(1)),
            "returned the thresholds nan and 1.0, they must be finite, the first at most",
        ),
        (
            (vector(2), vector(1)),
            "the thresholds 2.0 and 1.0, they must be finite, the first at most the second",
        ),
    ],
)
def test_nonsense_from_a_calibrator_is_refused(answer: object, message: str) -> None:
    with pytest.raises(CalibratorError, match=message):
        fitted_by(Given(answer))
    with pytest.raises(CalibratorError, match="that"):
        fitted_by(Given(CalibratorError("that")))
