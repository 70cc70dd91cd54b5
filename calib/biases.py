"""Biases of layers whose inputs are quantized, made safe from onnxruntime's optimiser."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.biasscales import IntegerBias
from calib.editing import Editor
from calib.prepare import is_constant

_OPSET_OF_OUTPUT_DTYPE = 21


def move_bias(editor: Editor, node: ir.Node) -> None:
    """Turns the bias of ``node`` into an Add behind it.

    onnxruntime rounds the float bias of DequantizeLinear → Conv → QuantizeLinear to int32 at
    s_x·s_w, at 4 bits visibly (method.md, section 4); it leaves an Add alone.
    """
    if node.op_type == "MatMul":
        _keep_from_gemm(editor, node)
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    bias = node.inputs[2]
    node.resize_inputs(2)
    if node.op_type == "Gemm":
        beta = node.attributes.pop("beta", None)
        if beta is not None and beta.as_float() != 1.0:
            bias = _scaled(editor, bias, beta.as_float())
    else:
        bias = _channels_first(editor, bias, node)
    output = node.outputs[0]
    name = output.name
    with_bias = editor.new_name(f"{name}_with_bias")
    total = ir.Value(name=with_bias, type=output.type, shape=output.shape)
    add_name = editor.new_name(f"{node.name}_bias")
    add = ir.Node("", "Add", [output, bias], outputs=[total], name=add_name)
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    editor.graph.insert_after(node, add)
    output.name, total.name = editor.new_name(f"{name}_without_bias"), name
    editor.values[name] = total


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
