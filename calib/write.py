"""Write a calibration table into a model: QDQ pairs, integer weights, biases made safe."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray
from onnxscript import version_converter

from calib.errors import ModelError, one_line
from calib.files import whole_file, writing
from calib.granularity import onnx_axis
from calib.graph import Model
from calib.prepare import QUANTIZABLE_OPS, kept_interface
from calib.qtypes import Storage
from calib.quantize import quantize
from calib.table import CalibrationTable, TensorRecord, dumps

METADATA_KEY = "octav_calibrate"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A QDQ model in memory.

    Attributes:
        ir: the graph.
        table: what was written.
        stored: tensor → name of its integers; for a weight an initializer.
        dequantized: tensor → name of what its consumers read instead of it.
        notes: what had to change besides.
    """

    ir: ir.Model
    table: CalibrationTable
    stored: dict[str, str]
    dequantized: dict[str, str]
    notes: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Writes the model to ``path``, whole or not at all.

        Raises:
            OutputError: if the file cannot be written.
        """
        with writing(path), whole_file(path) as temporary:
            self.write(temporary)

    def write(self, path: Path) -> None:
        """As `save`, straight to ``path``."""
        ir.save(self.ir, path)


def write_qdq(model: Model, table: CalibrationTable) -> Quantized:
    """The quantized model. ``model`` stays as it is.

    Every tensor of the table gets one QDQ pair that all its consumers read: activations
    QuantizeLinear → DequantizeLinear, behind a Clip where the grid is narrower than its storage
    type; weights their integers → DequantizeLinear. Biases of those consumers become an Add.

    Raises:
        ModelError: if the table belongs to another model, or the opset cannot be raised.
    """
    table.check_model(model)
    quantized = model.ir.clone()
    storages = _storages(quantized, table)
    with kept_interface(quantized):
        notes = (*_widened(table, storages), *_raise_opset(quantized, set(storages.values())))
    writer = _Writer(quantized, storages)
    consumers = {name for record in table.records for name in record.spec.consumers}
    for node in list(quantized.graph):
        if node.name in consumers:
            writer.move_bias(node)
    for record in table.records:
        if record.spec.kind == "weight":
            writer.weight(record)
        else:
            writer.activation(record)
    passes.RemoveUnusedNodesPass()(quantized)
    quantized.metadata_props[METADATA_KEY] = dumps(table.manifest)
    return Quantized(quantized, table, writer.stored, writer.dequantized, notes)


def _storages(model: ir.Model, table: CalibrationTable) -> dict[str, Storage]:
    """How each tensor's integers are stored."""
    mishandled = _moved_to(model) | _read_with_int8_weights(table)

    def storage(record: TensorRecord) -> Storage:
        narrowest = record.qtype.storage
        if record.spec.kind == "weight":
            return narrowest
        wider = record.name in mishandled or record.qtype.exceeds(narrowest)
        return record.qtype.clipped_storage if wider else narrowest

    return {record.name: storage(record) for record in table.records}


def _widened(table: CalibrationTable, storages: dict[str, Storage]) -> tuple[str, ...]:
    """A note where activations with a type of their own are stored in a wider one."""
    names = [
        record.name
        for record in table.records
        if not record.qtype.exceeds(record.qtype.storage)
        and storages[record.name] != record.qtype.storage
    ]
    note = (
        f"4-bit activations that are stored in 8 bits, as onnxruntime cannot load 4-bit ones "
        f"there: {len(names)}, the first {names[:1]}"
    )
    return (note,) if names else ()


def _moved_to(model: ir.Model) -> set[str | None]:
    """Values that a Clip or a MaxPool gives, or that are made from one by anything but a layer.

    onnxruntime 1.31 moves a QuantizeLinear to before many such operators, and drops others, and
    then cannot load a 4-bit one behind the Clip, or before the MaxPool.
    """
    found: set[str | None] = set()
    for node in model.graph:
        floats = [v.name for v in node.inputs if v is not None and _is_float_activation(v)]
        follows = len(floats) == 1 and floats[0] in found and node.op_type not in QUANTIZABLE_OPS
        if node.op_type in ("Clip", "MaxPool") or follows:
            found.update(value.name for value in node.outputs)
    return found


