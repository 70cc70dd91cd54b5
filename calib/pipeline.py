"""The whole flow in one call: load, observe, calibrate, write, verify, evaluate."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calib.calibration import calibrate
from calib.comparison import Comparison
from calib.data import open_data
from calib.files import uninterrupted, whole_file, writing
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.report.document import number, versions
from calib.resuming import check_checkpoint, checkpoint_path, observe_split, saved_observations
from calib.run import Run, Split, check_outputs
from calib.table import CalibrationTable, dumps
from calib.targets import Rules, make_plan
from calib.verification import verify
from calib.write import external_files, free_data_name, write_qdq

_LOW_SQNR_DB = 10.0
_LARGE_BYTES = 100_000_000


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
            "output_sqnr_db": number(self.comparison.output_sqnr_db),
            "outputs_sqnr_db": {n: number(db) for n, db in self.comparison.sqnr_db.items()},
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
    rules, run, stage = rules or Rules(), run or Run(), _Stages()
    with stage("load"):
        loaded = load_model(model, run.feedback)
        stage.large = loaded.n_bytes > _LARGE_BYTES
        plan = make_plan(loaded, rules)
        target = Path(output) if output else default_output(loaded, rules)
        _check_files(target, loaded, data, run)
        saved = saved_observations(loaded, run)
        split = Split.of(open_data(loaded, data, run.reading), run, saved)
    with stage("observe"):
        observations = saved or observe_split(loaded, split, plan, rules)
    with stage("calibrate"):
        table = calibrate(loaded, observations, plan, rules)
        table = table.with_manifest(_manifest(table, rules, run, data))
    with stage("write"):
        quantized = write_qdq(loaded, table)
    with _outputs(target, loaded, run) as (written, files):
        with stage("save"), writing(target):
            name = free_data_name(target, [run.summary, run.save_observations])
            quantized = quantized.write(written, run.external_data, name)
        with stage("verify"):
            verify(loaded, quantized, written, split.first_batch(), run.runtime)
        with stage("evaluate"):
            comparison = split.compare(loaded, written)
        sizes = loaded.n_bytes, sum(file.stat().st_size for file in written.parent.iterdir())
        warnings = _warnings(table, comparison, data is None, saved is not None)
        told = *loaded.notes, *quantized.notes, *split.all_notes, *comparison.notes
        notes = (*told, *_observed_notes(observations, split))
        calibration = Calibration(
            target, table, comparison, split.held_out, sizes, stage.seconds, warnings, notes
        )
        _save_beside(calibration, observations, run, files)
    return calibration


@contextmanager
def _outputs(target: Path, model: Model, run: Run) -> Iterator[tuple[Path, ExitStack]]:
    """Where to write the model, and a stack for other files: all appear together, and what only an
    older ``target`` or a run that was cut off needed goes."""
    outdated = set(external_files(target)) - {file.resolve() for file in model.files}
    with ExitStack() as files:
        yield files.enter_context(whole_file(target, outdated)), files
        with uninterrupted():
            files.close()
            if run.save_observations is not None:
                checkpoint_path(run.save_observations).unlink(missing_ok=True)


def default_output(model: Model, rules: Rules) -> Path:
    """``<stem>-w4a4.onnx`` beside the model, by its widths."""
    widths = rules.widths
    return model.path.with_name(f"{model.path.stem}-w{widths.weights}a{widths.activations}.onnx")


def _observed_notes(observations: Observations, split: Split) -> Iterator[str]:
    n, wanted, names = observations.n_samples, split.n_calibration, observations.unmasked
    if wanted is not None and n < wanted:
        yield f"{wanted} samples were asked for, there are {n}"
    if names:
        yield (
            f"{len(names)} activations do not begin with the axes of the padding mask and were "
            f"counted whole, the first {names[0]!r}"
        )


def _save_beside(
    calibration: Calibration, observations: Observations, run: Run, files: ExitStack
) -> None:
    """Writes the other files that were asked for; they appear with the model."""
    if run.save_observations is not None:
        with writing(run.save_observations):
            observations.write(files.enter_context(whole_file(run.save_observations)))
    if run.summary is not None:
        text = dumps(calibration.summary(), indent=2) + "\n"
        with writing(run.summary):
            files.enter_context(whole_file(run.summary)).write_text(text, "utf-8")


def _check_files(target: Path, model: Model, data: object, run: Run) -> None:
    """Raises `OutputError` if a file cannot be written, or must not be overwritten."""
    paths = [data if isinstance(data, str | Path) else None, run.observations, run.reading.labels]
    others = (Path(path) for path in paths if path is not None)
    inputs = [*model.files, *others, *run.runtime.custom_ops, *run.protected]
    check_outputs([target, run.save_observations, run.summary], inputs, run)
    check_checkpoint(run)


def _manifest(table: CalibrationTable, rules: Rules, run: Run, data: object) -> dict[str, Any]:
    source = Path(data).name if isinstance(data, str | Path) else type(data).__name__
    return {
        "options": {
            **_plain(asdict(rules)),
            "data": None if data is None else source,
            "samples": run.samples,
            **_plain(asdict(run.reading)),
            **_plain(asdict(run.runtime)),
            "feedback": dict(run.feedback),
            "padding_mask": run.padding_mask,
            "external_data": run.external_data,
            "observations": run.observations and run.observations.name,
        },
        "versions": versions(),
        "digests": {"model_sha256": table.model_sha256},
        "n_samples": table.n_samples,
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them; files by their names."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda path: path.name))
    return plain


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
    if sqnr_db < _LOW_SQNR_DB and not (synthetic and observed):
        worst = ", ".join(f"{r.name!r} ({r.sqnr_db:.1f} dB)" for r in table.worst(3))
        warnings.append(
            f"output SQNR is {sqnr_db:.1f} dB, accuracy has likely collapsed. Worst tensors: "
            f"{worst}. Try more bits, --exclude for these, or another --method"
        )
    return tuple(warnings)


@dataclass(slots=True)
class _Stages:
    """Seconds by stage. Between those of a large model, memory is given back at once: graphs are
    cyclic, and its weights hang on each copy."""

    seconds: dict[str, float] = field(default_factory=dict)
    large: bool = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.large:
            gc.collect()
        self.seconds[name] = time.perf_counter() - start
