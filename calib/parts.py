"""The part of a graph that some of its values need."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from calib.prepare import inner_nodes, remove_unused, sources


def part_for(model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
    """A view of ``model`` with the values ``names`` as its only outputs, and of nodes and
    initializers those that they need; without names, or if no node makes any of these, its own
    outputs and all nodes. Initializers of the view can be replaced in it.
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
