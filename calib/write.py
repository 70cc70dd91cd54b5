"""Write a calibration table into a model: QDQ pairs, integer weights, biases made safe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.errors import OutputError
from calib.files import whole_file, writing
from calib.granularity import onnx_axis, pieces
from calib.graph import Model
from calib.prepare import all_names, is_constant, kept_interface, remove_unused, unique_name
from calib.qtypes import Storage
from calib.quantize import quantize
from calib.storage import choose_storages, guarded, raise_opset, widened_note
from calib.table import CalibrationTable, TensorRecord, dumps

# Writing weights into the model file itself takes them in memory several times.
_MOST_INLINE = 1_000_000_000
_PROTOBUF_LIMIT = 2_000_000_000

_SMALLEST_CLIPPED_SCALE = 1e-6
_OPSET_OF_OUTPUT_DTYPE = 21

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
        external_data: the float model has external data.
    """

    ir: ir.Model
    table: CalibrationTable
    stored: dict[str, str]
    dequantized: dict[str, str]
    notes: tuple[str, ...]
    external_data: bool = False

    @property
    def n_bytes(self) -> int:
        """Size of all weights and other constants, as they will be stored."""
        return constant_bytes(self.ir)

    def save(self, path: Path, external_data: str = "auto") -> None:
        """Writes the model to ``path``, whole or not at all.

        Args:
            path: file to write.
            external_data: whether weights go into a file of their own beside it, named after
                it: ``always``, ``never``, or ``auto``: where they do in the float model, or are
                larger than 1 GB.

        Raises:
            OutputError: if the file cannot be written.
        """
        with whole_file(path) as temporary, writing(path):
            self.write(temporary, external_data)

    def write(self, path: Path, external_data: str = "auto", data: str | None = None) -> Quantized:
        """As `save`, straight to ``path``; ``data`` is the name of the other file. Returns the
        same, its weights on disk instead of in memory."""
        n_bytes = self.n_bytes
        if external_data == "auto":
            external = n_bytes > _MOST_INLINE or self.external_data
        else:
            external = external_data == "always"
        if not external and n_bytes > _PROTOBUF_LIMIT:
            raise OutputError(
                f"{path.name}: {n_bytes / 1e9:.1f} GB of weights do not fit into an ONNX file "
                f"itself: leave --external-data at auto"
            )
        if external:
            beside = path.with_name(data or f"{path.name}.data")
            ir.save(self.ir, path, external_data=beside.name)
            if beside.stat().st_size == 0:  # every tensor was small enough for the model file
                beside.unlink()
        else:
            ir.save(ir.external_data.load_to_model(self.ir.clone()), path)
        return replace(self, ir=ir.load(path))


def constant_bytes(model: ir.Model) -> int:
    """Size of all initializers of a graph, packed as they are stored."""
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def free_data_name(path: Path, others: Sequence[Path | None] = ()) -> str:
    """A name for the external data of a model at ``path`` that no file beside it has, so that a
    model that is being replaced keeps its own until the end; nor one of ``others``."""
    taken = {other.absolute() for other in others if other is not None}
    names = (f"{path.name}{infix}.data" for infix in ("", *(f".{n}" for n in range(2, 1000))))
    paths = (path.absolute().with_name(name) for name in names)
    return next(p.name for p in paths if p not in taken and not p.exists())


def external_files(path: Path) -> list[Path]:
    """Files of external data that `Quantized.write` wrote for the model at ``path``; none where
    there is no such model."""
    try:
        tensors = [v.const_value for v in ir.load(path).graph.initializers.values()]
    except Exception:  # whatever stands there is about to be replaced
        return []
    locations = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    ours = re.compile(re.escape(path.name) + r"(\.\d+)?\.data")
    found = (name for name in sorted(locations) if ours.fullmatch(name))
    return [path.with_name(name).resolve() for name in found]


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
    storages = choose_storages(quantized, table)
    with kept_interface(quantized):
        raised = raise_opset(quantized, table, storages)
    notes = (*widened_note(table, storages), *raised)
    writer = _Writer(model, quantized, storages)
    consumers = {name for record in table.records for name in record.spec.consumers}
    for node in list(quantized.graph):
        if node.name in consumers:
            writer.move_bias(node)
    for record in table.records:
        if record.spec.kind == "weight":
            writer.weight(record)
        else:
            writer.activation(record)
    remove_unused(quantized)
    quantized.metadata_props[METADATA_KEY] = dumps(table.manifest)
    external = len(model.files) > 1
    return Quantized(quantized, table, writer.stored, writer.dequantized, notes, external)


