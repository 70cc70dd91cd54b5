"""The KL divergence calibrator known from TensorRT and onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.distribution import Distribution, Floats
from calib.errors import OptionError
from calib.qtypes import QuantType

_EMPTY = 1e-10


@dataclass(frozen=True, slots=True)
class Entropy:
    """Thresholds ``(G,)``: of the upper edges of ``bins`` equal bins of ``(0, max|x|]``, the one
    whose clipped histogram loses least, by KL divergence, when it is reduced to the levels of
    the grid (Migacz, "8-bit inference with TensorRT", GTC 2017).

    Zeros are left out, and no more bins are used than a group has values. With fewer bins than
    levels there is nothing to choose, and the answer is ``max|x|``. Made for 8 bits and large
    activations; below that it clips hard.

    Raises:
        OptionError: if ``bins`` is below 2.
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise OptionError(f"entropy: bins must be at least 2, got {self.bins}")

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        best = dist.max_abs()
        levels = qtype.qmax + 1
        bins = np.minimum(self.bins, dist.count()).astype(np.intp)
        for n in np.unique(bins[bins > levels]).tolist():
            best[bins == n] = _least_divergence(dist, n, levels)[bins == n]
        return best


def _least_divergence(dist: Distribution, bins: int, levels: int) -> Floats:
    largest = dist.max_abs()
    edges = np.arange(bins + 1)[:, None] / bins * largest
    edges[-1] = largest
    above = dist.tail(edges).count
    histogram = (above[:-1] - above[1:]).T
    kept = np.arange(levels, bins + 1)
    losses = np.stack([_divergence(histogram, n, levels) for n in kept.tolist()])
    best: Floats = kept[np.argmin(losses, axis=0)] / bins * largest
    return np.minimum(best, largest)


def _divergence(histogram: Floats, kept: int, levels: int) -> Floats:
    """KL divergence ``(G,)`` of the first ``kept`` bins, what is above them added to the last,
    from the same bins averaged over each of ``levels`` levels."""
    inside = histogram[:, :kept]
    reference = inside.copy()
    reference[:, -1] += histogram[:, kept:].sum(axis=1)
    level = np.arange(kept) * levels // kept
    starts = np.searchsorted(level, np.arange(levels))
    mass = np.add.reduceat(inside, starts, axis=1)
    occupied = np.add.reduceat((inside > 0).astype(np.float64), starts, axis=1)
    mean = mass / np.maximum(occupied, 1)
    candidate = np.where(inside > 0, mean[:, level], 0)
    p = reference / np.maximum(reference.sum(axis=1, keepdims=True), 1)
    q = candidate / np.maximum(candidate.sum(axis=1, keepdims=True), 1)
    ratio = np.where(p > 0, p / np.maximum(q, _EMPTY), 1.0)
    return np.asarray((p * np.log(ratio)).sum(axis=1))
