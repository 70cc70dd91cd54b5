"""Everything that any job asks of any tensor, each once, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from calib.calibrators import Calibrator, is_built_in
from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Floats
from calib.granularity import Blocked
from calib.observations import Observations, pooled
from calib.planning import Plan, TensorSpec
from calib.qtypes import QuantType
from calib.rules import Reduction, Rules
from calib.stacking import Answers, Asked, merged
from calib.table import decibels

_RAW = "sqnr_db from the raw values"
_MODELLED = "sqnr_db from the noise model: the counters are too coarse above 8 bits"


@dataclass(frozen=True, slots=True)
class Job:
    """One table to be made, with a calibrator for each tensor's name."""

    plan: Plan
    rules: Rules
    calibrators: Mapping[str, Calibrator]


@dataclass(frozen=True, slots=True)
class Facts:
    """What records of a tensor hold, the lists for each of its questions; see
    `calib.table.TensorRecord`."""

    threshold: list[Floats]
    scale: list[NDArray[np.float32]]
    max_abs: float
    count: int
    sqnr_db: list[float | None]
    notes: list[tuple[str, ...]]


class Tensor:
    """A tensor, everything that any job asks of it, and what is answered.

    Attributes:
        counter: an activation's; None of a weight.
        batches: counters of single batches, where thresholds are the mean over them.
        fewer: a note where these are fewer than were asked for.
        numbers: of the questions, by the identity of the calibrator and the width.
        questions: the same, in their order; one list for all tensors that are asked the same.
        places: of these among those of its stack, where that is asked more.
        parts: answers to its own questions, on each part.
    """

    def __init__(self, spec: TensorSpec, counter: Counter | None, batches: list[Counter] | None):
        self.name, self.dtype, self.granularity = spec.name, spec.dtype, spec.granularity
        self.counter, self.batches = counter, batches
        self.signed = counter is None or counter.min < 0
        # Of 32 values at 4 bits, the 16th level is worth 0.5 dB to mse, of 128 0.2 dB to octav.
        self.narrow = counter is None and not isinstance(spec.granularity, Blocked)
        self.empty = counter is not None and counter.min > counter.max
        self.fewer: tuple[str, ...] = ()
        self.numbers: dict[tuple[int, int, bool], int] = {}
        self.questions: Sequence[Asked] = ()
        self.places: list[int] | None = None
        self.parts: list[Answers] = []

    def hear(self, part: Answers) -> None:
        """Notes what its stack was answered on a part of it."""
        self.parts.append(part if self.places is None else part.some(self.places))

    @cached_property
    def facts(self) -> Facts:
        """What is known once all parts are."""
        answers = merged(self.parts)
        noises, known = answers.noise.tolist(), dict[tuple[bool, bool], tuple[str, ...]]()
        all_notes = []
        for question, noise, notes in zip(self.questions, noises, answers.notes, strict=True):
            case = question.qtype.bits > HISTOGRAM_BITS, answers.signal > 0 and not noise > 0
            if (more := known.get(case)) is None:
                more = known[case] = tuple(self._notes(*case))
            all_notes.append((*notes, *more))
        return Facts(
            list(answers.threshold),
            list(answers.scale),
            answers.max_abs,
            answers.count,
            [decibels(answers.signal, noise) for noise in noises],
            all_notes,
        )

    def _notes(self, wide: bool, exact: bool) -> Iterator[str]:
        """Besides those on a calibrator's answer: on a grid that is wider than counters are fine,
        or without any error."""
        yield from self.fewer
        if wide:
            yield _RAW if self.counter is None else _MODELLED
        if self.counter is not None and self.counter.min == self.counter.max:
            yield "constant: it held one value throughout"
        if exact:
            yield "no quantization error at all"


@cache
def _grid(bits: int, signed: bool, narrow: bool) -> QuantType:
    return QuantType(bits, signed, narrow)


# For each spec of a plan, its tensor and which of the tensor's questions is meant. Two lists:
# thousands of tuples would cost the garbage collector as much time as they took to make.
Rows = tuple[list[Tensor], list[int]]
_Questions = tuple[tuple[int, int, bool], ...]
_Stacks = dict[tuple[_Questions, tuple[Hashable, ...]], list[Tensor]]