class _Writer:
    """Edits one graph, giving new values names that nothing else has."""

    def __init__(self, model: Model, quantized: ir.Model, storages: dict[str, Storage]):
        self._model = model
        self._graph = quantized.graph
        self._storages = storages
        self._names = all_names(quantized)
        self._opset = quantized.opset_imports[""]
        self._guarded = guarded(quantized)
        self._values = {v.name: v for node in quantized.graph for v in node.outputs}
        self._values |= {v.name: v for v in quantized.graph.inputs}
        self._values.update(quantized.graph.initializers)
        self._nodes = {node.name: node for node in quantized.graph}
        self.stored: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}

    def move_bias(self, node: ir.Node) -> None:
        """Turns the bias of ``node`` into an Add behind it.

        onnxruntime rounds the float bias of DequantizeLinear → Conv → QuantizeLinear to int32 at
        s_x·s_w, at 4 bits visibly (method.md, section 4); it leaves an Add alone.
        """
        if node.op_type == "MatMul":
            self._keep_from_gemm(node)
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
        add = ir.Node(
            "", "Add", [output, bias], outputs=[total], name=self._new(f"{node.name}_bias")
        )
        output.replace_all_uses_with(total, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        self._graph.insert_after(node, add)
        output.name, total.name = self._new(f"{name}_without_bias"), name
        self._values[name] = total

    def _keep_from_gemm(self, node: ir.Node) -> None:
        """Gives the bias of an Add behind a MatMul a second axis: of one, onnxruntime 1.31 makes a
        Gemm, which it cannot load where the data is int8, has 3 axes, and the opset is 21."""
        output = node.outputs[0]
        if self._opset < _OPSET_OF_OUTPUT_DTYPE or output.shape is None or len(output.shape) < 3:
            return
        for add in [use.node for use in output.uses() if use.node.op_type == "Add"]:
            for position, bias in enumerate(add.inputs):
                tensor = bias.const_value if bias is not None and is_constant(bias) else None
                if tensor is not None and len(tensor.shape) == 1:
                    row = self._constant(f"{tensor.name}_row", tensor.numpy().reshape(1, -1))
                    add.replace_input_with(position, row)

    def weight(self, record: TensorRecord) -> None:
        """Puts the integers of a weight and a DequantizeLinear in its place."""
        tensor = self._model.weight(record.name)
        granularity = record.spec.granularity
        integers = np.empty(tensor.shape, self._data_type(record).numpy())
        for index, groups in pieces(tensor.shape, granularity):
            part = quantize(tensor[index], record.scale[groups], record.qtype, granularity)
            integers[index] = part.astype(integers.dtype)
        stored = self._integers(f"{record.name}_quantized", integers, record)
        axis = onnx_axis(granularity)
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        self._dequantize(record, [stored, *self._parameters(record)], attributes)

    def activation(self, record: TensorRecord) -> None:
        """Puts a QDQ pair between an activation and its consumers."""
        value = source = self._values[record.name]
        if record.qtype.exceeds(self._storages[record.name]) or record.name in self._guarded:
            source = self._clipped(record, value)
        parameters = self._parameters(record)
        stored = self._node("QuantizeLinear", [source, *parameters], f"{record.name}_quantized")
        stored.dtype, stored.shape = self._data_type(record), value.shape
        self._dequantize(record, [stored, *parameters])

    def _clipped(self, record: TensorRecord, value: ir.Value) -> ir.Value:
        """``value`` within the grid. onnxruntime 1.31 takes a Clip that cuts off less than 1.2e-7
        for one that does nothing, and drops it; it leaves Min and Max alone (see also
        `guarded`)."""
        low, high = (
            self._constant(
                f"{record.name}_clip_{end}",
                np.asarray(np.float32(level) * record.scale[0]).astype(record.spec.dtype),
            )
            for end, level in (("min", record.qtype.qmin), ("max", record.qtype.qmax))
        )
        name = f"{record.name}_clipped"
        if record.scale[0] > _SMALLEST_CLIPPED_SCALE and record.name not in self._guarded:
            return self._node("Clip", [value, low, high], name, value)
        below = self._node("Min", [value, high], f"{name}_above", value)
        return self._node("Max", [below, low], name, value)

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
            self._constant(f"{record.name}_scale", scale.astype(record.spec.dtype)),
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
        name = self._new(f"{result.name}_{op_type}")
        node = ir.Node("", op_type, inputs, attributes or [], outputs=[result], name=name)
        producer = inputs[0].producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return result

    def _scaled(self, bias: ir.Value, beta: float) -> ir.Value:
        if is_constant(bias) and bias.const_value is not None:
            array = bias.const_value.numpy()
            scaled = (np.float32(beta) * array).astype(array.dtype)
            return self._constant(f"{bias.name}_scaled", scaled)
        dtype = (bias.dtype or ir.DataType.FLOAT).numpy()
        factor = self._constant(f"{bias.name}_beta", np.asarray(beta, dtype))
        return self._node("Mul", [bias, factor], f"{bias.name}_scaled", bias)

    def _channels_first(self, bias: ir.Value, node: ir.Node) -> ir.Value:
        """A convolution's bias ``(C,)`` so that it broadcasts against ``(N, C, …)``."""
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        shape = (-1, *[1] * (len(weight.shape) - 2))
        if is_constant(bias) and bias.const_value is not None:
            return self._constant(f"{bias.name}_channels", bias.const_value.numpy().reshape(shape))
        target = self._constant(f"{bias.name}_shape", np.array(shape, np.int64))
        return self._node("Reshape", [bias, target], f"{bias.name}_channels")

    def _integers(self, name: str, integers: NDArray[Any], record: TensorRecord) -> ir.Value:
        dtype = self._data_type(record)
        array = integers.astype(dtype.numpy(), copy=False)
        return self._register(name, ir.tensor(array, dtype=dtype))

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
        return unique_name(name, self._names)
