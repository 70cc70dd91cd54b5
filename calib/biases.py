"""Biases of layers that read quantized tensors: safe from onnxruntime's optimiser, corrected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.biasscales import IntegerBias
from calib.editing import Editor
from calib.prepare import QUANTIZABLE_OPS, is_constant

_OPSET_OF_OUTPUT_DTYPE = 21
_POSITION = 2  # of the bias among the inputs


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose bias can be corrected.

    Attributes:
        node: its name.
        output: name of the value that it makes.
        channels: how many channels that has.
        rank: number of axes, the second of which are the channels, of a convolution's output; None
            where the last axis are the channels.
        measured: name of the value in which its error is measured: ``output``, or the sum that
            this alone goes into.
    """

    node: str
    output: str
    channels: int
    rank: int | None
    measured: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a vector over the channels, so that it broadcasts against the output."""
        return (-1,) if self.rank is None else (-1, *[1] * (self.rank - 2))


def correctable(graph: ir.Graph, nodes: Iterable[str]) -> tuple[Layer, ...]:
    """Those of ``nodes`` that have a constant weight which tells their output channels, in graph
    order. Of layers that go into one sum, the last is measured there."""
    chosen = set(nodes)
    found = (_layer(node) for node in graph if node.name in chosen)
    layers = [layer for layer in found if layer is not None]
    last = {layer.measured: layer for layer in layers}
    return tuple(
        layer if last[layer.measured] is layer else replace(layer, measured=layer.output)
        for layer in layers
    )


def _layer(node: ir.Node) -> Layer | None:
    weight = node.inputs[1] if node.op_type in QUANTIZABLE_OPS and node.domain == "" else None
    if weight is None or not is_constant(weight):
        return None
    if weight.shape is None or len(weight.shape) < 2:
        return None
    shape, rank = weight.shape.numpy(), None
    if node.op_type == "Conv":
        channels, rank = shape[0], len(shape)
    elif node.op_type == "ConvTranspose":
        channels, rank = shape[1] * node.attributes.get_int("group", 1), len(shape)
    elif node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        channels = shape[0]
    else:
        channels = shape[-1]
    name = str(node.outputs[0].name)
    layer = Layer(str(node.name), name, channels, rank, name)
    return replace(layer, measured=str(_sum(node.outputs[0], layer).name))


def _sum(value: ir.Value, layer: Layer) -> ir.Value:
    """The value behind all Adds that ``value`` alone goes into, as long as it has the channels of
    the layer on the same axis."""
    while len(uses := list(value.uses())) == 1 and not value.is_graph_output():
        node = uses[0].node
        total = node.outputs[0]
        if node.op_type != "Add" or node.domain != "" or node.graph is not value.graph:
            break
        if total.shape is None or (layer.rank is not None and len(total.shape) != layer.rank):
            break
        axis = -1 if layer.rank is None else 1
        if len(total.shape) == 0 or total.shape[axis] != layer.channels:
            break
        value = total
    return value


def has_room(node: ir.Node) -> bool:
    """Whether a layer has, or can have, a constant bias that is added as it is."""
    if node.op_type == "MatMul" or node.attributes.get_float("beta", 1.0) != 1.0:
        return False
    bias = node.inputs[2] if len(node.inputs) > _POSITION else None
    return bias is None or (is_constant(bias) and bias.shape is not None and len(bias.shape) == 1)


def place_corrections(
    editor: Editor, corrections: Mapping[str, NDArray[np.float64]]
) -> dict[str, str]:
    """Adds ``corrections``, ``(C,)`` by the layer's name, to the biases inside the layers; those
    that have none get one. Returns the name of the constant for each layer."""
    held = {}
    for name, correction in corrections.items():
        node = editor.nodes[name]
        bias = node.inputs[_POSITION] if len(node.inputs) > _POSITION else None
        if bias is None:
            dtype = (node.outputs[0].dtype or ir.DataType.FLOAT).numpy()
            values = np.zeros(correction.shape, dtype)
            constant = editor.constant(f"{name}_correction", correction.astype(dtype))
        else:
            assert bias.const_value is not None
            values = bias.const_value.numpy()
            total = (values.astype(np.float64) + correction).astype(values.dtype)
            constant = editor.constant(f"{bias.name}_corrected", total)
        node.resize_inputs(_POSITION + 1)
        node.replace_input_with(_POSITION, constant)
        held[name] = str(constant.name)
        editor.originals[held[name]] = values
    return held


def correct_bias(editor: Editor, layer: Layer, correction: NDArray[np.float64]) -> str:
    """Adds ``correction``, ``(C,)``, to the constant bias behind a layer, or behind the layer where
    there is none; the name of the constant that now holds it."""
    output = editor.values[layer.output]
    found = _bias_of(output, layer)
    if found is not None:
        add, position, tensor = found
        bias = tensor.numpy()
        total = bias.astype(np.float64) + correction.reshape(bias.shape)
        constant = editor.constant(f"{tensor.name}_corrected", total.astype(bias.dtype))
        add.replace_input_with(position, constant)
        editor.originals[str(constant.name)] = bias
        return str(constant.name)
    dtype = (output.dtype or ir.DataType.FLOAT).numpy()
    shape = layer.shape
    if layer.rank is None and output.shape is not None and len(output.shape) > 1:
        shape = (1, -1)  # see _keep_from_gemm
    constant = editor.constant(f"{layer.node}_correction", correction.reshape(shape).astype(dtype))
    editor.originals[str(constant.name)] = np.zeros_like(correction.reshape(shape), dtype)
    _add_behind(editor, output, constant, f"{layer.node}_correct", "uncorrected")
    return str(constant.name)


def _bias_of(output: ir.Value, layer: Layer) -> tuple[ir.Node, int, ir.TensorProtocol] | None:
    """The Add that makes a layer's output, or alone reads it, the other side of which is a constant
    with one value for each channel; that side, and the constant."""
    uses = list(output.uses())
    alone = len(uses) == 1 and not output.is_graph_output()
    for node in (output.producer(), uses[0].node if alone else None):
        if node is None or node.op_type != "Add" or node.domain != "":
            continue
        for position, value in enumerate(node.inputs):
            tensor = value.const_value if value is not None and is_constant(value) else None
            if tensor is not None and _is_vector(tensor.shape.numpy(), layer):
                return node, position, tensor
    return None


def _is_vector(shape: Sequence[int], layer: Layer) -> bool:
    """Whether a constant of that shape has one value for each channel and no other axis."""
    axis = 1 if layer.rank is None else layer.rank - 1
    if len(shape) < axis or (layer.rank is not None and len(shape) > layer.rank):
        return False
    return shape[-axis] == layer.channels == math.prod(shape)


def _add_behind(
    editor: Editor, output: ir.Value, bias: ir.Value, node_name: str, without: str
) -> None:
    """What ``output`` and ``bias`` add up to takes the place and the name of ``output``."""
    name, producer = str(output.name), output.producer()
    assert producer is not None
    total = ir.Value(
        name=editor.new_name(f"{name}_with_bias"), type=output.type, shape=output.shape
    )
    add = ir.Node("", "Add", [output, bias], outputs=[total], name=editor.new_name(node_name))
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    editor.graph.insert_after(producer, add)
    output.name, total.name = editor.new_name(f"{name}_{without}"), name
    editor.values[name] = total


def move_bias(editor: Editor, node: ir.Node) -> str | None:
    """Turns the bias of ``node`` into an Add behind it, and returns the name of what is added.

    onnxruntime rounds the float bias of DequantizeLinear → Conv → QuantizeLinear to int32 at
    s_x·s_w, at 4 bits visibly (method.md, section 4); it leaves an Add alone.
    """
    if node.op_type == "MatMul":
        _keep_from_gemm(editor, node)
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias = node.inputs[2]
    node.resize_inputs(2)
    if node.op_type == "Gemm":
        beta = node.attributes.pop("beta", None)
        if beta is not None and beta.as_float() != 1.0:
            bias = _scaled(editor, bias, beta.as_float())
    else:
        bias = _channels_first(editor, bias, node)
    _add_behind(editor, node.outputs[0], bias, f"{node.name}_bias", "without_bias")
    return bias.name


def store_bias(editor: Editor, node: ir.Node, bias: IntegerBias) -> str:
    """Gives ``node`` its bias as int32 behind a DequantizeLinear of which the scale is exactly
    s_x·s_w: integer kernels add the integers as they are, and never read that scale. Returns the
    name of the dequantized bias."""
    value = node.inputs[2]
    assert value is not None
    assert value.const_value is not None
    integers = bias.integers(value.const_value.numpy())
    per_tensor = bias.weight.scale.size == 1
    scale = bias.scale.reshape(()) if per_tensor else bias.scale
    inputs = [
        editor.constant(f"{bias.name}_quantized", integers),
        editor.constant(f"{bias.name}_scale", scale),
        editor.constant(f"{bias.name}_zero_point", np.zeros(scale.shape, np.int32)),
    ]
    axis = [] if per_tensor else [ir.AttrInt64("axis", 0)]
    result = editor.node("DequantizeLinear", inputs, f"{bias.name}_dequantized", value, axis)
    node.replace_input_with(2, result)
    return str(result.name)


def _keep_from_gemm(editor: Editor, node: ir.Node) -> None:
    """Gives the bias of an Add behind a MatMul a second axis: of one, onnxruntime 1.31 makes a
    Gemm, which it cannot load where the data is int8, has 3 axes, and the opset is 21."""
    output = node.outputs[0]
    if editor.opset < _OPSET_OF_OUTPUT_DTYPE or output.shape is None or len(output.shape) < 3:
        return
    for add in [use.node for use in output.uses() if use.node.op_type == "Add"]:
        for position, bias in enumerate(add.inputs):
            tensor = bias.const_value if bias is not None and is_constant(bias) else None
            if tensor is not None and len(tensor.shape) == 1:
                row = editor.constant(f"{tensor.name}_row", tensor.numpy().reshape(1, -1))
                add.replace_input_with(position, row)


def _scaled(editor: Editor, bias: ir.Value, beta: float) -> ir.Value:
    if is_constant(bias) and bias.const_value is not None:
        array = bias.const_value.numpy()
        scaled = (np.float32(beta) * array).astype(array.dtype)
        return editor.constant(f"{bias.name}_scaled", scaled)
    dtype = (bias.dtype or ir.DataType.FLOAT).numpy()
    factor = editor.constant(f"{bias.name}_beta", np.asarray(beta, dtype))
    return editor.node("Mul", [bias, factor], f"{bias.name}_scaled", bias)


def _channels_first(editor: Editor, bias: ir.Value, node: ir.Node) -> ir.Value:
    """A convolution's bias ``(C,)`` so that it broadcasts against ``(N, C, …)``."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    shape = (-1, *[1] * (len(weight.shape) - 2))
    if is_constant(bias) and bias.const_value is not None:
        return editor.constant(f"{bias.name}_channels", bias.const_value.numpy().reshape(shape))
    target = editor.constant(f"{bias.name}_shape", np.array(shape, np.int64))
    return editor.node("Reshape", [bias, target], f"{bias.name}_channels")
