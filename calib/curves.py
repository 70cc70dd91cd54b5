"""What a tensor looks like to a calibrator: its histogram, and its error against the threshold.

The paper's figures 1 and 5 for any tensor (OCTAV, section 3 and appendix G).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.counter import Counter
from calib.distribution import Floats, Histogram
from calib.granularity import Blocked, PerChannel, along_tensor, pieces, to_groups
from calib.graph import Model
from calib.observations import Observations
from calib.planning import TensorSpec
from calib.qtypes import QuantType

_BINS = 64
_POINTS = 96
_REFINED = 24
_LOWEST = 1 / 256  # of the maximum: where the smallest threshold of a curve lies
_BARRIER = 1.02  # between two minima the error rises by at least 2 %, or they are ripples of one
_APART = 1.5


@dataclass(frozen=True, slots=True)
class Point:
    """A threshold, and the mean squared error with it."""

    threshold: float
    mse: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean squared error against the threshold, on the grid of one width.

    Attributes:
        bits: the width.
        thresholds: float64 ``(P,)``, ascending, up to the largest magnitude.
        measured: error of quantizing, float64 ``(P,)``.
        modelled: J, the noise model that OCTAV minimises (OCTAV, equation 4), float64 ``(P,)``.
        minima: of ``measured``, ascending; ripples of less than 2 % are not counted.
    """

    bits: int
    thresholds: Floats
    measured: Floats
    modelled: Floats
    minima: tuple[Point, ...]

    @property
    def second(self) -> tuple[Point, Point] | None:
        """The small and the large minimum where there are two: that of the many values and that of
        the outliers, between which OCTAV and a sweep may part ways (OCTAV, appendix G)."""
        if len(self.minima) < 2:
            return None
        small, large = sorted(sorted(self.minima, key=_mse)[:2], key=lambda point: point.threshold)
        return (small, large) if large.threshold > _APART * small.threshold else None


@dataclass(frozen=True, slots=True)
class Profile:
    """One tensor's magnitudes.

    Attributes:
        name: the tensor.
        relative: magnitudes and thresholds are fractions of their channel's largest magnitude, and
            errors of its square.
        largest: what magnitudes are divided by, float64 ``(G,)``; 1 where they are not, or the
            channel is all zero.
        edges: of the histogram's bins, float64 ``(N+1,)``, from 0 to the largest magnitude.
        counts: int64 ``(N,)``.
        signed: whether any value is negative.
        curves: one for each width.
    """

    name: str
    relative: bool
    largest: Floats
    edges: Floats
    counts: NDArray[np.int64]
    signed: bool
    curves: tuple[Curve, ...]


def profiles(
    model: Model,
    observations: Observations,
    specs: Sequence[TensorSpec],
    widths: Sequence[int] | None = None,
) -> tuple[Profile, ...]:
    """Histogram and curves of each tensor of which there are values: an activation's from its
    counter, a weight's from its values, each channel's divided by their largest magnitude.

    Args:
        widths: of the curves; None for that of the tensor's spec.

    Raises:
        KeyError: if an activation was not observed.
    """
    return tuple(
        _profile(model, observations, spec, (spec.bits,) if widths is None else widths)
        for spec in specs
        if spec.kind == "weight" or observations.counters[spec.name].n_finite
    )


def _profile(
    model: Model, observations: Observations, spec: TensorSpec, widths: Sequence[int]
) -> Profile:
    weight = spec.kind == "weight"
    if weight:
        counter, largest = _count_weight(model, spec)
    else:
        counter, largest = observations.counters[spec.name], np.ones(1)
    signed = weight or counter.min < 0
    dist = Histogram(counter)
    narrow = weight and not isinstance(spec.granularity, Blocked)
    types = [QuantType(bits, signed=signed, narrow=narrow) for bits in widths]
    return Profile(
        spec.name,
        weight and isinstance(spec.granularity, PerChannel),
        largest,
        *_magnitudes(counter),
        signed=counter.min < 0,
        curves=tuple(_curve(dist, qtype) for qtype in types),
    )


def _count_weight(model: Model, spec: TensorSpec) -> tuple[Counter, Floats]:
    """Counts of a weight's values, those of a channel divided by the channel's largest; and
    these."""
    tensor = model.weight(spec.name)
    counter, found = Counter(), [np.ones(0)]
    for index, _ in pieces(tensor.shape, spec.granularity):
        part = tensor[index].astype(np.float32, copy=False)
        if isinstance(spec.granularity, PerChannel):
            most = np.abs(to_groups(part, spec.granularity)).max(axis=1, initial=0.0)
            divisor = np.where(most > 0, most, np.float32(1))
            part = part / along_tensor(divisor, part.shape, spec.granularity)
            found.append(divisor.astype(np.float64))
        counter.update(part)
    per_channel = np.concatenate(found)
    return counter, per_channel if per_channel.size else np.ones(1)


def _magnitudes(counter: Counter) -> tuple[Floats, NDArray[np.int64]]:
    codes, times = counter.bins()
    largest = max(abs(counter.min), abs(counter.max)) if codes.size else 0.0
    values = np.abs((codes.astype(np.uint32) << np.uint32(16)).view(np.float32))
    edges = np.linspace(0.0, largest or 1.0, _BINS + 1)
    bins = np.searchsorted(edges, np.minimum(values, edges[-1]), side="right") - 1
    counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)
    np.add.at(counts, np.minimum(bins, _BINS - 1), times)
    return edges, counts


def _curve(dist: Histogram, qtype: QuantType) -> Curve:
    largest = float(dist.max_abs()[0])
    thresholds = np.geomspace(_LOWEST, 1.0, _POINTS) * (largest or 1.0)
    column = thresholds[:, None]
    measured, modelled = dist.mse(column, qtype)[:, 0], dist.modelled_mse(column, qtype)[:, 0]
    found = minima_of(measured) if largest > 0 else ()
    minima = tuple(_refined(dist, qtype, thresholds, i) for i in found)
    return Curve(qtype.bits, thresholds, measured, modelled, minima)


def _refined(dist: Histogram, qtype: QuantType, thresholds: Floats, i: int) -> Point:
    """The least error between the neighbours of ``thresholds[i]``."""
    low, high = thresholds[max(i - 1, 0)], thresholds[min(i + 1, thresholds.size - 1)]
    finer = np.append(np.linspace(low, high, _REFINED), thresholds[i])
    errors = dist.mse(finer[:, None], qtype)[:, 0]
    best = int(np.argmin(errors))
    return Point(float(finer[best]), float(errors[best]))


def minima_of(values: Floats, barrier: float = _BARRIER) -> tuple[int, ...]:
    """Indices of the local minima between which ``values`` rise to at least ``barrier`` times
    either of them, ends included."""
    found: list[int] = []
    lowest, highest = 0, 0  # since the last minimum that was passed
    rising = False
    for i, value in enumerate(values):
        if not rising:
            if value <= values[lowest]:
                lowest = i
            elif value >= barrier * values[lowest]:
                found.append(lowest)
                highest, rising = i, True
        elif value >= values[highest]:
            highest = i
        elif value * barrier <= values[highest]:
            lowest, rising = i, False
    if not rising and values.size:
        found.append(lowest)
    return tuple(found)


def _mse(point: Point) -> float:
    return point.mse
