"""Make a model ready for quantization without changing what it computes.

Constant chains behind weights, and behind the shapes and places that operators are told, become
initializers, BatchNormalization goes into the layer before it, every node and value has a name.
Names of inputs, outputs and nodes are kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray
from onnx.defs import get_schema, has
from onnx.reference import ReferenceEvaluator
from onnxscript import rewriter
from onnxscript.rewriter.rules import common as rules

_LOG = logging.getLogger(__name__)

QUANTIZABLE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_IR_WITHOUT_INITIALIZER_INPUTS = 4
# Operators of which all inputs but the first say what shape or place is meant: once these are
# numbers, shapes behind can be inferred.
_TOLD = {
    *("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Pad", "Slice", "Resize", "Upsample"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "Split", "TopK", "CumSum"),
}
_GRAPH, _GRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS
_FEW = 1 << 12
_GROWING = ("Expand", "Tile", "Range", "Resize", "Upsample", "Pad", "OneHot")
_NEVER_FOLDED = (
    "DequantizeLinear",  # it keeps what is quantized already as it is
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    *("Multinomial", "Bernoulli"),
)
_FUSE_BATCHNORM = rewriter.RewriteRuleSet(
    [
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
    ]
)


class _Names(passes.naming.SimpleNameGenerator):
    """Names unnamed nodes after what they do and make, so that a user can point at them."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or f"{node.op_type}_{node.outputs[0].name}"


def prepare(model: ir.Model) -> tuple[str, ...]:
    """Folds and names in place; returns one note for each kind of change worth telling."""
    notes = []
    if model.functions:
        passes.InlinePass()(model)
        _check_inputs(model)
        notes.append("local functions are inlined, so that the layers in them can be quantized")
    remove_unused(model)
    passes.NameFixPass(_Names())(model)
    n_constants = _fix_initializer_inputs(model)
    if n_constants:
        notes.append(f"{n_constants} initializers were also graph inputs: they are constants now")
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _fold_constant_chains(model)
    folded = _fold_batchnorm(model)
    if folded:
        notes.append(f"{folded} BatchNormalization nodes folded into the layer before them")
    remove_unused(model)
    passes.NameFixPass(_Names())(model)
    with kept_interface(model):
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for graph in model.graphs():  # what was read for folding stays on disk from here
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.release()
    return tuple(notes)


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer that no feed can override."""
    return value.is_initializer() and not value.is_graph_input()


@contextmanager
def kept_interface(model: ir.Model) -> Iterator[None]:
    """Gives inputs and outputs back the types and shapes that they were declared with."""
    declared = [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    copies = {name: (type_, shape and shape.copy()) for name, type_, shape in declared}
    yield
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type, value.shape = copies[value.name]


def _check_inputs(model: ir.Model) -> None:
    """Raises `ValueError` for nodes that a function, called with fewer inputs than it declares,
    leaves without some of theirs; the checker does not look there."""
    for node in model.graph.all_nodes():
        version = model.opset_imports.get(node.domain, 0)
        if node.domain == "" and has(node.op_type, version, ""):
            least = get_schema(node.op_type, version, "").min_input
            if len(node.inputs) < least or None in node.inputs[:least]:
                raise ValueError(f"{node.op_type} {node.name!r} lacks an input")


def all_names(model: ir.Model) -> set[str]:
    """Names of all values and nodes, also in subgraphs."""
    nodes = list(model.graph.all_nodes())
    names = {str(v.name) for node in nodes for v in node.outputs}
    names.update(str(node.name) for node in nodes)
    for graph in model.graphs():
        names.update(graph.initializers, (str(v.name) for v in graph.inputs))
    return names


def unique_name(name: str, taken: set[str]) -> str:
    """``name``, with a number behind it where it is taken; taken from now on."""
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    taken.add(unique)
    return unique


def inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """All nodes in the subgraphs of ``node``, at any depth."""
    for attribute in node.attributes.values():
        if (kind := attribute.type) == _GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif kind == _GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def sources(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes of the same graph whose outputs ``node``, or a subgraph of it, reads."""
    for reader in (node, *inner_nodes(node)):
        for value in reader.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is node.graph:
                yield producer


def remove_unused(model: ir.Model) -> None:
    """Removes nodes and initializers that no output needs; what only the subgraphs of unused nodes
    read is unused too."""
    needed = {producer for v in model.graph.outputs if (producer := v.producer()) is not None}
    for node in reversed(list(model.graph)):
        if node in needed:
            needed.update(sources(node))
            continue
        for reader in (node, *inner_nodes(node)):
            for position in range(len(reader.inputs)):
                reader.replace_input_with(position, None)
        model.graph.remove(node)
    passes.RemoveUnusedNodesPass()(model)


def _fix_initializer_inputs(model: ir.Model) -> int:
    """Makes constants of initializers that are graph inputs too, as exporters once wrote all
    weights, where layers read them or they are integers, as shapes are; returns how many. Other
    such inputs are defaults that a feed may override.
    """
    defaults = [v for v in model.graph.inputs if v.is_initializer()]
    if model.ir_version >= _IR_WITHOUT_INITIALIZER_INPUTS:
        defaults = [v for v in defaults if _is_weight_or_integer(v)]
    for value in defaults:
        model.graph.inputs.remove(value)
    if defaults:
        model.ir_version = max(model.ir_version, _IR_WITHOUT_INITIALIZER_INPUTS)
    return len(defaults)


