"""Cosine, largest error and agreement, held against NumPy; outputs that cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import Load, Save
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from models import MODELS, Array, feed_for, parsed, run, values
from test_comparison import disturbed

from calib.arrays import Batch
from calib.comparison import Difference, evaluate
from calib.errors import ModelError, VerificationError
from calib.graph import load_model

MODERATE = st.floats(-1e3, 1e3, width=32)
SHAPES = stnp.array_shapes(max_dims=3, max_side=6)


@given(st.data(), stnp.arrays(np.float32, SHAPES, elements=MODERATE))
def test_pieces_make_the_cosine_and_the_largest_error_of_the_whole(
    data: st.DataObject, reference: Array
) -> None:
    other = data.draw(stnp.arrays(np.float32, reference.shape, elements=MODERATE))
    parts = Difference()
    for a, b in zip(reference, other, strict=True):
        parts.add(a, b)
    x, y = (array.astype(np.float64).ravel() for array in (reference, other))
    assert parts.largest == np.abs(x - y).max()
    assert -1 <= parts.cosine <= 1
    norm = math.sqrt(x @ x) * math.sqrt(y @ y)
    if norm > 0:
        assert parts.cosine == pytest.approx(x @ y / norm, abs=1e-6)
    else:
        assert parts.cosine == (1 if parts.noise == 0 else 0)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("other", [0.0, 1.0, math.inf, -math.inf])
def test_infinity_in_one_of_both_is_an_infinite_error_and_no_warning(
    value: float, other: float
) -> None:
    difference = Difference()
    difference.add(np.array([1.0, value]), np.array([1.0, other]))
    if value == other:
        assert (difference.sqnr_db, difference.cosine, difference.largest) == (math.inf, 1, 0)
    else:
        assert (difference.sqnr_db, difference.cosine) == (-math.inf, 0)
        assert difference.largest == math.inf


def test_a_difference_that_is_not_a_number_stays_one() -> None:
    difference = Difference()
    difference.add(np.ones(2), np.array([1.0, math.nan]))
    difference.add(np.ones(2), np.zeros(2))
    assert math.isnan(difference.largest)
    assert difference.sqnr_db == -math.inf


@pytest.mark.parametrize("name", ["conv_bn_relu", "two_inputs", "tied"])
def test_the_figures_of_a_comparison_are_numpys(name: str, load: Load, save: Save) -> None:
    original, other = MODELS[name](), disturbed(name, 0.5)
    feed = feed_for(original, n=20)
    expected, actual = run(original, feed), run(other, feed)
    parts = [Batch({n: a[rows] for n, a in feed.items()}) for rows in (slice(0, 7), slice(7, 20))]
    whole = [Batch(feed)]
    found = evaluate(load(name), save(other), whole if name == "tied" else parts)
    for output, reference in expected.items():
        x, y = (a.astype(np.float64).ravel() for a in (reference, actual[output]))
        wanted = x @ y / math.sqrt((x @ x) * (y @ y))
        assert found.cosine[output] == pytest.approx(wanted, abs=1e-5)
        assert found.max_error[output] == pytest.approx(np.abs(x - y).max(), rel=1e-4)
    first = next(iter(expected))
    same = (expected[first].argmax(1) == actual[first].argmax(1)).mean()
    assert found.agreement == pytest.approx(same)


def test_without_an_output_of_classes_agreement_is_that_of_integers(save: Save) -> None:
    text = """(float[N,6] x) => (int64[N] y, float[N,1] z) <float[6,5] w, float[6,1] v> {
      linear = MatMul(x, w)  y = ArgMax<axis=1, keepdims=0>(linear)  z = MatMul(x, v) }"""
    one, other = parsed(text), parsed(text, {"w": values(6, 5, seed=9)})
    feed = {"x": values(50, 6)}
    found = evaluate(load_model(save(one)), save(other), [Batch(feed)])
    assert found.agreement == pytest.approx((run(one, feed)["y"] == run(other, feed)["y"]).mean())
    assert 0 < (found.agreement or 0) < 1


def test_without_either_there_is_no_agreement(load: Load) -> None:
    batch = Batch(feed_for(MODELS["conv_bias"](), n=2))
    assert evaluate(load("conv_bias"), load("conv_bias").path, [batch]).agreement is None


def test_outputs_of_another_shape_are_an_error(save: Save) -> None:
    text = "(float[N,6] x, int64[1] k) => (float[M,K] y) {{ y = {0}(x) }}"
    model = load_model(save(parsed(text.format("Relu"))))
    other = save(parsed(text.format("Transpose")))
    batch = Batch({"x": values(4, 6), "k": np.ones(1, np.int64)})
    with pytest.raises(VerificationError) as caught:
        evaluate(model, other, [batch])
    assert str(caught.value) == (
        "output 'y' of the quantized model has shape [6, 4], the float model's [4, 6], on the "
        "same data"
    )


def test_elements_of_a_list_that_are_missing_are_an_error(save: Save) -> None:
    text = """(float[N,6] x) => (seq(float[N,K]) y) { y = SplitToSequence<axis=1>(x, size) }"""
    paths = [save(parsed(text, {"size": np.array(size, np.int64)})) for size in (2, 3)]
    with pytest.raises(VerificationError) as caught:
        evaluate(load_model(paths[0]), paths[1], [Batch({"x": values(4, 6)})])
    assert "'y[0]' of the quantized model has shape [4, 3]" in str(caught.value)
    one = save(parsed(text, {"size": np.array(6, np.int64)}))
    three = load_model(paths[0])
    with pytest.raises(VerificationError, match=r"^output 'y\[0\]' of the quantized"):
        evaluate(three, one, [Batch({"x": values(4, 6)})])


def test_an_error_of_onnxruntime_names_the_model_that_it_is_about(save: Save) -> None:
    fixed = save(MODELS["fixed_batch_4"]())
    free = save(parsed("(float[N,6] x) => (float[N,6] y) { y = Relu(x) }"))
    for one, other in ((free, fixed), (fixed, free)):
        with pytest.raises(ModelError, match=f"^{fixed.name}: onnxruntime cannot run the model on"):
            evaluate(load_model(one), other, [Batch({"x": values(3, 6)})])
    unknown = save(parsed("(float[N,6] x) => (float[N,6] y) { y = own.Magic(x) }"))
    with pytest.raises(ModelError, match=f"^{unknown.name}: onnxruntime cannot load the model"):
        evaluate(load_model(free), unknown, [])
