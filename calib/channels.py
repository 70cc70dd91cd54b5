"""How onnxruntime lays out what convolutions make, and how that is read soonest.

On x86-64 it computes them, and what follows, on blocks of 16 channels, or 8. An output has to leave
these blocks. Where nothing in the model needs that either, channels behind height and width are
quicker: each block is then moved as it is, instead of being transposed.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

_BLOCK = 16
_FEW = 8  # channels that are read as they lie, such as those of images
_BINARY = ("Add", "Sum")
_UNARY = ("Relu", "MaxPool", "AveragePool")
_BODIES = (ir.AttributeType.GRAPH.value, ir.AttributeType.GRAPHS.value)
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def in_blocks(model: ir.Model) -> list[str]:
    """Names of those outputs ``(N, C, H, W)`` that lie in blocks of channels, and that all nodes
    read like that; none where it is not known. They have four axes, as the weights of all Convs
    behind them have; if they do not lie in blocks, reading takes longer, no more."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    blocked, nodes = set[ir.Value | None](), set(model.graph)
    for node in model.graph:
        if _keeps_blocks(node, blocked):
            blocked.add(node.outputs[0])
    return [
        value.name
        for value in model.graph.outputs
        if value in blocked
        and value.name is not None
        and all(n in nodes and _keeps_blocks(n, blocked) for n, _ in value.uses())
    ]


def _keeps_blocks(node: ir.Node, blocked: set[ir.Value | None]) -> bool:
    """Whether a node reads blocks and makes some."""
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op_type == "Conv":
        return _is_in_blocks(node)
    if node.op_type in _UNARY:
        return node.inputs[0] in blocked
    return node.op_type in _BINARY and all(value in blocked for value in node.inputs)


def _is_in_blocks(conv: ir.Node) -> bool:
    weight = conv.inputs[1].const_value if conv.inputs[1] is not None else None
    if weight is None or weight.dtype is not ir.DataType.FLOAT or len(weight.shape) != 4:
        return False
    out_channels, in_channels, *_ = weight.shape.numpy()
    group = conv.attributes.get_int("group", 1)
    in_blocks = in_channels % _BLOCK == 0 or in_channels < _FEW
    return group == 1 and out_channels % _BLOCK == 0 and in_blocks


def _names(graph: Any) -> Iterator[str]:
    """All names of values, of bodies of nodes as well."""
    yield from (value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.type in _BODIES:
                for body in (attribute.g, *attribute.graphs):
                    yield from _names(body)


def put_channels_last(proto: Any, names: list[str]) -> dict[str, str]:
    """Has outputs of an ONNX ModelProto ``(N, C, H, W)`` come as `CHANNELS_LAST`, under new names;
    answers which value each of these is."""
    taken = {*_names(proto.graph)}
    made = dict[str, str]()
    for output in proto.graph.output:
        if output.name not in names:
            continue
        name, last = output.name, f"{output.name}:channels_last"
        while last in taken:
            last += "_"
        node = proto.graph.node.add(op_type="Transpose", input=[name], output=[last])
        kind = ir.AttributeType.INTS.value
        node.attribute.add(name="perm", ints=CHANNELS_LAST, type=kind)
        output.Clear()
        output.name, made[last] = last, name
    return made
