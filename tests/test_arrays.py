"""Calibration data in files: chunks that equal the array, and files that are refused."""

from __future__ import annotations

import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_models import ONE, TWO, joined, model_taking, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from models import Array, values

from calib.data import Reading, open_data
from calib.errors import DataError
from calib.graph import Model

NUMBERS = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool"])


def saved(folder: Path, compressed: bool = False, **arrays: Array) -> Path:
    path = folder / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)  # type: ignore[arg-type]
    return path


@settings(deadline=None, max_examples=60)
@given(
    array=stnp.arrays(NUMBERS, stnp.array_shapes(max_dims=4, max_side=9)),
    size=st.integers(1, 12), start=st.integers(0, 10), stop=st.none() | st.integers(0, 12),
    kind=st.sampled_from(["npz", "npy", "compressed"]),
)  # fmt: skip
def test_rows_read_in_chunks_are_the_rows_of_the_array(
    array: Array, size: int, start: int, stop: int | None, kind: str
) -> None:
    model = model_taking(("x", array.dtype.name, ("N", *array.shape[1:])))
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder), compressed=kind == "compressed", x=array)
        if kind == "npy":
            path = path.with_suffix(".npy")
            np.save(path, array)
        batches = list(open_data(model, path, Reading(size)).batches(start, stop))
    wanted = array[start:stop]
    assert [b.n_samples for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert sum(b.n_samples for b in batches) == len(wanted)
    if len(wanted):
        read = joined(iter(batches), "x")
        assert (read.dtype, read.tobytes()) == (array.dtype, wanted.tobytes())


def test_a_second_pass_reads_the_same(tmp_path: Path) -> None:
    data = open_data(ONE, saved(tmp_path, compressed=True, x=values(7, 6)), Reading(3))
    assert data.n_samples == 7
    first, second = joined(data.batches(), "x"), joined(data.batches(), "x")
    np.testing.assert_array_equal(first, second)


def test_labels_travel_with_their_samples(tmp_path: Path) -> None:
    labels = np.arange(10, dtype=np.int32)
    data = open_data(ONE, saved(tmp_path, labels=labels, x=values(10, 6)), Reading(4))
    batches = list(data.batches(3))
    assert [list(b.feed) for b in batches] == [["x"], ["x"]]
    found = np.concatenate([b.labels for b in batches if b.labels is not None])
    np.testing.assert_array_equal(found, labels[3:])


def test_arrays_that_no_input_takes_are_left_out_and_noted(tmp_path: Path) -> None:
    data = open_data(ONE, saved(tmp_path, x=values(2, 6), ids=values(3), date=values(1)))
    assert data.notes == ("arrays that are no input of the model are not used: 'date', 'ids'",)
    assert [list(b.feed) for b in data.batches()] == [["x"]]


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    model = model_taking(("labels", "float32", ("N", 6)))
    array = values(4, 6)
    data = open_data(model, saved(tmp_path, labels=array))
    np.testing.assert_array_equal(joined(data.batches(), "labels"), array)


def test_a_fixed_batch_is_kept_to_and_left_over_samples_are_noted(tmp_path: Path) -> None:
    data = open_data(
        model_taking(("x", "float32", (4, 6))), saved(tmp_path, x=values(11, 6)), Reading(32)
    )
    assert (data.n_samples, data.multiple) == (8, 4)
    assert data.notes == ("the last 3 samples fill no batch of 4: not used",)
    assert [b.n_samples for b in data.batches()] == [4, 4]


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_array(compressed: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, compressed=compressed, x=np.zeros((40_000, 1000), np.float32))
    data = open_data(model_taking(("x", "float32", ("N", 1000))), path)
    tracemalloc.start()
    try:
        n = sum(batch.n_samples for batch in data.batches(100))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 39_900
    assert peak < 2e6  # the array: 160 MB, a batch: 128 kB


def test_files_that_cannot_be_data_are_refused(tmp_path: Path) -> None:
    text, picture = tmp_path / "notes.npz", tmp_path / "x.png"
    text.write_text("not a zip file")
    picture.write_bytes(b"\x89PNG")
    kinds = "calibration data must be an .npz or .npy file, a directory, or package.module:function"
    assert refusal(ONE, tmp_path / "no.npz") == f"{tmp_path / 'no.npz'}: no such file"
    assert refusal(ONE, str(picture)) == f"{picture}: {kinds}"
    assert refusal(ONE, text).startswith(f"{text}: cannot be read: ")
    bad = tmp_path / "bad.npy"
    for content in (b"", b"\x93NUMPY", b"no header at all"):
        bad.write_bytes(content)
        assert refusal(ONE, bad).startswith(f"{bad}: cannot be read: ")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_off_or_damaged_anywhere_is_refused_or_read_right(
    compressed: bool, tmp_path: Path
) -> None:
    array = values(60, 6)
    path = saved(tmp_path, compressed=compressed, x=array)
    content, refused = path.read_bytes(), 0
    for position in range(0, len(content), 41):
        damaged = content[:position] + b"\xff" * 8 + content[position + 8 :]
        for broken in (content[:position], damaged):
            path.write_bytes(broken)
            try:
                read = joined(open_data(ONE, path, Reading(16)).batches(), "x")
            except DataError as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
                refused += 1
            else:
                np.testing.assert_array_equal(read, array)
    assert refused > 20


def test_rows_from_the_middle_of_an_archive_are_read_without_those_before(tmp_path: Path) -> None:
    array = values(400_000, 6)
    path = saved(tmp_path, other=values(3, 2), x=array, y=values(3, 2))
    data = open_data(ONE, path, Reading(16))
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1  # the checksum of all rows is wrong then
    path.write_bytes(content)
    assert len(joined(data.batches(0, 16), "x")) == 16
    middle = joined(data.batches(398_000, 399_000), "x")
    np.testing.assert_array_equal(middle, array[398_000:399_000])
    for start in (0, 399_000):  # who reads the last row has seen all
        with pytest.raises(DataError, match="CRC"):
            joined(data.batches(start), "x")


@pytest.mark.parametrize("start", [0, 4, 12])
def test_a_member_of_an_archive_ends_before_the_next_one(tmp_path: Path, start: int) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name in "xy":
            content = io.BytesIO()
            np.save(content, values(10, 6))
            lying = content.getvalue().replace(b"(10, 6), ", b"(30, 6), ")
            archive.writestr(f"{name}.npy", lying)
    data = open_data(ONE, tmp_path / "data.npz", Reading(4))
    with pytest.raises(DataError, match="'x' ends before row 30"):
        joined(data.batches(start), "x")


def test_an_npy_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, values(10, 6))
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(ONE, path, Reading(4)) == f"{path}: 'x' ends before row 10"


