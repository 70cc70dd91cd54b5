"""Written models, held against a simulation of the calibration table, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, Save, all_bits, calibrated, needs_onnxruntime
from models import MODELS, Array, Feed, parsed, relu6, run, values
from onnx import TensorProto, helper, numpy_helper

from calib.errors import ModelError
from calib.granularity import PerTensor
from calib.graph import Model, load_model
from calib.qtypes import WIDTHS
from calib.quantize import fake_quantize
from calib.rules import Rules, Selection, Widths
from calib.saving import Quantized
from calib.table import TensorRecord
from calib.write import write_qdq

BITS = (2, 3, 4, 5, 8, 16)
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

COMPUTED_BIAS = """(float[N,3,5] x, float[4] b) => (float[N,4,3] y) <float[4,3,3] kernel> {
  bias = Tanh(b)
  y = Conv(x, kernel, bias)
}"""
VOLUME = """(float[N,2,3,3,3] x) => (float[N,4,4,4,4] y)
<float[2,4,2,2,2] kernel, float[4] bias> { y = ConvTranspose(x, kernel, bias) }"""
INNER_OUTPUT = """(float[N,6] x) => (float[N,5] hidden, float[N,3] y, float[N,5] linear)
<float[6,5] w1, float[5] b1, float[5,3] w2> {
  linear = Gemm(x, w1, b1)
  hidden = Relu(linear)
  y = MatMul(hidden, w2)
}"""
STEM = """(float[N,3,6,6] image) => (float[N,2,3,3] output)
<float[4,3,3,3] kernel1, float[4,4,1,1] kernel2, float[2,4,1,1] kernel3> {{
  first = Conv<pads=[1,1,1,1]>(image, kernel1)
  hidden = {}(first)
  pooled = MaxPool<kernel_shape=[2,2], strides=[2,2]>(hidden)
  second = Conv(pooled, kernel2)
  output = Conv(second, kernel3)
}}"""
BARE = """(float[N,3,6,6] image) => (float[N,2,6,6] output)
<float[4,3,1,1] kernel1, float[4,4,1,1] kernel2, float[4,4,1,1] kernel3, float[2,4,1,1] kernel4> {{
  first = Conv(image, kernel1)
  hidden = {0}(first)
  second = Conv(hidden, kernel2)
  inner = {0}(second)
  third = Conv(inner, kernel3)
  output = Conv(third, kernel4)
}}"""
SAME_TWICE = "(float[N,4,4] x) => (float[N,4,4] y) { h = Tanh(x)\n y = MatMul(h, h) }"
SKIPPED_BIAS = """(float[N,3,5] x) => (float[N,4,3] y) <float[4,3,3] kernel> {
  h = Relu(x)
  y = Conv(h, kernel, )
}"""
# Names that a writer would like to give.
TAKEN = """(float[N,6] x) => (float[N,5] y, float[N,6] x_scale) <float[6,5] w, float[5] b> {
  x_quantized = Relu(x)
  x_dequantized = Mul(x_quantized, w_scale)
  x_clipped = Add(x_dequantized, x_zero_point)
  x_scale = Add(x_clipped, x_clip_min)
  y_with_bias = Gemm(x, w, b)
  w_dequantized = Gemm(x_clipped, w, b)
  b_scaled = Add(w_dequantized, y_with_bias)
  y = Mul(b_scaled, b_beta)
}"""
GIVEN = {
    name: values(seed=i)
    for i, name in enumerate(("w_scale", "x_zero_point", "x_clip_min", "b_beta"))
}
SPECIAL: dict[str, Callable[[], onnx.ModelProto]] = {
    "computed_bias": partial(parsed, COMPUTED_BIAS),
    "volume": partial(parsed, VOLUME),
    "inner_output": partial(parsed, INNER_OUTPUT),
    "same_twice": partial(parsed, SAME_TWICE),
    "stem": partial(parsed, STEM.format("Relu")),
    "signed_stem": partial(parsed, STEM.format("Identity")),
    "bare": partial(parsed, BARE.format("Relu")),
    "signed_bare": partial(parsed, BARE.format("Identity")),
    "skipped_bias": partial(parsed, SKIPPED_BIAS),
    "taken_names": partial(parsed, TAKEN, GIVEN),
    "relu6_pooled": partial(relu6, "MaxPool<kernel_shape=[2,2]>(clipped)"),
    "relu6_reshaped": partial(relu6, "Reshape(clipped, flat)", 2),
    "relu6_turned": partial(relu6, "Transpose<perm=[0,1,3,2]>(clipped)"),
    "relu6_flat": partial(relu6, "Flatten(clipped)", 2),
    "relu6_relu": partial(relu6, "Relu(clipped)"),
    "relu6_cast": partial(relu6, "Cast<to=1>(clipped)"),
    "relu6_expand": partial(relu6, "Expand(clipped, one)"),
}
MIXED = {
    "w4a8": Rules(widths=Widths(4, 8)),
    "w8a4": Rules(widths=Widths(8, 4)),
    "w2a16, edges 5": Rules(widths=Widths(2, 16, 5)),
    "per-tensor": Rules(widths=Widths(4, 4), weight_granularity="per-tensor"),
    "asymmetric, 4 bits": Rules(widths=Widths(4, 4, 4), activations="asymmetric"),
    "asymmetric, 3 and 8 bits": Rules(widths=Widths(4, 3), activations="asymmetric"),
    "asymmetric, 16 bits": Rules(widths=Widths(16, 16), activations="asymmetric"),
    # At 8 bits onnxruntime runs such a MatMul as MatMulNBits, on activations it rounds itself.
    "weights only": Rules(Widths(4, 4, 4), selection=Selection(only="weight|kernel|head|^w")),
    "activations only": Rules(selection=Selection(exclude="weight|kernel|head|^w")),
}


def quantized(model: Model, rules: Rules) -> tuple[Quantized, Feed]:
    table, feed = calibrated(model, rules)
    return write_qdq(model, table), feed


def proto(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(model)


def evaluate(node: onnx.NodeProto, inputs: list[Array], opset: int) -> list[Array]:
    """One node alone."""
    names = [name for name in node.input if name]
    feed = dict(zip(names, inputs, strict=True))
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in feed.items()
    ]
    outputs = map(helper.make_empty_tensor_value_info, node.output)
    graph = helper.make_graph([node], "g", infos, list(outputs))
    opsets = [helper.make_opsetid("", opset)]
    made = run(helper.make_model(graph, opset_imports=opsets, ir_version=8), feed)
    return [made[name] for name in node.output]


def assert_equals_simulation(model: Model, written: Quantized, feed: Feed) -> None:
    """Every value of the float graph, as the written model has it, follows from the values before
    it when the operands of the table's layers go through ``fake_quantize``."""
    prepared, opset = proto(model.ir), model.ir.opset_imports[""]
    made = [name for node in prepared.graph.node for name in node.output]
    actual = feed | run(proto(written.ir), feed, names=made)
    actual |= {t.name: numpy_helper.to_array(t) for t in prepared.graph.initializer}
    records = {record.name: record for record in written.table.records}
    for node in prepared.graph.node:
        if node.op_type == "If":
            continue
        inputs = []
        for position, name in enumerate(node.input):
            record = records.get(name)
            if record and position < 2 and node.name in record.spec.consumers:
                inputs.append(simulated(actual[name], record))
            elif name:
                inputs.append(actual[name])
        for name, expected in zip(node.output, evaluate(node, inputs, opset), strict=True):
            unit = float(np.abs(expected).max()) if expected.size else 0.0
            tolerance = 3e-3 if expected.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(actual[name], expected, rtol=0, atol=tolerance * unit)


