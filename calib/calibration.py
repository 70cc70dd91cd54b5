"""From what was observed to the calibration table. No files and no onnxruntime here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from calib.biasscales import fit_biases
from calib.calibrators import Calibrator, is_built_in, make
from calib.counter import Counter
from calib.counterfile import Counters
from calib.distribution import HISTOGRAM_BITS
from calib.errors import CalibError, ObservationsError
from calib.granularity import PerTensor, pieces, to_groups
from calib.graph import Model, Skipped
from calib.observations import Observations
from calib.qtypes import QuantType
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
from calib.targets import TARGETS, Plan, Reduction, Rules, TensorSpec
from calib.zeropoints import shifted

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
        questions, answers: the same number of each.
    """

    def __init__(self, spec: TensorSpec, counter: Counter | None, batches: list[Counter] | None):
        self.name, self.dtype, self.granularity = spec.name, spec.dtype, spec.granularity
        self.counter, self.batches = counter, batches
        self.empty = counter is not None and counter.min > counter.max
        self.questions: list[Asked] = []
        self.parts: list[Answers] = []
        self._known: dict[Hashable, int] = {}

    def ask(self, identity: int, calibrator: Calibrator, spec: TensorSpec) -> int:
        """The number of the question for the thresholds of ``calibrator`` on the spec's grid."""
        symmetric = spec.grid == "symmetric"
        number = self._known.setdefault((identity, spec.bits, symmetric), len(self._known))
        if number == len(self.questions):
            signed = self.counter is None or self.signed or symmetric
            qtype = QuantType(spec.bits, signed, self.counter is None)
            self.questions.append(Asked(calibrator, qtype))
        return number

    @property
    def signed(self) -> bool:
        """Whether an activation has negative values."""
        return self.counter is not None and self.counter.min < 0

    @property
    def built_in(self) -> bool:
        """Whether only calibrators of ours are asked."""
        return all(is_built_in(question.calibrator) for question in self.questions)

    @property
    def stack(self) -> Hashable:
        """The same of tensors that can be dealt with together; a third party's calibrators see one
        at a time."""
        alone = id(self) if self.batches is not None or not self.built_in else None
        return tuple(self._known), self.dtype, self.counter is None, self.signed, alone

    @cached_property
    def answers(self) -> Answers:
        """On the whole tensor, once all its parts are known."""
        return merged(self.parts)

    @cached_property
    def constant(self) -> bool:
        """Whether an activation held one value throughout."""
        return self.counter is not None and self.counter.min == self.counter.max


def _identities(jobs: Sequence[_Job]) -> dict[int, int]:
    """For the id of each calibrator a number, the same for those that answer the same."""
    distinct = {id(c): c for job in jobs for c in job.calibrators.values()}
    numbers: dict[object, int] = {}
    return {key: numbers.setdefault(_identity(c), len(numbers)) for key, c in distinct.items()}


def _identity(calibrator: Calibrator) -> object:
    try:
        hash(calibrator)
    except TypeError:
        return id(calibrator)
    return calibrator


def _tables(
    model: Model, observations: Observations, jobs: Sequence[_Job]
) -> list[CalibrationTable]:
    tensors: dict[Hashable, _Tensor] = {}
    for job in jobs:
        _check_observations(observations, job.plan, job.rules)
    identities = _identities(jobs)
    asked = [list(_questions(job, observations, tensors, identities)) for job in jobs]
    _answer(model, [tensor for tensor in tensors.values() if not tensor.empty])
    return [_table(model, observations, job, rows) for job, rows in zip(jobs, asked, strict=True)]


def _check_observations(observations: Observations, plan: Plan, rules: Rules) -> None:
    missing = [name for name in plan.activations if name not in observations.counters]
    if missing:
        raise ObservationsError(
            f"activation {missing[0]!r} and {len(missing) - 1} others were not observed: "
            f"observe again with the present --only, --exclude and --op-types"
        )
    asked, kept = rules.reduction.kept_batches, len(observations.batches)
    if asked and kept < max(1, min(asked, observations.n_batches)):
        raise ObservationsError(
            f"the observations keep counters of {kept} single batches, --reduce mean needs "
            f"{asked}: observe again with it and --save-observations"
        )


