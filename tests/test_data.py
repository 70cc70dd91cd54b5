"""Calibration data from iterables of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from data_models import ONE, TWO, joined, model_taking, read, refusal
from models import Array, values

from calib.arrays import Batch
from calib.data import Reading, open_data
from calib.errors import DataError, OptionError
from calib.graph import Model
from calib.iterables import Batches


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "^batch-size must be at least 1, got 0$"),
        ({"seed": -1}, "^seed must not be negative, got -1$"),
    ],
)
def test_readings_that_make_no_sense_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Reading(**settings)  # type: ignore[arg-type]


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
        (ONE, [good.astype(int)],
         "batch 0: 'x' is int64, the model takes float32: convert it with .astype(np.float32)"),
        (ONE, [good, values(3, 5)],
         "batch 1: 'x' is 3x5, the model takes Nx6, with samples along the first axis"),
        (ONE, 7, "data must be a path or an iterable of batches, got 7"),
    ]  # fmt: skip
    for model, source, expected in cases:
        assert refusal(model, source) == expected


def test_batches_of_an_iterable_are_cut_where_the_samples_asked_for_begin_and_end() -> None:
    rows = values(12, 6)
    data = open_data(ONE, [(rows[i : i + 4], np.arange(i, i + 4)) for i in (0, 4, 8)])
    found = list(data.batches(2, 9))
    assert [batch.n_samples for batch in found] == [2, 4, 1]
    assert np.array_equal(np.concatenate([batch.feed["x"] for batch in found]), rows[2:9])
    assert np.array_equal(
        np.concatenate([b.labels for b in found if b.labels is not None]), range(2, 9)
    )


def test_batches_whose_size_the_model_fixes_are_not_cut_and_belong_to_where_they_begin() -> None:
    fixed = model_taking(("x", "float32", (4, 6)))
    rows = [values(4, 6, seed=s) for s in range(3)]
    data = open_data(fixed, rows)
    assert data.multiple == 4
    for start, stop, expected in ((0, 5, [0, 1]), (5, None, [2]), (4, 8, [1]), (2, 6, [1])):
        found = [batch.feed["x"] for batch in data.batches(start, stop)]
        assert np.array_equal(found, [rows[n] for n in expected]), (start, stop)


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


def test_arrays_with_one_axis_less_are_samples_that_need_not_stack() -> None:
    free = model_taking(("x", "float32", ("N", "T", 3)))
    samples = [values(5, 3), (values(7, 3), np.int64(4)), {"x": values(2, 9, 3)}]
    found = read(free, samples)
    assert [b.feed["x"].shape for b in found] == [(1, 5, 3), (1, 7, 3), (2, 9, 3)]
    assert np.array_equal(np.asarray(found[1].labels), [4])
    assert [b.n_samples for b in open_data(free, samples).batches(1, 3)] == [1, 1]


def test_more_samples_than_the_model_takes_at_a_time_are_fed_in_parts() -> None:
    rows, labels = values(6, 6), np.arange(6)
    for fixed, n_feeds in ((1, 6), (2, 3)):
        found = read(model_taking(("x", "float32", (fixed, 6))), [(rows, labels)])
        assert [b.n_samples for b in found] == [fixed] * n_feeds
        np.testing.assert_array_equal(joined(found, "x"), rows)
        assert np.concatenate([b.labels for b in found if b.labels is not None]).tolist() == [
            *range(6)
        ]
    data = open_data(model_taking(("x", "float32", (4, 6))), [rows])
    assert [batch.n_samples for batch in data.batches()] == [4]
    assert data.notes == ("2 samples fill no batch of 4: not used",)


def test_single_numbers_are_fed_whole_where_batches_are_cut() -> None:
    model = model_taking(("rate", "float32", ()), ("x", "float32", ("N", 6)))
    data = open_data(model, [{"x": values(4, 6), "rate": np.float32(3)}])
    (batch,) = data.batches(1, 3)
    assert (batch.n_samples, float(batch.feed["rate"])) == (2, 3.0)
    assert batch.feed["x"].shape == (2, 6)


def test_tuples_hold_the_required_inputs_and_dictionaries_any() -> None:
    model = model_taking(
        ("mask", "bool", ("N",)), ("x", "float32", ("N", 6)), optional="mask"
    )  # fmt: skip
    mask, x = np.ones(3, bool), values(3, 6)
    found = read(model, [x, (x, np.arange(3)), {"x": x, "mask": mask}])
    assert [sorted(b.feed) for b in found] == [["x"], ["x"], ["mask", "x"]]
    assert refusal(model, [{"mask": mask}]) == "batch 0: no array for input 'x'; got 'mask'"
    assert refusal(model, [{"x": x, "mask": x}]) == (
        "batch 0: 'mask' is float32, the model takes bool: convert it with .astype(np.bool)"
    )


def test_an_item_with_an_input_that_is_fed_back_starts_a_sequence() -> None:
    model = model_taking(("s", "float32", (2, 4)), ("x", "float32", (1, 6)), fed_back="s")
    x, state = values(1, 6), values(2, 4)
    data = open_data(model, [x, {"x": x}, {"x": x, "s": state}, values(3, 6)])
    for _ in range(2):
        found = [(b.restart, "s" in b.feed) for b in data.batches()]
        assert found == [(True, False), (False, False), (True, True), *[(False, False)] * 3]
    assert [b.restart for b in read(model, [values(3, 6)])] == [True, False, False]
    (first, *later) = read(model, [{"x": values(3, 6), "s": state}])
    assert (first.restart, "s" in first.feed) == (True, True)
    assert [(b.restart, list(b.feed)) for b in later] == [(False, ["x"])] * 2
    assert refusal(model, [{"x": x, "s": x}]) == "batch 0: 's' is 1x6, the model takes 2x4"


def test_only_the_first_part_of_a_batch_starts_its_sequence() -> None:
    batch = Batch({"x": values(4, 6), "s": values(2, 4)}, np.arange(4), True, frozenset("s"))
    parts = [batch.part(0, 2), batch.part(2, 4)]
    assert [part.restart for part in parts] == [True, False]
    assert [part.feed["s"].shape for part in parts] == [(2, 4)] * 2
    assert [np.asarray(part.labels).tolist() for part in parts] == [[0, 1], [2, 3]]
    assert parts[0].stacks_with(parts[1])
    assert not parts[0].stacks_with(Batch(parts[1].feed, None, False, batch.whole))


def test_an_iterable_has_no_identity() -> None:
    assert open_data(ONE, [values(2, 6)]).identity is None
