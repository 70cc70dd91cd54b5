"""From what was observed to the calibration table. No files and no onnxruntime here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from calib.asymmetric import with_zero_point
from calib.biasscales import fit_biases
from calib.calibrators import Calibrator, is_built_in, make
from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Floats
from calib.errors import CalibError, CalibratorError, ObservationsError
from calib.granularity import Blocked, PerTensor, pieces, to_groups
from calib.graph import Model, Skipped
from calib.observations import Observations, pooled
from calib.planning import Plan, TensorSpec
from calib.qtypes import QuantType
from calib.rules import Reduction, Rules
from calib.stacking import (
    Answers,
    Asked,
    merged,
    of_batches,
    of_counters,
    of_values,
    one_by_one,
    spread,
)
from calib.table import CalibrationTable, TensorRecord, decibels
from calib.targets import TARGETS

_MOST = 1 << 20  # values of weights at a time; a value takes 40 bytes meanwhile
_FIRST = 1 << 18  # fewer at first, so that there is something to do for every core
_COUNTERS = 12  # of activations at a time
_LIKE_A_COUNTER = 1 << 13  # values that take about as long
_RAW = "sqnr_db from the raw values"
_MODELLED = "sqnr_db from the noise model: the counters are too coarse above 8 bits"


def calibrate(
    model: Model, observations: Observations, plan: Plan, rules: Rules
) -> CalibrationTable:
    """Thresholds for all tensors of ``plan``: weights from their values, activations from their
    counters.

    Raises:
        ObservationsError: if an activation of the plan was not observed, or the counters of
            single batches that ``rules.reduction`` needs were not kept.
        CalibratorError: if a calibrator fails or returns nonsense; the tensor is named.
    """
    return calibrate_each(model, observations, [(plan, rules)])[0]


def calibrate_each(
    model: Model, observations: Observations, jobs: Sequence[tuple[Plan, Rules]]
) -> list[CalibrationTable]:
    """A table for each of ``jobs``, as `calibrate` gives it; what is the same for several of them,
    such as sorting a weight, is done once.

    Raises:
        ObservationsError, CalibratorError: as `calibrate`, for any of the jobs.
    """
    methods = dict.fromkeys(spec.method for plan, _ in jobs for spec in plan.specs)
    made = {method: make(method) for method in methods}
    return _tables(
        model,
        observations,
        [_Job(plan, rules, {s.name: made[s.method] for s in plan.specs}) for plan, rules in jobs],
    )


def calibrate_with(
    model: Model,
    observations: Observations,
    plan: Plan,
    rules: Rules,
    calibrators: Mapping[str, Calibrator],
) -> CalibrationTable:
    """As `calibrate`, with the calibrator that is given for each tensor's name."""
    return _tables(model, observations, [_Job(plan, rules, calibrators)])[0]


@dataclass(frozen=True, slots=True)
class _Job:
    """One table to be made, with a calibrator for each tensor's name."""

    plan: Plan
    rules: Rules
    calibrators: Mapping[str, Calibrator]


class _Tensor:
    """A tensor, everything that any job asks of it, and what is answered.

    Attributes:
        counter: an activation's; None of a weight.
        batches: counters of single batches, where thresholds are the mean over them.
        fewer: a note where these are fewer than were asked for.
        numbers: of the questions, by the identity of the calibrator and the width.
        questions: the same, in their order; one list for all tensors of a stack.
        parts: answers to all of them, on each part.
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
        self.parts: list[Answers] = []

    @cached_property
    def facts(self) -> list[_Fact]:
        """What every question's record holds, once all parts are known."""
        answers = merged(self.parts)
        signal, noise = answers.signal, answers.noise.tolist()
        facts = []
        for number, question in enumerate(self.questions):
            sqnr_db = decibels(signal, noise[number])
            notes = (*answers.notes[number], *self._notes(question.qtype, signal, noise[number]))
            own = question.qtype, answers.threshold[number], answers.scale[number]
            facts.append(((*own, answers.max_abs, answers.count, sqnr_db), notes))
        return facts

    def _notes(self, qtype: QuantType, signal: float, noise: float) -> Iterator[str]:
        """Besides those on a calibrator's answer."""
        yield from self.fewer
        if qtype.bits > HISTOGRAM_BITS:
            yield _RAW if self.counter is None else _MODELLED
        if self.counter is not None and self.counter.min == self.counter.max:
            yield "constant: it held one value throughout"
        if signal > 0 and not noise > 0:
            yield "no quantization error at all"


