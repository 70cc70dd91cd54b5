"""How a calibration is carried out: settings, which samples it sees, which files it may write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from calib.arrayfiles import ARRAY_SUFFIXES
from calib.arrays import Batch
from calib.bounds import Bounds
from calib.capture import Runtime, Session
from calib.comparison import Comparison, Scores, evaluate
from calib.data import Data, Reading
from calib.errors import DataError, OptionError, OutputError
from calib.graph import Model
from calib.images import IMAGE_SUFFIXES
from calib.iterables import Batches
from calib.metric import load_metric, score
from calib.observations import Observations
from calib.progress import Progress, silent
from calib.rules import Rules

EXTERNAL_DATA = ("auto", "always", "never")

_DATA_SUFFIXES = (*ARRAY_SUFFIXES, *IMAGE_SUFFIXES, ".pb")


@dataclass(frozen=True, slots=True)
class Run:
    """How a calibration is carried out; nothing here changes what is computed from the same
    samples.

    Args:
        samples: calibrate on that many first samples, and compare on the others; None: on all.
        reading: how data becomes feeds.
        runtime: provider and threads.
        observations: file to read instead of observing.
        save_observations: file to write what was observed to.
        external_data: see `calib.saving.Quantized.save`.
        feedback: input → output that is fed back into it at the next feed.
        padding_mask: an input of integers or bools that is 0 where padding stands; what activations
            hold there is not counted.
        summary: file to write `Calibration.summary` to, as JSON.
        checkpoint_seconds: how often observations that are to be saved are saved on the way.
        protected: files that are read besides, as settings are; never overwritten.
        bounds: what the quantized model must keep to be written.
        keep_failed: write it all the same.
        metric: ``package.module:function``, see `calib.metric.load_metric`.
        report: file to write a page on all of it to.
        command: what was typed, for the report.
        force: overwrite files that exist.
        max_memory: bytes that the process may take while it observes, or each worker; None for no
            bound.
        workers: observe in that many processes of this machine.
        scheduler: observe on the workers of the Dask scheduler at this address.
        progress: called with a stage and its number of samples; gives a function to advance it.
    """

    samples: int | None = None
    reading: Reading = field(default_factory=Reading)
    runtime: Runtime = field(default_factory=Runtime)
    observations: Path | None = None
    save_observations: Path | None = None
    summary: Path | None = None
    external_data: str = "auto"
    feedback: Mapping[str, str] = field(default_factory=dict)
    padding_mask: str | None = None
    checkpoint_seconds: float = 30.0
    protected: tuple[Path, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    keep_failed: bool = False
    metric: str | None = None
    report: Path | None = None
    command: str = ""
    force: bool = False
    max_memory: int | None = None
    workers: int | None = None
    scheduler: str | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        for name in ("observations", "save_observations", "summary", "report"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        if self.external_data not in EXTERNAL_DATA:
            raise OptionError(
                f"external-data must be {', '.join(EXTERNAL_DATA)}, got {self.external_data!r}"
            )
        if self.samples is not None and self.samples < 1:
            raise OptionError(f"samples must be at least 1, got {self.samples}")
        if self.observations is not None and self.save_observations is not None:
            raise OptionError(
                "observations and save-observations contradict each other: read or save them"
            )
        for name in ("max_memory", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.workers is not None and self.scheduler is not None:
            raise OptionError(
                "workers and scheduler contradict each other: start workers here, or use others"
            )

    @property
    def on_workers(self) -> bool:
        """Whether other processes observe."""
        return self.workers is not None or self.scheduler is not None


def check_weights_only(rules: Rules, run: Run) -> None:
    """Raises `OptionError` if ``run`` is to observe in some way what ``rules`` keep float."""
    names = ("padding_mask", "observations", "save_observations", "max_memory")
    for name in (*names, "workers", "scheduler"):
        if rules.weights_only and getattr(run, name) is not None:
            raise OptionError(
                f"{name.replace('_', '-')} is about observing activations, which activation-bits "
                f"none keeps float: leave one of them out"
            )


@dataclass(slots=True)
class Split:
    """Which samples are calibrated on, and which the models are compared on."""

    source: Data
    run: Run
    n_calibration: int | None
    held_out: bool
    notes: tuple[str, ...] = ()
    first: Batch | None = None

    @classmethod
    def of(cls, source: Data, run: Run, saved: Observations | None) -> Split:
        """The split that ``run`` asks for, or that ``saved`` observations have made already.

        Raises:
            OptionError: if other samples are asked for than the observations hold.
            DataError: if they do not fill one batch of a model that fixes it.
        """
        wanted = run.samples or (saved.n_samples if saved else None)
        if saved is not None and wanted != saved.n_samples:
            raise OptionError(
                f"--samples {wanted}: the observations hold {saved.n_samples} samples, neither "
                f"more nor fewer; leave --samples out, or observe again"
            )
        available = source.n_samples
        if wanted is None:
            return cls(source, run, None, held_out=False, notes=source.notes)
        n = wanted - wanted % source.multiple
        n = n if available is None else min(n, available)
        if n == 0:
            raise DataError(
                f"samples must be at least {source.multiple}, the model's fixed batch, got {wanted}"
            )
        note = f"{run.samples} samples were asked for, {n} are used"
        notes = (note,) if run.samples not in (None, n) else ()
        held_out = available is not None and n < available
        return cls(source, run, n, held_out, (*source.notes, *notes))

    @property
    def all_notes(self) -> tuple[str, ...]:
        """``notes``, and what only a pass over the data could tell."""
        return tuple(dict.fromkeys((*self.notes, *self.source.notes)))

    def calibration(self, start: int = 0) -> Iterator[Batch]:
        """Batches to observe from sample ``start``; the first of all is kept for what needs just
        one."""
        batches = self.source.batches(start, self.n_calibration)
        total = self.n_calibration or self.source.n_samples
        with self.run.progress("observe", total) as advance:
            if start:
                advance(start)
            for batch in batches:
                if start == 0:
                    self.first = self.first or batch
                yield batch
                advance(batch.n_samples)

    def again(self, stage: str) -> Iterator[Batch]:
        """The batches that were observed, once more; shown as progress of ``stage``."""
        n = self.n_calibration
        return self._shown(stage, self.source.batches(0, n), n or self.source.n_samples)

    def evaluation(self, stage: str | None = "evaluate") -> Iterator[Batch]:
        """Batches to compare on: those not calibrated on, if any are left; of a source that can
        be gone through once only, its first. Shown as progress of ``stage``, if it has one."""
        if isinstance(self.source, Batches) and self.source.once_only:
            return iter([self.first_batch()])
        n, available = self.n_calibration, self.source.n_samples
        if available is None and n is not None:
            rest = self.source.batches(n)
            head = next(rest, None)
            self.held_out = head is not None
            if head is not None:
                return self._shown(stage, chain([head], rest), None)
        if not self.held_out:
            return self._shown(stage, self.source.batches(0, n), n or available)
        return self._shown(stage, self.source.batches(n or 0), (available or 0) - (n or 0))

    def _shown(
        self, stage: str | None, batches: Iterator[Batch], total: int | None
    ) -> Iterator[Batch]:
        """The same batches, each reported as progress once it is dealt with."""
        progress = silent if stage is None else self.run.progress
        with progress(stage or "", total) as advance:
            for batch in batches:
                yield batch
                advance(batch.n_samples)

    def compare(self, model: Model, quantized: Path) -> Comparison:
        """The float model against the one at ``quantized``, on `evaluation`."""
        batches = self.evaluation()
        first = (self.n_calibration or 0) if self.held_out else 0
        comparison = evaluate(model, quantized, batches, self.run.runtime, first)
        if self.run.metric is None:
            return comparison
        found = (self.score(model, path) for path in (model.path, quantized))
        return replace(comparison, scores=Scores(self.run.metric, *found))

    def score(self, model: Model, path: Path) -> float:
        """What the user's metric says of the model at ``path``, on `evaluation`."""
        name = self.run.metric or ""
        session = Session(path, self.run.runtime, feedback=model.feedback)
        return score(load_metric(name), name, session, self.evaluation())

    def first_batch(self) -> Batch:
        """One batch, to run a model on."""
        self.first = self.first or next(self.source.batches(), None)
        if self.first is None:
            raise DataError("the calibration data holds no samples")
        return self.first


def check_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path], run: Run) -> None:
    """Raises `OutputError` if an output exists and must not be overwritten, is an input or data in
    a folder that is one, lies in no directory, or is named twice."""
    given = [path.resolve() for path in inputs]
    wanted = [path for path in outputs if path is not None]
    for path in wanted:
        try:
            resolved, exists, is_dir = path.resolve(), path.exists(), path.is_dir()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        is_data = path.suffix.lower() in _DATA_SUFFIXES and any(
            p in given for p in resolved.parents
        )
        if resolved in given or (is_data and exists):
            what = "the input model" if resolved == given[0] else "an input"
            raise OutputError(f"{path}: is {what}, which is never overwritten")
        if is_dir:
            raise OutputError(f"{path}: is a directory, a file name is needed")
        if exists and not run.force:
            raise OutputError(f"{path}: exists; choose another name, or overwrite it with --force")
        if not path.parent.is_dir():
            state = "is not a directory" if path.parent.exists() else "does not exist"
            raise OutputError(f"{path}: the directory {path.parent} {state}")
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path}: the directory {path.parent} cannot be written to")
        if sum(resolved == other.resolve() for other in wanted) > 1:
            raise OutputError(f"{path}: is named for two different outputs")
