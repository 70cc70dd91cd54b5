"""Magnitudes in ascending order, group by group, and what follows from the order alone.

The groups of several tensors lie behind one another and may differ in length: group g is
``flat[starts[g]:starts[g + 1]]``. Sums have one more entry per group, so that group g's begin at
``starts[g] + g``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calib import compiled
from calib.compiled import kernel

Floats = NDArray[np.float64]
Ranks = NDArray[np.intp]
Values = NDArray[np.floating]
Scalar = TypeVar("Scalar", bound=np.generic)


class Ranked:
    """Magnitudes that ascend in each group; of those that stand for ``counts`` values, sums count
    them so often."""

    def __init__(
        self,
        magnitude: NDArray[Any],
        starts: NDArray[np.int64],
        shapes: Sequence[tuple[int, ...]],
        counts: NDArray[np.int64] | None = None,
    ):
        self.magnitude, self.starts = magnitude, starts
        self._shapes, self._counts = shapes, counts
        self._known: dict[tuple[str, float], Floats] = {}
        self._noises: set[float] = set()

    @classmethod
    def of(
        cls, pieces: Sequence[Values], counts: Sequence[NDArray[np.int64]] | None = None
    ) -> Ranked:
        """The magnitudes of ``pieces``, each ``(G, N)``, sorted."""
        magnitudes, joined_counts = [np.abs(piece) for piece in pieces], None
        if counts is None:
            for magnitude in magnitudes:
                magnitude.sort(axis=1)
        else:
            orders = [np.argsort(magnitude, axis=1) for magnitude in magnitudes]
            magnitudes = list(map(_taken, magnitudes, orders))
            joined_counts = joined(list(map(_taken, counts, orders)))
        shapes = [piece.shape for piece in pieces]
        return cls(joined(magnitudes), starts_of(pieces), shapes, joined_counts)

    @classmethod
    def of_sides(
        cls, magnitude: NDArray[np.float32], counts: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> Ranked:
        """Of groups of which each has two sides, that ascend already and begin at ``starts``."""
        groups = starts[::2]
        if compiled.enabled():
            shapes = [(1, n) for n in np.diff(groups).tolist()]
            ranked, times = _of_both_sides(magnitude, counts, starts)
            return cls(ranked, groups, shapes, times)
        pieces = [piece[None] for piece in np.split(magnitude, groups[1:-1])]
        return cls.of(pieces, [own[None] for own in np.split(counts, groups[1:-1])])

    @cached_property
    def length(self) -> Ranks:
        """How many magnitudes each group has, ``(G,)``."""
        return np.diff(self.starts)

    @cached_property
    def largest(self) -> Floats:
        """The last of each group, ``(G,)``."""
        return self.magnitude[self.starts[1:] - 1].astype(np.float64)

    @cached_property
    def count(self) -> Floats | None:
        """How many values there are from each rank on; None where they are so many as ranks."""
        return None if self._counts is None else self._from_rank(0)

    @cached_property
    def sum(self) -> Floats:
        """The sum of magnitudes from each rank on."""
        return self._from_rank(1)

    @cached_property
    def square_sum(self) -> Floats:
        """The sum of squares from each rank on."""
        return self._from_rank(2)

    def _from_rank(self, power: int) -> Floats:
        if compiled.enabled() and self.magnitude.dtype == np.float32:
            if self._counts is not None:
                return _counted_from_rank(self.magnitude, self._counts, self.starts, power)
            return _sums_from_rank(self.magnitude, self.starts, power)
        terms = self.magnitude.astype(np.float64)
        if power != 1:
            terms **= power
        if self._counts is not None:
            terms *= self._counts
        sums, first = np.zeros(terms.size + self.starts.size - 1), 0
        for groups, n in self._shapes:
            row = terms[first : first + groups * n].reshape(groups, n)
            start = first + self._groups_before(first)
            part = sums[start : start + groups * (n + 1)].reshape(groups, n + 1)
            np.cumsum(row[:, ::-1], axis=1, out=part[:, :n][:, ::-1])
            first += groups * n
        return sums

    def _groups_before(self, first: int) -> int:
        return int(np.searchsorted(self.starts, first))

    def count_at(self, rank: Ranks) -> Floats:
        """How many values there are from ``rank`` ``(..., G)`` on."""
        if self.count is None:
            return np.asarray(self.length - rank, np.float64)
        return self.at(self.count, rank)

    def at(self, sums: Floats, rank: Ranks) -> Floats:
        """``sums`` of each group from ``rank`` ``(..., G)`` on."""
        return np.asarray(sums.take(self._sums + rank))

    @cached_property
    def _sums(self) -> Ranks:
        """Where sums of each group begin."""
        return np.asarray(self.starts[:-1] + np.arange(self.starts.size - 1))

    def rank(self, t: Floats) -> Ranks:
        """How many magnitudes of each group are ≤ ``t`` ``(..., G)``."""
        return self._first(np.shape(t), lambda at, _rank: self.magnitude.take(at) <= t)

    def tail(self, t: Floats) -> tuple[Floats, Floats]:
        """Count and sum of the magnitudes strictly above ``t`` ``(..., G)``."""
        rank = self.rank(t)
        return self.count_at(rank), self.at(self.sum, rank)

    def squared_excess(self, t: Floats) -> Floats:
        """The sum of ``(|x| - t)²`` over the magnitudes above ``t`` ``(..., G)``."""
        rank = self.rank(t)
        linear = self.at(self.sum, rank)
        return self.at(self.square_sum, rank) - 2 * t * linear + t**2 * self.count_at(rank)

    def quantile(self, q: float) -> Floats:
        """The smallest magnitude that at least a fraction ``q`` of all values do not exceed."""
        return self._once("quantile", self._quantile, q)

    def _once(self, what: str, answer: Callable[[float], Floats], value: float) -> Floats:
        """``answer(value)``, which several methods and widths ask for."""
        if (what, value) not in self._known:
            self._known[what, value] = answer(value)
        return self._known[what, value].copy()

    def _quantile(self, q: float) -> Floats:
        everything = self.count_at(np.zeros(self.starts.size - 1, np.intp))
        # The tolerance keeps q·N from landing a rounding error above the integer that it is.
        wanted = q * everything * (1 - 1e-12)
        if self.count is None:
            rank = np.maximum(np.ceil(wanted).astype(np.intp) - 1, 0)
        else:
            rank = self._first(
                wanted.shape, lambda _at, rank: everything - self.count_at(rank + 1) < wanted
            )
        at = self.starts[:-1] + np.minimum(rank, self.length - 1)
        return self.magnitude.take(at).astype(np.float64)

    def fixed_point(self, noise: float) -> Floats:
        """Where ``h(s) = s·(noise·In(s) + Out(s)) - Tail(s)`` changes its sign: of the values
        not 0, In counts those ≤ s and Out those above, Tail is the sum of the latter.

        h increases strictly, linearly between magnitudes: the place is found by bisection of the
        ranks. It is the largest magnitude if h is below 0 before it.
        """
        return self._once("fixed point", self._fixed_point, noise)

    def expect(self, noises: Iterable[float]) -> None:
        """Says that `fixed_point` of these is to be asked for: NumPy finds them in one go."""
        self._noises = {*noises}

    def _fixed_point(self, noise: float) -> Floats:
        if compiled.enabled() and self.magnitude.dtype == np.float32:
            count = np.empty(0) if self.count is None else self.count
            return _fixed_points(self.magnitude, self.sum, count, self.starts, noise)
        noises = np.array([noise, *(self._noises - {noise})])
        self._noises = set()
        for one, found in zip(noises.tolist(), self._plain_fixed_points(noises), strict=True):
            self._known["fixed point", one] = found
        return self._known["fixed point", noise]

    def _plain_fixed_points(self, noises: Floats) -> Floats:
        """Of F ``noises``, ``(F, G)``."""
        nonzero = self.count_at(self.rank(np.zeros(self.starts.size - 1)))
        noise, shape = noises[:, None], (noises.size, nonzero.size)

        def weight(rank: Ranks) -> Floats:
            above = self.count_at(rank)
            return np.asarray(noise * (nonzero - above) + above)

        def below(at: Ranks, rank: Ranks) -> NDArray[np.bool_]:
            return self.at(self.sum, rank) >= self.magnitude.take(at) * weight(rank)

        rank = self._first(shape, below)
        before = self.magnitude.take(self.starts[:-1] + np.maximum(rank - 1, 0))
        rest = weight(rank)
        root = self.at(self.sum, rank) / np.where(rest > 0, rest, 1)
        found = np.maximum(root, np.where(rank > 0, before, 0))
        return np.where(nonzero > 0, found, 0.0)

    def _first(
        self, shape: tuple[int, ...], before: Callable[[Ranks, Ranks], NDArray[np.bool_]]
    ) -> Ranks:
        """The first rank for which ``before(where it lies, rank)`` does not hold, by bisection of
        all groups at once."""
        first, n = self.starts[:-1], self.length
        rank = np.zeros(shape, np.intp)
        for step in (1 << bit for bit in reversed(range(int(n.max()).bit_length()))):
            last = np.minimum(rank + step, n) - 1
            rank += step * ((rank + step <= n) & before(first + last, last))
        return rank


def starts_of(pieces: Sequence[NDArray[np.generic]]) -> NDArray[np.int64]:
    """Where the groups of ``pieces``, each ``(G, N)``, begin when they lie behind one another, and
    where the last one ends."""
    lengths = [np.full(piece.shape[0], piece.shape[1]) for piece in pieces]
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)


def joined(pieces: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """All values of ``pieces`` behind one another, ``(N,)``; a view where that is possible."""
    flat = [piece.reshape(-1) for piece in pieces]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def _taken(array: NDArray[Scalar], order: Ranks) -> NDArray[Scalar]:
    return np.take_along_axis(array, order, axis=1)


@kernel()
def _sums_from_rank(
    magnitude: NDArray[np.float32], starts: NDArray[np.int64], power: int
) -> Floats:
    groups = starts.size - 1
    sums = np.empty(magnitude.size + groups)
    for group in range(groups):
        total = 0.0
        sums[starts[group + 1] + group] = total
        for at in range(starts[group + 1] - 1, starts[group] - 1, -1):
            value = np.float64(magnitude[at])
            total += value if power == 1 else value * value
            sums[at + group] = total
    return sums


@kernel()
def _counted_from_rank(
    magnitude: NDArray[np.float32], counts: NDArray[np.int64], starts: NDArray[np.int64], power: int
) -> Floats:
    groups = starts.size - 1
    sums = np.empty(magnitude.size + groups)
    for group in range(groups):
        total = 0.0
        sums[starts[group + 1] + group] = total
        for at in range(starts[group + 1] - 1, starts[group] - 1, -1):
            value, term = np.float64(magnitude[at]), 1.0
            for _ in range(power):
                term *= value
            total += term * counts[at]
            sums[at + group] = total
    return sums


@kernel()
def _of_both_sides(
    magnitude: NDArray[np.float32], counts: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Magnitudes of both sides in one order, and their counts."""
    ranked, times = np.empty_like(magnitude), np.empty_like(counts)
    for group in range(starts.size // 2):
        one, other = starts[2 * group], starts[2 * group + 1]
        middle, last = other, starts[2 * group + 2]
        for rank in range(one, last):
            if other == last or (one < middle and magnitude[one] <= magnitude[other]):
                at, one = one, one + 1
            else:
                at, other = other, other + 1
            ranked[rank], times[rank] = magnitude[at], counts[at]
    return ranked, times


@kernel()
def _fixed_points(
    magnitude: NDArray[np.float32],
    sums: Floats,
    counts: Floats,
    starts: NDArray[np.int64],
    noise: float,
) -> Floats:
    found = np.zeros(starts.size - 1)
    for group in range(found.size):
        first, last = starts[group], starts[group + 1]
        rank = _after_zeros(magnitude, first, last)
        nonzero = _count_from(counts, rank, last, group)
        if nonzero == 0:
            continue
        end = last
        while rank < end:  # the root at rank is below its magnitude from end on
            middle = (rank + end) // 2
            above = _count_from(counts, middle, last, group)
            weight = noise * (nonzero - above) + above
            if sums[middle + group] >= magnitude[middle] * weight:
                rank = middle + 1
            else:
                end = middle
        above = _count_from(counts, rank, last, group)
        found[group] = sums[rank + group] / (noise * (nonzero - above) + above)
        if rank > first and magnitude[rank - 1] > found[group]:
            found[group] = magnitude[rank - 1]
    return found


@kernel()
def _after_zeros(magnitude: NDArray[np.float32], first: int, last: int) -> int:
    while first < last:
        middle = (first + last) // 2
        if magnitude[middle] > 0:
            last = middle
        else:
            first = middle + 1
    return first


@kernel()
def _count_from(counts: Floats, at: int, last: int, group: int) -> float:
    if counts.size == 0:
        return np.float64(last - at)
    return float(counts[at + group])
