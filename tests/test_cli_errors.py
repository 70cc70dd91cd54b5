"""Bad options, models and outputs: one line on stderr, exit code 2, every file as it was.

Data and observations have `test_cli_bad_data.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_models import (
    DIGITS,
    assert_tells,
    enter_room,
    normal,
    refuse,
    run_script,
    save_relu,
    save_two_layers,
    succeed,
)

from calib.errors import VerificationError

Capsys = pytest.CaptureFixture[str]
Case = tuple[Sequence[object], Sequence[str]]

pytestmark = pytest.mark.usefixtures("room")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of two layers and 50 samples for it."""
    save_two_layers(tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=normal(50, 4, seed=2))
    return enter_room(tmp_path, monkeypatch)


# --- the command line -------------------------------------------------------------------------

# What is typed behind the model and its data, and what the message must tell.
OPTIONS: dict[str, Case] = {
    "an unknown option": (["--bitz", 4], ["--bitz", "--bits"]),
    "an option without its value": (["--method"], ["--method", "argument"]),
    "a second model": (["other.onnx"], ["other.onnx"]),
    "bits that are a word": (["--bits", "four"], ["--bits", "'four'"]),
    "bits that are a fraction": (["--bits", 4.5], ["--bits", "'4.5'"]),
    "9 bits": (["--bits", 9], ["bits", "2 to 8 or 16", "got 9"]),
    "1 bit": (["--bits", 1], ["bits", "2 to 8 or 16", "got 1"]),
    "0 weight bits": (["--weight-bits", 0], ["weight-bits", "2 to 8 or 16", "got 0"]),
    "32 activation bits": (["--activation-bits", 32], ["activation-bits", "got 32"]),
    "negative edge bits": (["--edge-bits", -4], ["edge-bits", "2 to 8 or 16", "got -4"]),
    "0 samples": (["--samples", 0], ["samples", "at least 1", "got 0"]),
    "a batch size of 0": (["--batch-size", 0], ["batch-size", "at least 1", "got 0"]),
    "0 mean batches": (
        ["--reduce", "mean", "--mean-batches", 0],
        ["--mean-batches", "at least 1", "got 0"],
    ),
    "mean batches without a mean": (
        ["--mean-batches", 3],
        ["--mean-batches belongs to reduce mean", "'pool'"],
    ),
    "a feedback that names no output": (["--feed-back", "x"], ["--feed-back", "'x'", "INPUT=OUT"]),
    "a feedback without an input": (["--feed-back", "=y"], ["--feed-back", "'=y'"]),
    "two feedbacks into one input": (
        ["--feed-back", "x=y", "--feed-back", "x=z"],
        ["--feed-back", "'x' is given twice"],
    ),
    "a pixel scale that is no number": (
        ["--pixel-scale", "1/0"],
        ["--pixel-scale", "a number or a fraction, as 1/255", "'1/0'"],
    ),
    "a mean that is no number": (["--mean", "0.5,red,1"], ["--mean[1]", "a number", "'red'"]),
    "a std of zero": (["--std", "0"], ["--std must be above 0"]),
    "a percentile that is nan": (
        ["--method", "percentile", "--percentile", "nan"],
        ["--percentile must be a number, got nan"],
    ),
    "external data of an unknown kind": (
        ["--external-data", "perhaps"],
        ["--external-data must be auto, always, never", "'perhaps'"],
    ),
    "an empty path": (["--output", ""], ["is a directory"]),
    "negative threads": (["--threads", -1], ["threads", "0 to 1024", "got -1"]),
    "a negative seed": (["--seed", -1], ["seed", "-1"]),
    "an unknown provider": (["--provider", "Abacus"], ["'Abacus'", "CPUExecutionProvider"]),
    "an unknown reduction": (["--reduce", "median"], ["reduce", "pool", "mean", "'median'"]),
    "an unknown granularity": (
        ["--weight-granularity", "per-row"],
        ["weight-granularity", "per-channel", "per-tensor", "'per-row'"],
    ),
    "an unknown method": (["--method", "octave"], ["'octave'", "Did you mean 'octav'?", "mse"]),
    "an unknown weight method": (["--weight-method", "entrpy"], ["'entrpy'", "'entropy'"]),
    "no method at all": (["--method", ""], ["''", "octav, percentile, mse, max, entropy"]),
    "an unknown parameter": (["--method", "octav:speed=9"], ["'speed'", "kappa, tolerance"]),
    "a parameter of the wrong type": (["--method", "mse:many"], ["mse:many", "points", "'many'"]),
    "a percentile that is a fraction": (
        ["--method", "percentile:0.999"],
        ["percentile", "0.999", "at most 100", "99.99"],
    ),
    "a percentile above 100": (["--method", "percentile", "--percentile", 101], ["101", "100"]),
    "a percentile for another method": (
        ["--method", "mse", "--percentile", 99],
        ["--percentile belongs to method percentile", "'mse'"],
    ),
    "a percentile given twice": (
        ["--method", "percentile:99", "--percentile", 99.9],
        ["--percentile", "'percentile:99'"],
    ),
    "a regular expression that is none": (["--exclude", "conv("], ["exclude", "'conv('"]),
    "another one that is none": (["--only", "*"], ["only", "'*'", "nothing to repeat"]),
    "exclude that matches nothing": (["--exclude", "head"], ["--exclude", "'head'", "--dry-run"]),
    "only that matches nothing": (["--only", "head"], ["--only", "'head'", "--dry-run"]),
    "a selection that leaves nothing": (
        ["--only", "first", "--exclude", "first"],
        ["nothing left to quantize", "--only", "--exclude"],
    ),
    "op types that leave nothing": (["--op-types", "Conv"], ["nothing left", "--op-types"]),
    "an unknown op type": (["--op-types", "MatMul,Softmax"], ["'Softmax'", "Conv, ", "MatMul"]),
    "quiet and verbose": (["--quiet", "--verbose"], ["--quiet and verbose contradict"]),
    "memory in an unknown unit": (["--max-memory", "3XB"], ["--max-memory", "3GB", "'3XB'"]),
    "no workers": (["--workers", 0], ["--workers must be at least 1, got 0"]),
    "workers here and elsewhere": (
        ["--workers", 2, "--scheduler", "tcp://there:8786"],
        ["workers", "scheduler", "contradict"],
    ),
    "observations both read and saved": (
        ["--observations", "a.npz", "--save-observations", "b.npz"],
        ["observations", "save-observations", "contradict"],
    ),
}