def simulated(array: Array, record: TensorRecord) -> Array:
    return fake_quantize(array, record.scale, record.qtype, record.spec.granularity)


def sqnr(reference: Array, other: Array) -> float:
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / (noise + 1e-300)))


def check(model: Model, original: onnx.ModelProto, rules: Rules, save: Save) -> None:
    written, feed = quantized(model, rules)
    path = save(proto(written.ir))
    onnx.checker.check_model(str(path), full_check=True)
    assert_equals_simulation(model, written, feed)
    floats, plain = run(original, feed), run(path, feed)
    optimized = run(path, feed, optimized=True)
    assert list(optimized) == list(floats)
    for name, array in floats.items():
        own = sqnr(array, plain[name])
        assert sqnr(plain[name], optimized[name]) >= min(own + 10, 100)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MODELS)
def test_the_written_model_computes_what_the_table_says(
    name: str, bits: int, load: Load, save: Save
) -> None:
    check(load(name), MODELS[name](), all_bits(bits), save)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SPECIAL)
def test_the_written_model_computes_what_the_table_says_in_odd_cases_too(
    name: str, bits: int, save: Save
) -> None:
    original = SPECIAL[name]()
    check(load_model(save(original)), original, all_bits(bits), save)


@pytest.mark.parametrize("rules", ["w4a8", "w8a4", "w2a16, edges 5"])
@pytest.mark.parametrize("name", SPECIAL)
def test_the_written_model_computes_what_the_table_says_in_odd_cases_at_mixed_widths(
    name: str, rules: str, save: Save
) -> None:
    original = SPECIAL[name]()
    check(load_model(save(original)), original, MIXED[rules], save)


@pytest.mark.parametrize("rules", MIXED)
@pytest.mark.parametrize("name", ["conv_bn_relu", "residual", "tied", "two_inputs"])
def test_the_written_model_computes_what_the_table_says_at_mixed_widths(
    name: str, rules: str, load: Load, save: Save
) -> None:
    needs_onnxruntime(1, 31)
    check(load(name), MODELS[name](), MIXED[rules], save)


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_close_to_float(name: str, load: Load) -> None:
    model = load(name)
    written, feed = quantized(model, all_bits(16))
    actual = run(proto(written.ir), feed)
    for output, array in run(MODELS[name](), feed).items():
        assert sqnr(array, actual[output]) > 60


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_table_has_one_qdq_pair_and_all_its_readers_read_it(
    name: str, bits: int, load: Load
) -> None:
    model = load(name)
    written, _ = quantized(model, all_bits(bits))
    before, after = (Counter(n.op_type for n in m.graph) for m in (model.ir, written.ir))
    kinds = Counter(record.spec.kind for record in written.table.records)
    assert after["QuantizeLinear"] - before["QuantizeLinear"] == kinds["activation"]
    assert after["DequantizeLinear"] - before["DequantizeLinear"] == len(written.table.records)
    nodes = {node.name: node for node in written.ir.graph}
    for record in written.table.records:
        for consumer in record.spec.consumers:
            read = [v.name for v in nodes[consumer].inputs[:2] if v is not None]
            assert written.dequantized[record.name] in read
            assert record.name not in read


