"""A distribution on torch tensors: what calibrators ask is computed where the tensor lies."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from calib.distribution import Floats, Tail
from calib.qat.grid import SMALLEST_SCALE, Grid, apply_scale, scale_of
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold

_TINY = 2.0**-60


class TensorSamples:
    """Values of shape ``(G, N)`` of any float type on any device, each standing for ``counts``
    values where these are given; a `calib.distribution.Distribution`.

    Only vectors of shape ``(G,)`` leave the device. Sums are those of float32, in which a
    threshold is off by less than 1e-6. The values are never modified.
    """

    def __init__(self, values: Tensor, counts: Tensor | None = None):
        self._values = values.detach().float()
        self._counts = counts

    @property
    def groups(self) -> int:
        return int(self._values.shape[0])

    @property
    def has_negative(self) -> bool:
        return bool((self._extremes[0] < 0).any())

    def count(self) -> Floats:
        if self._counts is not None:
            return np.full(self.groups, float(self._counts.sum()))
        return np.full(self.groups, float(self._values.shape[1]))

    def max_abs(self) -> Floats:
        return self._max_abs.copy()

    def mean_abs(self) -> Floats:
        return self._sums(self._magnitude)[0] / self.count()

    def rms(self) -> Floats:
        return np.sqrt(self._mean_square(self._values))

    def quantile(self, q: float) -> Floats:
        if q >= 1:
            return self.max_abs()
        magnitude = self._magnitude
        wanted = q * float(self.count()[0]) * (1 - 1e-12)
        if self._counts is None:
            rank = max(1, int(np.ceil(wanted)))
            return _floats(magnitude.kthvalue(rank, dim=1).values)
        magnitude, order = magnitude.sort(dim=1)
        below = self._counts[order].cumsum(1)
        first = (below < wanted).sum(1, keepdim=True)
        return _floats(magnitude.gather(1, first)[:, 0])

    def tail(self, t: Floats) -> Tail:
        if np.ndim(t) == 1 and not np.any(t):
            return self._nonzero
        rows = [self._tail(row) for row in np.reshape(t, (-1, self.groups))]
        count, total = (np.reshape([row[n] for row in rows], np.shape(t)) for n in (0, 1))
        return Tail(count, total)

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        if qtype.zero_point:
            return self._shifted_mse(t, qtype)
        grid = Grid(qtype.bits, narrow=qtype.narrow)
        signed = torch.tensor(qtype.signed, device=self._values.device)
        errors, mean_square = [], self._mean_square(self._values)
        for row in np.reshape(t, (-1, self.groups)):
            scale = scale_of(self._per_group(row).float(), grid, signed)
            quantized = apply_scale(self._values, scale[:, None], grid, signed)
            errors.append(
                np.where(row > 0, self._mean_square(quantized - self._values), mean_square)
            )
        return np.reshape(errors, np.shape(t))

    def _shifted_mse(self, t: Floats, qtype: QuantType) -> Floats:
        """`mse` on a grid with a zero point, which no layer in training has."""
        errors, mean_square = [], self._mean_square(self._values)
        for row in np.reshape(t, (-1, self.groups)):
            own = scale_from_threshold(row, qtype).astype(np.float64)
            scale = self._per_group(own).float()[:, None]
            levels = (self._values / scale).round().clamp(qtype.qmin, qtype.qmax)
            error = self._mean_square(levels * scale - self._values)
            errors.append(np.where(row > 0, error, mean_square))
        return np.reshape(errors, np.shape(t))

    def extremes(self) -> tuple[Floats, Floats]:
        low, high = self._extremes
        return low.copy(), high.copy()

    def signed_quantile(self, q: float) -> Floats:
        values, order = self._values.sort(dim=1)
        times = torch.ones_like(order) if self._counts is None else self._counts[order]
        below = times.cumsum(1)
        first = (below < q * float(self.count()[0]) * (1 - 1e-12)).sum(1, keepdim=True)
        return _floats(values.gather(1, first.clamp(max=values.shape[1] - 1))[:, 0])

    def tails(self, low: Floats, high: Floats) -> tuple[Tail, Tail]:
        below = self._values.double() < self._per_group(low)[:, None]
        above = self._values.double() > self._per_group(high)[:, None]
        found = [self._sums(part.float(), part * self._values) for part in (below, above)]
        return Tail(*found[0]), Tail(*found[1])

    @cached_property
    def _extremes(self) -> Floats:
        """The smallest and the largest value of each group: (2, G); NaN where there is one."""
        if self.groups == 1:
            low, high = self._values.aminmax()  # several times faster than by rows
            return _floats(torch.stack([low, high])[:, None])
        return _floats(torch.stack(self._values.aminmax(dim=1)))

    @cached_property
    def _max_abs(self) -> Floats:
        largest: Floats = np.abs(self._extremes).max(axis=0)
        return largest

    @cached_property
    def _magnitude(self) -> Tensor:
        return self._values.abs() if self.has_negative else self._values

    @cached_property
    def _nonzero(self) -> Tail:
        return Tail(*self._count_and_sum(self._magnitude, 0.0))

    def _tail(self, t: Floats) -> list[Floats]:
        """Count and sum of the magnitudes above ``t``: by sums of floats, which torch adds up many
        times faster than it counts."""
        if self.groups == 1:
            above = torch.nn.functional.threshold(self._magnitude, float(np.float32(t[0])), 0.0)
        else:
            magnitude = self._magnitude
            above = magnitude * (magnitude > self._per_group(t).float()[:, None])
        return self._count_and_sum(above, float(np.min(t)))

    def _count_and_sum(self, magnitude: Tensor, least: float) -> list[Floats]:
        """Of the values that are not 0, all of them above ``least``.

        Each is cut down to one power of two, so that their sum, which is exact, is their number:
        clamping takes a third of the time of a sign, and that less than comparing.
        """
        unit = 2.0 ** np.floor(np.log2(max(least, SMALLEST_SCALE)))
        if self._max_abs.max(initial=0.0) < _TINY:  # some may be subnormal, below any such power
            return self._sums(magnitude.sign(), magnitude)
        count, total = self._sums(magnitude.clamp(max=unit), magnitude)
        return [np.rint(count / unit), total]

    def _mean_square(self, values: Tensor) -> Floats:
        """By group; in units of the maximum, as squares leave the range of float32 early."""
        unit = np.where(self._max_abs > 0, self._max_abs, 1.0)
        squares = (values / self._per_group(unit).float()[:, None]).square()
        mean: Floats = self._sums(squares)[0] / self.count() * unit**2
        return mean

    def _sums(self, *terms: Tensor) -> list[Floats]:
        """Sums by group, which leave the device together."""
        if self._counts is not None:
            terms = tuple(t.double() * self._counts for t in terms)
        return list(_floats(torch.stack([t.sum(1) for t in terms])))

    def _per_group(self, vector: Floats) -> Tensor:
        return torch.from_numpy(np.asarray(vector, np.float64)).to(self._values.device)


def _floats(vector: Tensor) -> Floats:
    answer: Floats = vector.double().cpu().numpy()
    return answer
