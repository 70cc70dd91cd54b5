"""Every method at every width from one pass over the data, and what to do about the worst."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.comparison import Comparison
from calib.confidence import Confidence, confidence
from calib.curves import Profile, profiles
from calib.data import open_data
from calib.errors import CalibratorError, ModelError, OptionError, VerificationError
from calib.graph import Model, load_model
from calib.iterables import Batches
from calib.observations import Observations
from calib.proposals import propose
from calib.reference import Reference
from calib.resuming import check_files, observe_split, saved_observations
from calib.rivals import RIVALS, rival_ranges, rival_table
from calib.rules import Rules, Widths
from calib.run import Run, Split
from calib.sensitivity import Sensitivity, sensitivity
from calib.survey import Candidates, Measured, Row, Survey, detailed, wide_bits
from calib.table import CalibrationTable
from calib.targets import make_plan
from calib.write import write_qdq

_MOST_BYTES = 1_000_000_000  # a switchable model holds its weights three times
_TRIAL_BATCH = 8


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
        loaded, saved, split = job.opened(model, data)
        plan = make_plan(loaded, job.rules)
    with job.stage("observe"):
        seen = saved or observe_split(loaded, split, plan, job.rules, halves=True)
    with job.stage("calibrate"):
        rows = job.calibrated(loaded, seen, plan.activations)
    with job.stage("profile"):
        shapes = tuple(_profiled(loaded, seen, rows))
        sure = job.confidence(loaded, seen)
    with _reference(loaded, split) as reference:
        with job.stage("evaluate"):
            rows = _with_gains(tuple(job.evaluated(loaded, row, reference) for row in rows))
        with job.stage("sensitivity"):
            found, proposals = job.mended(loaded, seen, data, reference)
    return Survey(
        model=loaded,
        candidates=job.candidates,
        rows=rows,
        profiles=shapes,
        sensitivity=found,
        proposals=proposals,
        confidence=sure,
        held_out=split.held_out,
        observations=seen,
        notes=(*loaded.notes, *split.all_notes, *job.notes),
        warnings=job.warnings(data, saved),
        seconds=job.seconds,
        rules=job.rules,
        run=job.run,
    )


def _reference(model: Model, split: Split) -> Reference:
    run = split.run

    def first() -> int:  # whether samples are held out, only a pass over some data tells
        return (split.n_calibration or 0) if split.held_out else 0

    return Reference(model, split.evaluation, run.runtime, metric=run.metric, first=first)


def _profiled(model: Model, observations: Observations, rows: tuple[Row, ...]) -> Iterator[Profile]:
    """Every tensor at the widths that it has in any row: first and last layers have their own."""
    widths: dict[str, set[int]] = {}
    for row in rows:
        for record in row.table.records:
            widths.setdefault(record.name, set()).add(record.qtype.bits)
    for record in rows[0].table.records:
        yield from profiles(model, observations, [record.spec], sorted(widths[record.name]))


def _with_gains(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    most = {row.bits: row.sqnr_db for row in rows if row.method == "max"}
    return tuple(replace(row, gain_db=_gain(row.sqnr_db, most.get(row.bits))) for row in rows)


def _gain(sqnr_db: float | None, base_db: float | None) -> float | None:
    if sqnr_db is None or base_db is None:
        return None
    return sqnr_db - base_db if sqnr_db != base_db else 0.0  # both may be infinite


class _Job:
    """What the stages of one survey share."""

    def __init__(self, candidates: Candidates, rules: Rules, run: Run):
        self.candidates, self.rules, self.run = candidates, rules, run
        self.split: Split | None = None
        self.lowest = rules  # what the details are about, once it is known which methods work
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    def opened(self, path: str | Path, data: object) -> tuple[Model, Observations | None, Split]:
        """The model, observations that are read instead of observing, and the samples."""
        model = load_model(path, self.run.feedback)
        check_files([], model, data, self.run)
        saved = saved_observations(model, self.run)
        source = open_data(model, data, self.run.reading)
        if self.candidates.onnxruntime and isinstance(source, Batches) and source.once_only:
            raise OptionError("with-onnxruntime needs data that can be gone through again")
        self.split = Split.of(source, self.run, saved)
        return model, saved, self.split

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
        return tuple(sorted(rows, key=lambda row: self.candidates.bits.index(row.bits)))

    def _own(self, model: Model, observations: Observations) -> Iterator[Row]:
        for bits in self.candidates.bits:
            for method in self.candidates.methods:
                with self.noted(f"{method} at {bits} bits"):
                    start = time.perf_counter()
                    table = self._table(model, observations, self.rules_for(method, bits))
                    yield Row(method, bits, table, None, time.perf_counter() - start)

    def _rivals(
        self, model: Model, observations: Observations, names: tuple[str, ...]
    ) -> Iterator[Row]:
        """Rows of onnxruntime's own calibrators; their seconds hold a pass over the data."""
        assert self.split is not None
        source, n = self.split.source, self.split.n_calibration
        for method in RIVALS:
            with self.noted(method):
                start = time.perf_counter()
                ranges = rival_ranges(
                    model, lambda: source.batches(0, n), names, self.run.runtime, (method,)
                )[method]
                took = time.perf_counter() - start
                for bits in self.candidates.bits:
                    start = time.perf_counter()
                    plan = make_plan(model, self.rules_for("max", bits))
                    table = rival_table(model, observations, plan, ranges, method)
                    seconds = took + time.perf_counter() - start
                    yield Row(method, bits, table, None, seconds)

    def confidence(self, model: Model, observations: Observations) -> Confidence | None:
        """How sure the thresholds are that the details are about."""
        with self.noted("confidence was not measured"):
            return confidence(model, observations, make_plan(model, self.lowest), self.lowest)
        return None

    def _table(self, model: Model, observations: Observations, rules: Rules) -> CalibrationTable:
        return calibrate(model, observations, make_plan(model, rules), rules)

    def evaluated(self, model: Model, row: Row, reference: Reference) -> Row:
        """The row with what its model does to the outputs."""
        try:
            return replace(row, comparison=self._compare(model, row.table, reference))
        except (ModelError, VerificationError) as error:
            note = f"{row.method} at {row.bits} bits: {error}"
            self.notes.append(note)
            return replace(row, notes=(note,))

    def _compare(self, model: Model, table: CalibrationTable, reference: Reference) -> Comparison:
        return reference.compare(write_qdq(model, table).ir)

    def mended(
        self, model: Model, observations: Observations, data: object, reference: Reference
    ) -> tuple[Sensitivity | None, tuple[Measured, ...]]:
        """What each tensor does to the output, and what the proposals bring."""
        if not self.candidates.sensitivity:
            return None, ()
        if model.n_bytes > _MOST_BYTES:
            self.notes.append(
                f"sensitivity was not measured: of models beyond {_MOST_BYTES / 1e9:g} GB it would "
                f"hold the weights three times"
            )
            return None, ()
        wide = wide_bits(self.lowest.widths.weights)
        found, proposals = None, []
        with self.noted("sensitivity was not measured"):
            narrow = self._table(model, observations, self.lowest)
            wider = self._table(model, observations, _widened(self.lowest, wide))
            found = sensitivity(model, narrow, wider, self._trials(model, data), self.run.runtime)
        if found is None:
            return None, ()
        with self.noted("proposals were not measured"):
            before = self._compare(model, narrow, reference)
            for one in propose(found, self.lowest, narrow, wide):
                after = self._with_rules(model, observations, one.rules, reference)
                proposals.append(Measured(one, before, after))
        return found, tuple(proposals)

    def _with_rules(
        self, model: Model, observations: Observations, rules: Rules, reference: Reference
    ) -> Comparison:
        return self._compare(model, self._table(model, observations, rules), reference)

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


def _widened(rules: Rules, bits: int) -> Rules:
    """The rules with every tensor at ``bits`` at least."""
    edge = None if rules.widths.edge is None else max(bits, rules.widths.edge)
    overrides = (replace(rule, bits=rule.bits and max(bits, rule.bits)) for rule in rules.overrides)
    return replace(rules, widths=Widths(bits, bits, edge), overrides=tuple(overrides))
