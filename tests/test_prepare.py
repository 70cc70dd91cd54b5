"""Preparing a model changes its graph and nothing that it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, Save
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CONV_BN_RELU,
    MODELS,
    Array,
    feed_for,
    gemm,
    norm,
    parsed,
    run,
    values,
    weight_chain,
    weights_are_inputs,
)
from onnx import helper

from calib.graph import load_model
from calib.prepare import prepare

NORMALS = norm(4) | norm(4, "other_", seed=9)

CONV_TWICE = """(float[N,3,6,6] image, float[N,3,6,6] second)
=> (float[N,4,6,6] y, float[N,4,6,6] z) <float[4,3,3,3] kernel, float[4] bias> {{
  conv1 = Conv<pads=[1,1,1,1]>(image, kernel{bias})
  y = BatchNormalization(conv1, scale, shift, mean, var)
  conv2 = Conv<pads=[1,1,1,1]>(second, kernel{bias})
  z = {second}
}}"""
OTHER_NORM = "BatchNormalization(conv2, other_scale, other_shift, other_mean, other_var)"

AFTER_CONV = """(float[N,3,6,6] image) => (float[N,4,6,6] y{more}) <float[4,3,3,3] kernel> {{
  conv = Conv<pads=[1,1,1,1]>(image, kernel)
  normal{outputs} = BatchNormalization<{attributes}>(conv, scale, shift, mean, var)
  y = {end}
}}"""
PLAIN = {"more": "", "outputs": "", "attributes": "epsilon=0.01", "end": "Relu(normal)"}

FOLDABLE: dict[str, Callable[[], onnx.ModelProto]] = {
    "Conv": MODELS["conv_bn_relu"],
    "Conv, epsilon of its own": partial(parsed, AFTER_CONV.format(**PLAIN), norm(4)),
    "ConvTranspose, grouped": MODELS["conv_transpose"],
    "Gemm without C": partial(gemm, end="BatchNormalization"),
    "Gemm, C for each column": partial(gemm, values(5), end="BatchNormalization"),
}
GEMMS = {
    "Gemm, alpha and beta": partial(gemm, values(5), "alpha=0.5, beta=3.0"),
    "Gemm, alpha": partial(gemm, None, "alpha=0.5"),
    "Gemm, beta and no C": partial(gemm, None, "beta=0.5"),
    "Gemm, transA and transB": partial(gemm, values(5), "transA=1, transB=1", values(5, 6)),
    "Gemm, scalar C": partial(gemm, values()),
    "Gemm, C of one value": partial(gemm, values(1)),
    "Gemm, C for each row": partial(gemm, values(6, 1)),
    "Gemm, two-dimensional C": partial(gemm, values(6, 5)),
    "Gemm, C of one row": partial(gemm, values(1, 5)),
}
CONVS = {
    "a weight of two layers, both normalized": (CONV_TWICE, {"bias": "", "second": OTHER_NORM}),
    "weight and bias of two layers": (CONV_TWICE, {"bias": ", bias", "second": OTHER_NORM}),
    "a weight of two layers, one normalized": (CONV_TWICE, {"bias": "", "second": "Relu(conv2)"}),
    "a Conv that is read twice": (AFTER_CONV, PLAIN | {"end": "Add(normal, conv)"}),
    "a Conv that is an output too": (AFTER_CONV, PLAIN | {"more": ", float[N,4,6,6] conv"}),
    "two in a row": (
        AFTER_CONV,
        PLAIN
        | {"end": "BatchNormalization(normal, other_scale, other_shift, other_mean, other_var)"},
    ),
    "one in training mode": (
        AFTER_CONV,
        PLAIN | {"outputs": ", new_mean, new_var", "attributes": "training_mode=1"},
    ),
}


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_outputs(original: onnx.ModelProto, prepared: ir.Model) -> None:
    feed = feed_for(original)
    expected, actual = run(original, feed), run(ir.to_proto(prepared), feed)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        unit = float(np.abs(array).max())
        np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5 * unit + 1e-30)


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_passes_the_checker_and_gives_the_same_outputs(
    name: str, load: Load
) -> None:
    prepared = load(name).ir
    onnx.checker.check_model(ir.to_proto(prepared), full_check=True)
    assert_same_outputs(MODELS[name](), prepared)


@pytest.mark.parametrize("name", FOLDABLE)
def test_batchnorm_is_folded_into_the_layer_before_it(name: str, save: Save) -> None:
    original = FOLDABLE[name]()
    model = load_model(save(original))
    assert "BatchNormalization" not in op_types(model.ir)
    assert model.notes == ("1 BatchNormalization nodes folded into the layer before them",)
    assert_same_outputs(original, model.ir)


@pytest.mark.parametrize("name", GEMMS)
def test_a_batchnorm_behind_any_gemm_is_folded_right_or_left_alone(name: str, save: Save) -> None:
    original = GEMMS[name](end="BatchNormalization")
    assert_same_outputs(original, load_model(save(original)).ir)


@pytest.mark.parametrize("name", CONVS)
def test_a_batchnorm_behind_any_conv_is_folded_right_or_left_alone(name: str, save: Save) -> None:
    text, parts = CONVS[name]
    original = parsed(text.format(**parts), NORMALS)
    assert_same_outputs(original, load_model(save(original)).ir)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_folding_is_exact_for_any_statistics(data: st.DataObject) -> None:
    def draw(low: float, high: float) -> Array:
        floats = st.floats(low, high, width=32, allow_subnormal=False)
        return np.array(data.draw(st.lists(floats, min_size=4, max_size=4)), np.float32)

    statistics = {
        "scale": draw(-4, 4), "shift": draw(-4, 4), "mean": draw(-4, 4), "var": draw(0, 16),
    }  # fmt: skip
    original = parsed(AFTER_CONV.format(**PLAIN), statistics)
    prepared = ir.from_proto(original)
    prepare(prepared)
    assert op_types(prepared) == ["Conv", "Relu"]
    assert_same_outputs(original, prepared)


def test_the_layer_keeps_its_name_and_the_value_behind_it_the_name_of_the_batchnorms(
    load: Load,
) -> None:
    for name, layer in (
        ("conv_bn_relu", "/Conv/conv"),
        ("conv_transpose", "/ConvTranspose/up"),
    ):
        node = next(n for n in load(name).ir.graph if n.name == layer)
        assert node.outputs[0].name == "normal"


def test_a_folded_layer_keeps_its_doc_string(save: Save) -> None:
    original = MODELS["conv_bn_relu"]()
    original.graph.node[0].doc_string = "from stage 1"
    first = load_model(save(original)).ir.graph[0]
    assert (first.op_type, first.doc_string) == ("Conv", "from stage 1")


@pytest.mark.parametrize("name", [n for n in MODELS if n != "unnamed"])
def test_names_of_nodes_inputs_and_outputs_are_kept(name: str, load: Load) -> None:
    original, prepared = MODELS[name](), load(name).ir
    constants = {t.name for t in original.graph.initializer}
    inputs = [i.name for i in original.graph.input if i.name not in constants]
    assert [v.name for v in prepared.graph.inputs] == inputs
    assert [v.name for v in prepared.graph.outputs] == [o.name for o in original.graph.output]
    assert {n.name for n in prepared.graph} <= {n.name for n in original.graph.node}


def test_nodes_without_a_name_are_named_after_what_they_do_and_make(load: Load) -> None:
    model = load("unnamed").ir
    assert [n.name for n in model.graph] == [
        f"{n.op_type}_{n.output[0]}" for n in MODELS["unnamed"]().graph.node
    ]


def test_constant_chains_behind_weights_become_initializers(save: Save) -> None:
    original = weight_chain()
    model = load_model(save(original))
    assert op_types(model.ir) == ["MatMul", "Relu", "MatMul"]
    layers = [node for node in model.ir.graph if node.op_type == "MatMul"]
    weights = [str(node.inputs[1] and node.inputs[1].name) for node in layers]
    np.testing.assert_array_equal(model.weight(weights[0]), values(4, 6).T)
    np.testing.assert_array_equal(model.weight(weights[1]), 3 * values(4, 3))
    assert sorted(model.ir.graph.initializers) == sorted(weights)


TOLD = """(float[N,4,6,6] x) => (float[N,4,3,7] y) <float[4,4,1,1] kernel> {
  shape = Shape(six)
  missing = Sub(eight, shape)
  zeros = ConstantOfShape<value = int64[1] {0}>(missing)
  pads = Concat<axis=0>(six, zeros)
  half = Slice(x, start, shape, axis, step)
  padded = Pad(half, pads)
  y = Conv(padded, kernel)
}"""
PLACES = {
    "six": np.array([0, 0, 0, 1, 0, 0], np.int64),
    "eight": np.array([8], np.int64),
    "start": np.zeros(1, np.int64),
    "axis": np.array([2], np.int64),
    "step": np.array([2], np.int64),
}


def test_places_computed_from_constants_become_numbers_and_shapes_behind_them_are_known(
    save: Save,
) -> None:
    original = parsed(TOLD, PLACES)
    model = load_model(save(original))
    assert [node.op_type for node in model.ir.graph] == ["Slice", "Pad", "Conv"]
    shapes = {v.name: str(v.shape) for node in model.ir.graph for v in node.outputs}
    assert shapes == {"half": "[N,4,3,6]", "padded": "[N,4,3,7]", "y": "[N,4,3,7]"}
    feed = feed_for(original)
    expected = run(original, feed)
    prepared = run(ir.to_proto(model.ir), feed)
    np.testing.assert_array_equal(prepared["y"], expected["y"])


@pytest.mark.parametrize(
    "maker", ["ConstantOfShape<value=int64[1] {0}>(much)", "Expand(one, much)"]
)
def test_a_place_computed_from_much_is_left_to_onnxruntime(maker: str, save: Save) -> None:
    text = f"""(float[N,4,6,6] x) => (float[N,4,A,B] y) <float[4,4,1,1] kernel> {{
      many = {maker}
      least = ReduceMin<keepdims=0>(many)
      start = Unsqueeze(least, none)
      half = Slice(x, start, end, axis, step)
      y = Conv(half, kernel)
    }}"""
    given = {name: PLACES[name] for name in ("axis", "step")} | {
        "much": np.array([10**5], np.int64),
        "one": np.zeros(1, np.int64),
        "none": np.zeros(1, np.int64),
        "end": np.array([6], np.int64),
    }
    original = parsed(text, given)
    model = load_model(save(original))
    made = [v.name for node in model.ir.graph for v in node.outputs]
    assert made == ["many", "least", "start", "half", "y"]
    assert max(model.weight(name).size for name in model.ir.graph.initializers) < 100
    feed = feed_for(original)
    prepared, expected = run(ir.to_proto(model.ir), feed), run(original, feed)
    np.testing.assert_array_equal(prepared["y"], expected["y"])


def test_large_weights_are_folded_too(save: Save) -> None:
    """The folding of constants that this builds on has limits of size, made for other uses."""
    text = """(float[N,100] x) => (float[N,100] y) <float[100,100] stored> {
      turned = Transpose<perm=[1,0]>(stored)
      shaped = Reshape(turned, shape)
      y = MatMul(x, shaped)
    }"""
    model = load_model(save(parsed(text, {"shape": np.array([100, -1])})))
    assert op_types(model.ir) == ["MatMul"]
    np.testing.assert_array_equal(model.weight("shaped"), values(100, 100).T)


def test_constants_that_grow_are_folded_where_they_make_a_weight_and_nowhere_else(
    save: Save,
) -> None:
    text = """(float[N,6] x) => (float[N,4] y) {
      weight = Expand(one, shape)
      linear = MatMul(x, weight)
      large = Expand(one, huge)
      total = ReduceSum<keepdims=0>(large)
      y = Add(linear, total)
    }"""
    constants = {"shape": np.array([6, 4]), "huge": np.array([1000, 1000])}
    model = load_model(save(parsed(text, constants | {"one": values(1, 1)})))
    assert op_types(model.ir).count("Expand") == 1
    assert model.weight("weight").shape == (6, 4)
    constants_now = [v.const_value for v in model.ir.graph.initializers.values()]
    assert all(tensor is not None and tensor.size < 100 for tensor in constants_now)


def test_initializers_that_are_inputs_become_constants_and_a_note_says_so(save: Save) -> None:
    model = load_model(save(weights_are_inputs()))
    assert [v.name for v in model.ir.graph.inputs] == ["image"]
    assert model.notes == ("6 initializers were also graph inputs: they are constants now",)


def test_a_model_with_nothing_to_prepare_gives_no_notes(load: Load) -> None:
    assert load("conv_bias").notes == ()


@pytest.mark.parametrize("name", MODELS)
def test_preparing_twice_changes_nothing_more(name: str, load: Load) -> None:
    once = load(name).ir.clone()
    before = ir.to_proto(once)
    assert prepare(once) == ()
    assert ir.to_proto(once) == before


def test_a_branch_of_an_if_still_reads_what_it_read(save: Save) -> None:
    original = MODELS["if_subgraph"]()
    normalized = helper.make_node(
        "BatchNormalization", ["first", *norm(4)], ["normal"], "norm", epsilon=1e-3
    )
    original.graph.node[1].input[0] = "normal"
    original.graph.node.insert(1, normalized)
    weights = parsed(CONV_BN_RELU, norm(4)).graph.initializer
    original.graph.initializer.extend(t for t in weights if t.name in norm(4))
    model = load_model(save(original))
    assert "BatchNormalization" not in op_types(model.ir)
    assert_same_outputs(original, model.ir)
