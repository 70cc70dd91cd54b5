"""Edits of a graph: new nodes and constants under names that nothing else has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.prepare import all_names, unique_name


class Editor:
    """One graph that is being changed.

    Attributes:
        graph: it.
        opset: of ONNX's own operators.
        values: its values by name; where one was replaced, what stands in its place.
        nodes: its nodes by name, those that there were at first.
        originals: constant → the values of what it stands for with something added.
    """

    def __init__(self, model: ir.Model):
        self.graph = model.graph
        self.opset = model.opset_imports[""]
        self._names = all_names(model)
        self.values = {v.name: v for node in model.graph for v in node.outputs}
        self.values |= {v.name: v for v in model.graph.inputs}
        self.values.update(model.graph.initializers)
        self.nodes = {node.name: node for node in model.graph}
        self.originals: dict[str, NDArray[Any]] = {}

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        output: str,
        like: ir.Value | None = None,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """A new node behind the producer of its first input."""
        result = ir.Value(name=self.new_name(output))
        if like is not None:
            result.type, result.shape = like.type, like.shape
        name = self.new_name(f"{result.name}_{op_type}")
        node = ir.Node("", op_type, inputs, attributes or [], outputs=[result], name=name)
        producer = inputs[0].producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return result

    def input(self, name: str, shape: list[int]) -> ir.Value:
        """A new float32 input of the graph."""
        value = ir.val(self.new_name(name), ir.DataType.FLOAT, shape)
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """A new initializer."""
        return self.register(name, ir.tensor(np.asarray(array)))

    def register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """As `constant`, of a tensor that may be of a type that NumPy lacks."""
        value = ir.Value(
            name=self.new_name(name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        tensor.name = value.name
        self.graph.register_initializer(value)
        return value

    def new_name(self, name: str) -> str:
        """``name``, with a number behind it where it is taken."""
        return unique_name(name, self._names)
