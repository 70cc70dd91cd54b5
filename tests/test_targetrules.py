"""The rules of each target: a graph that keeps them, and for each rule one that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Save, calibrated
from models import parsed, values

from calib.errors import VerificationError
from calib.graph import load_model
from calib.rules import TARGETS as NAMES
from calib.rules import Rules
from calib.targetrules import (
    RULES,
    Rule,
    bias_scales,
    broken_rules,
    byte_types,
    check_target,
    concat_one_grid,
    float_biases,
    signed_weights,
    trt_activations_per_tensor,
    trt_both_inputs,
    trt_channel_axis,
    trt_constant_scales,
    trt_int4_weights_only,
    trt_no_quantized_bias,
    trt_one_branch,
    trt_pairs_meet,
    trt_positive_scales,
    trt_symmetric,
    trt_types,
    weights_apart,
)
from calib.targets import TARGETS
from calib.write import write_qdq

# {0}: type of the activation's integers, {1}: of the weight's.
LAYER = """(float[N,4,3,3] x, float given) => (float[N,4,3,3] y)
<float sx = {{0.5}}, {a} zx = {{{zx}}}, float[{n}] sw = {{{sw}}}, {w}[{n}] zw = {{{zw}}},
 {w}[4,4,1,1] kernel, float[4] bias, {a}[4] zc = {{0,0,0,0}}, float[4] sc = {{1,1,1,1}},
 int32[4] ib = {{1,2,3,4}}, float sb = {{{sb}}}> {{
  q = QuantizeLinear{qa}(x, {scale}, {zero})
  d = DequantizeLinear{qa}(q, {scale2}, {zero})
  k = DequantizeLinear<axis={axis}>(kernel, sw, zw)
  b = DequantizeLinear(ib, sb)
  y = Conv({read})
  {twice}
}}"""
USUAL: dict[str, object] = {
    "a": "int8",
    "w": "int8",
    "zx": 0,
    "n": 4,
    "sw": "1,1,1,1",
    "zw": "0,0,0,0",
    "axis": 0,
    "scale": "sx",
    "zero": "zx",
    "scale2": "sx",
    "qa": "",
    "read": "d, k, bias",
    "sb": 0.5,
    "twice": "",
}
RESIDUAL = """(float[N,4,3,3] x) => (float[N,4,3,3] y)
<float s = {{0.5}}, float t = {{0.25}}, int8 z = {{0}}, float[4,4,1,1] kernel> {{
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  inner = Conv(x, kernel)
  qi = QuantizeLinear(inner, t, z)
  di = DequantizeLinear(qi, t, z)
  y = {}
}}"""


def graph_of(text: str) -> ir.Graph:
    kernel = values(4, 4, 1, 1)
    given = {"bias": values(4)}
    if "float[4,4,1,1] kernel" in text:
        given["kernel"] = kernel
    return ir.from_proto(parsed(text, given, opset=21, ir_version=10)).graph


def layer(**changes: object) -> ir.Graph:
    settings = {**USUAL, **changes}
    text = LAYER.format(**settings)
    if "b" not in str(settings["read"]).split(", "):
        text = text.replace("  b = DequantizeLinear(ib, sb)\n", "")
    kind = str(settings["w"])
    text = text.replace(f"{kind}[4,4,1,1] kernel", "float[4,4,1,1] kernel")
    model = ir.Model(graph_of(text), ir_version=10)
    value = model.graph.initializers["kernel"]
    dtype = ir.DataType[kind.upper()]
    array = np.abs(np.rint(4 * values(4, 4, 1, 1))).astype(dtype.numpy())
    value.const_value = ir.tensor(array, dtype=dtype, name="kernel")
    value.type = ir.TensorType(dtype)
    return model.graph


# Rule, the graph that breaks it, what is said.
BROKEN: dict[Rule, tuple[Callable[[], ir.Graph], str]] = {
    trt_types: (
        lambda: layer(a="uint8"),
        "QuantizeLinear of 'x' is UINT8, TensorRT takes INT8 and INT4",
    ),
    trt_symmetric: (lambda: layer(zx=3), "QuantizeLinear of 'x' has a zero point other than 0"),
    trt_positive_scales: (
        lambda: layer(sw="1,0,1,1"),
        "DequantizeLinear of 'kernel' has a scale that is not positive",
    ),
    trt_constant_scales: (
        lambda: layer(scale="given", scale2="given"),
        "QuantizeLinear of 'x' has a scale or zero point that is not constant",
    ),
    trt_no_quantized_bias: (
        lambda: layer(read="d, k, b"),
        "the bias of '/Conv/y' comes from a DequantizeLinear",
    ),
    trt_activations_per_tensor: (
        lambda: layer(scale="sc", scale2="sc", zero="zc", qa="<axis=1>"),
        "QuantizeLinear of 'x' is an activation with 4 scales",
    ),
    trt_channel_axis: (
        lambda: layer(axis=1),
        "DequantizeLinear of 'kernel' has scales along axis 1, not 0",
    ),
    trt_int4_weights_only: (
        lambda: layer(w="int4"),
        "'/Conv/y' has an INT4 weight and a quantized activation",
    ),
    trt_both_inputs: (
        lambda: layer(read="x, k, bias"),
        "'/Conv/y' has one INT8 input and one float input",
    ),
    trt_one_branch: (
        lambda: graph_of(RESIDUAL.format("Add(di, d)")),
        "both branches of '/Add/y' are quantized: one alone may be",
    ),
    trt_pairs_meet: (
        lambda: layer(scale2="sb", sb=0.125),
        "QuantizeLinear of 'x' is not followed by its own DequantizeLinear",
    ),
    byte_types: (
        lambda: layer(a="int16"),
        "QuantizeLinear of 'x' is INT16, integer kernels take 8 bits",
    ),
    signed_weights: (
        lambda: layer(w="uint8"),
        "the weight of '/Conv/y' is not signed and symmetric",
    ),
    bias_scales: (
        lambda: layer(read="d, k, b", sb=0.125),
        "the scale of the bias of '/Conv/y' is not that of its inputs' product",
    ),
    concat_one_grid: (
        lambda: graph_of(RESIDUAL.format("Concat<axis=1>(d, di)")),
        "the inputs of '/Concat/y' have several scales",
    ),
    weights_apart: (
        lambda: layer(read="d, k, bias", twice="z = Conv(d, k)"),
        "'/Conv/y' and '/Conv/z' share a quantized weight",
    ),
    float_biases: (
        lambda: layer(read="d, k, b"),
        "the bias of '/Conv/y' comes from a DequantizeLinear",
    ),
}


def test_every_rule_of_every_target_has_a_graph_that_breaks_it() -> None:
    assert set(BROKEN) == {rule for rules in RULES.values() for rule in rules}
    assert tuple(RULES) == NAMES == tuple(TARGETS)
    assert len(RULES["tensorrt"]) == 11
    assert all(rule.__doc__ for rule in BROKEN)


@pytest.mark.parametrize("target", NAMES)
def test_a_graph_within_the_rules_breaks_none(target: str) -> None:
    assert [text for rule in RULES[target] for text in rule(layer())] == []


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_rule_names_what_breaks_it(rule: Rule) -> None:
    graph, message = BROKEN[rule]
    broken = graph()
    # Serialized once, so that what is checked is a graph as ONNX writes it.
    model = ir.from_proto(ir.to_proto(ir.Model(broken, ir_version=10)))
    assert next(iter(rule(model.graph))) == message


def test_an_add_of_one_quantized_branch_keeps_the_rule() -> None:
    assert list(trt_one_branch(graph_of(RESIDUAL.format("Add(inner, d)")))) == []


def test_weights_in_int4_alone_are_within_tensorrts_rules() -> None:
    graph = layer(w="int4", read="x, k, bias")
    assert list(trt_int4_weights_only(graph)) == []
    assert list(trt_types(graph)) == []


def test_a_model_that_breaks_a_rule_of_its_target_is_not_kept(save: Save, tmp_path: Path) -> None:
    text = """(float[N,4] x) => (float[N,3] y) <float[4,3] w> { y = MatMul(x, w) }"""
    model = load_model(save(parsed(text)))
    table, _ = calibrated(model, Rules(target="onnxruntime"))
    quantized = write_qdq(model, table).write(tmp_path / "written.onnx")
    check_target(quantized.ir, "onnxruntime")
    assert list(broken_rules(quantized.ir, "tensorrt"))
    with pytest.raises(VerificationError) as caught:
        check_target(quantized.ir, "tensorrt")
    assert str(caught.value) == (
        "target tensorrt: QuantizeLinear of 'x' is UINT8, TensorRT takes INT8 and INT4; keep that "
        "tensor float with --exclude, or use target generic"
    )