# The fields of a record, but for the first and the notes; and the notes.
_Fields = tuple[QuantType, Floats, NDArray[np.float32], float, int, float | None]
_Fact = tuple[_Fields, tuple[str, ...]]
_Rows = list[tuple[TensorSpec, _Tensor, int]]


class _Register:
    """All tensors of all jobs, and the calibrators that they are calibrated by.

    Attributes:
        tensors: each once, in the order in which they are first asked for.
        calibrators: those that answer the same are one; the place of each is its identity.
    """

    def __init__(self, observations: Observations):
        self._observations = observations
        self._known: dict[Hashable, _Tensor] = {}
        self._identities: dict[object, int] = {}
        self.calibrators: list[Calibrator] = []

    @property
    def tensors(self) -> list[_Tensor]:
        return list(self._known.values())

    def rows(self, job: _Job) -> _Rows:
        """Each tensor of the job's plan, and which of its questions is meant."""
        reduction = job.rules.reduction
        mean = reduction if reduction.name != "pool" else None
        distinct = {id(calibrator): calibrator for calibrator in job.calibrators.values()}
        identities = {key: self._identity(calibrator) for key, calibrator in distinct.items()}
        rows, known = [], self._known
        for spec in job.plan.specs:
            key = spec.shares or spec.name, spec.kind, spec.granularity, mean
            if (tensor := known.get(key)) is None:
                tensor = known[key] = self._tensor(spec, mean)
            identity = identities[id(job.calibrators[spec.name])]
            question = identity, spec.bits, spec.grid == "signed"
            rows.append((spec, tensor, tensor.numbers.setdefault(question, len(tensor.numbers))))
        return rows

    def stacks(self, tensors: Sequence[_Tensor]) -> Iterator[tuple[list[_Tensor], bool]]:
        """Tensors that can be dealt with together, and whether by calibrators of ours alone; a
        third party's see one tensor at a time."""
        foreign = {n for n, c in enumerate(self.calibrators) if not is_built_in(c)}
        found: dict[Hashable, list[_Tensor]] = {}
        ours: dict[Hashable, bool] = {}
        for tensor in tensors:
            asked = tuple(tensor.numbers)
            if asked not in ours:
                ours[asked] = foreign.isdisjoint(identity for identity, *_ in asked)
            alone = None if tensor.batches is None and ours[asked] else id(tensor)
            kind = tensor.counter is None, tensor.narrow, tensor.signed
            key = asked, tensor.dtype, kind, alone
            found.setdefault(key, []).append(tensor)
        for stack in found.values():
            first, asked = stack[0], tuple(stack[0].numbers)
            questions = [
                Asked(self.calibrators[n], QuantType(bits, first.signed or signed, first.narrow))
                for n, bits, signed in asked
            ]
            for tensor in stack:
                tensor.questions = questions
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

    def _tensor(self, spec: TensorSpec, mean: Reduction | None) -> _Tensor:
        if spec.kind == "weight":
            return _Tensor(spec, None, None)
        names = spec.shares or (spec.name,)
        counter = pooled(self._observations.counters, names)
        if mean is None:
            return _Tensor(spec, counter, None)
        kept = self._observations.batches[: mean.batches]
        single = [found for batch in kept if (found := pooled(batch, names)).n_finite]
        tensor = _Tensor(spec, counter, single)
        if (all_ := len(self._observations.batches)) < mean.kept_batches:
            tensor.fewer = (f"mean over all {all_} batches that there are",)
        return tensor


def _tables(
    model: Model, observations: Observations, jobs: Sequence[_Job]
) -> list[CalibrationTable]:
    register = _Register(observations)
    for job in jobs:
        _check_observations(observations, job.plan, job.rules)
    asked = [register.rows(job) for job in jobs]
    _answer(model, register)
    return [_table(model, observations, job, rows) for job, rows in zip(jobs, asked, strict=True)]


def _check_observations(observations: Observations, plan: Plan, rules: Rules) -> None:
    missing = [name for name in plan.activations if name not in observations.counters]
    if missing:
        raise ObservationsError(
            f"activation {missing[0]!r} and {len(missing) - 1} others were not observed: "
            f"observe again with the present --target, --only, --exclude and --op-types"
        )
    asked, kept = rules.reduction.kept_batches, len(observations.batches)
    if asked and kept < max(1, min(asked, observations.n_batches)):
        raise ObservationsError(
            f"the observations keep counters of {kept} single batches, --reduce mean needs "
            f"{asked}: observe again with it and --save-observations"
        )


