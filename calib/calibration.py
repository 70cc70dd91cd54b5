"""From what was observed to the calibration table. No files and no onnxruntime here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from calib.asymmetric import with_zero_point
from calib.biasscales import fit_biases
from calib.calibrators import Calibrator, make
from calib.counter import Counter
from calib.errors import CalibError, CalibratorError, ObservationsError
from calib.granularity import PerTensor, pieces, to_groups
from calib.graph import Model, Skipped
from calib.making import maker
from calib.observations import Observations
from calib.planning import Plan
from calib.register import Job, Register, Rows, Tensor
from calib.rules import Rules
from calib.stacking import (
    Answers,
    of_batches,
    of_counters,
    of_values,
    one_by_one,
    spread,
)
from calib.table import CalibrationTable, TensorRecord
from calib.targets import TARGETS

_MOST = 1 << 20  # values of weights at a time; a value takes 40 bytes meanwhile
_FIRST = 1 << 19  # fewer at first, so that there is something to do for every core
_COUNTERS = 24  # of activations at a time
_LIKE_A_COUNTER = 1 << 13  # values that take about as long
_LITTLE = 1 << 16  # values that take less time than a stack of their own does

_record_of = maker(TensorRecord)


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
        [Job(plan, rules, {s.name: made[s.method] for s in plan.specs}) for plan, rules in jobs],
    )


def calibrate_with(
    model: Model,
    observations: Observations,
    plan: Plan,
    rules: Rules,
    calibrators: Mapping[str, Calibrator],
) -> CalibrationTable:
    """As `calibrate`, with the calibrator that is given for each tensor's name."""
    return _tables(model, observations, [Job(plan, rules, calibrators)])[0]


def _tables(
    model: Model, observations: Observations, jobs: Sequence[Job]
) -> list[CalibrationTable]:
    register = Register(observations)
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


def _answer(model: Model, register: Register) -> None:
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


def _answer_stacked(model: Model, register: Register, tensors: Sequence[Tensor]) -> None:
    # No core waits for a long one.
    stacks = sorted(register.stacks(tensors, partial(_is_little, model)), key=_work, reverse=True)
    for built_in, share in ((True, spread), (False, one_by_one)):
        chosen = (stack for stack, ours in stacks if ours == built_in)
        portions = (portion for stack in chosen for portion in _portions(model, stack))
        for owners, answers in share(lambda portion: (portion[0], portion[1]()), portions):
            for owner, part in zip(owners, answers, strict=True):
                owner.hear(part)


def _is_little(model: Model, stack: list[Tensor]) -> bool:
    if stack[0].counter is None:
        return sum(model.weight_size(tensor.name) for tensor in stack) <= _LITTLE
    return len(stack) * _LIKE_A_COUNTER <= _LITTLE


def _work(stack: tuple[list[Tensor], bool]) -> int:
    """About how long a stack takes; where long ones come first, cores end at about one time."""
    tensors, _ = stack
    return len(tensors) * len(tensors[0].questions)


_Portion = tuple[list[Tensor], Callable[[], list[Answers]]]


def _portions(model: Model, stack: list[Tensor]) -> Iterator[tuple[_Portion, int]]:
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
    model: Model, stack: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[NDArray[np.floating]]]]:
    """The values of weights as ``(groups, values)``, about so many at a time as memory allows, and
    whose they are. Channels are independent: a large weight comes in several parts."""
    owners, values = list[Tensor](), list[NDArray[np.floating]]()
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


def _table(model: Model, observations: Observations, job: Job, rows: Rows) -> CalibrationTable:
    unseen = "no value of it was seen in the data"
    empty = [spec for spec, tensor in zip(job.plan.specs, rows[0], strict=True) if tensor.empty]
    table = CalibrationTable(
        model.sha256,
        observations.n_samples,
        tuple(_records(model, job.plan, rows)),
        (*job.plan.skipped, *(Skipped(spec.name, unseen) for spec in empty)),
        target=job.rules.target,
    )
    return fit_biases(model, table) if TARGETS[table.target].bias == "int32" else table


def _records(model: Model, plan: Plan, rows: Rows) -> Iterator[TensorRecord]:
    for spec, tensor, number in zip(plan.specs, *rows, strict=True):
        if tensor.empty:
            continue
        facts = tensor.facts
        notes = facts.notes[number]
        record = _record_of(
            spec,
            tensor.questions[number].qtype,
            facts.threshold[number],
            facts.scale[number],
            facts.max_abs,
            facts.count,
            facts.sqnr_db[number],
            (*spec.notes, *notes) if spec.notes else notes,
        )
        if spec.grid not in ("symmetric", "signed"):
            record = _with_zero_point(model, record, tensor, number)
        yield record


def _with_zero_point(
    model: Model, record: TensorRecord, tensor: Tensor, number: int
) -> TensorRecord:
    counter = tensor.counter or Counter.of(model.weight(record.name))
    try:
        calibrator = tensor.questions[number].calibrator
        return with_zero_point(record, calibrator, counter, tensor.batches or ())
    except CalibratorError as error:
        raise CalibratorError(f"{record.name!r}: {error}") from error
