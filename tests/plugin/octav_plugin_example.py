"""Two calibrators of a third party: a frozen dataclass with a parameter, and a plain function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.distribution import Distribution, Floats
from calib.errors import OptionError
from calib.qtypes import QuantType


@dataclass(frozen=True, slots=True)
class MeanMax:
    """Thresholds ``(G,)``: ``weight`` of the way from the mean magnitude to the largest.

    Raises:
        OptionError: if ``weight`` is not in (0, 1].
    """

    weight: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise OptionError(f"meanmax: weight must be in (0, 1], got {self.weight}")

    def __call__(self, dist: Distribution, _qtype: QuantType, /) -> Floats:
        mean = dist.mean_abs()
        return mean + self.weight * (dist.max_abs() - mean)


def three_sigma(dist: Distribution, _qtype: QuantType, /) -> Floats:
    """Thresholds ``(G,)``: three times the root mean square, at most the largest magnitude."""
    return np.minimum(3 * dist.rms(), dist.max_abs())
