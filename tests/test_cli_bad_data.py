"""Bad data and observations: one line on stderr, exit code 2, every file as it was.

Options, models and outputs have `test_cli_errors.py`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import (
    assert_tells,
    by_name,
    enter_room,
    normal,
    read_json,
    refuse,
    run_main,
    save_two_layers,
    succeed,
)
from numpy.typing import NDArray

Capsys = pytest.CaptureFixture[str]
Make = Callable[[Path], object]

X = normal(50, 4, seed=2)

pytestmark = pytest.mark.usefixtures("room")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of two layers and 50 samples for it."""
    save_two_layers(tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=X)
    return enter_room(tmp_path, monkeypatch)


def arrays(**named: Any) -> Make:
    """An npz."""
    return lambda path: np.savez(path, allow_pickle=True, **named)


def array(values: NDArray[Any]) -> Make:
    """An npy."""
    return lambda path: np.save(path, values)


def file(content: bytes) -> Make:
    """Whatever stands in it."""
    return lambda path: path.write_bytes(content)


def nothing(_: Path) -> None:
    """Leaves the file missing."""


def with_value(sample: int, value: float) -> NDArray[np.float32]:
    changed = X.copy()
    changed[sample, 1] = value
    return changed


def npy_bytes(values: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def npz_bytes(values: NDArray[Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    """``values`` as ``x``; always the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo("x.npy"), npy_bytes(values), compression)
    return stream.getvalue()


def damaged(content: bytes, fill: bytes = b"\x3f", part: float = 0.5) -> bytes:
    """With 64 bytes overwritten, at that part of the whole; as float32, 0x3f3f3f3f is a number."""
    start = int(part * len(content))
    return content[:start] + fill * 64 + content[start + 64 :]


def archive_of(member: bytes) -> Make:
    """A sound zip of an unsound ``x.npy``."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", member)

    return make


MANY = normal(5000, 4)
PARTS = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97]
NPZ: dict[str, tuple[Make, Sequence[str]]] = {
    "missing": (nothing, ["no such file"]),
    "a directory": (Path.mkdir, ["director"]),
    "empty": (file(b""), ["cannot be read"]),
    "a text": (file(b"1 2 3 4\n"), ["cannot be read"]),
    "cut off": (file(npz_bytes(X)[:400]), ["cannot be read"]),
    "damaged": (file(damaged(npz_bytes(X))), ["CRC"]),
    "damaged far behind": (file(damaged(npz_bytes(MANY))), ["CRC"]),
    "of an array that ends early": (archive_of(npy_bytes(X)[:-100]), ["'x'", "ends before"]),
    "of an array with a broken header": (archive_of(b"\x93NUMPY\x01\x00\x10\x00{nonsense"), []),
    "without arrays": (arrays(), ["'x'", "nothing"]),
    "with a misnamed array": (arrays(image=X, labels=np.zeros(50, int)), ["'x'", "'image'"]),
    "of pickled objects": (arrays(x=np.array([{}, None], object)), ["'x'", "objects"]),
    "in Fortran order": (arrays(x=np.asfortranarray(X)), ["'x'", "Fortran", "ascontiguous"]),
    "of float64": (arrays(x=X.astype(np.float64)), ["'x' is float64", "float32", "astype"]),
    "of bytes": (arrays(x=X.astype(np.uint8)), ["'x' is uint8", "float32"]),
    "of the other byte order": (arrays(x=X.astype(">f4")), ["'x'", ">f4", "float32"]),
    "of text": (arrays(x=np.array(["a"] * 50)), ["'x'", "float32"]),
    "too narrow": (arrays(x=X[:, :3]), ["'x' is 50x3", "Nx4"]),
    "with an axis too many": (arrays(x=X[..., None]), ["'x' is 50x4x1", "Nx4"]),
    "with an axis too few": (arrays(x=X[:, 0]), ["'x' is 50", "Nx4"]),
    "of a single number": (arrays(x=np.float32(1)), ["'x'", "Nx4"]),
    "of zero samples": (arrays(x=X[:0]), ["0 samples"]),
    "with too few labels": (arrays(x=X, labels=np.zeros(49, int)), ["'x': 50", "'labels': 49"]),
    "with labels that are fractions": (arrays(x=X, labels=np.zeros(50)), ["'labels'", "float64"]),
    "with labels of two axes": (arrays(x=X, labels=np.eye(50, dtype=int)), ["'labels'", "50"]),
}
NPY: dict[str, tuple[Make, Sequence[str]]] = {
    "missing": (nothing, ["no such file"]),
    "empty": (file(b""), ["cannot be read"]),
    "a text": (file(b"1 2 3 4\n"), ["cannot be read"]),
    "cut off": (file(npy_bytes(X)[:500]), ["'x'", "ends before"]),
    "an npz in fact": (file(npz_bytes(X)), ["cannot be read"]),
    "of pickled objects": (array(np.array([{}], object)), ["objects"]),
    "in Fortran order": (array(np.asfortranarray(X)), ["Fortran"]),
    "of float64": (array(X.astype(np.float64)), ["float64", "float32"]),
    "too narrow": (array(X[:, :3]), ["50x3", "Nx4"]),
    "of zero samples": (array(X[:0]), ["0 samples"]),
}


@pytest.mark.parametrize(("make", "parts"), NPZ.values(), ids=NPZ)
def test_an_npz_that_cannot_be_used_is_refused(
    capsys: Capsys, make: Make, parts: Sequence[str]
) -> None:
    make(Path("bad.npz"))
    message = refuse(capsys, "model.onnx", "--data", "bad.npz", "--summary", "s.json")
    assert_tells(message, "bad.npz: ", *parts)


@pytest.mark.parametrize("part", PARTS)
def test_a_compressed_npz_damaged_anywhere_is_refused(capsys: Capsys, part: float) -> None:
    content = npz_bytes(MANY, zipfile.ZIP_DEFLATED)
    Path("bad.npz").write_bytes(damaged(content, b"\xff", part))
    # Whichever shows first: broken compression, a wrong checksum, or values that are no numbers.
    refuse(capsys, "model.onnx", "--data", "bad.npz")


@pytest.mark.parametrize(("make", "parts"), NPY.values(), ids=NPY)
def test_an_npy_that_cannot_be_used_is_refused(
    capsys: Capsys, make: Make, parts: Sequence[str]
) -> None:
    make(Path("bad.npy"))
    message = refuse(capsys, "model.onnx", "--data", "bad.npy")
    assert_tells(message, "bad.npy: ", *parts)


@pytest.mark.parametrize("name", ["data.csv", "data", "model.onnx"])
def test_data_of_an_unknown_kind_is_refused(capsys: Capsys, room: Path, name: str) -> None:
    if name != "model.onnx":
        (room / name).write_text("1,2,3,4\n")
    assert_tells(refuse(capsys, "model.onnx", "--data", name), name, ".npz", ".npy")


@pytest.mark.parametrize("sample", [0, 37, 49])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_is_refused_by_array_and_sample(
    capsys: Capsys, sample: int, value: float
) -> None:
    np.savez("bad.npz", x=with_value(sample, value))
    message = refuse(capsys, "model.onnx", "--data", "bad.npz")
    assert_tells(message, "data", "'x'", "NaN" if np.isnan(value) else "inf", f"sample {sample}")


def test_nan_in_the_samples_held_out_is_named_too(capsys: Capsys) -> None:
    np.savez("late.npz", x=with_value(37, np.nan))
    message = refuse(capsys, "model.onnx", "--data", "late.npz", "--samples", 20)
    assert_tells(message, "'x'", "NaN", "sample 37")


def test_data_that_ends_early_leaves_no_observations_behind(capsys: Capsys) -> None:
    archive_of(npy_bytes(X)[:-100])(Path("short.npz"))
    options = ("--samples", 20, "--save-observations", "seen.npz")
    assert_tells(refuse(capsys, "model.onnx", "--data", "short.npz", *options), "ends before")


def test_fewer_samples_than_a_fixed_batch_are_refused(capsys: Capsys) -> None:
    save_two_layers("fixed.onnx", batch=64)
    assert_tells(refuse(capsys, "fixed.onnx", "--data", "calib.npz"), "50 samples", "64")
    save_two_layers("fixed.onnx", batch=8)
    options = ("--data", "calib.npz", "--samples", 7)
    assert_tells(refuse(capsys, "fixed.onnx", *options), "samples", "at least 8", "got 7")


# --- observations -----------------------------------------------------------------------------


def manifest(**fields: object) -> Make:
    """An npz that looks like observations at first sight."""
    text = json.dumps(fields).encode()
    return lambda path: np.savez(path, observations=np.frombuffer(text, np.uint8))


def observed(capsys: Capsys, *options: object) -> bytes:
    """The bytes of sound observations of the model."""
    arguments = ("--data", "calib.npz", *options, "--output", "o.onnx")
    succeed(capsys, "model.onnx", *arguments, "--save-observations", "sound.npz")
    Path("o.onnx").unlink()
    return Path("sound.npz").read_bytes()


OBSERVATIONS: dict[str, tuple[Make, Sequence[str]]] = {
    "missing": (nothing, ["no such file"]),
    "a directory": (Path.mkdir, ["director"]),
    "empty": (file(b""), ["not a file that --save-observations wrote"]),
    "a text": (file(b"dear diary\n"), ["not a file that --save-observations wrote"]),
    "calibration data": (arrays(x=X), ["not a file that --save-observations wrote"]),
    "one array": (file(npy_bytes(X)), ["not a file that --save-observations wrote"]),
    "pickled objects": (
        arrays(observations=np.array([{}], object)),
        ["not a file that --save-observations wrote"],
    ),
    "of another schema": (manifest(schema=99), ["schema 99", "reads 1", "observe again"]),
    "of an unfinished schema": (
        manifest(schema=1, names=[], batches=0),
        ["not a file that --save-observations wrote"],
    ),
    "of a model without a digest": (
        manifest(schema=1, names=[], batches=0, n_samples=1, model_sha256=5),
        [],
    ),
}


@pytest.mark.parametrize(("make", "parts"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observations_that_are_none_are_refused(
    capsys: Capsys, make: Make, parts: Sequence[str]
) -> None:
    make(Path("bad.npz"))
    message = refuse(capsys, "model.onnx", "--data", "calib.npz", "--observations", "bad.npz")
    assert_tells(message, "bad.npz: ", *parts)


@pytest.mark.parametrize("part", PARTS)
def test_observations_damaged_anywhere_are_refused(capsys: Capsys, part: float) -> None:
    Path("bad.npz").write_bytes(damaged(observed(capsys), b"\xff", part))
    message = refuse(capsys, "model.onnx", "--observations", "bad.npz")
    assert_tells(message, "bad.npz: ", "not a file that --save-observations wrote")


def test_observations_of_another_model_are_refused(capsys: Capsys) -> None:
    observed(capsys)
    save_two_layers("other.onnx", first=normal(4, 5, seed=9))
    message = refuse(capsys, "other.onnx", "--observations", "sound.npz")
    assert_tells(message, "sound.npz: ", "another model", "other.onnx", "observe again")


def test_observations_without_single_batches_are_refused_for_reduce_mean(capsys: Capsys) -> None:
    observed(capsys)
    message = refuse(capsys, "model.onnx", "--observations", "sound.npz", "--reduce", "mean")
    assert_tells(message, "batches", "mean", "observe again")


def test_fewer_samples_than_the_observations_hold_cannot_be_taken_from_them(
    capsys: Capsys,
) -> None:
    observed(capsys, "--samples", 20)
    options = ("--observations", "sound.npz", "--samples", 10)
    message = refuse(capsys, "model.onnx", "--data", "calib.npz", *options)
    assert_tells(message, "--samples 10", "20 samples", "observe again")


def test_more_samples_than_the_observations_hold_are_not_called_calibrated_on(
    capsys: Capsys,
) -> None:
    observed(capsys, "--samples", 20)
    options = ("--observations", "sound.npz", "--samples", 30, "--summary", "s.json")
    told = run_main(capsys, "model.onnx", "--data", "calib.npz", *options)
    if told.code == 0:
        assert read_json("s.json")["n_samples"] == 20
        assert any("30" in note and "20" in note for note in read_json("s.json")["notes"])
    else:
        assert_tells(told.err, "--samples 30", "20 samples")


# --- what is odd but no error -----------------------------------------------------------------


# The first weight, the data, and what the notes of which tensors must say.
ODD: dict[str, tuple[NDArray[Any], NDArray[Any], dict[str, str]]] = {
    "a weight of zeros": (np.zeros((4, 5)), X, {"first.weight": "all zero", "hidden": "constant"}),
    "data of zeros": (normal(4, 5), 0 * X, {"x": "all zero", "hidden": "constant"}),
    "data of one value": (normal(4, 5), 0 * X + 3, {"x": "constant"}),
    "an activation of zeros": (-np.ones((4, 5)), np.abs(X), {"hidden": "all zero"}),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("method", ["octav", "percentile", "mse", "max", "entropy"])
def test_constant_and_all_zero_tensors_are_calibrated_and_noted(
    capsys: Capsys, kind: str, bits: int, method: str
) -> None:
    weight, x, notes = ODD[kind]
    save_two_layers("model.onnx", weight.astype(np.float32))
    np.savez("calib.npz", x=x)
    options = ("--bits", bits, "--method", method, "--summary", "s.json")
    succeed(capsys, "model.onnx", "--data", "calib.npz", *options)
    tensors = by_name(read_json("s.json"))
    for name, words in notes.items():
        found = tensors[name]["notes"]
        assert any(words in note for note in found), (name, found)
        if words == "all zero" and isinstance(tensors[name]["threshold"], float):
            assert tensors[name]["threshold"] == 1


def test_one_channel_of_zeros_is_noted_by_number(capsys: Capsys) -> None:
    weight = normal(4, 5)
    weight[:, 2] = 0
    save_two_layers("model.onnx", weight)
    succeed(capsys, "model.onnx", "--data", "calib.npz", "--summary", "s.json")
    tensor = by_name(read_json("s.json"))["first.weight"]
    assert any("1 of 5 channels" in note and "all zero" in note for note in tensor["notes"])
    assert tensor["threshold"][2] == 1


def test_arrays_that_are_no_input_are_noted(capsys: Capsys) -> None:
    np.savez("more.npz", x=X, extra=X)
    told = succeed(capsys, "model.onnx", "--data", "more.npz")
    assert "'extra'" in told.out
