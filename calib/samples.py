"""Raw values as a distribution, which answers exactly (weights)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib import compiled
from calib.granularity import PerChannel
from calib.magnitudes import Singles, moments, plain_squared_errors, units
from calib.ordered import Ordered
from calib.protocol import HISTOGRAM_BITS, Tail, or_mean_square, sweep, usual_noises
from calib.qtypes import QuantType, places
from calib.quantize import fake_quantize, scale_from_threshold
from calib.ranked import Floats, Ranked, joined, starts_of
from calib.rounding import seek, squared_errors
from calib.sweeping import TOP, Swept, plain_sweeps

_HUGE = 1e38

_Groups = tuple[NDArray[np.intp], NDArray[Any]]


class Samples:
    """Raw values of shape ``(G, N)``, optionally each standing for ``counts`` values.

    The input is never modified and may be read-only. Memory: up to 40 bytes a value on top.
    """

    def __init__(self, values: NDArray[np.floating], counts: NDArray[np.int64] | None = None):
        self._values = values
        self._more: tuple[NDArray[np.floating], ...] = ()
        self._counts = counts
        self._expected: tuple[tuple[int, QuantType], ...] = ()
        self._noises: tuple[float, ...] = ()
        self._fixed: dict[float, Floats] = {}
        self._swept: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._measured: dict[int, list[tuple[Singles, Floats]]] = {}

    @classmethod
    def stacked(cls, pieces: Sequence[NDArray[np.floating]]) -> Samples:
        """The groups of all ``pieces``, each ``(G, N)``, behind one another."""
        samples = cls(pieces[0])
        samples._more = tuple(pieces[1:])
        return samples

    @property
    def _pieces(self) -> tuple[NDArray[np.floating], ...]:
        return (self._values, *self._more)

    @cached_property
    def groups(self) -> int:
        return sum(piece.shape[0] for piece in self._pieces)

    @cached_property
    def has_negative(self) -> bool:
        return any(bool((piece < 0).any()) for piece in self._pieces)

    def count(self) -> Floats:
        if self._counts is not None:
            return np.asarray(self._counts.sum(axis=1), np.float64)
        return np.diff(self._starts).astype(np.float64)

    def max_abs(self) -> Floats:
        return self._moments[0].copy()

    def mean_abs(self) -> Floats:
        ranked = self._ranked
        return ranked.at(ranked.sum, np.zeros(self.groups, np.intp)) / self.count()

    def rms(self) -> Floats:
        return np.sqrt(self._moments[1] / self.count())

    def quantile(self, q: float) -> Floats:
        rank = np.ceil(q * np.diff(self._starts) * (1 - 1e-12)) - 1  # see `Ranked.quantile`
        if self._counts is None and (rank == np.diff(self._starts) - 1).all():
            return self.max_abs()
        return self._ranked.quantile(q)

    def tail(self, t: Floats) -> Tail:
        return Tail(*self._ranked.tail(t))

    def extremes(self) -> tuple[Floats, Floats]:
        low = [piece.min(axis=1) for piece in self._pieces]
        high = [piece.max(axis=1) for piece in self._pieces]
        return np.concatenate(low).astype(np.float64), np.concatenate(high).astype(np.float64)

    def signed_quantile(self, q: float) -> Floats:
        return self._ordered.quantile(q)

    def tails(self, low: Floats, high: Floats) -> tuple[Tail, Tail]:
        return Tail(*self._ordered.below(low)), Tail(*self._ordered.above(high))

    def squared_excess(self, t: Floats) -> Floats:
        """The sum of ``(|x| - t)²`` over the magnitudes above ``t``."""
        return self._ranked.squared_excess(t)

    def fixed_point(self, noise: float) -> Floats:
        """See `Seeking`."""
        if self._fast():
            if noise not in self._fixed:
                self._seek(self._expected, noise, *usual_noises(noise))
            return self._fixed[noise].copy()
        return self._ranked.fixed_point(noise)

    def expect(self, sweeps: Iterable[tuple[int, QuantType]], noises: Iterable[float] = ()) -> None:
        """Says that `least_mse` and `fixed_point` of these are to be asked for: those of as many
        points as the first, on grids that are symmetric for these values, are found in one pass."""
        self._expected, self._noises = tuple(sweeps), tuple(noises)

    def least_mse(self, points: int, qtype: QuantType) -> Floats:
        """See `Seeking`."""
        if not self._seeks(qtype):
            return sweep(self, points, qtype)
        if (points, qtype.steps) not in self._swept:
            if compiled.enabled():
                self._seek([(points, qtype), *self._expected])
            else:
                self._plainly_sweep(points, qtype)
        return self._swept[points, qtype.steps] / points * self._moments[0]

    def _seeks(self, qtype: QuantType) -> bool:
        """Whether the grid is symmetric for these values, and float32 exact enough."""
        levels = qtype.narrow or (qtype.qmax == qtype.steps and not self.has_negative)
        if not (self._single(qtype) and levels):
            return False
        # The lowest level, which nothing reaches, bounds the scale of the largest values.
        return -qtype.qmin <= qtype.steps or bool(self._moments[0].max() < _HUGE)

    def _seek(self, sweeps: Sequence[tuple[int, QuantType]], *noise: float) -> None:
        """Finds what is expected and ``noise``, and of ``sweeps`` those with as many points as the
        first."""
        points = sweeps[0][0] if sweeps else 1
        grids = {q.steps: q.rounding_noise for n, q in sweeps if n == points and self._seeks(q)}
        noises = [*grids.values(), *({*self._noises, *noise} - {*grids.values()})]
        steps = np.array([*grids], np.int64)
        given = self._flat, self._starts, self._moments, np.array(noises), (steps, points)
        found, best = seek(*given)
        self._fixed.update(zip(noises, found, strict=True))
        self._swept.update(zip(((points, n) for n in grids), best, strict=True))

    def _plainly_sweep(self, points: int, qtype: QuantType) -> None:
        """As `_seek` does, without fixed points; errors that are found are kept."""
        asked = [qtype, *(q for n, q in self._expected if n == points and self._seeks(q))]
        grids = {q.steps: q for q in asked}
        shape, (largest, squares) = (len(grids), self.groups), self._moments
        found = Swept(np.empty(shape, np.int64), np.empty(shape), np.empty(shape))
        steps = np.array([*grids], np.int64)
        ranked = self._ranked
        for groups, rows in self._by_length:
            few = np.arange(-min(rows.shape[1], TOP), 0)
            top = ranked.magnitude[ranked.starts[groups + 1, None] + few]
            swept = plain_sweeps(rows, top, squares[groups], (steps, points))
            for whole, part in zip(found, swept, strict=True):
                whole[:, groups] = part
        for (n, grid), best, least, last in zip(grids.items(), *found, strict=True):
            self._swept[points, n] = best
            thresholds = (best / points * largest, least), (largest, last)
            measured = [(scale_from_threshold(t, grid), error) for t, error in thresholds]
            self._measured.setdefault(n, []).extend(measured)

    def mse(self, t: Floats, qtype: QuantType) -> Floats:
        thresholds = np.asarray(t, np.float64).reshape(-1, self.groups)
        steps = scale_from_threshold(thresholds, qtype)
        errors = self.squared_errors(steps, [qtype] * len(steps))
        return or_mean_square(self, thresholds, errors / self.count()).reshape(np.shape(t))

    def squared_errors(self, steps: Singles, qtypes: Sequence[QuantType]) -> Floats:
        """The sums of squared errors on grids with ``steps`` and of ``qtypes``, ``(P, G)``.

        Args:
            steps: ``(P, G)``.
            qtypes: P of them.
        """
        if all(map(self._fast, qtypes)):
            levels = np.array([(each.qmin, each.qmax) for each in qtypes], np.float32)
            return squared_errors(self._flat, self._starts, steps, levels, units(self._moments[0]))
        errors = np.empty(steps.shape)
        for qtype, rows in places(qtypes).items():
            errors[rows] = self._squared_errors(steps[rows], qtype)
        return errors

    def _squared_errors(self, steps: Singles, qtype: QuantType) -> Floats:
        """As the kernel; only where no method and no sweep led to the same step."""
        seeks = self._seeks(qtype)
        known = list(self._measured.get(qtype.steps, ())) if seeks else []
        merged = seeks and "_by_length" in self.__dict__  # the same but for signs
        parts = self._by_length if merged else list(self._by_piece())
        errors = np.empty(steps.shape)
        for step, error in zip(steps, errors, strict=True):
            new = np.ones(self.groups, np.bool_)
            for other, found in known:
                same = other == step
                np.copyto(error, found, where=same)
                new &= ~same
            for groups, rows in parts if new.any() else ():
                if new[groups].any():
                    error[groups] = self._error(groups, rows, step[groups], qtype)
            known.append((step, error))
        return errors

    def _by_piece(self) -> Iterator[_Groups]:
        first = 0
        for piece in self._pieces:
            yield np.arange(first, first + len(piece)), piece
            first += len(piece)

    def _error(
        self, groups: NDArray[np.intp], rows: NDArray[Any], step: Singles, qtype: QuantType
    ) -> Floats:
        if not self._single(qtype):
            return self._exact(rows, step, qtype)
        levels = np.array([qtype.qmin, qtype.qmax], np.float32)
        unit = units(self._moments[0][groups])
        return np.asarray(plain_squared_errors(rows, step[None], levels, unit)[0])

    def _exact(self, piece: NDArray[Any], step: Singles, qtype: QuantType) -> Floats:
        written = fake_quantize(piece, step, qtype, PerChannel(0))
        squares = self._counted(np.square(written.astype(np.float64) - piece))
        return np.asarray(squares.sum(axis=1))

    def _counted(self, terms: Floats) -> Floats:
        return terms if self._counts is None else terms * self._counts

    def _fast(self, qtype: QuantType | None = None) -> bool:
        """Whether kernels answer."""
        return compiled.enabled() and self._single(qtype)

    def _single(self, qtype: QuantType | None = None) -> bool:
        """Whether float32 is exact enough; above 8 bits it is too coarse for errors."""
        narrow = qtype is None or qtype.bits <= HISTOGRAM_BITS
        return narrow and self._of_singles

    @cached_property
    def _of_singles(self) -> bool:
        single = all(piece.dtype == np.float32 for piece in self._pieces)
        return single and self._counts is None

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return starts_of(self._pieces)

    @cached_property
    def _flat(self) -> Singles:
        return np.require(joined(self._pieces), np.float32, ["C", "A", "W"])

    @cached_property
    def _moments(self) -> tuple[Floats, Floats]:
        """The largest magnitude and the sum of squares of each group."""
        if self._fast():
            return moments(self._flat, self._starts)
        largest = [np.abs(piece).max(axis=1) for piece in self._pieces]
        squares = [self._counted(np.square(piece, dtype=np.float64)) for piece in self._pieces]
        return (
            np.concatenate(largest).astype(np.float64),
            np.concatenate([part.sum(axis=1) for part in squares]),
        )

    @cached_property
    def _by_length(self) -> list[_Groups]:
        """Groups that are as long, and their magnitudes ``(G, N)``, in the order of the values:
        sums of errors do not depend on what else is asked, to the bit."""
        as_long: dict[int, list[_Groups]] = {}
        for groups, piece in self._by_piece():
            as_long.setdefault(piece.shape[1], []).append((groups, piece))
        parts = (zip(*found, strict=True) for found in as_long.values())
        return [
            (np.concatenate(groups), np.abs(np.concatenate(pieces))) for groups, pieces in parts
        ]

    @cached_property
    def _ordered(self) -> Ordered:
        rows = [row for piece in self._pieces for row in piece.astype(np.float64)]
        times = [np.ones(row.size) for row in rows] if self._counts is None else self._counts
        orders = map(np.argsort, rows)
        return Ordered([(r[o], t[o]) for r, t, o in zip(rows, times, orders, strict=True)])

    @cached_property
    def _ranked(self) -> Ranked:
        ranked = Ranked.of(self._pieces, None if self._counts is None else [self._counts])
        ranked.expect(self._noises)
        return ranked
