"""Float against quantized: SQNR and top-1, held against plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Load, Save
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from models import MODELS, Array, Feed, feed_for, parsed, run, values
from onnx import numpy_helper

from calib.arrays import Batch
from calib.comparison import Comparison, Difference, evaluate
from calib.errors import DataError, VerificationError
from calib.graph import load_model

MODERATE = st.floats(-1e3, 1e3, width=32)


def disturbed(name: str, amount: float = 0.05) -> onnx.ModelProto:
    """The model with other weights: whatever differs will do for a quantized one."""
    model = MODELS[name]()
    for seed, tensor in enumerate(model.graph.initializer):
        array = numpy_helper.to_array(tensor)
        noise = values(*array.shape, seed=100 + seed) * np.float32(amount)
        tensor.CopyFrom(numpy_helper.from_array(array + noise, tensor.name))
    return model


def cut(feed: Feed, size: int, labels: Array | None = None) -> Iterator[Batch]:
    n = len(next(iter(feed.values())))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        part = None if labels is None else labels[rows]
        yield Batch({name: array[rows] for name, array in feed.items()}, part)


def sqnr_db(reference: Array, other: Array) -> float:
    exact, found = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


@given(
    st.data(),
    stnp.arrays(np.float32, stnp.array_shapes(max_dims=3, max_side=6), elements=MODERATE),
)
def test_a_difference_added_piece_by_piece_is_that_of_the_whole(
    data: st.DataObject, reference: Array
) -> None:
    other = data.draw(stnp.arrays(np.float32, reference.shape, elements=MODERATE))
    parts = Difference()
    for a, b in zip(reference, other, strict=True):
        parts.add(a, b)
    noise = float(np.square(reference.astype(np.float64) - other).sum())
    if noise == 0:
        assert parts.sqnr_db == math.inf
    elif not np.square(reference.astype(np.float64)).sum():
        assert parts.sqnr_db == -math.inf
    else:
        assert parts.sqnr_db == pytest.approx(sqnr_db(reference, other), abs=1e-6)


def test_a_difference_of_float16_is_measured_in_float64() -> None:
    difference = Difference()
    difference.add(np.full(1000, 300, np.float16), np.full(1000, 301, np.float16))
    assert difference.sqnr_db == pytest.approx(20 * math.log10(300))


@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize("name", ["conv_bn_relu", "two_inputs", "attention", "gemm_activation"])
def test_the_comparison_is_numpys_on_all_samples_together(
    name: str, size: int, load: Load, save: Save
) -> None:
    original, other = MODELS[name](), disturbed(name)
    feed = feed_for(original, n=20)
    expected, actual = run(original, feed), run(other, feed)
    comparison = evaluate(load(name), save(other), cut(feed, size))
    assert comparison.n_samples == 20
    assert list(comparison.sqnr_db) == list(expected)
    for output, db in comparison.sqnr_db.items():
        assert db == pytest.approx(sqnr_db(expected[output], actual[output]), abs=1e-3)
    assert comparison.output_sqnr_db == min(comparison.sqnr_db.values())
    assert comparison.top1 is None


def test_the_float_model_is_the_file_not_the_prepared_graph(save: Save, load: Load) -> None:
    """Whatever preparing might do wrong shows in the comparison too."""
    model = load_model(save(disturbed("conv_bn_relu")))
    feed = feed_for(MODELS["conv_bn_relu"]())
    model.ir.graph.initializers["head_bias"].const_value = None
    comparison = evaluate(model, load("conv_bn_relu").path, [Batch(feed)])
    assert 5 < comparison.output_sqnr_db < 60


def test_equal_models_differ_by_nothing(load: Load) -> None:
    path = load("two_inputs").path
    comparison = evaluate(load("two_inputs"), path, [Batch(feed_for(MODELS["two_inputs"]()))])
    assert comparison.sqnr_db == {"y": math.inf, "second": math.inf}
    assert comparison.output_sqnr_db == math.inf
    assert Comparison(0, {}, None).output_sqnr_db == math.inf


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize(("name", "amount"), [("conv_bn_relu", 2.0), ("two_inputs", 0.6)])
def test_top1_is_the_share_of_labels_with_the_largest_output(
    name: str, amount: float, size: int, load: Load, save: Save
) -> None:
    """Of the first output of classes, where there are several."""
    original, other = MODELS[name](), disturbed(name, amount)
    feed = feed_for(original, n=50)
    floats, quantized = (next(iter(run(m, feed).values())).argmax(1) for m in (original, other))
    labels = np.where(np.arange(50) % 3 == 0, (floats + 1) % 3, floats)
    top1 = evaluate(load(name), save(other), cut(feed, size, labels)).top1
    assert top1 is not None
    assert top1.float_model == pytest.approx(100 * (floats == labels).mean())
    assert top1.quantized_model == pytest.approx(100 * (quantized == labels).mean())
    assert top1.quantized_model != top1.float_model


def test_samples_without_labels_do_not_count_for_top1(load: Load) -> None:
    model, feed = load("conv_bn_relu"), feed_for(MODELS["conv_bn_relu"](), n=6)
    right = next(iter(run(MODELS["conv_bn_relu"](), feed).values())).argmax(1)
    batches = [Batch(feed), Batch(feed, right), Batch(feed)]
    comparison = evaluate(model, model.path, batches)
    assert comparison.n_samples == 18
    assert comparison.top1 is not None
    assert comparison.top1.float_model == comparison.top1.quantized_model == 100


def test_labels_mean_nothing_without_an_output_of_classes(load: Load) -> None:
    feed = feed_for(MODELS["conv_bias"](), n=4)
    batch = Batch(feed, np.zeros(4, np.int64))
    assert evaluate(load("conv_bias"), load("conv_bias").path, [batch]).top1 is None


@pytest.mark.parametrize("shape", [(5,), (4, 1), ()])
def test_labels_that_are_not_one_for_each_sample_are_refused(
    shape: tuple[int, ...], load: Load
) -> None:
    batch = Batch(feed_for(MODELS["conv_bn_relu"](), n=4), np.zeros(shape, np.int64))
    with pytest.raises(DataError) as caught:
        evaluate(load("conv_bn_relu"), load("conv_bn_relu").path, [batch])
    assert str(caught.value) == (
        f"labels have shape {shape}, the model's 'logits' (4, 5): one label for each sample is "
        f"needed"
    )


TAIL = """(float[N,6] x) => ({0}) <float[6,5] weight> {{
  hidden = Relu(x)
  linear = MatMul(hidden, weight)
  y = {1}
  z = Identity(linear)
}}"""


def test_nan_from_the_quantized_model_is_an_error(save: Save) -> None:
    model = load_model(save(parsed(TAIL.format("float[N,5] y", "Identity(linear)"))))
    broken = save(parsed(TAIL.format("float[N,5] y", "Sqrt(linear)")))
    with pytest.raises(VerificationError, match=r"^output 'y' of the quantized model holds NaN$"):
        evaluate(model, broken, [Batch({"x": values(20, 6)})])


def test_outputs_of_integers_have_no_sqnr(save: Save) -> None:
    text = TAIL.format("int64[N] y, float[N,5] z", "ArgMax<axis=1, keepdims=0>(linear)")
    model, other = load_model(save(parsed(text))), parsed(text, {"weight": values(6, 5, seed=8)})
    comparison = evaluate(model, save(other), [Batch({"x": values(20, 6)})])
    assert list(comparison.sqnr_db) == ["z"]


def test_values_that_are_infinite_in_both_models_do_not_spoil_the_sqnr(save: Save) -> None:
    text = TAIL.format("float[N,5] y, float[N,5] z", "Where(mask, linear, minus)")
    mask: Feed = {"mask": np.arange(5) != 2, "minus": np.array(-np.inf, np.float32)}
    model = load_model(save(parsed(text, mask)))
    other = save(parsed(text, mask | {"weight": values(6, 5) * np.float32(1.01)}))
    comparison = evaluate(model, other, [Batch({"x": values(20, 6)})])
    assert comparison.sqnr_db["y"] == pytest.approx(40, abs=1)
    assert comparison.sqnr_db["z"] == pytest.approx(40, abs=1)


def test_the_models_are_run_from_their_files(load: Load, tmp_path: Path) -> None:
    """So that external data is found wherever the process stands."""
    path = tmp_path / "model.onnx"
    onnx.save(MODELS["tied"](), path, save_as_external_data=True, size_threshold=0, location="w")
    batch = Batch(feed_for(MODELS["tied"]()))
    comparison = evaluate(load_model(path), load("tied").path, [batch])
    assert comparison.output_sqnr_db == math.inf
