"""The user's metric: what it is given, what it may return, who is blamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Load
from models import MODELS, feed_for, run

from calib.arrays import Batch
from calib.capture import Session
from calib.errors import CalibError, DataError, ModelError, OptionError
from calib.metric import Metric, load_metric, score


def session(load: Load) -> Session:
    return Session(load("conv_bn_relu").path)


def some_batches(n: int = 3) -> Iterator[Batch]:
    for seed in range(n):
        labels = None if seed == 1 else np.arange(4)
        yield Batch(feed_for(MODELS["conv_bn_relu"](), 4, seed), labels)


def refused(metric: Any, load: Load, batches: Iterator[Batch] | None = None) -> CalibError:
    with pytest.raises(CalibError) as caught:
        score(metric, "m:f", session(load), batches or some_batches())
    return caught.value


def test_it_is_given_outputs_inputs_and_labels_a_batch_at_a_time(load: Load) -> None:
    seen: list[Any] = []

    def metric(answers: Any) -> float:
        seen.extend(answers)
        return 0.5

    assert score(metric, "m:f", session(load), some_batches()) == 0.5
    assert len(seen) == 3
    for (outputs, feed, labels), batch in zip(seen, some_batches(), strict=True):
        expected = run(MODELS["conv_bn_relu"](), batch.feed)
        assert list(outputs) == ["logits"]
        np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(feed["image"], batch.feed["image"])
        assert (labels is None) == (batch.labels is None)


@pytest.mark.parametrize("value", [1, True, np.float32(0.25), np.array(2.0), "0.5"])
def test_whatever_is_a_number_will_do(value: Any, load: Load) -> None:
    assert score(lambda _: value, "m:f", session(load), some_batches()) == float(value)


def test_it_need_not_look_at_everything(load: Load) -> None:
    metric: Metric = lambda answers: len(next(answers)[0])  # noqa: E731
    assert score(metric, "m:f", session(load), some_batches()) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("good", "'good'"),
        (10**400, "1" + "0" * 59),
        ([1.0], "[1.0]"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, shown: str, load: Load) -> None:
    error = refused(lambda _: value, load)
    assert str(error) == f"metric m:f: must return a finite number, got {shown}"
    assert isinstance(error, DataError)


def test_what_it_raises_is_told_in_one_line(load: Load) -> None:
    def metric(_answers: Any) -> float:
        raise KeyError("boxes\nand more")

    assert str(refused(metric, load)) == r"metric m:f: KeyError: 'boxes\nand more'"


def test_it_is_not_blamed_for_what_the_model_or_the_data_do(load: Load) -> None:
    def unreadable() -> Iterator[Batch]:
        yield from some_batches(1)
        raise DataError("x.npz: damaged")

    assert str(refused(lambda a: len(list(a)), load, unreadable())) == "x.npz: damaged"
    wrong = iter([Batch({"image": np.zeros((1, 2, 6, 6), np.float32)})])
    error = refused(lambda a: len(list(a)), load, wrong)
    assert isinstance(error, ModelError)
    assert str(error).startswith("onnxruntime cannot run the model on 'image' [1, 2, 6, 6]")


def test_running_out_of_memory_stays_what_it_is(load: Load) -> None:
    def metric(_answers: Any) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        score(metric, "m:f", session(load), some_batches())


# --- its name ---------------------------------------------------------------------------------


def test_a_function_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges_found.py").write_text("def half(answers):\n    return 0.5\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_metric("judges_found:half")(iter([])) == 0.5


@pytest.mark.parametrize("name", ["judges", "judges.py", "a:b:c", ""])
def test_another_form_of_name_is_refused(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_metric(name)
    assert str(caught.value) == f"metric must be package.module:function, got {name!r}"


@pytest.mark.parametrize("name", ["no_such_judges:half", "math:no_such_function", "math:pi"])
def test_a_function_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_metric(name)
    assert str(caught.value).startswith(f"{name}: ")