def _joined(stacks: _Stacks, is_little: Callable[[list[Tensor]], bool]) -> _Stacks:
    """``stacks``, of which little ones are part of others of their kind that are asked more."""
    joined: _Stacks = {}
    for (asked, kind), stack in sorted(stacks.items(), key=lambda item: -len(item[0][0])):
        *_, alone = kind
        more = (
            other
            for (wanted, theirs), other in joined.items()
            if alone is None and theirs == kind and {*asked} < {*wanted}
        )
        if (other := next(more, None)) is not None and is_little(stack):
            other += stack
        else:
            joined[asked, kind] = stack
    return joined


class Register:
    """All tensors of all jobs, and the calibrators that they are calibrated by.

    Attributes:
        calibrators: those that answer the same are one; the place of each is its identity.
    """

    def __init__(self, observations: Observations):
        self._observations = observations
        self._known: dict[Hashable, Tensor] = {}
        self._identities: dict[object, int] = {}
        self.calibrators: list[Calibrator] = []

    @property
    def tensors(self) -> list[Tensor]:
        """Each once, in the order in which they are first asked for."""
        return list(self._known.values())

    def rows(self, job: Job) -> Rows:
        """What the job asks, in the order of its plan."""
        reduction = job.rules.reduction
        mean = reduction if reduction.name != "pool" else None
        distinct = {id(calibrator): calibrator for calibrator in job.calibrators.values()}
        identities = {key: self._identity(calibrator) for key, calibrator in distinct.items()}
        tensors, numbers, known = list[Tensor](), list[int](), self._known
        for spec in job.plan.specs:
            key = spec.shares or spec.name, spec.kind, spec.granularity, mean
            if (tensor := known.get(key)) is None:
                tensor = known[key] = self._tensor(spec, mean)
            identity = identities[id(job.calibrators[spec.name])]
            question = identity, spec.bits, spec.grid == "signed"
            tensors.append(tensor)
            numbers.append(tensor.numbers.setdefault(question, len(tensor.numbers)))
        return tensors, numbers

    def stacks(
        self, tensors: Sequence[Tensor], is_little: Callable[[list[Tensor]], bool]
    ) -> Iterator[tuple[list[Tensor], bool]]:
        """Tensors that can be dealt with together, and whether by calibrators of ours alone; a
        third party's see one tensor at a time. What ``is_little`` goes along with a stack that is
        asked more: the first and the last layer, often at 8 bits, with the others."""
        foreign = {n for n, c in enumerate(self.calibrators) if not is_built_in(c)}
        found: _Stacks = {}
        ours: dict[_Questions, bool] = {}
        for tensor in tensors:
            asked = tuple(tensor.numbers)
            if asked not in ours:
                ours[asked] = foreign.isdisjoint(identity for identity, *_ in asked)
            alone = None if tensor.batches is None and ours[asked] else id(tensor)
            kind = tensor.dtype, tensor.counter is None, tensor.narrow, tensor.signed, alone
            found.setdefault((asked, kind), []).append(tensor)
        for (asked, _), stack in _joined(found, is_little).items():
            first, number = stack[0], {question: n for n, question in enumerate(asked)}
            questions = [
                Asked(self.calibrators[n], _grid(bits, first.signed or signed, first.narrow))
                for n, bits, signed in asked
            ]
            for tensor in stack:
                tensor.questions, tensor.places = questions, None
                if len(tensor.numbers) < len(asked):
                    tensor.places = [number[question] for question in tensor.numbers]
                    tensor.questions = [questions[place] for place in tensor.places]
            yield stack, ours[asked]

    def _identity(self, calibrator: Calibrator) -> int:
        key: object = calibrator
        try:
            hash(calibrator)
        except TypeError:
            key = id(calibrator)
        number = self._identities.setdefault(key, len(self.calibrators))
        if number == len(self.calibrators):
            self.calibrators.append(calibrator)
        return number

    def _tensor(self, spec: TensorSpec, mean: Reduction | None) -> Tensor:
        if spec.kind == "weight":
            return Tensor(spec, None, None)
        names = spec.shares or (spec.name,)
        counter = pooled(self._observations.counters, names)
        if mean is None:
            return Tensor(spec, counter, None)
        kept = self._observations.batches[: mean.batches]
        single = [found for batch in kept if (found := pooled(batch, names)).n_finite]
        tensor = Tensor(spec, counter, single)
        if (all_ := len(self._observations.batches)) < mean.kept_batches:
            tensor.fewer = (f"mean over all {all_} batches that there are",)
        return tensor
