"""A part of a model computes what the whole model does, and leaves it as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
import pytest
from conftest import Load, Save
from models import MODELS, feed_for, parsed

from calib.graph import Model, load_model
from calib.parts import copy_for, part_for, shareable, take_out


def computed(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    read = {node.name for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    values = session.run(names, {name: array for name, array in feed.items() if name in read})
    return dict(zip(names, values, strict=True))


def inner(model: Model) -> list[str]:
    return [str(value.name) for node in model.ir.graph for value in node.outputs]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "already_quantized"])
def test_a_part_computes_each_value_as_the_model_with_all_of_them_does(
    name: str, load: Load
) -> None:
    model, feed = load(name), feed_for(MODELS[name]())
    whole = computed(part_for(model.ir, inner(model)), feed)
    before = ir.to_proto(model.ir).SerializeToString()
    assert list(whole) == inner(model)
    for value, expected in whole.items():
        for part in (part_for(model.ir, [value]), copy_for(model.ir, [value])):
            found = computed(part, feed)[value]
            # onnxruntime computes float16 in float32, and rounds what is an output.
            tolerance = 1e-3 if name == "float16_conv" else 0
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert ir.to_proto(model.ir).SerializeToString() == before


def test_a_part_has_nothing_that_its_outputs_do_not_need(load: Load) -> None:
    model = load("residual")
    first = inner(model)[0]
    part = part_for(model.ir, [first]).graph
    made = [str(value.name) for node in part for value in node.outputs]
    read = {value.name for node in part for value in node.inputs if value is not None}
    assert made == [first]
    assert set(part.initializers) <= read
    assert len(part.initializers) < len(model.ir.graph.initializers)


def test_without_names_that_a_node_makes_the_part_is_the_whole(load: Load) -> None:
    model = load("residual")
    whole = [value.name for value in model.ir.graph.outputs]
    for names in (None, [], [model.inputs[0].name], ["nobody"]):
        for part in (part_for(model.ir, names), copy_for(model.ir, names)):
            assert [value.name for value in part.graph.outputs] == whole
            assert len(list(part.graph)) == len(list(model.ir.graph))


def test_outputs_that_no_node_makes_or_reads_stay_where_only_inputs_are_wanted(save: Save) -> None:
    text = """(float[N,4] x, float[N,2] u) => (float[N,4] y, float[N,2] u, float[4] c)
        <float[4,4] w, float[4] c> { y = MatMul(x, w) }"""
    model = load_model(save(parsed(text)))
    for part in (part_for(model.ir, ["x"]), copy_for(model.ir, ["x"])):
        assert [value.name for value in part.graph.outputs] == ["y", "u", "c"]


def test_an_initializer_replaced_in_a_part_stays_in_the_model(load: Load) -> None:
    model = load("conv_bias")
    part = part_for(model.ir).graph
    name = next(iter(part.initializers))
    before = model.weight(name).copy()
    part.initializers[name] = ir.Value(name=name, const_value=ir.tensor(before * 2, name=name))
    np.testing.assert_array_equal(model.weight(name), before)


def test_what_is_taken_out_of_a_part_is_said_to_lie_elsewhere_and_the_rest_stays(
    load: Load,
) -> None:
    model = load("conv_bias")
    before = ir.to_proto(model.ir).SerializeToString()
    part = part_for(model.ir)
    taken = shareable(part)[:1]
    proto, arrays = take_out(part, taken)
    assert list(arrays) == [value.name for value in taken]
    constants = {constant.name: constant for constant in proto.graph.initializer}
    assert set(constants) == set(model.ir.graph.initializers)
    for name, constant in constants.items():
        weight = model.ir.graph.initializers[name].const_value
        assert weight is not None
        assert (constant.data_type, list(constant.dims)) == (weight.dtype.value, list(weight.shape))
        if name in arrays:
            np.testing.assert_array_equal(arrays[name], weight.numpy())
            assert {entry.key: entry.value for entry in constant.external_data} == {
                "location": "in-memory",
                "offset": "0",
                "length": str(weight.nbytes),
            }
        else:
            np.testing.assert_array_equal(ir.from_proto(constant).numpy(), weight.numpy())
    assert not proto.graph.value_info
    typed = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    assert typed == {
        value.name: ir.to_proto(value)
        for value in (*model.ir.graph.inputs, *model.ir.graph.outputs)
    }
    assert ir.to_proto(model.ir).SerializeToString() == before


def test_shapes_are_told_where_they_may_not_follow_from_those_of_inputs() -> None:
    """onnxruntime cannot know what a Reshape makes of a shape that it is fed, and would fuse the
    nodes behind it in another way."""
    text = """
        <ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[n, 8] x, int64[2] shape) => (float[a, b] z)
        <float[n, 8] u, float[4, 4] v, float[4, 4] w, float[4, 4] y> {
            u = Relu (x)
            v = Reshape (u, shape)
            w = Relu (v)
            y = com.microsoft.Gelu (w)
            z = Relu (y)
        }
    """
    model = ir.from_onnx_text(text)
    proto, _ = take_out(part_for(model), [])
    told = {value.name: value for value in proto.graph.value_info}
    assert told == {
        node.outputs[0].name: ir.to_proto(node.outputs[0])
        for node in model.graph
        if node.op_type in ("Reshape", "Gelu")
    }
