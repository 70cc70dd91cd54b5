"""The part of a graph that some of its values need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.prepare import inner_nodes, is_constant, remove_unused, sources

_SHARED_BYTES = 1 << 10
_NO_FILE = "in-memory"
_EXTERNAL = 1  # of TensorProto.DataLocation
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def part_for(model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
    """A view of ``model`` with the values ``names`` as its only outputs, and of nodes and
    initializers those that they need; without names, or if no node makes any of these, its own
    outputs and all nodes. Initializers of the view can be taken out of it.
    """
    graph = model.graph
    nodes, outputs = list(graph), list(graph.outputs)
    if names is not None:
        made = {v.name: v for node in nodes for v in node.outputs}
        if wanted := [made[name] for name in dict.fromkeys(names) if name in made]:
            nodes, outputs = _needed(nodes, wanted), wanted
    readers = (reader for node in nodes for reader in (node, *inner_nodes(node)))
    read = {value for reader in readers for value in reader.inputs}
    read.update(graph.inputs, outputs)
    view = ir.GraphView(
        graph.inputs,
        outputs,
        nodes=nodes,
        initializers=[value for value in graph.initializers.values() if value in read],
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    functions = list(model.functions.values())
    # A model of a view is documented; only the annotation does not know it.
    return ir.Model(view, ir_version=model.ir_version, functions=functions)  # type: ignore[arg-type]


def copy_for(model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
    """What `part_for` shows, as a model of its own."""
    outputs = [value.name for value in part_for(model, names).graph.outputs]
    copy = model.clone()
    if names is not None:
        values = {v.name: v for node in copy.graph for v in node.outputs}
        values.update({v.name: v for v in copy.graph.outputs})  # also inputs and constants
        copy.graph.outputs[:] = [values[name] for name in outputs]
        remove_unused(copy)
    return copy


def _needed(nodes: list[ir.Node], values: Sequence[ir.Value]) -> list[ir.Node]:
    """Of ``nodes`` those that ``values`` need, in their order."""
    needed = {producer for value in values if (producer := value.producer()) is not None}
    for node in reversed(nodes):
        if node in needed:
            needed.update(sources(node))
    return [node for node in nodes if node in needed]


def shareable(part: ir.Model) -> list[ir.Value]:
    """Constants that are large enough to be read where they are, and of a type that can be."""
    return [value for value in part.graph.initializers.values() if _is_shareable(value)]


def take_out(part: ir.Model, constants: Sequence[ir.Value]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """An ONNX ModelProto of ``part`` that says of ``constants`` that they lie elsewhere, and their
    arrays by name. Types and shapes of inner values are told only where they may not follow from
    those of inputs, see `_may_be_unknown`."""
    graph, taken, outputs = part.graph, set(constants), set(part.graph.outputs)
    ends = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=(),
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    functions = list(part.functions.values())
    model = ir.Model(ends, ir_version=part.ir_version, functions=functions)  # type: ignore[arg-type]
    proto, arrays = ir.to_proto(model), dict[str, NDArray[Any]]()
    for node in graph:
        ir.serde.serialize_node_into(proto.graph.node.add(), node, model_ir_version=part.ir_version)
        for value in node.outputs if _may_be_unknown(node) else ():
            if value.name and value.type is not None and value not in outputs:
                ir.serde.serialize_value_into(proto.graph.value_info.add(), value)
    for value in graph.initializers.values():
        if (tensor := value.const_value) is None:
            continue
        constant = proto.graph.initializer.add()
        if value in taken:
            array = np.ascontiguousarray(tensor.numpy())
            arrays[str(value.name)] = array
            constant.data_type, constant.data_location = tensor.dtype.value, _EXTERNAL
            constant.dims.extend(array.shape)
            for key, text in ("location", _NO_FILE), ("offset", "0"), ("length", str(array.nbytes)):
                constant.external_data.add(key=key, value=text)
        else:
            ir.serde.serialize_tensor_into(constant, tensor)
        constant.name = value.name
    return proto, arrays


def _may_be_unknown(node: ir.Node) -> bool:
    """Whether it may be that types and shapes of what ``node`` makes are only known by being told:
    of custom operators, of bodies, and where they depend on numbers that are computed."""
    if node.domain or next(inner_nodes(node), None) is not None:
        return True
    read = [value for value in node.inputs if value is not None and not is_constant(value)]
    return any(value.shape is None for value in read) or any(
        value.dtype not in _FLOATS for value in (*read, *node.outputs)
    )


def _is_shareable(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and not isinstance(tensor, ir.ExternalTensor)
        and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and tensor.nbytes >= _SHARED_BYTES
        and not value.is_graph_input()
        and bool(value.uses())  # onnxruntime removes others before it would read them
    )
