"""Any two models with the same interface: how far apart they are, and whether that is too far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.bounds import Verdict
from calib.comparison import Comparison
from calib.data import open_data
from calib.errors import ModelError, OptionError, VerificationError, one_line
from calib.files import uninterrupted, write_texts
from calib.graph import Model, load_model
from calib.inspection import Inspection, inspect
from calib.interface import check_interface, feeding_model
from calib.iterables import Batches
from calib.metric import load_metric
from calib.report.document import blank, model_facts, number, verdict_facts
from calib.report.junit import render_junit
from calib.report.markdown import render_markdown
from calib.report.page import check_available, render_page
from calib.run import Run, Split, check_outputs
from calib.table import dumps


@dataclass(frozen=True, slots=True)
class CheckFiles:
    """Where to write what a check has found; None for nowhere.

    Args:
        report: an HTML page.
        junit: JUnit XML, a test case for each bound.
        markdown: a summary for a job or a merge request.
        json: the document, with every number.
    """

    report: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    json: Path | None = None


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A model file: digest and size include its external data."""

    path: Path
    sha256: str
    n_bytes: int

    @classmethod
    def of(cls, model: Model) -> CheckedFile:
        """Of a model that was loaded."""
        return cls(model.path, model.sha256, model.n_bytes)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return model_facts(self.path, self.sha256, self.n_bytes)


@dataclass(frozen=True, slots=True)
class Check:
    """What `check_models` found.

    Attributes:
        float_model: the reference.
        quantized: the model that was checked.
        verdicts: one for each bound that was asked for.
        comparison: None where it could not be completed, see ``failure``.
        inspection: of the inner tensors.
        failure: why the quantized model fails whatever the bounds: its outputs hold NaN, or have
            other shapes than the float model's. None where that is not so.
        n_skipped: how many first samples were left out, as those that calibration saw.
        options: what was asked for, as plain values.
        warnings: what makes the result doubtful.
        notes: what the user should know.
    """

    float_model: CheckedFile
    quantized: CheckedFile
    verdicts: tuple[Verdict, ...]
    comparison: Comparison | None
    inspection: Inspection
    failure: str | None = None
    n_skipped: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every bound holds, and the models could be compared."""
        return self.failure is None and all(verdict.holds for verdict in self.verdicts)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why it has not passed, a line each."""
        first = () if self.failure is None else (self.failure,)
        return (*first, *(verdict.text for verdict in self.verdicts if not verdict.holds))

    def document(self) -> dict[str, Any]:
        """Everything as plain values, as pages and summaries take it."""
        found = self.comparison
        top1, scores = (found.top1, found.scores) if found else (None, None)
        document = blank("check", self.float_model.facts)
        document["options"] = dict(self.options)
        document["samples"] = {
            "calibration": self.n_skipped or None,
            "evaluation": found and found.n_samples,
            "held_out": self.n_skipped > 0,
        }
        document["float"] = {
            "top1": top1 and top1.float_model,
            "metric": scores and scores.float_model,
        }
        document["metric_name"] = scores and scores.name
        document["check"] = self._part()
        document["warnings"] = [*([self.failure] if self.failure else []), *self.warnings]
        document["notes"] = list(self.notes)
        return document

    def _part(self) -> dict[str, Any]:
        found = self.comparison or Comparison(0, {}, None)
        top1, scores, jump = found.top1, found.scores, self.inspection.first
        return {
            "passed": self.passed,
            "failure": self.failure,
            "float": self.float_model.facts,
            "quantized": self.quantized.facts,
            "verdicts": [verdict_facts(verdict) for verdict in self.verdicts],
            "outputs": [
                {
                    "name": name,
                    "sqnr_db": number(db),
                    "cosine": number(found.cosine[name]),
                    "max_error": number(found.max_error[name]),
                }
                for name, db in found.sqnr_db.items()
            ],
            "agreement": found.agreement,
            "top1": top1 and {"float": top1.float_model, "quantized": top1.quantized_model},
            "metric": scores
            and {
                "name": scores.name,
                "float": scores.float_model,
                "quantized": scores.quantized_model,
            },
            "tensors": [
                {"name": t.name, "op_type": t.op_type, "sqnr_db": number(t.sqnr_db)}
                for t in self.inspection.tensors
            ],
            "first": jump
            and {
                "name": jump.tensor.name,
                "sqnr_db": number(jump.tensor.sqnr_db),
                "before_db": number(jump.before_db),
            },
            "first_text": self.inspection.text,
        }


