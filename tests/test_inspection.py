"""Inner tensors of two models: which are compared, what is said of each, which one is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from check_models import (
    FLOAT,
    LAYERS,
    batches,
    changed,
    digits_by_onnxruntime,
    digits_qdq,
    layers,
    sqnr_db,
)
from conftest import Load, Save, all_bits, calibrated
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, feed_for, parsed, run, values
from onnx import TensorProto, helper

from calib.arrays import Batch
from calib.graph import load_model
from calib.inspection import InnerTensor, Inspection, inspect
from calib.write import write_qdq


def inspection(*db: float) -> Inspection:
    return Inspection(tuple(InnerTensor(f"t{n}", "Conv", value) for n, value in enumerate(db)), 1)


# --- which tensor is named --------------------------------------------------------------------


@given(st.lists(st.floats(-20, 120) | st.just(math.inf), max_size=12))
def test_the_named_tensor_is_the_first_that_falls_by_more_than_10_db(db: list[float]) -> None:
    jumps = [n for n, value in enumerate(db) if value < min([30.0, *db[:n]]) - 10]
    found = inspection(*db).first
    if not jumps:
        assert found is None
    else:
        assert found is not None
        assert found.tensor.name == f"t{jumps[0]}"
        assert found.before_db == min(db[: jumps[0]], default=math.inf)


@given(st.lists(st.floats(-10, 0), max_size=20))
def test_error_that_grows_by_up_to_10_db_a_tensor_names_none(steps: list[float]) -> None:
    db = list(np.cumsum([30.0, *steps]))
    assert all(b - a >= -10.001 for a, b in pairwise(db))
    gentle = [value + 0.01 * n for n, value in enumerate(db)]
    assert inspection(*gentle).first is None


def test_each_case_has_its_sentence() -> None:
    assert inspection(40, 33, 12, 11).text == (
        "the first tensor whose error stands out is 't2' (Conv): 12.0 dB; lowest before it: 33.0 dB"
    )
    assert inspection(12).text.endswith("'t0' (Conv): 12.0 dB; lowest before it: none")
    assert inspection(40, -math.inf).text == (
        "the first tensor whose error stands out is 't1' (Conv): it holds NaN or infinity; lowest "
        "before it: 40.0 dB"
    )
    assert inspection(40, 25, 28).text == (
        "no tensor stands out: the error grows evenly, down to 25.0 dB at 't1'"
    )
    assert inspection(math.inf, math.inf).text == "no tensor stands out: none of 2 differs"
    assert Inspection(reason="why").text == "why"


# --- what is compared -------------------------------------------------------------------------


def test_a_model_differs_nowhere_from_itself() -> None:
    found = inspect(load_model(FLOAT), FLOAT, batches())
    assert [t.name for t in found.tensors] == [n.output[0] for n in onnx.load(FLOAT).graph.node]
    assert {t.sqnr_db for t in found.tensors} == {math.inf}
    assert found.n_samples == 64
    assert found.first is None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_figures_are_numpys_of_what_readers_get(bits: int) -> None:
    path = digits_qdq(bits)
    found = inspect(load_model(FLOAT), path, batches())
    pairs = {}
    for node in onnx.load(path).graph.node:
        if node.op_type == "QuantizeLinear":
            pairs[node.output[0]] = node.input[0]
    behind = {n.input[0]: n.output[0] for n in onnx.load(path).graph.node if n.input[0] in pairs}
    seen_as = {name: behind[quantized] for quantized, name in pairs.items()}
    names = [t.name for t in found.tensors]
    feed = {"image": np.concatenate([b.feed["image"] for b in batches()])}
    inner = [name for name in names if name != "image"]
    expected = run(FLOAT, feed, names=inner) | feed
    actual = run(path, feed, names=[seen_as.get(name, name) for name in names])
    assert len(names) > 15
    for tensor in found.tensors:
        wanted = sqnr_db(expected[tensor.name], actual[seen_as.get(tensor.name, tensor.name)])
        assert tensor.sqnr_db == pytest.approx(wanted, abs=0.2), tensor.name


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_onnxruntimes_own_models_are_compared_tensor_by_tensor(form: str) -> None:
    """Their tools drop a Relu that the zero point does as well: that is no error."""
    found = inspect(load_model(FLOAT), digits_by_onnxruntime(form), batches())
    assert {"image", "stem.relu.out", "block1.relu.out", "block2.relu.out", "logits"} <= {
        tensor.name for tensor in found.tensors
    }
    assert len(found.tensors) >= 18
    assert found.first is None, found.text
    assert all(tensor.sqnr_db > 20 for tensor in found.tensors)


def test_a_relu_that_was_dropped_may_lend_its_name_to_the_dequantized_value(
    save: Save,
) -> None:
    """As in ResNets, where one reader of a Relu is quantized and another is not."""
    model = load_model(
        save(
            parsed("""(float[N,6] x) => (float[N,6] y, float[N,6] z) {
      sum = Add(x, x)  act = Relu(sum)  y = Neg(act)  z = Add(x, x) }""")
        )
    )
    other = save(
        parsed(
            """(float[N,6] x) => (float[N,6] y, float[N,6] z)
            <float sum_scale, uint8 sum_zero_point> {
              total = Add(x, x)
              sum_quantized = QuantizeLinear(total, sum_scale, sum_zero_point)
              act = DequantizeLinear(sum_quantized, sum_scale, sum_zero_point)
              y = Neg(act)
              z = Add(x, x)
            }""",
            {
                "sum_scale": np.array(0.02, np.float32),
                "sum_zero_point": np.array(0, np.uint8),
            },
        )
    )
    found = inspect(model, other, [Batch({"x": values(40, 6)})])
    assert "sum" not in [tensor.name for tensor in found.tensors]
    assert found.first is None, found.text


def test_at_most_64_samples_are_read_or_the_batch_that_reaches_them() -> None:
    read = []

    def counted() -> Iterator[Batch]:
        for batch in batches(24, 240):
            read.append(batch)
            yield batch

    assert inspect(load_model(FLOAT), digits_qdq(), counted()).n_samples == 72
    assert len(read) == 3


def test_the_prepared_graph_serves_where_it_has_more_of_the_names(save: Save) -> None:
    """The values of local functions have names only once these are inlined."""
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
    g (float[N,6] x) => (float[N,5] y) <float[6,6] first, float[6,5] second> {
      y = own.two(x, first, second)
    }
    <domain: "own", opset_import: ["": 17]>
    two (x, a, b) => (y) { product = MatMul(x, a)  hidden = Relu(product)  y = MatMul(hidden, b) }
    """
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    for name, array in {"first": values(6, 6), "second": values(6, 5)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = load_model(save(proto))
    table, feed = calibrated(model, all_bits(8))
    written = model.path.with_name("quantized.onnx")
    write_qdq(model, table).save(written)
    found = inspect(model, written, [Batch(feed)])
    assert [t.op_type for t in found.tensors].count("MatMul") == 2
    assert "Relu" in [t.op_type for t in found.tensors]


def test_float16_is_compared_too_also_with_float32(load: Load, save: Save) -> None:
    model = load("float16_conv")
    feed = feed_for(MODELS["float16_conv"](), n=4)
    table, _ = calibrated(model, all_bits(8), feed)
    path = model.path.with_name("float16_quantized.onnx")
    write_qdq(model, table).save(path)
    found = inspect(model, path, [Batch(feed)])
    assert found.tensors
    assert found.first is None
    half = parsed(
        """(float[N,6] x) => (float[N,5] y) <float16[6,5] w> {
          h = Cast<to=10>(x)
          product = MatMul(h, w)
          y = Cast<to=1>(product)
        }""",
        {"w": values(6, 5).astype(np.float16)},
    )
    whole = parsed(
        "(float[N,6] x) => (float[N,5] y) <float[6,5] w> { product = MatMul(x, w) "
        "y = Identity(product) }",
        {"w": values(6, 5)},
    )
    found = inspect(load_model(save(whole)), save(half), [Batch({"x": values(20, 6)})])
    assert [tensor.name for tensor in found.tensors] == ["product", "y"]
    assert all(50 < tensor.sqnr_db < 90 for tensor in found.tensors)


def test_models_without_a_common_name_are_no_error(save: Save) -> None:
    text = "(float[N,6] x) => (float[N,5] {0}) <float[6,5] w> {{ {0} = MatMul(x, w) }}"
    one, other = (save(parsed(text.format(name))) for name in ("y", "z"))
    found = inspect(load_model(one), other, [Batch({"x": values(4, 6)})])
    assert found.tensors == ()
    assert found.text == "no inner tensor can be compared: none has the same name in both models"


def test_names_that_mean_other_types_or_shapes_are_left_out(save: Save) -> None:
    one = parsed("""(float[N,6] x) => (float[N,6] y)
      { a = Relu(x)  b = Transpose(x)  c = Transpose(b)  y = Add(a, c) }""")
    other = parsed("""(float[N,6] x) => (float[N,6] y)
      { a = Cast<to=6>(x)  b = Identity(x)  c = Cast<to=1>(a)  y = Add(b, c) }""")
    found = inspect(load_model(save(one)), save(other), [Batch({"x": values(4, 6)})])
    assert [tensor.name for tensor in found.tensors] == ["c", "y"]
    only = "(float[N,6] x) => ({0}[N,6] y) {{ y = Cast<to={1}>(x) }}"
    pair = (save(parsed(only.format(t, n))) for t, n in (("float", 1), ("int32", 6)))
    found = inspect(load_model(next(pair)), next(pair), [Batch({"x": values(4, 6)})])
    assert found.text == "no inner tensor can be compared: types or shapes differ"


def test_a_tensor_that_is_zero_or_nan_in_the_float_model_accuses_nobody(save: Save) -> None:
    text = """(float[N,6] x) => (float[N,6] y) <float[6] shift> {{
      low = Clip(x, {0}, {0})
      root = Sqrt(x)
      y = Add(x, shift)
    }}"""
    model, other = (
        parsed(text.format("shift_0"), {"shift": values(6), "shift_0": np.array(value, np.float32)})
        for value in (0.0, 1e-3)
    )
    for proto in (model, other):
        extra = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("low", "root")]
        proto.graph.output.extend(extra)
    found = inspect(load_model(save(model)), save(other), [Batch({"x": values(4, 6)})])
    assert [tensor.name for tensor in found.tensors] == ["y"]


