"""The sweep: the candidate threshold with the smallest measured error."""

from __future__ import annotations

from dataclasses import dataclass

from calib.distribution import Distribution, Floats, seeking, sweep
from calib.errors import OptionError
from calib.qtypes import QuantType


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
