"""What each tensor's quantization does to the output, and what to do about the worst."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from calib.arrays import Batch
from calib.capture import Values
from calib.comparison import Difference
from calib.progress import Advance, Progress, silent
from calib.switchable import Records, Switchable
from calib.table import CalibrationTable, TensorRecord

_Key = TypeVar("_Key", bound=Hashable)

N_SAMPLES = 64
# Each tensor is run twice for each batch; beyond this many, most get an estimate from fewer.
_MOST_EXACT = 64
_MOST_KEPT = 256_000_000  # bytes of inputs and outputs
_GOOD_DB = 15.0
_GAIN_DB = 3.0
_NEAR_DB = 1.0
_CURVE_POINTS = 24


@dataclass(frozen=True, slots=True)
class Damage:
    """What one tensor's quantization does to the output.

    Attributes:
        name, kind: the tensor.
        alone_db: output SQNR with it alone quantized.
        all_but_db: output SQNR with all others quantized; None where only estimated.
        estimated: ``alone_db`` comes from a few samples only.
    """

    name: str
    kind: str
    alone_db: float
    all_but_db: float | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """All tensors, ranked by the damage that each does alone.

    Attributes:
        n_samples: how many samples it was measured on.
        base_db: output SQNR with all tensors quantized.
        wide_db: the same with all tensors at the wider width.
        tensors: worst first.
        curve: ``(n, output SQNR with the n worst tensors at the wider width)``.
        excluding: ``(n, output SQNR with the n worst layers float)``.
        layers: node names, worst first.
    """

    n_samples: int
    base_db: float
    wide_db: float
    tensors: tuple[Damage, ...]
    curve: tuple[tuple[int, float], ...]
    excluding: tuple[tuple[int, float], ...]
    layers: tuple[str, ...]

    @property
    def target_db(self) -> float:
        """What a proposal aims at: 15 dB, where accuracy mostly lives, or 3 dB more than there is
        without it; at most what the wider width reaches, less 1 dB."""
        return _target_db(self.base_db, self.wide_db)

    def widened(self) -> tuple[str, ...]:
        """The fewest of the worst tensors that reach the target at the wider width."""
        n = _first_reaching(self.curve, self.target_db)
        return tuple(damage.name for damage in self.tensors[:n])

    def excluded(self) -> tuple[str, ...]:
        """The fewest of the worst layers that reach the target in float."""
        return self.layers[: _first_reaching(self.excluding, self.target_db)]


def _target_db(base_db: float, wide_db: float) -> float:
    return min(max(_GOOD_DB, base_db + _GAIN_DB), wide_db - _NEAR_DB)


def _first_reaching(curve: Iterable[tuple[int, float]], target_db: float) -> int:
    points = list(curve)
    return next((n for n, db in points if db >= target_db), points[-1][0])


def sensitivity(
    model: Switchable,
    narrow: CalibrationTable,
    wide: CalibrationTable,
    batches: Iterable[Batch],
    progress: Progress = silent,
) -> Sensitivity:
    """Quantizes each tensor of ``narrow`` alone, all but it, and the worst ones as ``wide`` has
    them, on the first 64 samples; ``model`` was made with ``narrow``.

    With more than 64 tensors each is first tried on the first batch alone, and only the worst 64
    are measured on all.

    Raises:
        ModelError: if onnxruntime fails.
    """
    low = {record.name: record for record in narrow.records}
    high = {record.name: record for record in wide.records}
    trials = _Trials(model, batches)
    with progress("sensitivity", trials.expected(len(low))) as trials.advance:
        return _measured(trials, low, high)


def _measured(trials: _Trials, low: Records, high: Records) -> Sensitivity:
    alone: dict[str, Records] = {name: {name: record} for name, record in low.items()}
    estimates = trials.run(alone, first=True) if len(low) > _MOST_EXACT else {}
    exact = sorted(low, key=lambda name: estimates.get(name, 0.0))[:_MOST_EXACT]
    measured = trials.run({name: alone[name] for name in exact})
    damage = estimates | measured
    but = trials.run({x: {n: r for n, r in low.items() if n != x} for x in exact})
    ranked = sorted(low, key=lambda name: (name not in measured, damage[name]))
    layers = _layers(low, damage)
    curve = trials.run({n: _widened(low, high, ranked[:n]) for n in _steps(len(ranked))})
    excluding = trials.run({n: _without(low, layers[:n]) for n in _steps(len(layers))})
    target_db = _target_db(curve[0], curve[len(ranked)])
    curve |= trials.run({n: _widened(low, high, ranked[:n]) for n in _between(curve, target_db)})
    excluding |= trials.run({n: _without(low, layers[:n]) for n in _between(excluding, target_db)})
    return Sensitivity(
        n_samples=trials.n_samples,
        base_db=curve[0],
        wide_db=curve[len(ranked)],
        tensors=tuple(
            Damage(name, low[name].spec.kind, damage[name], but.get(name), name not in measured)
            for name in ranked
        ),
        curve=tuple(sorted(curve.items())),
        excluding=tuple(sorted(excluding.items())),
        layers=layers,
    )


def _layers(records: Records, damage: Mapping[str, float]) -> tuple[str, ...]:
    """Nodes by the noise that the tensors they read bring to the output, most first."""
    noise: dict[str, float] = {}
    for name, record in records.items():
        for consumer in record.spec.consumers:
            noise[consumer] = noise.get(consumer, 0.0) + 10 ** (-damage[name] / 10)
    return tuple(sorted(noise, key=lambda node: -noise[node]))


def _widened(low: Records, high: Records, names: Iterable[str]) -> Records:
    return {**low, **{name: high[name] for name in names}}


def _between(curve: Mapping[int, float], target_db: float) -> range:
    """The numbers left out just before the first that reaches the target."""
    reaching = _first_reaching(curve.items(), target_db)
    return range(max((n for n in curve if n < reaching), default=reaching) + 1, reaching)


def _without(records: Records, layers: Iterable[str]) -> dict[str, TensorRecord]:
    """What stays quantized when ``layers`` are float: what any other layer reads."""
    gone = set(layers)
    return {n: r for n, r in records.items() if not gone.issuperset(r.spec.consumers)}


def _steps(n: int) -> list[int]:
    """0 to ``n``: every number at first, then ever fewer."""
    steps, step = [0], 1
    while steps[-1] < n:
        steps.append(min(n, steps[-1] + step))
        step = max(1, steps[-1] * 4 // _CURVE_POINTS)
    return steps


class _Trials:
    """Runs the same samples with different sets of tensors quantized. ``advance`` is told how many
    samples were run."""

    advance: Advance

    def __init__(self, model: Switchable, batches: Iterable[Batch]):
        self._model = model
        self._kept: list[tuple[Batch, Values]] = []
        self.n_samples = n_bytes = 0
        for batch in batches:
            expected = model.run(batch, {})
            self._kept.append((batch, expected))
            self.n_samples += batch.n_samples
            arrays = (*expected.values(), *batch.feed.values())
            n_bytes += sum(array.nbytes for array in arrays)
            if self.n_samples >= N_SAMPLES or n_bytes > _MOST_KEPT:
                break

    def expected(self, n_tensors: int) -> int:
        """About how many samples `_measured` will run."""
        exact = min(n_tensors, _MOST_EXACT)
        estimates = (n_tensors > exact) * n_tensors * self._kept[0][0].n_samples
        return estimates + (2 * exact + 2 * len(_steps(n_tensors))) * self.n_samples

    def run(self, trials: Mapping[_Key, Records], first: bool = False) -> dict[_Key, float]:
        """Output SQNR with each set of records, the lowest of all outputs; on the ``first`` batch
        alone or on all. Minus infinity where an output has another shape than in float."""
        kept = self._kept[:1] if first else self._kept
        return {key: self._sqnr_db(records, kept) for key, records in trials.items()}

    def _sqnr_db(self, records: Records, kept: list[tuple[Batch, Values]]) -> float:
        differences: dict[str, Difference] = {}
        for batch, expected in kept:
            self.advance(batch.n_samples)
            for name, actual in self._model.run(batch, records).items():
                if name not in expected or actual.shape != expected[name].shape:
                    return -math.inf
                if actual.dtype.kind == "f":
                    differences.setdefault(name, Difference()).add(expected[name], actual)
        return min((d.sqnr_db for d in differences.values()), default=math.inf)