def _is_weight_or_integer(value: ir.Value) -> bool:
    if value.dtype is None or not value.dtype.is_floating_point():
        return True
    return any(
        node.op_type in (*QUANTIZABLE_OPS, "BatchNormalization")
        or all(v is None or v.is_initializer() for v in node.inputs)
        for node in value.consumers()
    )


def _fold_constant_chains(model: ir.Model) -> None:
    """Makes initializers of what nodes compute from constants alone for a layer, or as a shape."""
    for node in _constant_producers(model, _read_by_layer):
        _fold(node, model)
    for node in _constant_producers(model, _told):
        if _is_small(node):
            _fold(node, model)


def _fold(node: ir.Node, model: ir.Model) -> None:
    try:
        arrays = _evaluate(node, model)
    except Exception as error:  # the reference lacks the operator, or refuses its attributes
        _LOG.info("%s is not folded: %s", node.name, error)
        return
    for value, array in zip(node.outputs, arrays, strict=True):
        tensor = ir.tensor(array, name=value.name)
        constant = ir.Value(name=value.name, const_value=tensor)
        constant.type, constant.shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        value.replace_all_uses_with(constant, replace_graph_outputs=True)
        model.graph.register_initializer(constant)
    model.graph.remove(node, safe=True)


def _read_by_layer(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs if node.op_type in (*QUANTIZABLE_OPS, "BatchNormalization") else ()


def _told(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs[1:] if node.op_type in _TOLD else ()


def _is_small(node: ir.Node) -> bool:
    """Whether a node makes few numbers of few."""
    tensors = [value.const_value for value in node.inputs if value is not None]
    if node.op_type in _GROWING or any(t is None or t.size > _FEW for t in tensors):
        return False
    shapes = tensors if node.op_type == "ConstantOfShape" else ()
    return all(math.prod(t.numpy().tolist()) <= _FEW for t in shapes if t is not None)


def _evaluate(node: ir.Node, model: ir.Model) -> list[NDArray[Any]]:
    """The outputs of a node of which every input is constant, in ONNX's reference."""
    tensors = {n: _tensor(v) for n, v in enumerate(node.inputs) if v is not None}
    inputs = {
        n: ir.Value(name=f"i{n}", type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape.numpy()))
        for n, t in tensors.items()
    }
    outputs = [ir.Value(name=f"o{n}") for n in range(len(node.outputs))]
    attributes = node.attributes.values()
    read = [inputs.get(n) for n in range(len(node.inputs))]
    copy = ir.Node("", node.op_type, read, attributes, outputs=outputs)
    opsets = {"": model.opset_imports[""]}
    graph = ir.Graph(list(inputs.values()), outputs, nodes=[copy], opset_imports=opsets, name="g")
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=model.ir_version)))
    results: Any = evaluator.run(None, {f"i{n}": t.numpy() for n, t in tensors.items()})
    return [np.asarray(result) for result in results]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"{value.name} is not constant")
    return value.const_value


def _constant_producers(
    model: ir.Model, read: Callable[[ir.Node], Sequence[ir.Value | None]]
) -> list[ir.Node]:
    """Nodes that compute, from constants alone, what is ``read`` of a node; in graph order."""
    constant: set[ir.Node] = set()
    wanted: set[ir.Node] = set()
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        known = all(is_constant(v) or v.producer() in constant for v in inputs)
        if known and _is_foldable(node):
            constant.add(node)
        wanted.update(p for v in read(node) if v is not None and (p := v.producer()))
    for node in reversed(list(model.graph)):
        if node in wanted & constant:
            wanted.update(p for v in node.inputs if v is not None and (p := v.producer()))
    return [node for node in model.graph if node in wanted & constant]


def _is_foldable(node: ir.Node) -> bool:
    has_body = next(inner_nodes(node), None) is not None
    return node.domain == "" and node.op_type not in _NEVER_FOLDED and not has_body


def _fold_batchnorm(model: ir.Model) -> int:
    """Folds what can be folded; the layer keeps its name and doc string, the output its name.

    The rewriter's rules know no training mode: where there is one, none is folded.
    """
    batchnorms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    if any(node.attributes.get_int("training_mode", 0) for node in batchnorms):
        return 0
    layers = {
        node.outputs[0].name: producer
        for node in batchnorms
        if node.inputs[0] is not None and (producer := node.inputs[0].producer()) is not None
    }
    rewriter.rewrite(model, pattern_rewrite_rules=_FUSE_BATCHNORM)
    folded = 0
    for node in model.graph:
        if node.op_type in QUANTIZABLE_OPS and node.outputs[0].name in layers:
            layer = layers[node.outputs[0].name]
            node.name, node.doc_string = layer.name, layer.doc_string
            node.metadata_props.update(layer.metadata_props)
            folded += 1
    return folded