def _is_float_activation(value: ir.Value) -> bool:
    return not value.is_initializer() and (value.dtype is None or value.dtype.is_floating_point())


def _read_with_int8_weights(table: CalibrationTable) -> set[str]:
    """Activations of layers whose weights are stored in 8 bits.

    onnxruntime 1.31 makes a QLinearConv of such a Conv, which it then cannot load with 4-bit data.
    """
    readers = {
        name
        for record in table.records
        if record.spec.kind == "weight" and record.qtype.storage.bits == 8
        for name in record.spec.consumers
    }
    return {r.name for r in table.records if not readers.isdisjoint(r.spec.consumers)}


def _raise_opset(model: ir.Model, storages: set[Storage]) -> tuple[str, ...]:
    """Raises opset and IR version to what the storage types need, where they are lower."""
    before = model.opset_imports[""]
    needed = max((storage.opset for storage in storages), default=before)
    model.ir_version = max(model.ir_version, _ir_version(needed))
    if before >= needed:
        return ()
    names = ", ".join(sorted(s.name for s in storages if s.opset == needed))
    logger = logging.getLogger("onnxscript.version_converter")
    silenced, logger.disabled = logger.disabled, True  # our note says all that it warns of
    try:
        version_converter.convert_version(model, needed, fallback=True)
    except Exception as error:  # the converter raises types of its own
        raise ModelError(
            f"opset {before} cannot be raised to {needed}, which {names} needs: {one_line(error)}"
        ) from error
    finally:
        logger.disabled = silenced
    if model.opset_imports[""] != needed:
        raise ModelError(
            f"opset {before} cannot be raised to {needed}, which {names} needs: export the model "
            f"with opset {needed}, or use widths of 5 to 8 bits (opset 13)"
        )
    return (f"opset raised from {before} to {needed} for {names}",)


def _ir_version(opset: int) -> int:
    """The lowest IR version that the release introducing ``opset`` wrote."""
    version: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return version