def test_every_layer_is_among_those_that_are_broken_below() -> None:
    assert set(layers(digits_qdq())) == set(LAYERS)


# --- broken models ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_a_broken_weight_scale_is_the_first_that_is_named(
    layer: str, tmp_path: Path
) -> None:
    _, scale = layers(digits_qdq())[layer]
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s * 7)
    found = inspect(load_model(FLOAT), broken, batches())
    assert found.first is not None
    assert found.first.tensor.name == layer


@pytest.mark.parametrize("layer", LAYERS)
def test_an_activation_with_a_broken_scale_is_the_first_that_is_named(
    layer: str, tmp_path: Path
) -> None:
    scale, _ = layers(digits_qdq())[layer]
    (tensor,) = {
        node.input[0]
        for node in onnx.load(digits_qdq()).graph.node
        if node.op_type == "QuantizeLinear" and node.input[1] == scale
    }
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s / 16)
    found = inspect(load_model(FLOAT), broken, batches())
    assert found.first is not None
    assert found.first.tensor.name == tensor


@pytest.mark.parametrize("tensor", ["stem.conv.out", "block1.add.out", "block2.first.relu.out"])
def test_a_broken_scale_in_integer_operators_is_named(tensor: str, tmp_path: Path) -> None:
    path = digits_by_onnxruntime("QOperator")
    broken = changed(path, tmp_path / "broken.onnx", f"{tensor}_scale", lambda s: s / 16)
    found = inspect(load_model(FLOAT), broken, batches())
    assert found.first is not None
    # The Relu behind an addition is the addition's own, there.
    assert found.first.tensor.name == tensor.replace("add", "relu")


def test_a_tensor_with_nan_is_named(tmp_path: Path) -> None:
    _, scale = layers(digits_qdq())["block2.first.bn.out"]
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s * np.nan)
    found = inspect(load_model(FLOAT), broken, batches())
    assert found.first is not None
    assert found.first.tensor == InnerTensor("block2.first.bn.out", "BatchNormalization", -math.inf)