def check_models(
    float_model: str | Path,
    quantized: str | Path,
    data: object = None,
    run: Run | None = None,
    files: CheckFiles | None = None,
) -> Check:
    """Compares two models with the same interface, whatever made them, at onnxruntime's default
    level, and says which of ``run.bounds`` hold.

    Args:
        float_model: an ONNX file; the reference.
        quantized: an ONNX file; may be the same.
        data: see `calib.data.open_data`; None for synthetic inputs.
        run: bounds, metric, runtime and the like. Of ``samples``, the first that many are left out,
            as those that calibration saw, where there are more.
        files: what to write, also where the check fails.

    Raises:
        CalibError: one of its kinds, in one line, for models that cannot be read, run or compared,
            data that does not fit, or a bound that cannot be measured. Nothing is written then.
    """
    run, files = run or Run(), files or CheckFiles()
    run.bounds.check_metric(run.metric)
    if run.metric is not None:
        load_metric(run.metric)
    model, other = load_model(float_model, run.feedback), load_model(quantized)
    check_interface(model, other)
    _check_files(files, (model, other), data, run)
    feeding, note = feeding_model(model, other)
    split = Split.of(open_data(feeding, data, run.reading), run, None)
    if data is not None:
        _check_left(split)
    comparison, failure = _compared(split, model, other)
    sizes = model.n_bytes, other.n_bytes
    check = Check(
        CheckedFile.of(model),
        CheckedFile.of(other),
        run.bounds.judge(comparison, sizes) if comparison else _unmeasured(run, sizes),
        comparison,
        _inspected(split, model, other),
        failure,
        (split.n_calibration or 0) if split.held_out else 0,
        _options(data, run),
        () if data is not None else (_NO_DATA,),
        (
            *note,
            *_notes(split, model, other),
            *(comparison.notes if comparison else ()),
        ),
    )
    _write(check.document(), files)
    return check


_NO_DATA = "NO DATA: the models were compared on made-up inputs, which says little; give --data"


def _compared(split: Split, model: Model, other: Model) -> tuple[Comparison | None, str | None]:
    try:
        return split.compare(model, other.path), None
    except VerificationError as error:
        return None, str(error)


def _unmeasured(run: Run, n_bytes: tuple[int, int]) -> tuple[Verdict, ...]:
    """Every bound fails but that of the size, which needs no outputs."""
    bounds = ((name, getattr(run.bounds, name.replace("-", "_"))) for name in run.bounds.asked)
    ratio = n_bytes[1] / n_bytes[0]
    return tuple(
        Verdict(name, limit, ratio if name == "max-size-ratio" else float("nan"))
        for name, limit in bounds
    )


def _inspected(split: Split, model: Model, other: Model) -> Inspection:
    """The verdict never depends on whether inner tensors can be had."""
    try:
        return inspect(model, other.path, split.evaluation(), split.run.runtime)
    except ModelError as error:
        return Inspection(reason=f"the inner tensors cannot be compared: {one_line(error)}")


def _notes(split: Split, model: Model, other: Model) -> Iterator[str]:
    if model.sha256 == other.sha256:
        yield "both models are the same file, byte for byte"
    if split.held_out:
        yield f"the first {split.n_calibration} samples, those that calibration saw, are left out"
    if isinstance(split.source, Batches) and split.source.once_only:
        yield "the data can be gone through only once: compared on its first batch"
    yield from split.all_notes
    if not split.run.bounds.asked:
        yield "no bound was asked for, so that none can fail: 'min-sqnr' would be one"


def _check_left(split: Split) -> None:
    """Raises `OptionError` if no samples are left besides those that calibration saw."""
    n, asked = split.source.n_samples, split.run.samples
    if asked is not None and n is not None and not split.held_out:
        raise OptionError(
            f"samples: calibration saw the first {asked}, and there are {n}: none are left to "
            f"compare on; give other data, or leave --samples out"
        )


def _check_files(files: CheckFiles, models: tuple[Model, Model], data: object, run: Run) -> None:
    paths = [data if isinstance(data, str | Path) else None, run.reading.labels]
    others = (Path(path) for path in paths if path is not None)
    read = [*models[0].files, *models[1].files, *others, *run.runtime.custom_ops, *run.protected]
    check_outputs([files.report, files.junit, files.markdown, files.json], read, run)
    if files.report is not None:
        check_available()


def _write(document: dict[str, Any], files: CheckFiles) -> None:
    """All appear, or none."""
    renderers = {
        "report": render_page,
        "junit": render_junit,
        "markdown": render_markdown,
        "json": _json,
    }
    paths = {name: getattr(files, name) for name in renderers}
    texts = {path: renderers[name](document) for name, path in paths.items() if path is not None}
    with ExitStack() as stack:
        write_texts(texts, stack)
        with uninterrupted():
            stack.close()


def _json(document: Mapping[str, Any]) -> str:
    return dumps(document, indent=2) + "\n"


def _options(data: object, run: Run) -> dict[str, Any]:
    source = Path(data).name if isinstance(data, str | Path) else type(data).__name__
    return {
        "data": None if data is None else source,
        "samples": run.samples,
        "metric": run.metric,
        "provider": run.runtime.provider,
        **{name: getattr(run.bounds, name.replace("-", "_")) for name in run.bounds.asked},
    }