def test_arrays_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    x, z = values(5, 6), values(5, 4)
    takes = "the model takes Nx6, with samples along the first axis"
    named = "arrays must be named after the model's inputs"
    contiguous = "save np.ascontiguousarray of it"
    cases: list[tuple[Model, dict[str, Array], str]] = [
        (TWO, {"x": x}, f"no array for input 'z'; it holds 'x': {named}"),
        (ONE, {"images": x}, f"no array for input 'x'; it holds 'images': {named}"),
        (ONE, {}, f"no array for input 'x'; it holds nothing: {named}"),
        (ONE, {"x": x.astype(np.float64)},
         "'x' is float64, the model takes float32: convert it with .astype(np.float32)"),
        (ONE, {"x": values(5, 7)}, f"'x' is 5x7, {takes}"),
        (ONE, {"x": values(6)}, f"'x' is 6, {takes}"),
        (ONE, {"x": values(5, 6, 1)}, f"'x' is 5x6x1, {takes}"),
        (TWO, {"x": x, "z": z[:4]}, "arrays differ in their number of samples ('x': 5, 'z': 4)"),
        (ONE, {"x": x, "labels": np.arange(4)},
         "arrays differ in their number of samples ('x': 5, 'labels': 4)"),
        (ONE, {"x": x[:0]}, "0 samples: nothing to calibrate on"),
        (model_taking(("x", "float32", (8, 6))), {"x": x},
         "5 samples, the model takes 8 at a time: nothing to calibrate on"),
        (ONE, {"x": x, "labels": values(5)},
         "'labels' must be one integer for each sample, got float32 (5,)"),
        (ONE, {"x": x, "labels": np.ones((5, 2), int)},
         "'labels' must be one integer for each sample, got int64 (5, 2)"),
        (ONE, {"x": np.asfortranarray(x)},
         f"'x' is stored in Fortran order and cannot be read by samples: {contiguous}"),
        (ONE, {"x": np.array([[None] * 6])}, "'x' holds Python objects, only numbers can be fed"),
    ]  # fmt: skip
    for model, arrays, expected in cases:
        path = saved(tmp_path, False, **arrays)
        assert refusal(model, path) == f"{path}: {expected}"


def test_an_npy_serves_models_with_one_input_only(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, values(5, 6))
    assert refusal(TWO, path) == (
        f"{path}: an .npy holds one array, the model has 2 inputs: use an .npz with arrays "
        f"named 'x', 'z'"
    )


def test_a_member_compressed_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, x=values(5, 6))
    content = path.read_bytes()
    for signature, offset in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        at = content.index(signature) + offset
        content = content[:at] + b"\x63\x00" + content[at + 2 :]
    path.write_bytes(content)
    assert zipfile.ZipFile(path).infolist()[0].compress_type == 0x63
    assert refusal(ONE, path).startswith(f"{path}: ")
