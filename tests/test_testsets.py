"""ONNX test data as calibration data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from data_models import ONE, TWO, model_taking, read, refusal
from models import Array, values
from onnx import numpy_helper

from calib.data import Reading, open_data

STATEFUL = model_taking(("state", "float32", (2, 4)), ("x", "float32", (1, 6)), fed_back="state")


def onnx_set(folder: Path, *arrays: Array) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        onnx.save_tensor(numpy_helper.from_array(array, "any"), folder / f"input_{number}.pb")
    onnx.save_tensor(numpy_helper.from_array(values(1)), folder / "output_0.pb")
    return folder


def test_every_set_is_a_feed_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    sizes = {0: 3, 2: 1, 10: 40}
    for number, n in sizes.items():
        onnx_set(tmp_path / f"test_data_set_{number}", values(n, 6, seed=number), values(n, 4))
    data = open_data(TWO, tmp_path, Reading(32))
    assert (data.n_samples, data.multiple) == (44, 1)
    batches = list(data.batches())
    assert [(b.feed["x"].shape, b.feed["z"].shape) for b in batches] == [
        ((n, 6), (n, 4)) for n in sizes.values()
    ]
    np.testing.assert_array_equal(batches[1].feed["x"], values(1, 6, seed=2))
    assert [b.n_samples for b in data.batches(2, 5)] == [1, 1, 1]
    alone = tmp_path / "test_data_set_2"
    assert [b.n_samples for b in read(TWO, alone)] == [1]
    assert data.identity not in (None, open_data(TWO, alone).identity)


def test_sets_hold_required_inputs_or_all(tmp_path: Path) -> None:
    onnx_set(tmp_path, values(1, 6))
    assert [(sorted(b.feed), b.restart) for b in read(STATEFUL, tmp_path)] == [(["x"], True)]
    onnx_set(tmp_path, values(2, 4), values(1, 6))
    (batch,) = read(STATEFUL, tmp_path)
    assert (sorted(batch.feed), batch.restart, batch.n_samples) == (["state", "x"], True, 1)


def test_sets_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    onnx_set(tmp_path, values(1, 6))
    assert refusal(TWO, tmp_path) == (
        f"{tmp_path}: holds 'input_0.pb', the model has 2 inputs: 'x', 'z'"
    )
    fixed = model_taking(("x", "float32", (2, 6)))
    assert refusal(fixed, tmp_path) == f"{tmp_path}: 'x' is 1x6, the model takes 2x6"
    onnx_set(tmp_path, np.ones((1, 6), np.int64))
    assert refusal(ONE, tmp_path) == (
        f"{tmp_path}: 'x' is int64, the model takes float32: convert it with .astype(np.float32)"
    )
    onnx_set(tmp_path, values(0, 6))
    assert refusal(ONE, tmp_path) == f"{tmp_path}: 0 samples: nothing to calibrate on"
    bad = tmp_path / "input_0.pb"
    bad.write_bytes(b"\xff\xff nothing")
    assert refusal(ONE, tmp_path).startswith(f"{bad}: no tensor for 'x' can be read: DecodeError")