class _Writer:
    """Edits one graph, giving new values names that nothing else has."""

    def __init__(self, model: ir.Model, storages: dict[str, Storage]):
        self._graph = model.graph
        self._storages = storages
        values = (v for node in model.graph.all_nodes() for v in node.outputs)
        self._names = {v.name for v in values}
        for graph in model.graphs():
            self._names.update(graph.initializers, (v.name for v in graph.inputs))
        self._values = {v.name: v for node in model.graph for v in node.outputs}
        self._values |= {v.name: v for v in model.graph.inputs}
        self._values.update(model.graph.initializers)
        self._nodes = {node.name: node for node in model.graph}
        self.stored: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}

    def move_bias(self, node: ir.Node) -> None:
        """Turns the bias of ``node`` into an Add behind it.

        onnxruntime rounds the float bias of DequantizeLinear → Conv → QuantizeLinear to int32 at
        s_x·s_w, at 4 bits visibly (method.md, section 4); it leaves an Add alone.
        """
        if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
            return
        bias = node.inputs[2]
        node.resize_inputs(2)
        if node.op_type == "Gemm":
            beta = node.attributes.pop("beta", None)
            if beta is not None and beta.as_float() != 1.0:
                bias = self._scaled(bias, beta.as_float())
        else:
            bias = self._channels_first(bias, node)
        output = node.outputs[0]
        name = output.name
        total = ir.Value(name=self._new(f"{name}_with_bias"), type=output.type, shape=output.shape)
        add = ir.Node("", "Add", [output, bias], outputs=[total], name=f"{node.name}_bias")
        output.replace_all_uses_with(total, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        self._graph.insert_after(node, add)
        output.name, total.name = self._new(f"{name}_without_bias"), name
        self._values[name] = total

    def weight(self, record: TensorRecord) -> None:
        """Puts the integers of a weight and a DequantizeLinear in its place."""
        value = self._values[record.name]
        assert value.const_value is not None
        tensor = value.const_value.numpy()
        integers = quantize(tensor, record.scale, record.qtype, record.spec.granularity)
        stored = self._integers(f"{record.name}_quantized", integers, record)
        axis = onnx_axis(record.spec.granularity)
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        self._dequantize(record, [stored, *self._parameters(record)], attributes)

    def activation(self, record: TensorRecord) -> None:
        """Puts a QDQ pair between an activation and its consumers."""
        value = source = self._values[record.name]
        if record.qtype.exceeds(self._storages[record.name]):
            ends = {"min": record.qtype.qmin, "max": record.qtype.qmax}
            with np.errstate(over="ignore"):  # beyond float32 on one side there is no value to clip
                bounds = [
                    self._constant(f"{record.name}_clip_{end}", np.float32(level) * record.scale[0])
                    for end, level in ends.items()
                ]
            source = self._node("Clip", [value, *bounds], f"{record.name}_clipped", value)
        parameters = self._parameters(record)
        stored = self._node("QuantizeLinear", [source, *parameters], f"{record.name}_quantized")
        stored.dtype, stored.shape = self._data_type(record), value.shape
        self._dequantize(record, [stored, *parameters])

    def _dequantize(
        self,
        record: TensorRecord,
        inputs: list[ir.Value],
        attributes: list[ir.Attr] | None = None,
    ) -> None:
        """A DequantizeLinear that the tensor's consumers read instead of the tensor."""
        value = self._values[record.name]
        name = f"{record.name}_dequantized"
        replacement = self._node("DequantizeLinear", inputs, name, value, attributes)
        for consumer in record.spec.consumers:
            node = self._nodes[consumer]
            for position in (0, 1):
                if node.inputs[position] is value:
                    node.replace_input_with(position, replacement)
        self.stored[record.name] = str(inputs[0].name)
        self.dequantized[record.name] = str(replacement.name)

    def _parameters(self, record: TensorRecord) -> list[ir.Value]:
        """Scale and zero point of a tensor."""
        per_tensor = onnx_axis(record.spec.granularity) is None
        scale = record.scale.reshape(()) if per_tensor else record.scale
        return [
            self._constant(f"{record.name}_scale", scale),
            self._integers(f"{record.name}_zero_point", np.zeros(scale.shape, np.int32), record),
        ]

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: str,
        like: ir.Value | None = None,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """A new node behind the producer of its first input."""
        result = ir.Value(name=self._new(output))
        if like is not None:
            result.type, result.shape = like.type, like.shape
        name = f"{result.name}_{op_type}"
        node = ir.Node("", op_type, inputs, attributes or [], outputs=[result], name=name)
        producer = inputs[0].producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return result

    def _scaled(self, bias: ir.Value, beta: float) -> ir.Value:
        if bias.const_value is not None:
            scaled = np.float32(beta) * bias.const_value.numpy()
            return self._constant(f"{bias.name}_scaled", scaled)
        factor = self._constant(f"{bias.name}_beta", np.float32(beta))
        return self._node("Mul", [bias, factor], f"{bias.name}_scaled", bias)

    def _channels_first(self, bias: ir.Value, node: ir.Node) -> ir.Value:
        """A convolution's bias ``(C,)`` so that it broadcasts against ``(N, C, …)``."""
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        shape = (-1, *[1] * (len(weight.shape) - 2))
        if bias.const_value is not None:
            return self._constant(f"{bias.name}_channels", bias.const_value.numpy().reshape(shape))
        target = self._constant(f"{bias.name}_shape", np.array(shape, np.int64))
        return self._node("Reshape", [bias, target], f"{bias.name}_channels")

    def _integers(self, name: str, integers: NDArray[np.int32], record: TensorRecord) -> ir.Value:
        dtype = self._data_type(record)
        return self._register(name, ir.tensor(integers.astype(dtype.numpy()), dtype=dtype))

    def _data_type(self, record: TensorRecord) -> ir.DataType:
        return ir.DataType[self._storages[record.name].name]

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        return self._register(name, ir.tensor(np.asarray(array)))

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=self._new(name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        tensor.name = value.name
        self._graph.register_initializer(value)
        return value

    def _new(self, name: str) -> str:
        unique, number = name, 1
        while unique in self._names:
            unique, number = f"{name}_{number}", number + 1
        self._names.add(unique)
        return unique
