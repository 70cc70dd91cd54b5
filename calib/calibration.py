"""From what was observed to the calibration table. No files and no onnxruntime here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from calib.calibrators import Calibrator, make, thresholds
from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Distribution, Floats, Histogram, Samples
from calib.errors import CalibError, ObservationsError
from calib.granularity import PerTensor, pieces, to_groups
from calib.graph import Model, Skipped
from calib.observations import Observations
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold
from calib.table import CalibrationTable, TensorRecord, decibels
from calib.targets import Plan, Rules, TensorSpec

_MOST = 1 << 22  # values of a weight at a time; a value takes 32 bytes meanwhile


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
    made = {spec.method: make(spec.method) for spec in plan.specs}
    calibrators = {spec.name: made[spec.method] for spec in plan.specs}
    return calibrate_with(model, observations, plan, rules, calibrators)


def calibrate_with(
    model: Model,
    observations: Observations,
    plan: Plan,
    rules: Rules,
    calibrators: Mapping[str, Calibrator],
) -> CalibrationTable:
    """As `calibrate`, with the calibrator that is given for each tensor's name."""
    _check_observations(observations, plan, rules)
    records: list[TensorRecord] = []
    skipped: list[Skipped] = []
    for spec in plan.specs:
        calibrator = calibrators[spec.name]
        try:
            if spec.kind == "weight":
                records.append(_weight_record(model, spec, calibrator))
            elif observations.counters[spec.name].n_finite == 0:
                skipped.append(Skipped(spec.name, "no value of it was seen in the data"))
            else:
                records.append(_activation_record(observations, spec, calibrator, rules))
        except CalibError as error:
            raise type(error)(f"{spec.name!r}: {error}") from error
    return CalibrationTable(
        model.sha256, observations.n_samples, tuple(records), (*plan.skipped, *skipped)
    )


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


def _weight_record(model: Model, spec: TensorSpec, calibrator: Calibrator) -> TensorRecord:
    """Channels are independent: a few are dealt with at a time, to bound the memory."""
    tensor = model.weight(spec.name)
    qtype = QuantType(spec.bits, signed=True, narrow=True)
    sums, answers, notes = _Sums(), [], list[str]()
    per_tensor = isinstance(spec.granularity, PerTensor)
    for index, groups in pieces(
        tensor.shape, spec.granularity, tensor.size if per_tensor else _MOST
    ):
        part = tensor[index].astype(np.float32, copy=False)
        dist = Samples(to_groups(part, spec.granularity))
        threshold, said = thresholds(calibrator, dist, qtype)
        first = f"from channel {groups.start}: " if part.size < tensor.size else ""
        notes.extend(first + note for note in said)
        answers.append(threshold)
        sums.add(dist, threshold, qtype)
    if qtype.bits > HISTOGRAM_BITS:
        notes.append("sqnr_db from the raw values")
    return _record(spec, qtype, sums, np.concatenate(answers), tuple(notes))


def _activation_record(
    observations: Observations, spec: TensorSpec, calibrator: Calibrator, rules: Rules
) -> TensorRecord:
    dist = Histogram(observations.counters[spec.name])
    qtype = QuantType(spec.bits, signed=dist.has_negative)
    if rules.reduction.name == "pool":
        threshold, notes = _histogram_threshold(calibrator, dist, qtype)
    else:
        batches = observations.batches[: rules.reduction.batches]
        counters = [c for batch in batches if (c := batch[spec.name]).n_finite]
        threshold, notes = _mean_threshold(calibrator, counters, qtype, dist)
        if len(batches) < rules.reduction.batches:
            notes = (*notes, f"mean over all {len(batches)} batches that there are")
    if qtype.bits > HISTOGRAM_BITS:
        notes = (*notes, "sqnr_db from the noise model: the counters are too coarse above 8 bits")
    if observations.counters[spec.name].min == observations.counters[spec.name].max:
        notes = (*notes, "constant: it held one value throughout")
    sums = _Sums()
    sums.add(dist, threshold, qtype)
    return _record(spec, qtype, sums, threshold, notes)


def _histogram_threshold(
    calibrator: Calibrator, dist: Histogram, qtype: QuantType
) -> tuple[Floats, tuple[str, ...]]:
    threshold, notes = thresholds(calibrator, dist, qtype)
    if qtype.bits > HISTOGRAM_BITS and dist.max_abs()[0] > 0:
        threshold = dist.snap(threshold)
    return threshold, notes


def _mean_threshold(
    calibrator: Calibrator, counters: list[Counter], qtype: QuantType, pooled: Histogram
) -> tuple[Floats, tuple[str, ...]]:
    """The mean over batches; those in which the tensor is all zero have no threshold to add."""
    seen = [h for c in counters if (h := Histogram(c)).max_abs()[0] > 0]
    if not seen:
        return _histogram_threshold(calibrator, pooled, qtype)
    answers = [_histogram_threshold(calibrator, dist, qtype) for dist in seen]
    notes = tuple(dict.fromkeys(note for _, notes in answers for note in notes))
    if len(seen) < len(counters):
        notes = (*notes, f"all zero in {len(counters) - len(seen)} batches: left out of the mean")
    return np.mean([threshold for threshold, _ in answers], axis=0), notes


@dataclass(slots=True)
class _Sums:
    """What a record says of a tensor, gathered over its parts."""

    max_abs: float = 0.0
    count: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, dist: Distribution, threshold: Floats, qtype: QuantType) -> None:
        count = dist.count()
        self.max_abs = max(self.max_abs, float(dist.max_abs().max()))
        self.count += int(count.sum())
        self.signal += float((dist.rms() ** 2 * count).sum())
        self.noise += float((dist.mse(threshold, qtype) * count).sum())


def _record(
    spec: TensorSpec,
    qtype: QuantType,
    sums: _Sums,
    threshold: Floats,
    notes: tuple[str, ...],
) -> TensorRecord:
    record = TensorRecord(
        spec=spec,
        qtype=qtype,
        threshold=threshold,
        scale=scale_from_threshold(threshold, qtype, spec.dtype),
        max_abs=sums.max_abs,
        count=sums.count,
        sqnr_db=decibels(sums.signal, sums.noise),
        notes=(*spec.notes, *notes),
    )
    if record.sqnr_db is None and sums.signal > 0:
        record = replace(record, notes=(*record.notes, "no quantization error at all"))
    return record