def _questions(
    job: _Job,
    observations: Observations,
    tensors: dict[Hashable, _Tensor],
    identities: dict[int, int],
) -> Iterator[tuple[TensorSpec, _Tensor, int]]:
    """Each tensor of the plan, and which of its answers is meant; new ones join ``tensors``."""
    mean = job.rules.reduction if job.rules.reduction.name != "pool" else None
    for spec in job.plan.specs:
        key = spec.shares or spec.name, spec.kind, spec.granularity, mean
        tensor = tensors.get(key) or tensors.setdefault(key, _tensor(observations, spec, mean))
        calibrator = job.calibrators[spec.name]
        yield spec, tensor, tensor.ask(identities[id(calibrator)], calibrator, spec)


def _tensor(observations: Observations, spec: TensorSpec, mean: Reduction | None) -> _Tensor:
    if spec.kind == "weight":
        return _Tensor(spec, None, None)
    batches = None
    if mean is not None:
        kept = observations.batches[: mean.batches]
        batches = [counter for batch in kept if (counter := _counter(batch, spec)).n_finite]
    return _Tensor(spec, _counter(observations.counters, spec), batches)


def _counter(counters: Counters, spec: TensorSpec) -> Counter:
    """What was counted of all that shares the grid of ``spec``."""
    if len(spec.shares) <= 1:
        return counters[spec.name]
    total = Counter()
    for name in spec.shares:
        total.merge(counters[name])
    return total


def _answer(model: Model, tensors: Sequence[_Tensor]) -> None:
    """All together; where that fails one after another, so that the culprit is named."""
    try:
        _answer_stacked(model, tensors)
    except CalibError:
        for tensor in tensors:
            tensor.parts.clear()
        for tensor in tensors:
            try:
                _answer_stacked(model, [tensor])
            except CalibError as error:
                raise type(error)(f"{tensor.name!r}: {error}") from error


def _answer_stacked(model: Model, tensors: Sequence[_Tensor]) -> None:
    stacks: dict[Hashable, list[_Tensor]] = {}
    for tensor in tensors:
        stacks.setdefault(tensor.stack, []).append(tensor)
    for built_in, share in ((True, spread), (False, one_by_one)):
        chosen = (stack for stack in stacks.values() if stack[0].built_in == built_in)
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
        if (batches := owners[0].batches) is None:
            work = partial(of_counters, counters, asked, dtype)
        else:
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
        whole = isinstance(tensor.granularity, PerTensor)
        cuts = pieces(weight.shape, tensor.granularity, weight.size if whole else _MOST)
        for index, _ in cuts:
            part = weight[index].astype(np.float32, copy=False)
            if values and size + part.size > most:
                yield owners, values
                owners, values, size, most = [], [], 0, min(2 * most, _MOST)
            owners.append(tensor)
            values.append(to_groups(part, tensor.granularity))
            size += part.size
    yield owners, values


def _table(
    model: Model,
    observations: Observations,
    job: _Job,
    rows: Sequence[tuple[TensorSpec, _Tensor, int]],
) -> CalibrationTable:
    unseen = "no value of it was seen in the data"
    mean, kept = job.rules.reduction, len(observations.batches)
    fewer = [f"mean over all {kept} batches that there are"] if kept < mean.kept_batches else []
    records = (
        shifted(_record(*row, fewer), row[1].counter, model) for row in rows if not row[1].empty
    )
    table = CalibrationTable(
        model.sha256,
        observations.n_samples,
        tuple(records),
        (*job.plan.skipped, *(Skipped(spec.name, unseen) for spec, t, _ in rows if t.empty)),
        target=job.rules.target,
    )
    return fit_biases(model, table) if TARGETS[table.target].bias == "int32" else table


def _record(spec: TensorSpec, tensor: _Tensor, number: int, fewer: list[str]) -> TensorRecord:
    answers, qtype = tensor.answers, tensor.questions[number].qtype
    sqnr_db = decibels(answers.signal, float(answers.noise[number]))
    notes = [*spec.notes, *answers.notes[number]]
    if tensor.counter is not None:
        notes += fewer
    if qtype.bits > HISTOGRAM_BITS:
        notes.append(_RAW if tensor.counter is None else _MODELLED)
    if tensor.constant:
        notes.append("constant: it held one value throughout")
    if sqnr_db is None and answers.signal > 0:
        notes.append("no quantization error at all")
    return TensorRecord(
        spec=spec,
        qtype=qtype,
        threshold=answers.threshold[number],
        scale=answers.scale[number],
        max_abs=answers.max_abs,
        count=answers.count,
        sqnr_db=sqnr_db,
        notes=tuple(notes),
    )
