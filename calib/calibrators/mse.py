"""The sweep: the candidate threshold with the smallest measured error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.distribution import Distribution, Floats, seeking, sweep
from calib.errors import OptionError
from calib.qtypes import QuantType

_CUT = 8
_MOST_ZERO_POINTS = 16
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Mse:
    """Thresholds ``(G,)``: of ``{k/points · max|x|}``, k = 1 … points, the one with the least
    MSE on the grid that is written (OCTAV, section 4, its 100-point sweep), for each group by
    itself, the smallest where several are equal.

    Raises:
        OptionError: if ``points`` is below 1.
    """

    points: int = 100

    def __post_init__(self) -> None:
        if self.points < 1:
            raise OptionError(f"mse: points must be at least 1, got {self.points}")

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        if (seeker := seeking(dist)) is not None:
            return seeker.least_mse(self.points, qtype)
        return sweep(dist, self.points, qtype)

    def two_sided(self, dist: Distribution, bits: int, /) -> tuple[Floats, Floats]:
        """See `calib.calibrators.TwoSided`: the two that have the least MSE of all grids with a
        zero point that either extreme, cut to an eighth, would have or one between, 16 at most,
        and with ``k / points`` times the scale at which nothing is clipped.
        """
        low, high = dist.extremes()
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        most = (1 << bits) - 1
        ends, least = (low.copy(), high.copy()), np.full(dist.groups, np.inf)
        fractions = np.arange(1, self.points + 1)[:, None] / self.points
        for zero_point in _zero_points(low, high, most):
            qtype = QuantType(bits, signed=False, zero_point=zero_point)
            below, above = -low / max(zero_point, 1), high / max(most - zero_point, 1)
            thresholds = fractions * np.maximum(below, above) * qtype.steps
            errors = dist.mse(thresholds, qtype)
            at = np.argmin(errors, axis=0)[None]
            error = np.take_along_axis(errors, at, 0)[0]
            scale = np.take_along_axis(thresholds, at, 0)[0] / qtype.steps
            better = error < least
            least[better] = error[better]
            ends[0][better] = (scale * qtype.qmin)[better]
            ends[1][better] = (scale * qtype.qmax)[better]
        return ends


def _zero_points(low: Floats, high: Floats, most: int) -> list[int]:
    """Those to try, of all groups."""
    shares = [
        -part / np.maximum(whole - part, _TINY)
        for part, whole in ((low / _CUT, high), (low, high / _CUT))
    ]
    first, last = np.floor(most * np.min(shares[0])), np.ceil(most * np.max(shares[1]))
    wanted = np.rint(np.linspace(first, last, _MOST_ZERO_POINTS))
    return [int(zero_point) for zero_point in np.unique(wanted)]
