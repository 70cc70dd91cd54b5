"""The whole flow in one call: load, observe, calibrate, write, verify, evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calib.bounds import Verdict
from calib.calibration import calibrate
from calib.comparison import Comparison
from calib.correcting import check_correctable, corrected_on
from calib.data import open_data
from calib.equalizing import file_digest
from calib.files import whole_file, write_texts, writing
from calib.graph import Model
from calib.kernels import Kernels, has_vnni, integer_kernels
from calib.matmulnbits import in_format
from calib.observations import Observations
from calib.packed import verify
from calib.planning import make_plan
from calib.report.calibrated import calibration_document
from calib.report.document import figures, number, plain, verdict_facts, versions
from calib.report.page import render_page
from calib.resuming import appearing, check_files, observe_split, open_model, saved_observations
from calib.rules import Rules
from calib.run import Run, Split, check_weights_only
from calib.saving import Quantized, external_files, free_data_name
from calib.stages import Stages
from calib.table import CalibrationTable, dumps
from calib.targetrules import check_target
from calib.targets import TARGETS
from calib.verification import Check
from calib.write import write_qdq

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
        verdicts: on the bounds that were set.
        made_up: the comparison is on made-up inputs.
        kept: whether the model was written; not where a bound fails, unless it was told to.
        kernels: what onnxruntime runs in integers, where it is the target.
    """

    output: Path
    table: CalibrationTable
    comparison: Comparison
    held_out: bool
    n_bytes: tuple[int, int]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    verdicts: tuple[Verdict, ...] = ()
    made_up: bool = False
    kept: bool = True
    kernels: Kernels | None = None

    @property
    def passed(self) -> bool:
        """Whether all bounds hold."""
        return all(verdict.holds for verdict in self.verdicts)

    def summary(self) -> dict[str, Any]:
        """Everything, as plain values."""
        top1, scores = self.comparison.top1, self.comparison.scores
        return {
            **self.table.to_json(),
            "output": str(self.output) if self.kept else None,
            "output_sqnr_db": number(self.comparison.output_sqnr_db),
            "outputs_sqnr_db": {n: number(db) for n, db in self.comparison.sqnr_db.items()},
            "top1": top1 and {"float": top1.float_model, "quantized": top1.quantized_model},
            **{
                name: value
                for name, value in figures(self.comparison).items()
                if name in ("cosine", "max_error", "agreement")
            },
            "metric": scores
            and {
                "name": scores.name,
                "float": scores.float_model,
                "quantized": scores.quantized_model,
            },
            "verdicts": [verdict_facts(verdict) for verdict in self.verdicts],
            "compared_on": {
                "n_samples": self.comparison.n_samples,
                "held_out": self.held_out,
                **({"made_up": True} if self.made_up else {}),
            },
            "bytes": {"float": self.n_bytes[0], "quantized": self.n_bytes[1]},
            "seconds": self.seconds,
            **({"kernels": self.kernels.to_json()} if self.kernels else {}),
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
    rules, run, stage = rules or Rules(), run or Run(), Stages()
    with stage("load"):
        loaded = open_model(model, rules, run)
        stage.large = loaded.n_bytes > _LARGE_BYTES
        plan = make_plan(loaded, rules)
        check_weights_only(rules, run)
        target = Path(output) if output else default_output(loaded, rules)
        check_files([target], loaded, data, run)
        saved = saved_observations(loaded, run)
        split = Split.of(open_data(loaded, data, run.reading), run, saved)
        if rules.bias_correction:
            unseen = saved is not None or rules.weights_only
            check_correctable(split, made_up=data is None and unseen)
    with stage("observe"):
        halves = run.report is not None
        nothing = Observations(loaded.sha256, 0, {}) if rules.weights_only else None
        seen = saved or nothing or observe_split(loaded, split, plan, rules, halves=halves)
    with stage("calibrate"):
        table = calibrate(loaded, seen, plan, rules)
        table = table.with_manifest(_manifest(table, rules, run, data))
    if rules.bias_correction:
        with stage("correct"):
            table = corrected_on(loaded, table, split)
    with stage("write"):
        quantized = write_qdq(loaded, table)
    observed = saved is not None or rules.weights_only
    warnings = _no_data(synthetic=data is None, observed=observed)
    return _Work(loaded, rules, split, seen, quantized, target, stage, warnings).written()


@dataclass(slots=True)
class _Work:
    """A model that is ready to be written, and what else is written beside it."""

    model: Model
    rules: Rules
    split: Split
    observations: Observations
    quantized: Quantized
    target: Path
    stage: Stages
    warnings: tuple[str, ...]

    def written(self) -> Calibration:
        """Writes all files; the model only if it keeps its bounds, or shall be kept anyway."""
        run = self.split.run
        try:
            with _outputs(self.target, self.model, run) as (path, files):
                made = self._measured(path)
                if not (made.passed or run.keep_failed):
                    raise _RejectedError
                self._save_beside(made, files)
        except _RejectedError:
            made = replace(made, kept=False)
            with appearing(run) as files:
                self._save_beside(made, files)
        return made

    def _measured(self, path: Path) -> Calibration:
        """The model at ``path``, written, verified, compared and judged."""
        run, split, target = self.split.run, self.split, self.target
        with self.stage("save"), writing(target):
            name = free_data_name(target, [run.summary, run.save_observations, run.report])
            quantized = in_format(self.quantized, self.rules.weight_format)
            quantized = quantized.write(path, run.external_data, name)
        with self.stage("verify"):
            check = Check(self.model, quantized, path, split.first_batch(), run.runtime)
            told = verify(check, self.quantized)
            check_target(quantized.ir, self.rules.target)
            kernels = self._kernels(quantized, path)
        with self.stage("evaluate"):
            comparison = split.compare(self.model, path)
        sizes = self.model.n_bytes, sum(file.stat().st_size for file in path.parent.iterdir())
        told = *told, *self.model.notes, *quantized.notes, *split.all_notes, *comparison.notes
        return Calibration(
            output=target,
            table=quantized.table,
            comparison=comparison,
            held_out=split.held_out,
            n_bytes=sizes,
            seconds=self.stage.seconds,
            warnings=(*self.warnings, *_saturates(self.rules), *self._collapsed(comparison)),
            notes=(*told, *_observed_notes(self.observations, split)),
            verdicts=run.bounds.judge(comparison, sizes),
            made_up=bool(self.warnings),
            kernels=kernels,
        )

    def _kernels(self, quantized: Quantized, path: Path) -> Kernels | None:
        target = TARGETS[self.rules.target]
        if target.name != "onnxruntime" or self.rules.weight_format != "qdq":
            return None
        return integer_kernels(quantized, path, target, self.split.run.runtime)

    def _collapsed(self, comparison: Comparison) -> tuple[str, ...]:
        sqnr_db = comparison.output_sqnr_db
        if sqnr_db >= _LOW_SQNR_DB or self.warnings == _no_data(synthetic=True, observed=True):
            return ()
        first = "" if self.rules.bias_correction else "--bias-correction, "
        first = "without --equalize, " if self.rules.equalize else first
        worst = (f"{r.name!r} ({r.sqnr_db:.1f} dB)" for r in self.quantized.table.worst(3))
        text = (
            f"output SQNR is {sqnr_db:.1f} dB, accuracy has likely collapsed. Worst tensors: "
            f"{', '.join(worst)}. Try {first}more bits, --exclude for these, or another --method; "
            f"octav-compare finds the layers that hurt"
        )
        return (text,)

    def _save_beside(self, made: Calibration, files: ExitStack) -> None:
        """Writes the other files that were asked for; they appear together."""
        run = self.split.run
        if run.save_observations is not None:
            with writing(run.save_observations):
                self.observations.write(files.enter_context(whole_file(run.save_observations)))
        texts = {}
        if run.summary is not None:
            texts[run.summary] = dumps(made.summary(), indent=2) + "\n"
        if run.report is not None:
            texts[run.report] = render_page(self._document(made))
        write_texts(texts, files)

    def _document(self, made: Calibration) -> dict[str, Any]:
        """What the report shows."""
        facts = {
            "rules": self.rules,
            "command": self.split.run.command,
            "held_out": made.held_out,
            "made_up": made.made_up,
            "seconds": made.seconds,
            "warnings": made.warnings,
            "notes": made.notes,
            "verdicts": [verdict_facts(verdict) for verdict in made.verdicts],
        }
        seen, table = self.observations, made.table
        return calibration_document(self.model, seen, table, made.comparison, facts)


class _RejectedError(Exception):
    """A bound fails: what was written goes."""


@contextmanager
def _outputs(target: Path, model: Model, run: Run) -> Iterator[tuple[Path, ExitStack]]:
    """Where to write the model, and a stack for other files: all appear together, and what only an
    older ``target`` or a run that was cut off needed goes."""
    outdated = set(external_files(target)) - {file.resolve() for file in model.files}
    with appearing(run) as files:
        yield files.enter_context(whole_file(target, outdated)), files


def default_output(model: Model, rules: Rules) -> Path:
    """``<stem>-w4a4.onnx`` beside the model, by its widths; ``-w4b32.onnx`` with blocks of 32 and
    float activations."""
    widths = rules.widths
    blocks = "" if rules.block_size is None else f"b{rules.block_size}"
    activations = "" if widths.activations is None else f"a{widths.activations}"
    name = f"{model.path.stem}-w{widths.weights}{blocks}{activations}.onnx"
    return model.path.with_name(name)


def _observed_notes(observations: Observations, split: Split) -> Iterator[str]:
    n, wanted, names = observations.n_samples, split.n_calibration, observations.unmasked
    yield from observations.notes
    if not observations.counters:  # of weights alone, nothing is observed
        return
    if wanted is not None and n < wanted:
        yield f"{wanted} samples were asked for, there are {n}"
    if names:
        yield (
            f"{len(names)} activations do not begin with the axes of the padding mask and were "
            f"counted whole, the first {names[0]!r}"
        )


def _manifest(table: CalibrationTable, rules: Rules, run: Run, data: object) -> dict[str, Any]:
    source = Path(data).name if isinstance(data, str | Path) else type(data).__name__
    return {
        "options": {
            **plain(asdict(rules)),
            "data": None if data is None else source,
            "samples": run.samples,
            **plain(asdict(run.reading)),
            **plain({k: getattr(run.runtime, k) for k in ("provider", "threads", "custom_ops")}),
            "feedback": dict(run.feedback),
            "padding_mask": run.padding_mask,
            "external_data": run.external_data,
            "observations": run.observations and run.observations.name,
        },
        "versions": versions(),
        "digests": {"model_sha256": file_digest(table.model_sha256)},
        "n_samples": table.n_samples,
    }


def _no_data(*, synthetic: bool, observed: bool) -> tuple[str, ...]:
    if not synthetic:
        return ()
    if observed:
        return ("NO DATA: the models were compared on made-up inputs; give --data",)
    text = (
        "NO DATA: activations were calibrated on made-up inputs. The model is good for smoke tests "
        "only; give --data"
    )
    return (text,)


def _saturates(rules: Rules) -> Iterator[str]:
    if rules.target == "onnxruntime" and not rules.reduce_range and has_vnni() is False:
        yield (
            "this CPU has no VNNI: it adds products of 8-bit activations and weights in 16 bits, "
            "which saturate: use --reduce-range for machines like this one"
        )