@pytest.mark.parametrize(("options", "parts"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense_are_refused(
    capsys: Capsys, options: Sequence[object], parts: Sequence[str]
) -> None:
    assert_tells(refuse(capsys, "model.onnx", "--data", "calib.npz", *options), *parts)


def test_a_command_without_a_model_is_refused(capsys: Capsys) -> None:
    assert_tells(refuse(capsys), "MODEL")


@pytest.mark.parametrize(
    "arguments", [["two\nlines.onnx"], ["model.onnx", "--data", "two\nlines.npz"]]
)
def test_a_message_stays_one_line_whatever_it_quotes(capsys: Capsys, arguments: list[str]) -> None:
    assert_tells(refuse(capsys, *arguments), "two lines", "no such file")


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "99"],
        ["--method", "octave"],
        ["--only", "head"],
        ["--exclude", "conv("],
        ["--threads", "-1"],
        ["--batch-size", "0"],
    ],
    ids=" ".join,
)
def test_a_dry_run_refuses_the_same_options(capsys: Capsys, options: list[str]) -> None:
    wet = refuse(capsys, "model.onnx", *options)
    assert refuse(capsys, "model.onnx", *options, "--dry-run") == wet


# --- the model --------------------------------------------------------------------------------


def save_nan_weight(path: Path) -> None:
    weight = normal(4, 5)
    weight[2, 3] = np.nan
    save_two_layers(path, weight)


def save_infinite_last_weight(path: Path) -> None:
    weight = normal(5, 3)
    weight[1, 1] = np.inf
    save_two_layers(path, second=weight)


