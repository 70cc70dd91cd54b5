"""Whatever goes wrong is one line, and leaves every folder as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Save, all_bits
from models import MODELS, parsed, values

from calib.capture import Runtime
from calib.data import Reading
from calib.errors import (
    CalibError,
    CalibratorError,
    DataError,
    ModelError,
    ObservationsError,
    OptionError,
    OutputError,
    VerificationError,
)
from calib.pipeline import calibrate_model
from calib.rules import Reduction, Rules, Selection
from calib.run import Run

Contents = dict[str, bytes | None]


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    """A model, data for it, and files that must not be overwritten."""
    save(MODELS["conv_bn_relu"]())
    np.savez(tmp_path / "data.npz", image=values(12, 3, 6, 6), labels=np.arange(12) % 5)
    broken = values(12, 3, 6, 6)
    broken[5, 1, 2, 3] = np.nan
    np.savez(tmp_path / "nan.npz", image=broken)
    np.savez(tmp_path / "late.npz", image=np.concatenate([values(12, 3, 6, 6), broken]))
    np.savez(tmp_path / "doubles.npz", image=broken.astype(np.float64))
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.onnx").write_text("precious")
    (tmp_path / "there.json").write_text("precious")
    (tmp_path / "text.npz").write_text("no observations")
    return tmp_path


def contents(folder: Path) -> Contents:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(
    folder: Path, error: type[CalibError], call: Callable[[], object], message: str
) -> None:
    before = contents(folder)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


OUTPUTS: dict[str, tuple[str, Callable[[Path], Run], str]] = {
    "output exists": ("there.onnx", lambda _: Run(), r"there\.onnx: exists; .* --force$"),
    "output is the model": ("model.onnx", lambda _: Run(force=True), r"model\.onnx: is the input"),
    "output is the data": ("data.npz", lambda _: Run(force=True), r"data\.npz: is an input"),
    "output is the observations": (
        "text.npz", lambda f: Run(force=True, observations=f / "text.npz"), r"text\.npz: is an in",
    ),
    "output is a folder": ("folder", lambda _: Run(force=True), "folder: is a directory, a file"),
    "output in no folder": ("no/out.onnx", lambda _: Run(), r"out\.onnx: the directory .*no does"),
    "summary exists": (
        "new.onnx", lambda f: Run(summary=f / "there.json"), r"there\.json: exists; ",
    ),
    "summary in no folder": (
        "new.onnx", lambda f: Run(summary=f / "no" / "s.json"), r"s\.json: the directory",
    ),
    "observations exist": (
        "new.onnx", lambda f: Run(save_observations=f / "data.npz"), r"data\.npz: is an input",
    ),
    "summary and output are one": (
        "new.onnx", lambda f: Run(summary=f / "folder" / ".." / "new.onnx"),
        r"new\.onnx: is named for two different outputs",
    ),
    "summary and observations are one": (
        "new.onnx", lambda f: Run(summary=f / "x", save_observations=f / "x"),
        "x: is named for two different outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_is_refused_before_anything_is_done(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, build, message = OUTPUTS[name]
    monkeypatch.setattr("calib.pipeline.observe_split", pytest.fail)
    refused(
        folder,
        OutputError,
        lambda: calibrate_model(
            folder / "model.onnx", folder / "data.npz", None, folder / output, build(folder)
        ),
        message,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "^samples must be at least 1, got 0$"),
        (
            {"observations": Path("a"), "save_observations": Path("b")},
            "^observations and save-observations contradict each other: read or save them$",
        ),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Run(**settings)  # type: ignore[arg-type]


def all_outputs(folder: Path) -> Run:
    return Run(
        samples=12, summary=folder / "out.json", save_observations=folder / "seen.npz",
        reading=Reading(batch_size=4),
    )  # fmt: skip


INPUTS: dict[str, tuple[type[CalibError], str, str | None, Rules, str]] = {
    "no model": (ModelError, "none.onnx", "data.npz", Rules(), r"none\.onnx: no such file$"),
    "not a model": (ModelError, "there.onnx", "data.npz", Rules(), "not a valid ONNX model"),
    "no data": (DataError, "model.onnx", "none.npz", Rules(), r"none\.npz: no such file$"),
    "nan": (DataError, "model.onnx", "nan.npz", Rules(), "holds NaN in sample 5: leave"),
    "nan in what is compared on": (
        DataError, "model.onnx", "late.npz", Rules(), "holds NaN in sample 17: leave",
    ),
    "wrong type": (DataError, "model.onnx", "doubles.npz", Rules(), "'image' is float64, the mo"),
    "nothing selected": (
        OptionError, "model.onnx", "data.npz", Rules(selection=Selection(only="x{9}")),
        "matches no node and no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_leaves_nothing_behind(name: str, folder: Path) -> None:
    error, model, data, rules, message = INPUTS[name]
    source = folder / data if data else None
    refused(
        folder,
        error,
        lambda: calibrate_model(folder / model, source, rules, None, all_outputs(folder)),
        message,
    )


def test_a_provider_that_is_not_there_leaves_nothing_behind(folder: Path) -> None:
    settings = Run(runtime=Runtime(provider="MadeUpExecutionProvider"))
    refused(
        folder,
        OptionError,
        lambda: calibrate_model(folder / "model.onnx", folder / "data.npz", run=settings),
        "^provider 'MadeUpExecutionProvider' is not available",
    )


def test_observations_that_do_not_serve_leave_nothing_behind(folder: Path, save: Save) -> None:
    for observations, message in (
        ("text.npz", "not a file that --save-obs"),
        ("none", "no such file"),
    ):
        refused(
            folder,
            ObservationsError,
            lambda o=observations: calibrate_model(  # type: ignore[misc]
                folder / "model.onnx", folder / "data.npz", run=Run(observations=folder / o)
            ),
            message,
        )
    other = save(MODELS["conv_bias"]())
    calibrate_model(other, run=Run(save_observations=folder / "other.npz"))
    calibrate_model(folder / "model.onnx", run=Run(save_observations=folder / "own.npz"))
    for name, rules, message in (
        ("other", Rules(), "observed on another model"),
        ("own", Rules(reduction=Reduction("mean")), "keep counters of 0 single batches"),
    ):
        settings = Run(observations=folder / f"{name}.npz", force=True)
        refused(
            folder,
            ObservationsError,
            lambda r=rules, s=settings: calibrate_model(  # type: ignore[misc]
                folder / "model.onnx", folder / "data.npz", r, folder / "new.onnx", s
            ),
            message,
        )


@pytest.mark.parametrize(
    "stage", ["pipeline.calibrate", "pipeline.write_qdq", "pipeline.verify", "run.evaluate"]
)
@pytest.mark.parametrize("kind", [VerificationError, CalibratorError])
def test_a_failure_at_any_stage_leaves_nothing_behind(
    stage: str, kind: type[CalibError], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise kind("it went wrong")

    monkeypatch.setattr(f"calib.{stage}", fails)
    refused(
        folder,
        kind,
        lambda: calibrate_model(
            folder / "model.onnx", folder / "data.npz", run=all_outputs(folder)
        ),
        "^it went wrong$",
    )


def test_labels_that_do_not_fit_leave_nothing_behind(folder: Path) -> None:
    batches = [(values(4, 3, 6, 6), np.zeros((4, 1), np.int64))]
    refused(
        folder,
        DataError,
        lambda: calibrate_model(folder / "model.onnx", batches, run=all_outputs(folder)),
        "^batch 0: 'labels' must be one integer for each sample",
    )


@pytest.mark.parametrize("data", [[], iter(()), [values(0, 3, 6, 6)]])
def test_data_without_samples_leaves_nothing_behind(data: object, folder: Path) -> None:
    refused(
        folder,
        DataError,
        lambda: calibrate_model(folder / "model.onnx", data, run=all_outputs(folder)),
        "^the calibration data holds no samples$",
    )


def test_an_activation_that_overflows_leaves_nothing_behind(save: Save, tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y) <float[6,4] weight> {
      large = Mul(x, x)
      y = MatMul(large, weight)
    }"""
    path, feed = save(parsed(text)), [values(4, 6), np.full((4, 6), 1e30, np.float32)]
    refused(
        tmp_path,
        ModelError,
        lambda: calibrate_model(path, feed, run=all_outputs(tmp_path)),
        "^activation 'large' becomes infinite in the batch that starts at sample 4: ",
    )


def test_an_interrupt_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calib.run.evaluate", interrupted)
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(folder / "model.onnx", folder / "data.npz", run=all_outputs(folder))
    assert contents(folder) == before


def test_a_folder_that_fills_up_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model: ir.Model, path: Path) -> None:
        path.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calib.saving.ir.save", full)
    refused(
        folder,
        OutputError,
        lambda: calibrate_model(folder / "model.onnx", folder / "data.npz"),
        r": cannot be written: No space left on device$",
    )


def test_force_overwrites_all_outputs(folder: Path) -> None:
    settings = Run(summary=folder / "there.json", save_observations=folder / "text.npz", force=True)
    result = calibrate_model(
        folder / "model.onnx", folder / "data.npz", all_bits(4), folder / "there.onnx", settings
    )
    after = contents(folder)
    assert result.output == folder / "there.onnx"
    for name, start in (("there.onnx", b"\x08"), ("there.json", b"{"), ("text.npz", b"PK")):
        content = after[name]
        assert content is not None
        assert content.startswith(start)
