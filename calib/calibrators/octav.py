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
_NOTHING = 1e-300
_START = 0.05
_SWINGING = 50  # updates, by when all others have settled


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

    def two_sided(self, dist: Distribution, bits: int, /) -> tuple[Floats, Floats]:
        """See `calib.calibrators.TwoSided`. First, where neither of two recursions moves any more:

            a ← (κp·(m_q + m_r) + m_q·r) / D,   b ← (κp·(m_q + m_r) + m_r·q) / D,
            D = κp·(q + r) + q·r,   κ = 1 / (12 (2ᴮ - 1)²)

        with p of the values that are not 0 within [a, b], q below and r above it, and m_q, m_r the
        sums of these (derived as OCTAV, equation 6: both derivatives of ``κp·(b - a)²`` and of what
        is clipped are 0). They start at the 5 % and 95 % quantiles. An end behind which nothing
        lies is the extreme value, and takes no part.

        The zero point z is an integer: for those beside ``-a·L / (b - a)``, with L = 2ᴮ - 1 the
        recursion of the one scalar that is left, the scale s, goes on from there

            s ← ((L - z)·m_r - z·m_q) / (p / 12 + (L - z)²·r + z²·q)

        (derived likewise; z = 0 gives equation 6). Of these grids it is the one with the least
        MSE. ``kappa`` and ``iterations`` are of the symmetric grid, and leave this alone.
        """
        smallest, largest = dist.extremes()
        bounds = np.minimum(smallest, 0), np.maximum(largest, 0)
        noise = 1 / (12.0 * ((1 << bits) - 1) ** 2)
        a = np.clip(dist.signed_quantile(_START), bounds[0], 0)
        b = np.clip(dist.signed_quantile(1 - _START), 0, bounds[1])
        for update in range(_MAX_UPDATES):
            low, high = _update_both(dist, (a, b), bounds, noise)
            if update >= _SWINGING:  # between values of a few magnitudes
                low, high = (a + low) / 2, (b + high) / 2
            moved = np.maximum(np.abs(low - a), np.abs(high - b))
            a, b = low, high
            if (moved <= self.tolerance * (b - a)).all():
                break
        return self._rounded(dist, (a, b), bits)

    def _rounded(
        self, dist: Distribution, ends: tuple[Floats, Floats], bits: int
    ) -> tuple[Floats, Floats]:
        """``ends`` for an integer zero point."""
        most = (1 << bits) - 1
        span = ends[1] - ends[0]
        wanted = -ends[0] / np.where(span > 0, span, 1) * most
        low, high, least = ends[0].copy(), ends[1].copy(), np.full(dist.groups, np.inf)
        for zero_point in {*np.floor(wanted).astype(int), *np.ceil(wanted).astype(int)}:
            qtype = QuantType(bits, signed=False, zero_point=int(zero_point))
            scale = self._scale(dist, span / most, qtype)
            error = dist.mse(scale * qtype.steps, qtype)
            better = (error < least) & (scale > 0)
            low = np.where(better, scale * qtype.qmin, low)
            high = np.where(better, scale * qtype.qmax, high)
            least = np.where(better, error, least)
        return low, high

    def _scale(self, dist: Distribution, scale: Floats, qtype: QuantType) -> Floats:
        """The fixed point of the recursion of the scale; where nothing is clipped, the least scale
        at which that is so."""
        smallest, largest = dist.extremes()
        keeping = np.maximum(
            -smallest / max(-qtype.qmin, _NOTHING), largest / max(qtype.qmax, _NOTHING)
        )
        nonzero = dist.tail(np.zeros(dist.groups)).count
        for _ in range(_MAX_UPDATES):
            below, above = dist.tails(scale * qtype.qmin, scale * qtype.qmax)
            inside = nonzero - below.count - above.count
            weight = inside / 12 + qtype.qmax**2 * above.count + qtype.qmin**2 * below.count
            pull = qtype.qmax * above.sum + qtype.qmin * below.sum
            proposal = np.where(pull > 0, pull / np.maximum(weight, _NOTHING), keeping)
            settled = np.abs(proposal - scale) <= self.tolerance * scale
            scale = proposal
            if settled.all():
                break
        return scale

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


def _update_both(
    dist: Distribution, ends: tuple[Floats, Floats], bounds: tuple[Floats, Floats], noise: float
) -> tuple[Floats, Floats]:
    """One step of the two recursions. An end that cannot move, as nothing lies behind it or as it
    would pass 0, is where it must be, and the other one's derivative alone is 0."""
    below, above = dist.tails(*ends)
    q, r = below.count, above.count
    inside = noise * (dist.tail(np.zeros(dist.groups)).count - q - r)
    both, divisor = inside * (below.sum + above.sum), inside * (q + r) + q * r
    divisor = np.where(divisor > 0, divisor, 1)
    low = np.where(q == 0, bounds[0], (both + below.sum * r) / divisor)
    high = np.where(r == 0, bounds[1], (both + above.sum * q) / divisor)
    fixed_low, fixed_high = (q == 0) | (low >= 0), (r == 0) | (high <= 0)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    high_alone = (inside * low + above.sum) / np.maximum(inside + r, _NOTHING)
    low_alone = (inside * high + below.sum) / np.maximum(inside + q, _NOTHING)
    return (
        np.clip(np.where(fixed_high & ~fixed_low, low_alone, low), bounds[0], 0),
        np.clip(np.where(fixed_low & ~fixed_high, high_alone, high), 0, bounds[1]),
    )
