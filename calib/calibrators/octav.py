"""OCTAV: the MSE-optimal clipping scalar by a fixed-point recursion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.distribution import Distribution, Floats, seeking
from calib.errors import OptionError
from calib.qtypes import QuantType

_MAX_UPDATES = 200
_CLOSEST = 1e-6
_CLOSE = 1e-3
_BELOW_MAXIMUM = 0.99


@dataclass(frozen=True, slots=True)
class Octav:
    """Thresholds ``(G,)`` at the fixed point of the OCTAV recursion (OCTAV, equation 6):

        s ← Σ |x|·1{|x| > s} / (κ·Σ 1{0 < |x| ≤ s} + Σ 1{|x| > s}),   s₁ = Σ|x| / count(x ≠ 0)

    The fixed point is unique: ``h(s) = s·(κ·In(s) + Out(s)) - Tail(s)`` increases strictly, so
    each update also tells on which side of s it lies. An update that would leave the bracket so
    found, as on data with few distinct magnitudes, is replaced by the middle of the bracket.
    A distribution that can find the fixed point itself is asked for it instead.

    Args:
        kappa: ``"grid"`` for the rounding noise of the grid that is written, ``"paper"`` for the
            paper's ideal grid: 4⁻ᴮ/3 signed, 4⁻ᴮ/12 unsigned.
        tolerance: stop when the threshold moves by less than this, relative to itself.
        iterations: instead of the tolerance, exactly this many plain updates (the paper: 10);
            0 for none of that.

    Raises:
        OptionError: for an unknown ``kappa``, a tolerance not in (0, 1), negative iterations.
    """

    kappa: str = "grid"
    tolerance: float = _CLOSEST
    iterations: int = 0

    def __post_init__(self) -> None:
        if self.kappa not in ("grid", "paper"):
            raise OptionError(f"octav: kappa must be 'grid' or 'paper', got {self.kappa!r}")
        if not 0 < self.tolerance < 1:
            raise OptionError(f"octav: tolerance must be in (0, 1), got {self.tolerance}")
        if self.iterations < 0:
            raise OptionError(f"octav: iterations must not be negative, got {self.iterations}")

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        noise = self._noise(qtype)
        exact = not self.iterations and self.tolerance <= _CLOSEST
        if exact and (seeker := seeking(dist)) is not None:
            return seeker.fixed_point(noise)
        everything = dist.tail(np.zeros(dist.groups))
        nonzero = np.maximum(everything.count, 1)
        s = everything.sum / nonzero
        if self.iterations:
            for _ in range(self.iterations):
                s = _update(dist, s, nonzero, noise)
            return s
        return self._solve(dist, s, nonzero, noise, self.tolerance)

    def refine(self, dist: Distribution, qtype: QuantType, start: Floats, /) -> Floats:
        """As calling, from thresholds ``start`` ``(G,)`` that are close already, such as those of
        the training step before; within 0.1 %.

        Near the fixed point of many different values, an update that moves s by a fraction δ
        leaves an error of a few δ²: two updates are common, and thus two passes over the values.
        With ``iterations``, it is the call itself.
        """
        if self.iterations:
            return self(dist, qtype)
        nonzero = np.maximum(dist.tail(np.zeros(dist.groups)).count, 1)
        largest = dist.max_abs()  # from where no update comes back
        below = np.where(start < largest, start, _BELOW_MAXIMUM * largest)
        return self._solve(dist, below, nonzero, self._noise(qtype), _CLOSE)

    def _solve(
        self, dist: Distribution, s: Floats, nonzero: Floats, noise: float, tolerance: float
    ) -> Floats:
        """The recursion from ``s`` on, until it moves by less than ``tolerance``."""
        low, high = np.zeros_like(s), dist.max_abs()
        for _ in range(_MAX_UPDATES):
            proposal = _update(dist, s, nonzero, noise)
            low = np.where(proposal >= s, np.maximum(low, s), low)
            high = np.where(proposal <= s, np.minimum(high, s), high)
            inside = (low < proposal) & (proposal < high)
            proposal = np.where(inside, proposal, (low + high) / 2)
            settled = np.abs(proposal - s) <= tolerance * proposal
            s = proposal
            if settled.all():
                break
        return s

    def _noise(self, qtype: QuantType) -> float:
        if self.kappa == "grid":
            return qtype.rounding_noise
        return float(4.0**-qtype.bits / (3 if qtype.signed else 12))


def _update(dist: Distribution, s: Floats, nonzero: Floats, noise: float) -> Floats:
    """One step of the recursion; where nothing is clipped, the largest magnitude."""
    tail = dist.tail(s)
    updated = tail.sum / (noise * (nonzero - tail.count) + tail.count)
    return np.where(tail.count > 0, updated, dist.max_abs())
