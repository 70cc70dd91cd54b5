"""Made-up inputs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from conftest import Load, Save
from data_models import ONE, TWO, joined, model_taking
from models import fixed_batch, parsed, values

from calib.arrays import Batch
from calib.data import Reading, open_data
from calib.errors import DataError
from calib.graph import Model, load_model


def synthetic(model: Model, size: int = 32, seed: int = 0) -> list[Batch]:
    return list(open_data(model, None, Reading(size, seed)).batches())


def test_synthetic_inputs_are_decided_by_the_seed() -> None:
    first, again, other = (synthetic(TWO, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        for name in ("x", "z"):
            np.testing.assert_array_equal(a.feed[name], b.feed[name])
            assert not np.array_equal(a.feed[name], c.feed[name])
    x = joined(iter(first), "x")
    assert len({row.tobytes() for row in x}) == len(x) == 64
    assert abs(float(x.mean())) < 0.2
    assert abs(float(x.std()) - 1) < 0.2


@pytest.mark.parametrize(
    ("shape", "dtype", "made"),
    [
        (("N", 6), "float32", (32, 6)),
        (("N", "T", 4), "float16", (32, 32, 4)),
        (("N", None), "int64", (32, 32)),
        ((None,), "bool", (32,)),
        ((5, 2), "uint8", (5, 2)),
        ((), "float32", ()),
    ],
)
def test_synthetic_inputs_fit_the_declared_shape_and_type(
    shape: tuple[Any, ...], dtype: str, made: tuple[int, ...]
) -> None:
    for batch in synthetic(model_taking(("x", dtype, shape))):
        assert (batch.feed["x"].shape, batch.feed["x"].dtype.name) == (made, dtype)
        if dtype != "float32":
            assert float(np.abs(batch.feed["x"].astype(np.float32)).max()) < 6


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_synthetic_batches_are_whole_and_hold_64_samples_at_least(size: int) -> None:
    assert {b.n_samples for b in synthetic(ONE, size)} == {size}
    total = open_data(ONE, None, Reading(size)).n_samples
    assert total is not None
    assert total % size == 0
    assert total >= 64


def test_synthetic_bytes_of_images_are_pixels_and_other_integers_0_and_1() -> None:
    model = model_taking(
        ("image", "uint8", ("N", 3, "h", "w")), ("ids", "uint8", ("N", 9)), ("on", "bool", ("N", 9))
    )
    (batch, *_) = synthetic(model)
    assert (int(batch.feed["image"].min()), int(batch.feed["image"].max())) == (0, 255)
    assert np.unique(batch.feed["ids"]).tolist() == [0, 1]
    assert np.unique(batch.feed["on"]).tolist() == [False, True]


def test_synthetic_inputs_are_made_up_for_what_is_required_only() -> None:
    stateful = model_taking(("x", "float32", ("N", 6)), ("s", "float32", (2, 4)), fed_back="s")
    found = synthetic(stateful)
    assert {(b.n_samples, *b.feed) for b in found} == {(1, "x")}
    assert [b.restart for b in found] == [True] + [False] * 63
    optional = model_taking(("x", "float32", ("N", 6)), ("gain", "float32", ()), optional="gain")
    assert {tuple(b.feed) for b in synthetic(optional)} == {("x",)}
    assert open_data(optional, None).identity != open_data(optional, None, Reading(4)).identity


def test_inputs_that_disagree_about_the_batch_are_fed_as_declared(save: Save) -> None:
    text = """(float[1,6] x, float[2,1,4] state) => (float[1,5] y) <float[6,5] w> {
      y = MatMul(x, w) }"""
    model = load_model(save(parsed(text)))
    shapes = {tuple(a.shape for a in batch.feed.values()) for batch in synthetic(model)}
    assert shapes == {((1, 6), (2, 1, 4))}
    feeds = [{"x": values(1, 6), "state": values(2, 1, 4)}]
    assert len(list(open_data(model, feeds).batches())) == 1
    assert sum(batch.n_samples for batch in synthetic(model)) == 64
    path = save(parsed(text)).with_suffix(".npz")
    np.savez(path, x=values(1, 6), state=values(2, 1, 4))
    message = re.escape(
        f"{path}: the model's inputs have different fixed first axes [1, 2]: which of them counts "
        f"samples cannot be told; feed dictionaries from Python, or a folder with an .npz for each "
        f"feed"
    )
    with pytest.raises(DataError, match=f"^{message}$"):
        open_data(model, path)


def test_a_fixed_batch_is_known_from_the_model(save: Save, load: Load) -> None:
    fixed = open_data(load_model(save(fixed_batch(4))), None)
    assert fixed.multiple == 4
    assert {batch.n_samples for batch in fixed.batches()} == {4}
    assert open_data(load("conv_bias"), None).multiple == 1


def test_inputs_that_are_too_large_to_make_up_are_refused() -> None:
    model = model_taking(("x", "float32", ("N", 1 << 40)))
    with pytest.raises(DataError, match=r"^'x' would take \d+ GB a feed, .* give --data"):
        synthetic(model)