@pytest.mark.parametrize("name", MODELS)
def test_biases_of_quantized_layers_become_an_add_and_no_int32_is_written(
    name: str, load: Load
) -> None:
    written, _ = quantized(load(name), all_bits(4))
    layers = {consumer for r in written.table.records for consumer in r.spec.consumers}
    for node in written.ir.graph:
        if node.name in layers:
            assert len(node.inputs) == 2
    types = {t.data_type for t in proto(written.ir).graph.initializer}
    assert TensorProto.INT32 not in types
    moved = [n for n in load(name).ir.graph if n.name in layers and len(n.inputs) == 3]
    assert {f"{n.name}_bias" for n in moved} <= {
        n.name for n in written.ir.graph if n.op_type == "Add"
    }


def test_the_bias_of_a_layer_that_stays_float_stays(load: Load) -> None:
    written, _ = quantized(load("conv_bias"), Rules(selection=Selection(exclude="/Conv/second")))
    layers = {n.name: len(n.inputs) for n in written.ir.graph if n.op_type == "Conv"}
    assert layers == {"/Conv/first": 2, "/Conv/second": 3, "/Conv/third": 2}


def expected_storage(kind: str, signed: bool, bits: int) -> str:
    """Weights in the narrowest type; activations of a width without a type in 8 bits at least."""
    if kind == "weight" or bits in (4, 8, 16):
        stored = 4 if bits <= 4 else 8 if bits <= 8 else 16
    else:
        stored = 8
    return f"{'' if signed else 'U'}INT{stored}"


def initializers(model: ir.Model) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto(model).graph.initializer}


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_are_stored_in_the_narrowest_type_and_packed(bits: int, load: Load) -> None:
    model = load("residual")
    written, _ = quantized(model, all_bits(bits))
    tensors = initializers(written.ir)
    zero_points = {n.output[0]: n.input[2] for n in proto(written.ir).graph.node
                   if n.op_type == "QuantizeLinear"}  # fmt: skip
    for record in written.table.records:
        stored = written.stored[record.name]
        tensor = tensors[stored if record.spec.kind == "weight" else zero_points[stored]]
        wanted = expected_storage(record.spec.kind, record.qtype.signed, bits)
        assert TensorProto.DataType.Name(tensor.data_type) == wanted
        if record.spec.kind == "weight":
            n, stored_bits = model.weight(record.name).size, int(wanted.removeprefix("INT"))
            assert len(tensor.raw_data) == -(-n * stored_bits // 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_are_clipped_where_their_type_holds_more_than_their_grid(
    bits: int, load: Load
) -> None:
    written, _ = quantized(load("residual"), all_bits(bits))
    clips = [n for n in proto(written.ir).graph.node if n.op_type == "Clip"]
    records = [r for r in written.table.records if r.spec.kind == "activation"]
    if bits in (4, 8, 16):
        assert clips == []
        return
    tensors = {k: numpy_helper.to_array(t) for k, t in initializers(written.ir).items()}
    bounds = {n.input[0]: [float(tensors[i]) for i in n.input[1:]] for n in clips}
    assert bounds == {
        r.name: [float(level * r.scale[0]) for level in (np.float32(r.qtype.qmin), r.qtype.qmax)]
        for r in records
    }


def test_a_shared_weight_is_written_once(load: Load) -> None:
    for name in ("tied", "tied_transposed"):
        written, _ = quantized(load(name), all_bits(4))
        tensors = initializers(written.ir)
        assert sum(t.data_type == TensorProto.INT4 and len(t.dims) == 2
                   for t in tensors.values()) == 1  # fmt: skip
        assert ("weight" in tensors) == (name == "tied")  # a Mul reads it there


def test_weight_parameters_run_along_the_channels(load: Load) -> None:
    written, _ = quantized(load("conv_transpose"), all_bits(4))
    nodes = {n.output[0]: n for n in proto(written.ir).graph.node}
    for record in written.table.records:
        node = nodes[written.dequantized[record.name]]
        axes = [a.i for a in node.attribute if a.name == "axis"]
        assert axes == ([] if isinstance(record.spec.granularity, PerTensor) else [1])


def test_the_table_must_be_this_models(load: Load) -> None:
    table, _ = calibrated(load("tied"), all_bits(4))
    with pytest.raises(ModelError, match="the calibration table belongs to another model"):
        write_qdq(load("residual"), table)
