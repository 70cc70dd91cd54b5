"""The whole flow in one call: load, observe, calibrate, write, verify, evaluate."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calib import capture
from calib.arrays import Batch
from calib.calibration import calibrate
from calib.comparison import Comparison, evaluate
from calib.data import Batches, Data, open_data
from calib.errors import DataError, OptionError, OutputError
from calib.files import whole_file
from calib.graph import Model, load_model, quantizable_uses
from calib.observations import Observations, observe
from calib.table import CalibrationTable, dumps
from calib.targets import Plan, Rules, make_plan
from calib.verification import verify
from calib.write import write_qdq

_LOW_SQNR_DB = 10.0

Advance = Callable[[int], None]
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]


def _silent(_stage: str, _total: int | None) -> AbstractContextManager[Advance]:
    return nullcontext(lambda _n: None)


@dataclass(frozen=True, slots=True)
class Run:
    """How a calibration is carried out; nothing here changes what is computed from the same
    samples.

    Args:
        samples: calibrate on that many first samples, and compare on the others; None: on all.
        batch_size: samples a feed, where the model leaves that free.
        seed: of synthetic inputs, where there is no data.
        runtime: provider and threads.
        observations: file to read instead of observing.
        save_observations: file to write what was observed to.
        summary: file to write `Calibration.summary` to, as JSON.
        force: overwrite files that exist.
        progress: called with a stage and its number of samples; gives a function to advance it.
    """

    samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    runtime: capture.Runtime = field(default_factory=capture.Runtime)
    observations: Path | None = None
    save_observations: Path | None = None
    summary: Path | None = None
    force: bool = False
    progress: Progress = _silent

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise OptionError(f"samples must be at least 1, got {self.samples}")
        if self.batch_size < 1:
            raise OptionError(f"batch-size must be at least 1, got {self.batch_size}")
        if self.seed < 0:
            raise OptionError(f"seed must not be negative, got {self.seed}")
        if self.observations is not None and self.save_observations is not None:
            raise OptionError("observations are either read or saved, not both in one run")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate_model` made.

    Attributes:
        output: the quantized model.
        table: every tensor's parameters.
        comparison: float against quantized.
        held_out: the comparison is on samples that calibration did not see.
        n_bytes: sizes of the two model files.
        seconds: by stage.
        warnings: what makes the result doubtful.
        notes: what was changed or left out.
    """

    output: Path
    table: CalibrationTable
    comparison: Comparison
    held_out: bool
    n_bytes: tuple[int, int]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Everything, as plain values."""
        top1 = self.comparison.top1
        return {
            **self.table.to_json(),
            "output": str(self.output),
            "output_sqnr_db": _finite(self.comparison.output_sqnr_db),
            "outputs_sqnr_db": {n: _finite(db) for n, db in self.comparison.sqnr_db.items()},
            "top1": top1 and {"float": top1.float_model, "quantized": top1.quantized_model},
            "compared_on": {"n_samples": self.comparison.n_samples, "held_out": self.held_out},
            "bytes": {"float": self.n_bytes[0], "quantized": self.n_bytes[1]},
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def calibrate_model(
    model: str | Path,
    data: object = None,
    rules: Rules | None = None,
    output: str | Path | None = None,
    run: Run | None = None,
) -> Calibration:
    """Writes a calibrated QDQ model beside the one at ``model``, and says how good it is.

    Args:
        model: an ONNX file; only read.
        data: see `calib.data.open_data`; None for synthetic inputs.
        rules: what is quantized, how wide, and by which calibrator.
        output: file to write; None for ``<stem>-w4a4.onnx`` beside the model, by its widths.
        run: samples, batch size, threads and the like.

    Raises:
        CalibError: one of its kinds, in one line; nothing is written then.
    """
    rules, run = rules or Rules(), run or Run()
    seconds: dict[str, float] = {}
    with _timed("load", seconds):
        loaded = load_model(model)
        plan = make_plan(loaded, rules)
        target = Path(output) if output else default_output(loaded, rules)
        given = [loaded.path, data if isinstance(data, str | Path) else None, run.observations]
        _check_outputs([target, run.save_observations, run.summary], given, run.force)
        source = open_data(loaded, data, run.batch_size, run.seed)
        saved = Observations.load(run.observations, loaded) if run.observations else None
        split = _Split.of(source, run, saved)
    with _timed("observe", seconds):
        observations = saved or _observe(loaded, split, plan, rules)
    with _timed("calibrate", seconds):
        table = calibrate(loaded, observations, plan, rules)
        table = table.with_manifest(_manifest(table, rules, run, data))
    with _timed("write", seconds):
        quantized = write_qdq(loaded, table)
    with ExitStack() as stack:
        temporary = stack.enter_context(whole_file(target))
        quantized.save(temporary)
        if run.save_observations is not None:
            observations.save(stack.enter_context(whole_file(run.save_observations)))
        with _timed("verify", seconds):
            verify(loaded, quantized, temporary, split.first_batch(), run.runtime)
        with _timed("evaluate", seconds):
            batches = split.evaluation()
            comparison = evaluate(loaded, temporary, batches, run.runtime, split.first_compared)
        calibration = Calibration(
            output=target,
            table=table,
            comparison=comparison,
            held_out=split.held_out,
            n_bytes=(loaded.n_bytes, temporary.stat().st_size),
            seconds=seconds,
            warnings=_warnings(table, comparison, data is None, saved is not None),
            notes=(*loaded.notes, *quantized.notes, *source.notes, *split.notes),
        )
        if run.summary is not None:
            text = dumps(calibration.summary(), indent=2) + "\n"
            stack.enter_context(whole_file(run.summary)).write_text(text, "utf-8")
    return calibration


def default_output(model: Model, rules: Rules) -> Path:
    """``<stem>-w4a4.onnx`` beside the model, by its widths."""
    widths = rules.widths
    return model.path.with_name(f"{model.path.stem}-w{widths.weights}a{widths.activations}.onnx")


def _check_outputs(
    outputs: Sequence[Path | None], inputs: Sequence[str | Path | None], force: bool
) -> None:
    """Raises `OutputError` if an output exists and must not be overwritten, is an input, lies in
    no directory, or is named twice."""
    given = [Path(path).resolve() for path in inputs if path is not None]
    wanted = [path for path in outputs if path is not None]
    for path in wanted:
        try:
            resolved, exists, is_dir = path.resolve(), path.exists(), path.is_dir()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        if resolved in given:
            what = "the input model" if resolved == given[0] else "an input"
            raise OutputError(f"{path}: is {what}, which is never overwritten")
        if is_dir:
            raise OutputError(f"{path}: is a directory, a file name is needed")
        if exists and not force:
            raise OutputError(f"{path}: exists; choose another name, or overwrite it with --force")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the directory {path.parent} does not exist")
        if sum(resolved == other.resolve() for other in wanted) > 1:
            raise OutputError(f"{path}: is named for two different outputs")


@dataclass(slots=True)
class _Split:
    """Which samples are calibrated on, and which the models are compared on."""

    source: Data
    run: Run
    n_calibration: int | None
    held_out: bool
    notes: tuple[str, ...] = ()
    first: Batch | None = None

    @classmethod
    def of(cls, source: Data, run: Run, saved: Observations | None) -> _Split:
        wanted = run.samples or (saved.n_samples if saved else None)
        if saved is not None and wanted is not None and wanted < saved.n_samples:
            raise OptionError(
                f"--samples {wanted}: the observations hold {saved.n_samples} samples, fewer "
                f"cannot be taken from them; leave --samples out, or observe again"
            )
        available = source.n_samples
        if wanted is None or available is None:
            return cls(source, run, wanted, held_out=False)
        n = min(wanted - wanted % source.multiple, available)
        if n == 0:
            raise DataError(
                f"samples must be at least {source.multiple}, the model's fixed batch, got {wanted}"
            )
        note = f"{run.samples} samples were asked for, {n} are used"
        return cls(source, run, n, n < available, (note,) if run.samples not in (None, n) else ())

    def calibration(self) -> Iterator[Batch]:
        """Batches to observe; the first is kept for what needs just one."""
        batches = self.source.batches(0, self.n_calibration)
        for batch in self._shown("observe", batches, self.n_calibration or self.source.n_samples):
            self.first = self.first or batch
            yield batch

    def evaluation(self) -> Iterator[Batch]:
        """Batches to compare on: those not calibrated on, if any are left; of a source that can
        be gone through once only, its first."""
        if isinstance(self.source, Batches) and self.source.once_only:
            return iter([self.first_batch()])
        n, available = self.n_calibration, self.source.n_samples
        if not self.held_out:
            return self._shown("evaluate", self.source.batches(0, n), n or available)
        rest = (available or 0) - (n or 0)
        return self._shown("evaluate", self.source.batches(n or 0), rest)

    def _shown(self, stage: str, batches: Iterator[Batch], total: int | None) -> Iterator[Batch]:
        """The same batches, each reported as progress once it is dealt with."""
        with self.run.progress(stage, total) as advance:
            for batch in batches:
                yield batch
                advance(batch.n_samples)

    @property
    def first_compared(self) -> int:
        """Number of the first sample that the models are compared on."""
        return (self.n_calibration or 0) if self.held_out else 0

    def first_batch(self) -> Batch:
        """One batch, to run a model on."""
        self.first = self.first or next(self.source.batches(), None)
        if self.first is None:
            raise DataError("the calibration data holds no samples")
        return self.first


def _observe(model: Model, split: _Split, plan: Plan, rules: Rules) -> Observations:
    """Observes what the plan needs; all there is, where it is saved for other plans too."""
    run = split.run
    names = plan.activations
    if run.save_observations is not None:
        uses, _ = quantizable_uses(model)
        names = tuple(dict.fromkeys(use.tensor for use in uses if use.kind == "activation"))
    batches = split.calibration()
    return observe(model, batches, names, rules.reduction.kept_batches, run.runtime)


def _manifest(table: CalibrationTable, rules: Rules, run: Run, data: object) -> dict[str, Any]:
    distributions = ("octav-calibrate", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
    source = Path(data).name if isinstance(data, str | Path) else data and type(data).__name__
    return {
        "options": {
            **asdict(rules),
            "data": source,
            "samples": run.samples,
            "batch_size": run.batch_size,
            "seed": run.seed,
            **asdict(run.runtime),
            "observations": run.observations and run.observations.name,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in distributions},
        },
        "digests": {"model_sha256": table.model_sha256},
        "n_samples": table.n_samples,
    }


def _warnings(
    table: CalibrationTable, comparison: Comparison, synthetic: bool, observed: bool
) -> tuple[str, ...]:
    warnings = []
    if synthetic and not observed:
        warnings.append(
            "NO DATA: activations were calibrated on made-up inputs. The model is good for smoke "
            "tests only; give --data"
        )
    elif synthetic:
        warnings.append("NO DATA: the models were compared on made-up inputs; give --data")
    sqnr_db = comparison.output_sqnr_db
    if sqnr_db < _LOW_SQNR_DB:
        worst = ", ".join(f"{r.name!r} ({r.sqnr_db:.1f} dB)" for r in table.worst(3))
        warnings.append(
            f"output SQNR is {sqnr_db:.1f} dB, accuracy has likely collapsed. Worst tensors: "
            f"{worst}. Try more bits, --exclude for these, or another --method"
        )
    return tuple(warnings)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