def save_overflowing(path: Path) -> None:
    save_two_layers(path, np.full((4, 5), 3e38, np.float32))


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DIGITS_BYTES = (DIGITS / "digits.onnx").read_bytes()
MODELS: dict[str, tuple[Callable[[Path], object], Sequence[str]]] = {
    "missing": (lambda _: None, ["no such file"]),
    "a directory": (Path.mkdir, ["not a file"]),
    "empty": (write(b""), ["is empty"]),
    "a text": (write(b"Dear model,\nwhere are you?\n"), ["not a valid ONNX model"]),
    "random bytes": (write(np.random.default_rng(0).bytes(999)), ["not a valid ONNX model"]),
    "a zip": (write(b"PK\x03\x04" + bytes(200)), ["not a valid ONNX model"]),
    "cut off": (write(DIGITS_BYTES[:40_000]), ["not a valid ONNX model"]),
    "cut off early": (write(DIGITS_BYTES[:100]), ["not a valid ONNX model"]),
    "damaged": (write(DIGITS_BYTES[:90] + b"\xff" * 60 + DIGITS_BYTES[150:]), ["bad.onnx"]),
    "without anything to quantize": (save_relu, ["nothing to quantize", "Conv", "MatMul"]),
    "with NaN in a weight": (save_nan_weight, ["NaN"]),
    "with infinity in the last weight": (save_infinite_last_weight, ["'second.weight'", "infin"]),
    "that overflows": (save_overflowing, ["'hidden'", "infinit", "sample 0"]),
}
NAMED_BY_TENSOR = {"with NaN in a weight", "with infinity in the last weight", "that overflows"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_used_is_refused(capsys: Capsys, kind: str) -> None:
    make, parts = MODELS[kind]
    make(Path("bad.onnx"))
    message = refuse(capsys, "bad.onnx", "--data", "calib.npz")
    assert_tells(message, *parts, *([] if kind in NAMED_BY_TENSOR else ["bad.onnx: "]))


@pytest.mark.parametrize("name", ["model.onnx", "calib.npz"])
def test_a_file_that_may_not_be_read_is_refused(room: Path, name: str) -> None:
    (room / name).chmod(0)
    if os.access(room / name, os.R_OK):
        pytest.skip("this user may read everything")
    told = run_script("model.onnx", "--data", "calib.npz")
    assert (told.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    assert_tells(line, "octav-calibrate: error: ", name, "read")
    assert len(list(room.iterdir())) == 2


def test_a_directory_that_may_not_be_written_is_refused(capsys: Capsys, room: Path) -> None:
    (room / "locked").mkdir(0o500)
    if os.access(room / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    message = refuse(capsys, "model.onnx", "--output", "locked/out.onnx")
    assert_tells(message, str(Path("locked/out.onnx")), "Permission denied")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that takes no file")
@pytest.mark.parametrize("option", ["--output", "--summary", "--save-observations"])
def test_a_place_that_takes_no_file_is_named_as_it_was_given(capsys: Capsys, option: str) -> None:
    message = refuse(capsys, "model.onnx", option, "/proc/out.file")
    assert message.startswith("/proc/out.file: ")


# --- outputs ----------------------------------------------------------------------------------

OUTPUTS: dict[str, Case] = {
    "the default name exists": ([], ["model-w8a8.onnx", "exists", "--force"]),
    "output exists": (["--output", "there"], ["there: exists", "--force"]),
    "summary exists": (["--summary", "there"], ["there: exists", "--force"]),
    "observations exist": (["--save-observations", "there"], ["there: exists", "--force"]),
    "output in no directory": (
        ["--output", "no/where/a.onnx"],
        ["a.onnx", str(Path("no/where")), "does not exist"],
    ),
    "summary in no directory": (["--summary", "no/a.json"], ["directory no", "does not exist"]),
    "observations in no directory": (["--save-observations", "no/a.npz"], ["directory no"]),
    "output below a file": (["--output", "there/a.onnx"], ["directory there"]),
    "output is a directory": (["--output", "folder"], ["folder: is a directory"]),
    "summary is a directory": (["--summary", "folder"], ["folder: is a directory"]),
    "output is the model": (["--output", "model.onnx"], ["is the input model"]),
    "summary is the model": (["--summary", "model.onnx"], ["is the input model"]),
    "output is the model by another path": (
        ["--output", "folder/../model.onnx"],
        ["is the input model"],
    ),
    "output and summary are one file": (["--output", "a", "--summary", "a"], ["a: ", "two"]),
    "output and observations are one file": (
        ["--output", "a", "--save-observations", "folder/../a"],
        ["a: ", "two"],
    ),
    "output with a name that is too long": (["--output", "a" * 300], ["a" * 300]),
}


@pytest.mark.parametrize(("options", "parts"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(
    capsys: Capsys, room: Path, options: Sequence[str], parts: Sequence[str]
) -> None:
    (room / "folder").mkdir()
    for name in ("there", *([] if options else ["model-w8a8.onnx"])):
        (room / name).write_text("precious")
    assert_tells(refuse(capsys, "model.onnx", "--data", "calib.npz", *options), *parts)


@pytest.mark.parametrize("option", ["--output", "--summary", "--save-observations"])
@pytest.mark.parametrize("precious", ["model.onnx", "calib.npz"])
def test_not_even_force_overwrites_an_input(capsys: Capsys, option: str, precious: str) -> None:
    data = ("--data", "calib.npz")
    message = refuse(capsys, "model.onnx", *data, option, precious, "--force")
    assert_tells(message, precious, "input")


@pytest.mark.parametrize("option", ["--output", "--summary"])
def test_not_even_force_overwrites_the_observations_read(capsys: Capsys, option: str) -> None:
    succeed(capsys, "model.onnx", "--save-observations", "seen.npz", "--output", "seen.onnx")
    reading = ("--observations", "seen.npz")
    message = refuse(capsys, "model.onnx", *reading, option, "seen.npz", "--force")
    assert_tells(message, "seen.npz", "input")


def test_a_model_that_fails_verification_leaves_no_file(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise VerificationError("output 'y' is wrong")

    monkeypatch.setattr("calib.pipeline.verify", fail)
    outputs = ("--summary", "s.json", "--save-observations", "seen.npz")
    assert refuse(capsys, "model.onnx", *outputs) == "output 'y' is wrong"


# --- in a process of its own ------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bits", "x"],
        ["missing.onnx"],
        ["model.onnx", "--bits", "9"],
        ["model.onnx", "--only", "z"],
    ],
    ids=" ".join,
)
def test_the_script_refuses_as_the_command_does_in_process(
    capsys: Capsys, arguments: list[str]
) -> None:
    message = refuse(capsys, *arguments)
    told = run_script(*arguments)
    assert (told.code, told.out) == (2, "")
    assert told.err.splitlines() == [f"octav-calibrate: error: {message}"]
