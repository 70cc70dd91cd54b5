"""Folders of arrays and of ONNX test data: what is fed, in which feeds, and what is refused."""

from __future__ import annotations

import re
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_models import ONE, TWO, joined, model_taking, read, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, values

from calib.data import Reading, open_data
from calib.errors import OptionError
from calib.folders import natural
from calib.graph import Model
from calib.images import Preprocessing

FREE = model_taking(("x", "float32", ("N", "T", 3)))
# Steps of one sample, and a state of another length.
STATEFUL = model_taking(
    ("state", "float32", (2, 4)), ("x", "float32", (1, 6)), fed_back="state"
)  # fmt: skip


def save(folder: Path, **arrays: Array | dict[str, Array]) -> Path:
    """``folder`` with an .npy for each array, and an .npz for each dictionary."""
    for name, content in arrays.items():
        if isinstance(content, dict):
            np.savez(folder / f"{name}.npz", **content)  # type: ignore[arg-type]
        else:
            np.save(folder / f"{name}.npy", content)
    return folder


def shapes(model: Model, source: Path, size: int = 32, name: str = "x") -> list[tuple[int, ...]]:
    return [batch.feed[name].shape for batch in read(model, source, Reading(size))]


# --- samples and batches ----------------------------------------------------------------------


def test_a_file_holds_a_sample_or_a_batch_and_neighbours_share_a_feed(tmp_path: Path) -> None:
    rows = values(8, 6)
    save(tmp_path, s1=rows[0], s2=rows[1:5], s10={"x": rows[5]}, s11={"x": rows[6:]})
    data = open_data(ONE, tmp_path, Reading(3))
    assert (data.n_samples, data.multiple, data.notes) == (8, 1, ())
    assert [batch.n_samples for batch in data.batches()] == [3, 3, 2]
    np.testing.assert_array_equal(joined(data.batches(), "x"), rows)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum),
    size=st.integers(1, 9),
    start=st.integers(0, 12),
    stop=st.none() | st.integers(0, 14),
)
def test_rows_of_many_files_are_those_of_one_array(
    lengths: list[int], size: int, start: int, stop: int | None
) -> None:
    rows = values(sum(lengths), 6)
    with tempfile.TemporaryDirectory() as name:
        first = 0
        for number, length in enumerate(lengths):
            np.save(Path(name, f"{number}.npy"), rows[first : first + length])
            first += length
        batches = list(open_data(ONE, name, Reading(size)).batches(start, stop))
    wanted = rows[start:stop]
    assert all(batch.n_samples == size for batch in batches[:-1])
    assert sum(batch.n_samples for batch in batches) == len(wanted)
    if len(wanted):
        np.testing.assert_array_equal(joined(batches, "x"), wanted)


def test_samples_of_different_sizes_are_fed_one_after_another(tmp_path: Path) -> None:
    save(
        tmp_path, a=values(5, 3), b=values(5, 3), c=values(7, 3), d=values(2, 7, 3), e=values(1, 3)
    )
    assert shapes(FREE, tmp_path) == [(2, 5, 3), (3, 7, 3), (1, 1, 3)]
    data = open_data(FREE, tmp_path)
    assert data.n_samples == 6
    assert [b.feed["x"].shape for b in data.batches(1, 4)] == [(1, 5, 3), (2, 7, 3)]


def test_a_fixed_batch_of_one_is_fed_row_by_row(tmp_path: Path) -> None:
    model = model_taking(("x", "float32", (1, "T", 3)))
    save(tmp_path, a=values(5, 3), b=values(2, 7, 3))
    assert shapes(model, tmp_path) == [(1, 5, 3), (1, 7, 3), (1, 7, 3)]


def test_a_fixed_batch_is_filled_from_neighbours_of_equal_shape(tmp_path: Path) -> None:
    model = model_taking(("x", "float32", (2, "T", 3)))
    save(tmp_path, a=values(5, 3), b=values(7, 3), c=values(2, 7, 3), d=values(9, 3, 3))
    data = open_data(model, tmp_path)
    assert (data.n_samples, data.multiple) == (10, 2)
    assert data.notes == ("3 samples fill no batch of 2: not used",)
    found = [batch.feed["x"].shape for batch in data.batches()]
    assert found == [(2, 7, 3), *[(2, 3, 3)] * 4]
    for other in "bcd":
        (tmp_path / f"{other}.npy").unlink()
    assert refusal(model, tmp_path) == (
        f"{tmp_path}: 1 samples, the model takes 2 of the same shape at a time: nothing to "
        f"calibrate on"
    )
    np.save(tmp_path / "a.npy", values(0, 5, 3))
    assert refusal(model, tmp_path) == f"{tmp_path}: 0 samples: nothing to calibrate on"


