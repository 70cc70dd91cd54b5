"""Write a calibration table into a model: QDQ pairs, integer weights, biases made safe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.biases import correct_bias, correctable, move_bias, place_corrections, store_bias
from calib.biasscales import integer_bias
from calib.distribution import Floats
from calib.editing import Editor
from calib.granularity import Blocked, for_onnx, onnx_axis, onnx_block_size, pieces
from calib.graph import Model
from calib.prepare import QUANTIZABLE_OPS, kept_interface, remove_unused
from calib.qtypes import Storage
from calib.quantize import quantize
from calib.saving import Quantized
from calib.storage import choose_storages, guarded, raise_opset, widened_note
from calib.table import CalibrationTable, TensorRecord, dumps
from calib.targets import TARGETS

METADATA_KEY = "octav_calibrate"

_SMALLEST_CLIPPED_SCALE = 1e-6


def write_qdq(model: Model, table: CalibrationTable) -> Quantized:
    """The quantized model. ``model`` stays as it is.

    Every tensor of the table gets one QDQ pair that all its consumers read: activations
    QuantizeLinear → DequantizeLinear, behind a Clip where the grid is narrower than its storage
    type; weights their integers → DequantizeLinear. Biases of those consumers become an Add, or
    what the table's target wants of them, and hold the table's corrections.

    Raises:
        ModelError: if the table belongs to another model, or the opset cannot be raised.
    """
    table.check_model(model)
    quantized = model.ir.clone()
    storages = choose_storages(quantized, table)
    with kept_interface(quantized):
        raised = raise_opset(quantized, table, storages)
    notes = (*widened_note(table, storages), *raised)
    writer = _Writer(model, quantized, storages, table)
    # Where no activation is quantized, nothing rounds a bias.
    moving = any(record.spec.kind == "activation" for record in table.records)
    consumers = {name for r in table.records if moving for name in r.spec.consumers}
    for node in list(quantized.graph):
        if node.name in consumers and node.op_type in QUANTIZABLE_OPS:
            writer.bias(node, TARGETS[table.target].bias)
    corrected = writer.corrections(table.bias_corrections)
    if (n_sums := writer.add_sums(consumers)) and table.target != "generic":
        notes = (*notes, f"{n_sums} Sum nodes of two inputs are Add now, which has integer kernels")
    for record in table.records:
        if record.spec.kind == "weight":
            writer.weight(record)
        else:
            writer.activation(record)
    remove_unused(quantized)
    quantized.metadata_props[METADATA_KEY] = dumps(table.manifest)
    return Quantized(
        quantized,
        table,
        writer.stored,
        writer.dequantized,
        notes,
        len(model.files) > 1,
        writer.biases,
        writer.sources,
        corrected,
        writer.editor.originals,
    )


class _Writer:
    """Puts QDQ pairs into one graph."""

    def __init__(
        self,
        model: Model,
        quantized: ir.Model,
        storages: dict[str, Storage],
        table: CalibrationTable,
    ):
        self._model = model
        self._storages = storages
        self._records = {record.name: record for record in table.records}
        # Where integer kernels are wanted, outputs are meant to be what they make.
        self._guarded = guarded(quantized) if TARGETS[table.target].bias == "add" else set()
        self.editor = Editor(quantized)
        self.stored: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}
        self.biases: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        # Where biases stay in their layers, corrections go there before they become integers.
        self._inside = TARGETS[table.target].bias != "add"
        corrections = table.bias_corrections if self._inside else {}
        self._corrected = place_corrections(self.editor, corrections)

    def corrections(self, corrections: Mapping[str, Floats]) -> dict[str, str]:
        """Adds what is left of ``corrections`` behind layers; layer → constant that holds it, but
        for those that are among integers."""
        if self._inside:
            return {n: held for n, held in self._corrected.items() if n not in self.biases}
        layers = correctable(self._model.ir.graph, corrections)
        return {r.node: correct_bias(self.editor, r, corrections[r.node]) for r in layers}

    def bias(self, node: ir.Node, kind: str) -> None:
        """Stores the bias of a layer as the target wants it."""
        if kind == "float":
            return
        found = integer_bias(node, self._records) if kind == "int32" else None
        if found is None:
            moved = move_bias(self.editor, node)
            if moved is not None and node.name in self._corrected:
                self._corrected[node.name] = moved
        else:
            self.biases[found.node] = store_bias(self.editor, node, found)

    def add_sums(self, consumers: set[str]) -> int:
        """Makes an Add of each Sum of two among ``consumers``; returns how many there are."""
        nodes = [self.editor.nodes.get(name) for name in sorted(consumers)]
        sums = [n for n in nodes if n is not None and (n.op_type, len(n.inputs)) == ("Sum", 2)]
        for node in sums:
            node.op_type = "Add"
        return len(sums)

    def weight(self, record: TensorRecord) -> None:
        """Puts the integers of a weight and a DequantizeLinear in its place."""
        tensor = self._model.weight(record.name)
        granularity = record.spec.granularity
        integers = np.empty(tensor.shape, self._data_type(record).numpy())
        for index, groups in pieces(tensor.shape, granularity):
            part = quantize(tensor[index], record.scale[groups], record.qtype, granularity)
            part += record.qtype.zero_point
            integers[index] = part.astype(integers.dtype)
        stored = self._integers(f"{record.name}_quantized", integers, record)
        found = {"axis": onnx_axis(granularity), "block_size": onnx_block_size(granularity)}
        attributes = [ir.AttrInt64(name, n) for name, n in found.items() if n is not None]
        inputs = [stored, *self._parameters(record, tensor.shape)]
        self._dequantize(record, inputs, attributes)

    def activation(self, record: TensorRecord) -> None:
        """Puts a QDQ pair between an activation and its consumers."""
        value = source = self.editor.values[record.name]
        readers = value.uses()
        if record.qtype.exceeds(self._storages[record.name]) or record.name in self._guarded:
            source = self._clipped(record, value)
        parameters = self._parameters(record)
        stored = self.editor.node(
            "QuantizeLinear", [source, *parameters], f"{record.name}_quantized"
        )
        stored.dtype, stored.shape = self._data_type(record), value.shape
        replacement = self._dequantize(record, [stored, *parameters])
        if record.spec.everyone:
            self._read_by_all(value, readers, replacement, record.spec.consumers)
            self.dequantized[record.name] = str(replacement.name)

    def _clipped(self, record: TensorRecord, value: ir.Value) -> ir.Value:
        """``value`` within the grid. onnxruntime 1.31 takes a Clip that cuts off less than 1.2e-7
        for one that does nothing, and drops it; it leaves Min and Max alone (see also
        `guarded`)."""
        low, high = (
            self.editor.constant(
                f"{record.name}_clip_{end}",
                np.asarray(np.float32(level) * record.scale[0]).astype(record.spec.dtype),
            )
            for end, level in (("min", record.qtype.qmin), ("max", record.qtype.qmax))
        )
        name = f"{record.name}_clipped"
        if record.scale[0] > _SMALLEST_CLIPPED_SCALE and record.name not in self._guarded:
            return self.editor.node("Clip", [value, low, high], name, value)
        below = self.editor.node("Min", [value, high], f"{name}_above", value)
        return self.editor.node("Max", [below, low], name, value)

    def _dequantize(
        self,
        record: TensorRecord,
        inputs: list[ir.Value],
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """A DequantizeLinear that the tensor's consumers read instead of the tensor."""
        value = self.editor.values[record.name]
        name = f"{record.name}_dequantized"
        replacement = self.editor.node("DequantizeLinear", inputs, name, value, attributes)
        for consumer in record.spec.consumers:
            node = self.editor.nodes.get(consumer)  # None: renamed as the opset was raised
            if node is None:
                continue
            most = 2 if node.op_type in QUANTIZABLE_OPS else None
            for position, read in enumerate(node.inputs[:most]):
                if read is value:
                    node.replace_input_with(position, replacement)
        self.stored[record.name] = str(inputs[0].name)
        self.dequantized[record.name] = str(replacement.name)
        return replacement

    def _read_by_all(
        self,
        value: ir.Value,
        readers: Iterable[Any],
        replacement: ir.Value,
        consumers: tuple[str, ...],
    ) -> None:
        """Has all ``readers`` of ``value`` read the pair, but layers that are none of its
        ``consumers``; an output keeps its name."""
        for use in readers:
            if use.node.op_type not in QUANTIZABLE_OPS or use.node.name in consumers:
                use.node.replace_input_with(use.idx, replacement)
        outputs = self.editor.graph.outputs
        for position, output in enumerate(outputs):
            if output is value:
                outputs[position] = replacement
        if value not in outputs and replacement in outputs:
            name = str(value.name)
            value.name = self.editor.new_name(f"{name}_float")
            replacement.name = name
            self.sources[name] = str(value.name)

    def _parameters(self, record: TensorRecord, shape: tuple[int, ...] = ()) -> list[ir.Value]:
        """Scale and zero point of a tensor; none for blocks where it would be 0 for all."""
        granularity, zero = record.spec.granularity, record.qtype.zero_point
        scale = for_onnx(record.scale, shape, granularity).astype(record.spec.dtype)
        values = [self.editor.constant(f"{record.name}_scale", scale.copy(order="C"))]
        if zero or not isinstance(granularity, Blocked):
            zero_point = np.full(scale.shape, zero, np.int32)
            values.append(self._integers(f"{record.name}_zero_point", zero_point, record))
        return values

    def _integers(self, name: str, integers: NDArray[Any], record: TensorRecord) -> ir.Value:
        dtype = self._data_type(record)
        array = integers.astype(dtype.numpy(), copy=False)
        return self.editor.register(name, ir.tensor(array, dtype=dtype))

    def _data_type(self, record: TensorRecord) -> ir.DataType:
        return ir.DataType[self._storages[record.name].name]
