"""Every method at every width from one pass over the data, and what to do about the worst."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from calib.arrays import Batch
from calib.calibration import calibrate, calibrate_each
from calib.confidence import Confidence, confidence
from calib.correcting import check_correctable, corrected_on
from calib.data import open_data
from calib.errors import CalibratorError, ModelError, OptionError, VerificationError
from calib.graph import Model
from calib.iterables import Batches
from calib.observations import Observations
from calib.planning import Plan, make_plan
from calib.proposals import propose
from calib.reference import Reference
from calib.resuming import check_files, observe_split, open_model, saved_observations
from calib.rivals import RIVALS, rival_ranges, rival_table
from calib.rules import Rules, Widths
from calib.run import Run, Split
from calib.saving import size_ratio
from calib.sensitivity import Sensitivity, sensitivity
from calib.survey import (
    Candidates,
    Measured,
    Row,
    Survey,
    comparable,
    detailed,
    profiled,
    wide_bits,
    widened,
    with_gains,
)
from calib.switchable import Switchable
from calib.table import CalibrationTable
from calib.write import write_qdq

_MOST_BYTES = 1_000_000_000  # a switchable model holds its weights three times
_TRIAL_BATCH = 8
_EVEN_BATCHES = 16  # halves then differ by less than an eighth of the samples


def compare_methods(
    model: str | Path,
    data: object = None,
    candidates: Candidates | None = None,
    rules: Rules | None = None,
    run: Run | None = None,
) -> Survey:
    """All ``candidates``, from one observation pass over ``data``; no model is written.

    Every row is a QDQ model in memory, run by onnxruntime at its default level.

    Args:
        model: an ONNX file; only read.
        data: see `calib.data.open_data`; None for synthetic inputs.
        candidates: methods and widths.
        rules: what is quantized; ``widths`` but for ``edge``, and the methods, are overruled.
        run: samples, batch size, threads and the like.

    Raises:
        CalibError: one of its kinds, in one line.
    """
    job = _Job(candidates or Candidates(), rules or Rules(), run or Run())
    with job.stage("load"):
        loaded, saved, split, plan = job.opened(model, data)
    with job.stage("observe"):
        halved = job.halved(loaded, data)
        seen = saved or observe_split(loaded, halved, plan, job.rules, halves=True)
    with job.stage("calibrate"):
        rows = job.calibrated(loaded, seen, plan.activations)
    with job.stage("profile"):
        shapes = tuple(profiled(loaded, seen, rows))
        sure = job.confidence(loaded, seen)
    with _reference(loaded, split) as reference:
        with job.stage("evaluate"):
            rows = with_gains(tuple(job.evaluated(loaded, rows, reference)))
        with job.stage("sensitivity"):
            found, proposals = job.mended(loaded, seen, data, rows, reference)
    return Survey(
        model=loaded,
        candidates=job.candidates,
        rows=rows,
        profiles=shapes,
        sensitivity=found,
        proposals=proposals,
        confidence=sure,
        held_out=split.held_out,
        made_up=data is None,
        observations=seen,
        notes=(*loaded.notes, *split.all_notes, *seen.notes, *job.notes),
        warnings=job.warnings(data, saved),
        seconds=job.seconds,
        rules=job.rules,
        run=job.run,
    )


def _reference(model: Model, split: Split) -> Reference:
    run = split.run

    def first() -> int:  # whether samples are held out, only a pass over some data tells
        return (split.n_calibration or 0) if split.held_out else 0

    stages = iter(["float model"])  # its pass is shown, the others are parts of a stage

    def batches() -> Iterator[Batch]:
        return split.evaluation(next(stages, None))

    return Reference(model, batches, run.runtime, metric=run.metric, first=first)


def _compared(model: Model, row: Row, reference: Reference, split: Split | None) -> Row:
    """``row`` with what its model does to the outputs, and how large that is; its biases are
    corrected first on the samples of ``split``."""
    if split is not None:
        row = replace(row, table=corrected_on(model, row.table, split))
    quantized = write_qdq(model, row.table)
    ratio = size_ratio(model.ir, quantized)
    return replace(row, comparison=reference.compare(quantized.ir), size_ratio=ratio)


class _Job:
    """What the stages of one survey share."""

    def __init__(self, candidates: Candidates, rules: Rules, run: Run):
        self.candidates, self.rules, self.run = candidates, comparable(rules), run
        self.split: Split | None = None
        self.lowest = rules  # what the details are about, once it is known which methods work
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    def opened(
        self, path: str | Path, data: object
    ) -> tuple[Model, Observations | None, Split, Plan]:
        """The model, observations that are read instead of observing, the samples, the tensors."""
        model = open_model(path, self.rules, self.run)
        check_files([], model, data, self.run)
        saved = saved_observations(model, self.run)
        source = open_data(model, data, self.run.reading)
        if self.candidates.onnxruntime and isinstance(source, Batches) and source.once_only:
            raise OptionError("with-onnxruntime needs data that can be gone through again")
        self.split = Split.of(source, self.run, saved)
        if self.rules.bias_correction:
            unseen = saved is not None or self.rules.weights_only
            check_correctable(self.split, made_up=data is None and unseen)
        return model, saved, self.split, make_plan(model, self.rules)

    def halved(self, model: Model, data: object) -> Split:
        """The same samples in batches that are small enough for two even halves."""
        assert self.split is not None
        source, n = self.split.source, self.split.n_calibration or self.split.source.n_samples
        size = self.run.reading.batch_size
        pooled = self.rules.reduction.name == "pool"  # which no batch size changes
        if n is None or isinstance(source, Batches) or not pooled or n > size * _EVEN_BATCHES:
            return self.split
        reading = replace(self.run.reading, batch_size=max(1, n // _EVEN_BATCHES))
        return replace(self.split, source=open_data(model, data, reading))

    @property
    def correcting(self) -> Split | None:
        """The samples to correct biases on, if that was asked for."""
        return self.split if self.rules.bias_correction else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def warnings(self, data: object, saved: Observations | None) -> tuple[str, ...]:
        """What makes the result doubtful."""
        if data is not None:
            return ()
        what = "activations were calibrated, and the models" if saved is None else "the models were"
        return (f"NO DATA: {what} compared on made-up inputs; give --data",)

    def rules_for(self, method: str, bits: int) -> Rules:
        """The rules with another method and width."""
        widths = Widths(bits, bits, self.rules.widths.edge)
        return replace(self.rules, widths=widths, method=method, weight_method=None)

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """A failure of the block is a note, not an end."""
        try:
            yield
        except (CalibratorError, ModelError, VerificationError) as error:
            self.notes.append(f"{what}: {error}")

    def calibrated(
        self, model: Model, observations: Observations, names: tuple[str, ...]
    ) -> tuple[Row, ...]:
        """The thresholds of every row, by width."""
        rows = list(self._own(model, observations))
        if not rows:
            raise CalibratorError(self.notes[0])
        self.lowest = self.rules_for(*detailed(self.candidates, rows))
        if self.candidates.onnxruntime:
            rows.extend(self._rivals(model, observations, names))
        self._note_edges(rows)
        return tuple(sorted(rows, key=lambda row: self.candidates.bits.index(row.bits)))

    def _note_edges(self, rows: list[Row]) -> None:
        """Where every layer is a first or last one, a row holds other widths than it says."""
        for bits in self.candidates.bits:
            tables = [row.table for row in rows if row.bits == bits]
            if all(record.qtype.bits != bits for table in tables for record in table.records):
                self.notes.append(f"no tensor has {bits} bits: see --edge-bits and the rules")

    def _own(self, model: Model, observations: Observations) -> Iterator[Row]:
        """All together; where a method fails one after another, to say which and go on."""
        wanted = [(bits, m) for bits in self.candidates.bits for m in self.candidates.methods]
        try:
            yield from self._rows(model, observations, wanted)
        except (CalibratorError, ModelError):
            for bits, method in wanted:
                with self.noted(f"{method} at {bits} bits"):
                    yield from self._rows(model, observations, [(bits, method)])

    def _rows(
        self, model: Model, observations: Observations, wanted: list[tuple[int, str]]
    ) -> list[Row]:
        start = time.perf_counter()
        rules = (self.rules_for(method, bits) for bits, method in wanted)
        tables = calibrate_each(model, observations, [(make_plan(model, r), r) for r in rules])
        seconds = (time.perf_counter() - start) / len(wanted)
        return [Row(m, b, t, None, seconds) for (b, m), t in zip(wanted, tables, strict=True)]

    def _rivals(
        self, model: Model, observations: Observations, names: tuple[str, ...]
    ) -> Iterator[Row]:
        """Rows of onnxruntime's own calibrators; their seconds hold a pass over the data."""
        for method in RIVALS:
            with self.noted(method):
                start = time.perf_counter()
                batches = partial(self._shown, method)
                found = rival_ranges(model, batches, names, self.run.runtime, (method,))
                ranges = found[method]
                took = time.perf_counter() - start
                for bits in self.candidates.bits:
                    start = time.perf_counter()
                    plan = make_plan(model, self.rules_for("max", bits))
                    table = rival_table(model, observations, plan, ranges, method)
                    seconds = took + time.perf_counter() - start
                    yield Row(method, bits, table, None, seconds)

    def _shown(self, stage: str) -> Iterator[Batch]:
        assert self.split is not None
        n = self.split.n_calibration
        with self.run.progress(stage, n or self.split.source.n_samples) as advance:
            for batch in self.split.source.batches(0, n):
                yield batch
                advance(batch.n_samples)

    def confidence(self, model: Model, observations: Observations) -> Confidence | None:
        """How sure the thresholds are that the details are about."""
        with self.noted("how sure thresholds are was not measured"):
            sure = confidence(model, observations, make_plan(model, self.lowest), self.lowest)
            if sure is None and self.rules.reduction.name == "pool":
                raise ModelError("there are no two batches, or saved observations have no halves")
            return sure
        return None

    def _table(self, model: Model, observations: Observations, rules: Rules) -> CalibrationTable:
        return calibrate(model, observations, make_plan(model, rules), rules)

    def evaluated(self, model: Model, rows: tuple[Row, ...], reference: Reference) -> Iterator[Row]:
        """The rows with what their models do to the outputs."""
        with self.run.progress("evaluate", reference.n_samples * len(rows)) as advance:
            for row in rows:
                try:
                    yield _compared(model, row, reference, self.correcting)
                except (ModelError, VerificationError) as error:
                    note = f"{row.method} at {row.bits} bits: {error}"
                    self.notes.append(note)
                    yield replace(row, notes=(note,))
                advance(reference.n_samples)

    def _sensitivity(
        self, model: Model, observations: Observations, data: object
    ) -> Sensitivity | None:
        """What each tensor does to the output, at the lowest width."""
        if not self.candidates.sensitivity:
            return None
        with self.noted("sensitivity was not measured"):
            if model.n_bytes > _MOST_BYTES:
                raise ModelError(f"a model beyond {_MOST_BYTES / 1e9:g} GB, weights thrice")
            if not any(spec.dtype.kind == "f" for spec in model.outputs):
                raise ModelError("no output of the model is floating-point")
            if data is None and self.run.observations is not None:
                raise ModelError("it takes real samples, give --data")
            wide = widened(self.lowest, wide_bits(self.lowest.widths.weights))
            narrow, wider = (self._table(model, observations, r) for r in (self.lowest, wide))
            switchable = Switchable(model, narrow, self.run.runtime)
            trials = self._trials(model, data)
            return sensitivity(switchable, narrow, wider, trials, self.run.progress)
        return None

    def mended(
        self,
        model: Model,
        observations: Observations,
        data: object,
        rows: tuple[Row, ...],
        reference: Reference,
    ) -> tuple[Sensitivity | None, tuple[Measured, ...]]:
        """What each tensor does to the output, and what the proposals bring."""
        found = self._sensitivity(model, observations, data)
        if found is None:
            return None, ()
        method, bits = self.lowest.method, self.lowest.widths.weights
        before = next(row for row in rows if (row.method, row.bits) == (method, bits))
        changes = [
            (change, replace(before, table=self._table(model, observations, change.rules)))
            for change in propose(found, self.lowest, before.table, wide_bits(bits))
        ]
        wide_table = self._table(model, observations, widened(self.lowest, wide_bits(bits)))
        wide = size_ratio(model.ir, write_qdq(model, wide_table))
        proposals = []
        with self.run.progress("proposals", reference.n_samples * len(changes)) as advance:
            for change, row in changes:
                with self.noted(f"{change.title} was not measured"):
                    after = _compared(model, row, reference, self.correcting)
                    proposals.append(Measured(change, before, after, wide))
                advance(reference.n_samples)
        return found, tuple(proposals)

    def _trials(self, model: Model, data: object) -> Iterator[Batch]:
        """Calibration samples in small batches, as far as the source allows."""
        assert self.split is not None
        source = self.split.source
        if isinstance(source, Batches):
            if source.once_only:
                return iter([self.split.first_batch()])
            return source.batches(0, self.split.n_calibration)
        reading = self.run.reading
        small = replace(reading, batch_size=min(_TRIAL_BATCH, reading.batch_size))
        return open_data(model, data, small).batches(0, self.split.n_calibration)
