"""Values with their signs in ascending order, group by group, and what follows from the order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calib.ranked import Floats


class Ordered:
    """The values of each group, ascending, ``(N,)``, and how many each of them stands for, of the
    same shape; N may differ from group to group."""

    def __init__(self, groups: Sequence[tuple[Floats, Floats]]):
        self._values = [values for values, _ in groups]
        self._counts = [_before(counts) for _, counts in groups]
        self._sums = [_before(values * counts) for values, counts in groups]

    def quantile(self, q: float) -> Floats:
        """The smallest value that at least a fraction ``q`` of all do not exceed, ``(G,)``."""
        found = np.empty(len(self._values))
        for group, (values, counts) in enumerate(zip(self._values, self._counts, strict=True)):
            # The tolerance keeps q·N from landing a rounding error above the integer that it is.
            rank = np.searchsorted(counts[1:], q * counts[-1] * (1 - 1e-12))
            found[group] = values[min(rank, values.size - 1)]
        return found

    def below(self, t: Floats) -> tuple[Floats, Floats]:
        """Count and sum of the values strictly below ``t``, ``(G,)`` each."""
        ranks = [int(np.searchsorted(v, x)) for v, x in zip(self._values, t, strict=True)]
        return _picked(self._counts, ranks), _picked(self._sums, ranks)

    def above(self, t: Floats) -> tuple[Floats, Floats]:
        """Count and sum of the values strictly above ``t``, ``(G,)`` each."""
        pairs = zip(self._values, t, strict=True)
        ranks = [int(np.searchsorted(values, x, side="right")) for values, x in pairs]
        last = [counts.size - 1 for counts in self._counts]
        return (
            _picked(self._counts, last) - _picked(self._counts, ranks),
            _picked(self._sums, last) - _picked(self._sums, ranks),
        )


def _before(terms: Floats) -> Floats:
    """The sum of the terms before each, and of all: one more than there are."""
    return np.concatenate([[0.0], np.cumsum(terms)])


def _picked(sums: Sequence[Floats], ranks: Sequence[int]) -> Floats:
    return np.array([own[rank] for own, rank in zip(sums, ranks, strict=True)])
