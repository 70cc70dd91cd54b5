"""Observe what a plan needs, going on from where an earlier run was cut off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from calib import cluster
from calib.capture import check_opset
from calib.cluster import connected, observe_on
from calib.counterfile import is_checkpoint
from calib.equalizing import equalize
from calib.errors import ObservationsError, OptionError, OutputError
from calib.files import uninterrupted
from calib.graph import Model, load_model, quantizable_uses
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import Plan
from calib.report import page
from calib.rules import Rules
from calib.run import Run, Split, check_outputs
from calib.shards import Task


def open_model(path: str | Path, rules: Rules, run: Run) -> Model:
    """The model at ``path``, equalized if ``rules`` say so.

    Raises:
        ModelError: as `load_model`, or if onnxruntime would not load it quantized, for its opset.
        OptionError: if workers, which read the model's file, shall observe an equalized one.
    """
    model = load_model(path, run.feedback)
    check_opset(model.ir)
    if not rules.equalize:
        return model
    if run.on_workers:
        raise OptionError("equalize works in one process: leave it out, or workers and scheduler")
    return equalize(model)


def observe_split(
    model: Model, split: Split, plan: Plan, rules: Rules, *, halves: bool = False
) -> Observations:
    """Counters of what the plan needs; of all there is, where they are saved for other plans too.

    What is saved is saved now and then on the way, and a run that was cut off goes on from there.
    It always has ``halves`` of the samples, too; what is not saved has them if asked for.
    """
    run, names, keep = split.run, plan.activations, rules.reduction.kept_batches
    how = Observing(
        keep,
        run.runtime,
        run.padding_mask,
        halves=halves or run.save_observations is not None,
        max_memory=run.max_memory,
    )
    if run.save_observations is None:
        return _observe(model, split, names, how)
    uses, _ = quantizable_uses(model)
    read = (use.tensor for use in uses if use.kind == "activation")
    names = tuple(dict.fromkeys((*read, *names)))
    if split.source.identity is None or model.feedback or run.on_workers:
        return _observe(model, split, names, how)
    parts = split.source.identity, split.n_calibration, names, keep, run.padding_mask, "halves"
    identity = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = checkpoint_path(run.save_observations)
    resumed = _resumed(path, model, identity, split)
    how = replace(
        how,
        resumed=resumed,
        checkpoint=lambda seen: replace(seen, identity=identity).save(path),
        checkpoint_seconds=run.checkpoint_seconds,
    )
    observed = observe(model, split.calibration(resumed.n_samples if resumed else 0), names, how)
    return replace(observed, identity="")


def _observe(model: Model, split: Split, names: Sequence[str], how: Observing) -> Observations:
    """From the first sample on, here or on workers."""
    run = split.run
    if not run.on_workers:
        return observe(model, split.calibration(), names, how)
    task = Task.of(model, split.source, names, how)
    stop = split.n_calibration
    with (
        run.progress("observe", stop or split.source.n_samples) as advance,
        connected(run.workers, run.scheduler) as client,
    ):
        return observe_on(client, task, split.source, stop, advance)


def saved_observations(model: Model, run: Run) -> Observations | None:
    """What ``run`` says to read instead of observing.

    Raises:
        ObservationsError: as `Observations.load`, or if another padding mask was used.
    """
    if run.observations is None:
        return None
    saved = Observations.load(run.observations, model)
    if run.padding_mask not in (None, saved.padding_mask):
        raise ObservationsError(
            f"{run.observations}: observed with padding-mask {saved.padding_mask}, not "
            f"{run.padding_mask}: observe again"
        )
    return saved


def check_files(outputs: Sequence[Path | None], model: Model, data: object, run: Run) -> None:
    """Raises `OutputError` if one of ``outputs`` or of the files that ``run`` names cannot be
    written, or must not be overwritten."""
    paths = [data if isinstance(data, str | Path) else None, run.observations, run.reading.labels]
    others = (Path(path) for path in paths if path is not None)
    inputs = [*model.files, *others, *run.runtime.custom_ops, *run.protected]
    if run.report is not None:
        page.check_available()
    if run.on_workers:
        cluster.check_available()
    check_outputs([*outputs, run.save_observations, run.summary, run.report], inputs, run)
    _check_checkpoint(run)


def _check_checkpoint(run: Run) -> None:
    """Something else may stand where observations would be saved on the way."""
    if run.save_observations is None or run.force:
        return
    path = checkpoint_path(run.save_observations)
    if path.exists() and not is_checkpoint(path):
        raise OutputError(
            f"{path}: exists and is no checkpoint; remove it, or overwrite it with --force"
        )


@contextmanager
def appearing(run: Run) -> Iterator[ExitStack]:
    """A stack for files that appear together when the block ends well; what ``run`` had saved of
    its observations on the way then goes."""
    with ExitStack() as files:
        yield files
        with uninterrupted():
            files.close()
            if run.save_observations is not None:
                checkpoint_path(run.save_observations).unlink(missing_ok=True)


def checkpoint_path(path: Path) -> Path:
    """Where observations that are to be saved to ``path`` stand until they are complete."""
    return path.with_name(f"{path.name}.partial")


def _resumed(path: Path, model: Model, identity: str, split: Split) -> Observations | None:
    if not path.exists():
        return None
    try:
        found = Observations.load(path, model)
    except ObservationsError:
        found = None
    if found is None or found.identity != identity:
        note = f"{path.name} is of another model, other data or settings: observed from the start"
        split.notes = (*split.notes, note)
        return None
    split.notes = (*split.notes, f"observing went on from sample {found.n_samples} ({path.name})")
    return found
