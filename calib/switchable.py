"""The float model with a switch at each tensor: any set of them can be quantized at every run.

One session then measures what each tensor does to the output, alone and together with others,
where a written model for each would take a session for each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import Runtime, Session, Values
from calib.graph import Model
from calib.prepare import all_names, kept_interface, remove_unused, unique_name
from calib.quantize import fake_quantize
from calib.storage import choose_storages, raise_opset
from calib.table import CalibrationTable, TensorRecord

Records = Mapping[str, TensorRecord]

_PARTS = ("scale", "low", "high")


class Switchable:
    """A session on the model in which the tensors of ``table`` are float unless told otherwise.

    Weights become inputs. Activations pass through ``clip(round(x / scale), low, high) · scale`` in
    float32, which is a QDQ pair to the bit, with all three numbers fed; a scale of 0 leaves them as
    they are.

    Holds every weight up to three times: float, and at two widths.

    Raises:
        ModelError: if the opset cannot be raised as far as the table needs.
    """

    def __init__(self, model: Model, table: CalibrationTable, runtime: Runtime | None = None):
        self._model = model
        self._quantized: dict[tuple[str, int], NDArray[np.floating]] = {}
        graph = model.ir.clone()
        with kept_interface(graph):
            raise_opset(graph, table, choose_storages(graph, table))
        inserted = _Switches(graph)
        for record in table.records:
            if record.spec.kind == "weight":
                inserted.weight(record)
            else:
                inserted.activation(record)
        graph.graph.sort()
        remove_unused(graph)
        self._inputs = inserted.inputs
        self._weights = {r.name: model.weight(r.name) for r in table.records if _is_weight(r)}
        self._session = Session(graph, runtime, feedback=model.feedback)

    def run(self, batch: Batch, records: Records) -> Values:
        """The model's outputs with the tensors of ``records`` quantized as they say."""
        feed = dict(batch.feed)
        for name, names in self._inputs.items():
            record = records.get(name)
            if name in self._weights:
                feed[names[0]] = self._weight(name, record)
            else:
                feed.update(zip(names, _parameters(record), strict=True))
        return self._session.run(feed, batch.restart)

    def _weight(self, name: str, record: TensorRecord | None) -> NDArray[np.floating]:
        weight = self._weights[name]
        if record is None:
            return weight
        key = name, record.qtype.bits
        if key not in self._quantized:
            granularity = record.spec.granularity
            self._quantized[key] = fake_quantize(weight, record.scale, record.qtype, granularity)
        return self._quantized[key]


def _is_weight(record: TensorRecord) -> bool:
    return record.spec.kind == "weight"


def _parameters(record: TensorRecord | None) -> tuple[NDArray[np.float32], ...]:
    if record is None:
        numbers = (0.0, 0.0, 0.0)
    else:
        numbers = (float(record.scale[0]), float(record.qtype.qmin), float(record.qtype.qmax))
    return tuple(np.array(number, np.float32) for number in numbers)


class _Switches:
    """Puts switches into one graph; ``inputs``: tensor → names of the inputs that work it."""

    def __init__(self, model: ir.Model):
        self._graph = model.graph
        self._names = all_names(model)
        self._values = {v.name: v for node in model.graph for v in node.outputs}
        self._values |= {v.name: v for v in model.graph.inputs}
        self._nodes = {node.name: node for node in model.graph}
        self.inputs: dict[str, list[str]] = {}

    def weight(self, record: TensorRecord) -> None:
        """Makes an input of a weight."""
        value = self._graph.initializers[record.name]
        fed = self._input(f"{record.name}_fed", value)
        self.inputs[record.name] = [str(fed.name)]
        self._replace(record, value, fed)

    def activation(self, record: TensorRecord) -> None:
        """Quantizes an activation on its way to its consumers, if its scale is above 0."""
        value = self._values[record.name]
        number = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
        scale, low, high = (self._input(f"{record.name}_{part}", number) for part in _PARTS)
        self.inputs[record.name] = [str(part.name) for part in (scale, low, high)]
        exact = self._node("Cast", value, to=ir.DataType.FLOAT)
        levels = self._node("Round", self._node("Div", exact, scale))
        quantized = self._node("Mul", self._node("Clip", levels, low, high), scale)
        dtype = ir.DataType.FLOAT16 if record.spec.dtype == "float16" else ir.DataType.FLOAT
        on = self._node("Greater", scale, self._node("Sub", scale, scale))
        back = self._node("Cast", quantized, to=dtype)
        self._replace(record, value, self._node("Where", on, back, value))

    def _replace(self, record: TensorRecord, value: ir.Value, replacement: ir.Value) -> None:
        for consumer in record.spec.consumers:
            node = self._nodes[consumer]
            for position in (0, 1):
                if node.inputs[position] is value:
                    node.replace_input_with(position, replacement)

    def _input(self, name: str, like: ir.Value) -> ir.Value:
        new = ir.Value(name=unique_name(name, self._names), type=like.type, shape=like.shape)
        self._graph.inputs.append(new)
        return new

    def _node(self, op_type: str, *inputs: ir.Value, to: ir.DataType | None = None) -> ir.Value:
        """A new node; the graph is sorted once all are there."""
        attributes = [] if to is None else [ir.AttrInt64("to", int(to))]
        name = unique_name(f"{inputs[0].name}_{op_type}", self._names)
        result = ir.Value(name=name)
        node = ir.Node("", op_type, inputs, attributes, outputs=[result], name=name)
        self._graph.append(node)
        return result
