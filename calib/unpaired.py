"""A written model without what quantization put into it, to be held against the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.biases import place_corrections
from calib.biasscales import integer_biases
from calib.editing import Editor
from calib.errors import VerificationError
from calib.granularity import PerTensor, pieces
from calib.graph import Model
from calib.prepare import all_names, remove_unused, unique_name
from calib.saving import Quantized

_BIAS = 2  # its position among a layer's inputs


def without_pairs(model: Model, quantized: Quantized, path: Path) -> ir.Model:
    """The model at ``path``, changed so that every consumer reads the float tensor again, and
    biases are the original's."""
    written = ir.load(path)
    values = {v.name: v for node in written.graph for v in node.outputs}
    values.update({v.name: v for v in written.graph.inputs})
    names = all_names(written)
    for record in quantized.table.records:
        if record.spec.kind == "weight":
            tensor = model.ir.graph.initializers[record.name].const_value
            name = unique_name(f"{record.name}_float", names)
            source = ir.Value(name=name, const_value=tensor)
            written.graph.register_initializer(source)
        else:
            source = values[quantized.sources.get(record.name, record.name)]
        pair = values[quantized.dequantized[record.name]]
        pair.replace_all_uses_with(source, replace_graph_outputs=True)
        if record.name in quantized.sources:
            pair.name, source.name = source.name, record.name
    _with_float_biases(model, quantized, written, values)
    _uncorrect(quantized, written)
    remove_unused(written)
    for name, value in written.graph.initializers.items():
        # Read from the float model where equal: onnxruntime takes external data of one folder.
        original = model.ir.graph.initializers.get(name)
        if original is not None and _same_on_disk(value.const_value, original.const_value):
            value.const_value = original.const_value
    return written


def _with_float_biases(
    model: Model, quantized: Quantized, written: ir.Model, values: Mapping[str | None, ir.Value]
) -> None:
    """The layers whose biases are integers get those of the original model, or 0."""
    nodes = {node.name: node for node in model.ir.graph}
    names = all_names(written)
    for layer, name in quantized.biases.items():
        pair, inputs = values[name], nodes[layer].inputs
        bias = inputs[_BIAS] if len(inputs) > _BIAS else None
        if bias is not None and bias.const_value is not None:
            tensor: ir.TensorProtocol = bias.const_value
        else:
            assert pair.shape is not None
            tensor = ir.tensor(np.zeros(pair.shape.numpy(), np.float32))
        source = ir.Value(name=unique_name(f"{layer}_float_bias", names), const_value=tensor)
        written.graph.register_initializer(source)
        pair.replace_all_uses_with(source)


def _uncorrect(quantized: Quantized, written: ir.Model) -> None:
    """Takes the stated corrections out; exactly, where they are what was written."""
    for layer, name in quantized.corrected.items():
        constant = written.graph.initializers[name]
        assert constant.const_value is not None
        bias = constant.const_value.numpy()
        correction = quantized.table.bias_corrections[layer].reshape(bias.shape)
        without = (bias.astype(np.float64) - correction).astype(bias.dtype)
        original = quantized.uncorrected.get(name)
        if original is not None:
            stated = (original.astype(np.float64) + correction).astype(bias.dtype)
            without = original if np.array_equal(stated, bias) else without
        constant.const_value = ir.tensor(without, name=name)


def _same_on_disk(one: object, other: object) -> bool:
    if not isinstance(one, ir.ExternalTensor) or not isinstance(other, ir.ExternalTensor):
        return False
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    arrays = [tensor.numpy().reshape(-1).view(np.uint8) for tensor in (one, other)]
    parts = pieces(arrays[0].shape, PerTensor())
    same = all(np.array_equal(arrays[0][index], arrays[1][index]) for index, _ in parts)
    del arrays
    one.release()
    other.release()
    return same


def check_biases(model: Model, quantized: Quantized, written: ir.Model) -> None:
    """Raises `VerificationError` unless the integers and scales of int32 biases are those that
    kernels add at s_x·s_w."""
    values = {v.name: v for node in written.graph for v in node.outputs}
    graph, table = model.ir.clone(), quantized.table
    if quantized.biases:
        place_corrections(Editor(graph), table.bias_corrections)
    found = {bias.node: bias for bias in integer_biases(graph.graph, table)}
    for node, name in quantized.biases.items():
        bias, producer = found[node], values[name].producer()
        assert producer is not None
        integers, scale = (_constant(producer, position) for position in (0, 1))
        tensor = graph.graph.initializers[bias.name].const_value
        assert tensor is not None
        wanted = bias.integers(tensor.numpy())
        if not (
            np.array_equal(integers, wanted.squeeze())
            and np.array_equal(scale, bias.scale.squeeze())
        ):
            raise VerificationError(f"bias {bias.name!r} of {node!r}: written wrongly")


def _constant(node: ir.Node, position: int) -> NDArray[Any]:
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().squeeze()
