"""Calibration data from iterables of batches, and synthetic inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Load, Save, data_refusal, joined, model_taking
from models import Array, fixed_batch, parsed, values

from calib.arrays import Arrays, Batch
from calib.data import Batches, open_data
from calib.errors import DataError
from calib.graph import Model, load_model

ONE = model_taking(("x", "float32", ("N", 6)))
TWO = model_taking(("x", "float32", ("N", 6)), ("z", "float32", ("N", 4)))


class Tensor:
    """As much of a torch tensor as NumPy needs: it must be detached first."""

    def __init__(self, array: Array):
        self._array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> Array:
        return self._array

    def __array__(self, *_: object) -> Array:
        raise RuntimeError("can't convert a tensor that requires grad")


def test_a_batch_size_below_one_is_refused() -> None:
    assert data_refusal(ONE, None, batch_size=0) == "batch-size must be at least 1, got 0"


# --- iterables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        {"x": values(3, 6)},
        values(3, 6),
        [values(3, 6)],
        (values(3, 6),),
        values(3, 6).tolist(),
        {"x": Tensor(values(3, 6)), "unused": Tensor(values(3))},
        (Tensor(values(3, 6)), Tensor(np.arange(3))),
    ],
)
def test_a_batch_may_be_a_dictionary_an_array_or_a_tuple(item: Any) -> None:
    if isinstance(item, list) and len(item) == 3:
        item = np.array(item, np.float32)
    (batch,) = open_data(ONE, [item]).batches()
    assert list(batch.feed) == ["x"]
    np.testing.assert_array_equal(batch.feed["x"], values(3, 6))


def test_labels_may_follow_the_inputs_of_a_tuple_or_have_their_name() -> None:
    x, z, labels = values(3, 6), values(3, 4), np.array([2, 0, 1])
    for item in ((x, z, labels), {"x": x, "labels": labels, "z": z}):
        (batch,) = open_data(TWO, [item]).batches()
        assert list(batch.feed) == ["x", "z"]
        np.testing.assert_array_equal(np.asarray(batch.labels), labels)
    (batch,) = open_data(TWO, [(x, z)]).batches()
    assert batch.labels is None


def test_an_onnxruntime_calibration_data_reader_is_data() -> None:
    from onnxruntime.quantization import CalibrationDataReader  # type: ignore[import-untyped]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = 3

        def get_next(self) -> dict[str, Array] | None:
            self._left -= 1
            return {"x": values(2, 6, seed=self._left)} if self._left >= 0 else None

    data = open_data(ONE, Reader())
    assert isinstance(data, Batches)
    assert data.once_only
    read = joined(data.batches(), "x")
    np.testing.assert_array_equal(read, np.vstack([values(2, 6, seed=s) for s in (2, 1, 0)]))


def test_what_can_be_iterated_once_is_told_from_what_can_again() -> None:
    items = [values(2, 6), values(2, 6)]
    for source, once in ((items, False), (tuple(items), False), (iter(items), True),
                         ((i for i in items), True), (map(np.copy, items), True)):  # fmt: skip
        data = open_data(ONE, source)
        assert isinstance(data, Batches)
        assert (data.once_only, data.n_samples) == (once, None)


def test_an_iterable_is_read_batch_by_batch_and_no_further_than_asked() -> None:
    taken: list[int] = []

    def source() -> Iterator[Array]:
        for number in range(100):
            taken.append(number)
            yield values(4, 6)

    batches = open_data(ONE, source()).batches(0, 10)
    next(batches)
    assert taken == [0]
    assert sum(batch.n_samples for batch in batches) == 6
    assert len(taken) <= 4


def test_batches_that_do_not_fit_the_model_are_refused() -> None:
    good = values(3, 6)
    cases: list[tuple[Model, Any, str]] = [
        (TWO, [(good,)], "batch 0: 1 arrays, the model has 2 inputs: 'x', 'z'"),
        (ONE, [good, (good, good, good)], "batch 1: 3 arrays, the model has 1 inputs: 'x'"),
        (ONE, [{"y": good}], "batch 0: no array for input 'x'; got 'y'"),
        (ONE, [good.astype(int)], "batch 0: 'x' is int64, the model takes float32"),
        (ONE, [good, values(3, 5)],
         "batch 1: 'x' is 3x5, the model takes Nx6, with samples along the first axis"),
        (ONE, 7, "data must be a path or an iterable of batches, got 7"),
    ]  # fmt: skip
    for model, source, expected in cases:
        assert data_refusal(model, source) == expected


def test_batches_of_an_iterable_are_cut_where_the_samples_asked_for_begin_and_end() -> None:
    rows = values(12, 6)
    data = open_data(ONE, [(rows[i : i + 4], np.arange(i, i + 4)) for i in (0, 4, 8)])
    found = list(data.batches(2, 9))
    assert [batch.n_samples for batch in found] == [2, 4, 1]
    assert np.array_equal(np.concatenate([batch.feed["x"] for batch in found]), rows[2:9])
    assert np.array_equal(
        np.concatenate([b.labels for b in found if b.labels is not None]), range(2, 9)
    )


def test_batches_whose_size_the_model_fixes_are_not_cut() -> None:
    fixed = model_taking(("x", "float32", (4, 6)))
    data = open_data(fixed, [values(4, 6, seed=s) for s in range(3)])
    assert [batch.n_samples for batch in data.batches(2, 6)] == [4, 4]


@pytest.mark.parametrize("labels", [np.full(3, "cat"), np.zeros(3), np.zeros((3, 1), int)])
def test_labels_of_a_batch_must_be_one_integer_for_each_sample(labels: Array) -> None:
    data = open_data(ONE, [(values(3, 6), labels)])
    with pytest.raises(DataError, match=r"^batch 0: 'labels' must be one integer for each sample"):
        next(data.batches())


def test_one_mapping_is_no_iterable_of_batches() -> None:
    with pytest.raises(DataError, match="got one mapping: wrap it in a list"):
        open_data(ONE, {"x": values(3, 6)})


def test_asking_whether_a_source_ends_does_not_start_it() -> None:
    class Loader:
        started = 0

        def __iter__(self) -> Iterator[Array]:
            self.started += 1
            yield values(3, 6)

    source = Loader()
    data = open_data(ONE, source)
    assert isinstance(data, Batches)
    assert not data.once_only
    assert source.started == 0


# --- synthetic inputs ---------------------------------------------------------------------------


def synthetic(model: Model, size: int = 32, seed: int = 0) -> list[Batch]:
    return list(open_data(model, None, size, seed).batches())


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
    total = open_data(ONE, None, size).n_samples
    assert total is not None
    assert total % size == 0
    assert total >= 64


def test_inputs_that_disagree_about_the_batch_are_fed_as_declared(save: Save) -> None:
    text = """(float[1,6] x, float[2,1,4] state) => (float[1,5] y) <float[6,5] w> {
      y = MatMul(x, w) }"""
    model = load_model(save(parsed(text)))
    shapes = {tuple(a.shape for a in batch.feed.values()) for batch in synthetic(model)}
    assert shapes == {((1, 6), (2, 1, 4))}
    feeds = [{"x": values(1, 6), "state": values(2, 1, 4)}]
    assert len(list(open_data(model, feeds).batches())) == 1
    path = save(parsed(text)).with_suffix(".npz")
    message = re.escape(
        f"{path}: the model's inputs have different fixed first axes [1, 2]: which of them counts "
        f"samples cannot be told; feed dictionaries from Python instead"
    )
    with pytest.raises(DataError, match=f"^{message}$"):
        open_data(model, path)


def test_a_fixed_batch_is_known_from_the_model(save: Save, load: Load) -> None:
    fixed = open_data(load_model(save(fixed_batch(4))), None)
    assert isinstance(fixed, Arrays)
    assert (fixed.multiple, fixed.batch_size) == (4, 4)
    assert open_data(load("conv_bias"), None).multiple == 1