def test_several_inputs_and_labels_travel_together(tmp_path: Path) -> None:
    x, z, labels = values(5, 6), values(5, 4), np.arange(5)
    for number in range(3):
        save(tmp_path, **{f"{number}": {"x": x[number], "z": z[number], "labels": labels[number]}})
    save(tmp_path, late={"x": x[3:], "z": z[3:], "labels": labels[3:], "id": values(1)})
    data = open_data(TWO, tmp_path, Reading(4))
    assert data.notes == ("arrays that are no input of the model are not used: 'id'",)
    batches = list(data.batches(1))
    np.testing.assert_array_equal(joined(batches, "x"), x[1:])
    np.testing.assert_array_equal(joined(batches, "z"), z[1:])
    found = [batch.labels for batch in batches if batch.labels is not None]
    np.testing.assert_array_equal(np.concatenate(found), labels[1:])


@pytest.mark.parametrize("dtype", ["int64", "bool", "float16", "uint8"])
def test_inputs_of_any_type_are_fed_as_they_are(dtype: str, tmp_path: Path) -> None:
    rows = np.arange(12).reshape(4, 3).astype(dtype)
    save(tmp_path, a=rows[0], b=rows[1:])
    found = joined(read(model_taking(("x", dtype, ("N", 3))), tmp_path), "x")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, rows)