def _answer(model: Model, register: _Register) -> None:
    """All together; where that fails one after another, so that the culprit is named."""
    tensors = [tensor for tensor in register.tensors if not tensor.empty]
    try:
        _answer_stacked(model, register, tensors)
    except CalibError:
        for tensor in tensors:
            tensor.parts.clear()
        for tensor in tensors:
            try:
                _answer_stacked(model, register, [tensor])
            except CalibError as error:
                raise type(error)(f"{tensor.name!r}: {error}") from error


def _answer_stacked(model: Model, register: _Register, tensors: Sequence[_Tensor]) -> None:
    stacks = list(register.stacks(tensors))
    for built_in, share in ((True, spread), (False, one_by_one)):
        chosen = (stack for stack, ours in stacks if ours == built_in)
        portions = (portion for stack in chosen for portion in _portions(model, stack))
        for owners, answers in share(lambda portion: (portion[0], portion[1]()), portions):
            for owner, part in zip(owners, answers, strict=True):
                owner.parts.append(part)


_Portion = tuple[list[_Tensor], Callable[[], list[Answers]]]


def _portions(model: Model, stack: list[_Tensor]) -> Iterator[tuple[_Portion, int]]:
    """Tensors and how answers on them, or on a part of them, are found; each of bounded memory.
    And its size, in values."""
    asked, dtype = stack[0].questions, stack[0].dtype
    if stack[0].counter is None:
        for owners, values in _weights(model, stack):
            size = sum(part.size for part in values)
            yield (owners, partial(of_values, values, asked, dtype)), size
        return
    for start in range(0, len(stack), _COUNTERS):
        owners = stack[start : start + _COUNTERS]
        counters = [owner.counter for owner in owners if owner.counter is not None]
        work = partial(of_counters, counters, asked, dtype)
        if (batches := owners[0].batches) is not None:
            work = partial(of_batches, counters[0], batches, asked, dtype)
        yield (owners, work), len(counters) * _LIKE_A_COUNTER


def _weights(
    model: Model, stack: list[_Tensor]
) -> Iterator[tuple[list[_Tensor], list[NDArray[np.floating]]]]:
    """The values of weights as ``(groups, values)``, about so many at a time as memory allows, and
    whose they are. Channels are independent: a large weight comes in several parts."""
    owners, values = list[_Tensor](), list[NDArray[np.floating]]()
    size, most = 0, _FIRST
    for tensor in stack:
        weight = model.weight(tensor.name)
        most_each = weight.size if isinstance(tensor.granularity, PerTensor) else _MOST
        for index, _ in pieces(weight.shape, tensor.granularity, most_each):
            part = weight[index].astype(np.float32, copy=False)
            if values and size + part.size > most:
                yield owners, values
                owners, values, size, most = [], [], 0, min(2 * most, _MOST)
            owners.append(tensor)
            values.append(to_groups(part, tensor.granularity))
            size += part.size
    yield owners, values


def _table(model: Model, observations: Observations, job: _Job, rows: _Rows) -> CalibrationTable:
    unseen = "no value of it was seen in the data"
    table = CalibrationTable(
        model.sha256,
        observations.n_samples,
        tuple(_record(model, *row) for row in rows if not row[1].empty),
        (*job.plan.skipped, *(Skipped(spec.name, unseen) for spec, t, _ in rows if t.empty)),
        target=job.rules.target,
    )
    return fit_biases(model, table) if TARGETS[table.target].bias == "int32" else table


def _record(model: Model, spec: TensorSpec, tensor: _Tensor, number: int) -> TensorRecord:
    fields, notes = tensor.facts[number]
    record = TensorRecord(spec, *fields, (*spec.notes, *notes) if spec.notes else notes)
    if spec.grid in ("symmetric", "signed"):
        return record
    counter = tensor.counter or Counter.of(model.weight(spec.name))
    try:
        calibrator = tensor.questions[number].calibrator
        return with_zero_point(record, calibrator, counter, tensor.batches or ())
    except CalibratorError as error:
        raise CalibratorError(f"{spec.name!r}: {error}") from error
