"""How sure thresholds are: those of each half of the samples beside those of all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from calib.calibration import calibrate_with
from calib.calibrators import Calibrator, make
from calib.counterfile import Counters
from calib.distribution import Distribution, Floats, Histogram
from calib.graph import Model
from calib.observations import Observations
from calib.planning import Plan
from calib.qtypes import QuantType
from calib.rules import Rules
from calib.table import TensorRecord

# A threshold 5 % off the optimum of OCTAV adds at most 0.19 dB to the MSE at 4 bits and 0.25 dB at
# 8, one 10 % off 0.5 and 1.4 dB: on Gaussian, rectified Gaussian, Laplace and Student (5) data.
ENOUGH_PERCENT = 5.0
ENOUGH_DB = 0.1


@dataclass(frozen=True, slots=True)
class Certainty:
    """Thresholds of one activation, in its unit: from all samples, and from each half; 0 from those
    in which it is zero throughout. ``excess_db``: how much more error the worse half's threshold
    makes on all samples; where the error is flat, thresholds that differ cost nothing."""

    name: str
    all: float
    first: float
    second: float
    excess_db: float

    @property
    def percent(self) -> float:
        """How far the half that differs more is from all, in percent of all."""
        difference = max(abs(self.first - self.all), abs(self.second - self.all))
        return 100 * difference / self.all if difference else 0.0


@dataclass(frozen=True, slots=True)
class Confidence:
    """How much the thresholds of a table depend on which samples were observed.

    Half the difference of two halves estimates the standard error of what all give; for methods
    that look at the largest value alone, as `max`, one half always agrees with all.

    Attributes:
        n_samples: of each half.
        tensors: activations, those that differ most first.
        unseen: activations of which one half holds no value: nothing is known of these.
    """

    n_samples: tuple[int, int]
    tensors: tuple[Certainty, ...]
    unseen: tuple[str, ...] = ()

    @property
    def unsure(self) -> tuple[Certainty, ...]:
        """Those that differ by more than `ENOUGH_PERCENT`, at the cost of more than `ENOUGH_DB`."""
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.percent > ENOUGH_PERCENT and tensor.excess_db > ENOUGH_DB
        )

    @property
    def text(self) -> str:
        """One sentence on what all of this means."""
        first, second = self.n_samples
        percents = [tensor.percent for tensor in self.tensors]
        found = (
            f"thresholds of the two halves of the samples ({first} and {second}) differ from those "
            f"of all by at most {percents[0]:.1f} % (median {median(percents):.1f} %)"
        )
        if self.unseen:
            names = f"{len(self.unseen)} activations, the first {self.unseen[0]!r},"
            return f"{found}; {names} were seen in one half only: more samples are needed"
        if not self.unsure:
            return f"{found}: more samples would change little"
        n, of, worst = len(self.unsure), len(percents), self.unsure[0]
        beyond = f"{n} of {of} by more than {ENOUGH_PERCENT:g} %"
        cost = f"{worst.name!r} at the cost of {worst.excess_db:.1f} dB"
        return f"{found}, {beyond}, {cost}: more samples are needed"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "n_samples": list(self.n_samples),
            "text": self.text,
            "tensors": [
                {
                    "name": tensor.name,
                    "all": tensor.all,
                    "first": tensor.first,
                    "second": tensor.second,
                    "percent": tensor.percent,
                    "excess_db": tensor.excess_db,
                }
                for tensor in self.tensors
            ],
            "unseen": list(self.unseen),
        }


def confidence(
    model: Model, observations: Observations, plan: Plan, rules: Rules
) -> Confidence | None:
    """How sure the thresholds of the activations of ``plan`` are; weights depend on no samples.

    None where the observations have no halves, where no activation was seen in both, and for the
    reduction ``mean``, which looks at the first batches alone.

    Raises:
        ObservationsError, CalibratorError: as `calib.calibration.calibrate`.
    """
    if not observations.halves or rules.reduction.name != "pool":
        return None
    specs = tuple(spec for spec in plan.specs if spec.kind == "activation")
    calibrators: dict[str, Calibrator] = {spec.name: make(spec.method) for spec in specs}

    def records(counters: Counters) -> dict[str, TensorRecord]:
        part = replace(observations, counters=counters)
        table = calibrate_with(model, part, Plan(specs, ()), rules, calibrators)
        return {record.name: record for record in table.records}

    everything = records(observations.counters)
    for name, record in everything.items():
        if not record.qtype.zero_point:
            calibrators[name] = _OnGrid(calibrators[name], record.qtype)
    specs = tuple(replace(spec, grid=_grid(everything.get(spec.name))) for spec in specs)
    halves = [records(half) for half in observations.halves]
    tensors = [
        _certainty(
            Histogram(observations.counters[name]), [part[name] for part in (everything, *halves)]
        )
        for name in everything
        if all(name in half for half in halves)
    ]
    if not tensors:
        return None
    ranked = sorted(tensors, key=lambda tensor: tensor.percent, reverse=True)
    known = {tensor.name for tensor in tensors}
    unseen = tuple(name for name in everything if name not in known)
    return Confidence(observations.half_samples, tuple(ranked), unseen)


def _certainty(dist: Histogram, records: list[TensorRecord]) -> Certainty:
    everything, first, second = (_threshold(record) for record in records)
    errors = (dist.mse(record.threshold, record.qtype)[0] for record in records)
    best, *others = (float(error) for error in errors)
    worse = max(*others, best) / best if best > 0 else 1.0
    return Certainty(records[0].name, everything, first, second, 10 * math.log10(worse))


def _grid(record: TensorRecord | None) -> str:
    """That of all samples, for the halves to be compared on."""
    return "asymmetric" if record is not None and record.qtype.zero_point else "symmetric"


@dataclass(frozen=True, slots=True)
class _OnGrid:
    """A calibrator that is asked for one grid whatever the sign of the values: a half may lack the
    negative ones of all."""

    calibrator: Calibrator
    qtype: QuantType

    def __call__(self, dist: Distribution, _qtype: QuantType, /) -> Floats:
        return self.calibrator(dist, self.qtype)


def _threshold(record: TensorRecord) -> float:
    return float(record.threshold[0]) if record.max_abs > 0 else 0.0