def test_a_single_number_is_fed_with_every_feed(tmp_path: Path) -> None:
    model = model_taking(("x", "float32", ("N", 6)), ("rate", "float32", ()))
    save(
        tmp_path,
        **{
            str(n): {"x": values(6, seed=n), "rate": np.array(n // 2, np.float32)} for n in range(4)
        },
    )
    batches = read(model, tmp_path)
    assert [(b.n_samples, float(b.feed["rate"])) for b in batches] == [(2, 0.0), (2, 1.0)]


def test_feeds_of_inputs_that_disagree_about_the_batch_are_a_file_each(tmp_path: Path) -> None:
    model = model_taking(("x", "float32", (1, 6)), ("cache", "float32", (2, 4)))
    save(
        tmp_path,
        a={"x": values(1, 6), "cache": values(2, 4)},
        b={"x": values(1, 6), "cache": values(2, 4)},
    )
    data = open_data(model, tmp_path)
    assert (data.n_samples, data.multiple) == (2, 1)
    assert [b.feed["cache"].shape for b in data.batches()] == [(2, 4)] * 2
    save(tmp_path, b={"x": values(2, 6), "cache": values(2, 4)})
    path = tmp_path / "b.npz"
    assert refusal(model, tmp_path) == f"{path}: 'x' is 2x6, the model takes 1x6"


def test_files_of_a_folder_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, a={"x": values(6)}, b={"x": values(5)})
    path = tmp_path / "b.npz"
    takes = "the model takes Nx6, with samples along the first axis"
    assert refusal(ONE, tmp_path) == f"{path}: 'x' is 1x5, {takes}"
    save(tmp_path, b={"x": values(1, 1, 6)})
    assert refusal(ONE, tmp_path) == f"{path}: 'x' is 1x1x6, {takes}"
    save(tmp_path, b={"x": values(6), "labels": np.array(3)})
    assert refusal(ONE, tmp_path) == (
        f"{tmp_path / 'a.npz'}: has no 'labels', b.npz has: none or all"
    )
    path.write_bytes(b"PK")
    assert refusal(ONE, tmp_path).startswith(f"{path}: cannot be read: ")


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    for number in range(100):
        np.save(tmp_path / f"{number}.npy", np.zeros((40, 1000), np.float32))
    data = open_data(model_taking(("x", "float32", ("N", 1000))), tmp_path, Reading(16))
    tracemalloc.start()
    try:
        n = sum(batch.n_samples for batch in data.batches(10))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 3990
    assert peak < 1e6  # all: 16 MB


def test_a_folder_that_changes_has_another_identity(tmp_path: Path) -> None:
    save(tmp_path, a=values(3, 6), b=values(3, 6))
    first, again = open_data(ONE, tmp_path).identity, open_data(ONE, tmp_path).identity
    assert first == again
    others = {first, open_data(ONE, tmp_path, Reading(4)).identity}
    save(tmp_path, b=values(4, 6))
    others.add(open_data(ONE, tmp_path).identity)
    (tmp_path / "b.npy").rename(tmp_path / "c.npy")
    others.add(open_data(ONE, tmp_path).identity)
    assert len(others) == 4


# --- inputs that need not be fed, or are fed back ---------------------------------------------


def test_every_file_is_a_sequence_of_steps(tmp_path: Path) -> None:
    save(tmp_path, a=values(3, 6), b={"x": values(6)}, c={"x": values(2, 6), "state": values(2, 4)})
    data = open_data(STATEFUL, tmp_path)
    assert (data.n_samples, data.multiple) == (6, 1)
    found = [(b.n_samples, b.restart, "state" in b.feed) for b in data.batches()]
    assert found == [
        (1, True, False), (1, False, False), (1, False, False), (1, True, False),
        (1, True, True), (1, False, False),
    ]  # fmt: skip
    assert [b.restart for b in data.batches(1, 4)] == [True, False, True]


def test_the_steps_of_one_file_are_one_sequence(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=values(5, 6), state=values(2, 4))
    for start in (0, 2):
        batches = list(open_data(STATEFUL, path).batches(start))
        assert [b.restart for b in batches] == [True] + [False] * (4 - start)
        assert ["state" in b.feed for b in batches] == [b.restart for b in batches]
        assert {b.n_samples for b in batches} == {1}
    np.savez(path, x=values(5, 6), state=values(5, 4))
    assert refusal(STATEFUL, path) == f"{path}: 'state' is 5x4, the model takes 2x4"


def test_steps_are_single_unless_the_model_fixes_another_batch(tmp_path: Path) -> None:
    free = model_taking(("x", "float32", ("N", 6)), ("s", "float32", ("N", 4)), fed_back="s")
    fixed = model_taking(("x", "float32", (2, 6)), ("s", "float32", (2, 4)), fed_back="s")
    save(tmp_path, a=values(5, 6), b=values(4, 6))
    assert {b.n_samples for b in read(free, tmp_path)} == {1}
    data = open_data(fixed, tmp_path)
    assert [(b.n_samples, b.restart) for b in data.batches()] == [(2, True), (2, False)] * 2
    assert data.notes == ("1 samples fill no batch of 2: not used",)


def test_optional_inputs_are_fed_where_the_data_holds_them(tmp_path: Path) -> None:
    model = model_taking(
        ("x", "float32", ("N", 6)), ("mask", "bool", ("N", 2)), ("gain", "float32", (3,)),
        optional="mask gain",
    )  # fmt: skip
    gain = values(3)
    save(tmp_path, a={"x": values(2, 6)}, b={"x": values(2, 6), "mask": np.ones((2, 2), bool)})
    save(tmp_path, c={"x": values(2, 6), "gain": gain}, d={"x": values(6), "gain": gain})
    found = [(sorted(b.feed), b.n_samples) for b in read(model, tmp_path)]
    assert found == [(["x"], 2), (["mask", "x"], 2), (["gain", "x"], 3)]
    np.save(tmp_path / "only.npy", values(4, 6))
    assert shapes(model, tmp_path / "only.npy") == [(4, 6)]


# --- folders of nothing, or of too much -------------------------------------------------------


def test_an_empty_or_mixed_folder_is_refused(tmp_path: Path) -> None:
    needs = (
        "the directory must hold images, .npy or .npz files, or ONNX test data (input_0.pb, or "
        "test_data_set_0 and so on), it holds"
    )
    assert refusal(ONE, tmp_path) == f"{tmp_path}: {needs} nothing"
    for name in ("a.csv", "b.txt", "c.txt", "d.txt", ".hidden.npy"):
        (tmp_path / name).write_text("")
    assert refusal(ONE, tmp_path) == (f"{tmp_path}: {needs} 'a.csv', 'b.txt', 'c.txt' and 1 more")
    save(tmp_path, x=values(3, 6))
    (tmp_path / "a.png").write_text("")
    (tmp_path / "test_data_set_0").mkdir()
    (tmp_path / "test_data_set_0" / "input_0.pb").write_text("")
    assert refusal(ONE, tmp_path) == (
        f"{tmp_path}: the directory holds 1 images and 1 .npy and .npz files and 1 ONNX test data "
        f"sets: calibration data must be of one kind"
    )


@pytest.mark.parametrize(
    ("reading", "option"),
    [
        (Reading(labels=Path("l.csv")), "labels"),
        (Reading(images=Preprocessing(pixel_scale=2)), "pixel-scale"),
    ],
)
def test_options_of_images_need_images(reading: Reading, option: str, tmp_path: Path) -> None:
    path = save(tmp_path, x=values(3, 6)) / "x.npy"
    sources: list[tuple[Any, str]] = [
        (tmp_path, f"1 .npy and .npz files in {tmp_path}"),
        (path, str(path)), (None, "made up"), ([values(3, 6)], "a list"),
    ]  # fmt: skip
    for source, shown in sources:
        message = f"{option} belongs to a folder of images, the calibration data is {shown}"
        with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
            open_data(ONE, source, reading)


def test_numbers_in_names_count() -> None:
    names = ["b", "a10", "a9", "a09", "10", "2", "a", "a9b"]
    assert sorted(names, key=natural) == ["2", "10", "a", "a09", "a9", "a9b", "a10", "b"]
