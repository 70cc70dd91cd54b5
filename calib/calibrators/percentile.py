"""A percentile of the magnitudes as the threshold."""

from __future__ import annotations

from dataclasses import dataclass

from calib.distribution import Distribution, Floats
from calib.errors import OptionError
from calib.qtypes import QuantType


@dataclass(frozen=True, slots=True)
class Percentile:
    """Thresholds ``(G,)``: the smallest magnitude that ``percentile`` % of all values, zeros
    included, do not exceed (OCTAV, section 4; the field's usual 99.9, 99.99 and 99.999).

    Raises:
        OptionError: if ``percentile`` is not above 1 and at most 100: below, it is a fraction
            that was meant as percent.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 1 < self.percentile <= 100:
            raise OptionError(
                f"percentile must be above 1 and at most 100, got {self.percentile}: it is in "
                f"percent, 99.99 keeps all but one value in 10,000"
            )

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        return dist.quantile(self.percentile / 100)

    def two_sided(self, dist: Distribution, _bits: int, /) -> tuple[Floats, Floats]:
        """See `calib.calibrators.TwoSided`: half of the share that is cut off, on either side."""
        cut = (1 - self.percentile / 100) / 2
        if cut <= 0:
            return dist.extremes()
        mirrored = cut * (1 + 1e-9)  # where it is a whole number of values, the next one
        return dist.signed_quantile(mirrored), dist.signed_quantile(1 - cut)
