"""No clipping: the largest magnitude is the threshold."""

from __future__ import annotations

from dataclasses import dataclass

from calib.distribution import Distribution, Floats
from calib.qtypes import QuantType


@dataclass(frozen=True, slots=True)
class Max:
    """Thresholds ``(G,)``: the largest magnitude, so that nothing is clipped."""

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        return dist.max_abs()

    def two_sided(self, dist: Distribution, _bits: int, /) -> tuple[Floats, Floats]:
        """See `calib.calibrators.TwoSided`: the smallest and the largest value."""
        return dist.extremes()
