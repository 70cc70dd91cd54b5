"""Grids with a zero point, for activations that reach further on one side of 0 than the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from calib.calibrators import Calibrator, TwoSided
from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Distribution, Histogram
from calib.errors import CalibError, CalibratorError, one_line
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold
from calib.table import TensorRecord, decibels

OnGrid = tuple[QuantType, float]  # a grid, and the threshold on it

_WORTH = 0.99  # of the error on a symmetric grid; above, a zero point gains nothing to speak of
_TOP_BIN = 1 - 2.0**-8


def with_zero_point(
    record: TensorRecord, calibrator: Calibrator, pooled: Counter, batches: Sequence[Counter] = ()
) -> TensorRecord:
    """``record``, an activation's on a symmetric grid, as its spec wants it: with a zero point, or
    with one where that is better by more than 1 %.

    Args:
        record: what ``calibrator`` found for the symmetric grid.
        calibrator: asked for two thresholds.
        pooled: all that was observed of the tensor.
        batches: of the single batches over which thresholds are averaged, where they are.

    Raises:
        CalibratorError: see `fitted`.
    """
    grid, bits = record.spec.grid, record.qtype.bits
    if grid == "symmetric" or record.max_abs == 0:
        return record
    dist, symmetric = Histogram(pooled), (record.qtype, float(record.threshold[0]))
    seen = [Histogram(batch) for batch in batches] or [dist]
    found, notes = fitted(calibrator, dist, seen, symmetric)
    if grid == "auto" and not (bits <= HISTOGRAM_BITS and _worth_it(dist, found, symmetric)):
        return record
    qtype, threshold = found[0], np.array([found[1]])
    noise, signal = float(dist.mse(threshold, qtype)[0]), float(dist.rms()[0] ** 2)
    return replace(
        record,
        qtype=qtype,
        threshold=threshold,
        scale=scale_from_threshold(threshold, qtype, record.spec.dtype),
        sqnr_db=decibels(signal, noise),
        notes=(*record.notes, *notes),
    )


def fitted(
    calibrator: Calibrator, dist: Distribution, seen: Sequence[Distribution], symmetric: OnGrid
) -> tuple[OnGrid, tuple[str, ...]]:
    """The grid with a zero point that ``calibrator`` wants for ``dist``, of one group; and notes.
    Its thresholds are the means of those for each of ``seen``.

    Of the integers beside the zero point that its two thresholds ask for, it is the one with the
    smaller measured error, at the scale of both thresholds or the least that keeps both; without
    the first where nothing is to be clipped. Where the ``symmetric`` grid has a smaller error
    still, it is that one, stored unsigned.

    Raises:
        CalibratorError: if the calibrator raises, or its thresholds are NaN or on the wrong side.
    """
    bits = symmetric[0].bits
    asked = [_ends(calibrator, each, bits, symmetric[1]) for each in seen]
    low, high = (float(np.mean([ends[n] for ends, _ in asked])) for n in (0, 1))
    notes = tuple(dict.fromkeys(note for _, said in asked for note in said))
    found = list(_candidates(dist, (low, high), bits))
    if bits > HISTOGRAM_BITS:  # bins are too coarse to compare by
        return found[0], notes
    found.append(_shifted(*symmetric))
    best = int(np.argmin([_error(dist, each) for each in found]))
    if best == len(found) - 1:
        notes = (*notes, "the symmetric threshold has the smaller error: it is used")
    return found[best], notes


def _worth_it(dist: Distribution, one: OnGrid, symmetric: OnGrid) -> bool:
    """Whether a zero point lowers the measured error by more than 1 %."""
    return _error(dist, one) < _WORTH * _error(dist, symmetric)


def _error(dist: Distribution, on_grid: OnGrid) -> float:
    qtype, threshold = on_grid
    return float(dist.mse(np.array([threshold]), qtype)[0])


def _ends(
    calibrator: Calibrator, dist: Distribution, bits: int, threshold: float
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """The lower and the upper threshold, within the extremes or 0; and notes."""
    smallest, largest = _extremes(dist)
    if not isinstance(calibrator, TwoSided):
        note = "the calibrator knows no two thresholds: its one, cut at the extremes, is used"
        return (max(smallest, -threshold), min(largest, threshold)), (note,)
    try:
        low, high = (np.asarray(end, np.float64) for end in calibrator.two_sided(dist, bits))
    except CalibError:
        raise
    except Exception as error:
        raise CalibratorError(f"{calibrator!r} failed: {one_line(error)}") from error
    if low.shape != (1,) or high.shape != (1,):
        raise CalibratorError(
            f"{calibrator!r} returned shapes {low.shape} and {high.shape}, they must be (1,)"
        )
    if not (np.isfinite(low[0]) and np.isfinite(high[0]) and low[0] <= high[0]):
        raise CalibratorError(
            f"{calibrator!r} returned the thresholds {low[0]} and {high[0]}, they must be finite, "
            f"the first at most the second"
        )
    lower, upper = (float(np.clip(end[0], smallest, largest)) for end in (low, high))
    lower, upper = min(lower, 0.0), max(upper, 0.0)
    if lower == upper:  # both 0, though not all values are
        return (smallest, largest), ("the calibrator found no thresholds: the extremes are used",)
    return (lower, upper), ()


def _extremes(dist: Distribution) -> tuple[float, float]:
    """The smallest and the largest value, or 0, which every grid holds."""
    smallest, largest = dist.extremes()
    return min(float(smallest[0]), 0.0), max(float(largest[0]), 0.0)


def _candidates(dist: Distribution, ends: tuple[float, float], bits: int) -> Iterator[OnGrid]:
    """Grids near the one that ends exactly at ``ends``, the nearest first."""
    low, high = ends
    smallest, largest = _extremes(dist)
    most = (1 << bits) - 1
    if bits > HISTOGRAM_BITS:
        low = smallest if low <= smallest * _TOP_BIN else low
        high = largest if high >= largest * _TOP_BIN else high
    clips = low > smallest or high < largest
    wanted = -low / (high - low) * most
    near = {int(np.floor(wanted)), int(np.ceil(wanted))}
    for zero_point in sorted(near, key=lambda integer: abs(integer - wanted)):
        qtype = QuantType(bits, signed=False, zero_point=zero_point)
        sides = ((-low, zero_point), (high, most - zero_point))
        if all(levels or not end for end, levels in sides):
            keeping = max(end / levels for end, levels in sides if levels)
            yield qtype, keeping * qtype.steps
        if clips:
            yield qtype, (high - low) / most * qtype.steps


def _shifted(qtype: QuantType, threshold: float) -> OnGrid:
    """The same levels and scale on an unsigned grid."""
    zero_point = (1 << (qtype.bits - 1)) if qtype.signed else 0
    shifted = QuantType(qtype.bits, signed=False, zero_point=zero_point)
    return shifted, threshold / qtype.steps * shifted.steps
