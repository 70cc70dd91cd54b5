"""Make a model ready for quantization without changing what it computes.

Constant chains behind weights become initializers, BatchNormalization goes into the layer
before it, every node and value has a name. Names of inputs, outputs and nodes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

QUANTIZABLE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_IR_WITHOUT_INITIALIZER_INPUTS = 4
_ENLARGING_OPS = ("ConstantOfShape", "Expand", "Tile", "Range")
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
    constant_inputs = [v.name for v in model.graph.inputs if v.is_initializer()]
    if constant_inputs:
        passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version, _IR_WITHOUT_INITIALIZER_INPUTS)
        notes.append(
            f"{len(constant_inputs)} initializers were also graph inputs: they are constants now"
        )
    passes.NameFixPass(_Names())(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _fold_constant_chains(model)
    folded = _fold_batchnorm(model)
    if folded:
        notes.append(f"{folded} BatchNormalization nodes folded into the layer before them")
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass(_Names())(model)
    with kept_interface(model):
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return tuple(notes)


@contextmanager
def kept_interface(model: ir.Model) -> Iterator[None]:
    """Gives inputs and outputs back the types and shapes that they were declared with."""
    declared = [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    copies = {name: (type_, shape and shape.copy()) for name, type_, shape in declared}
    yield
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type, value.shape = copies[value.name]


def _fold_constant_chains(model: ir.Model) -> None:
    wanted = _weight_producers(model)

    def should_fold(node: ir.Node) -> bool | None:
        if node in wanted:
            return True
        return False if node.op_type in _ENLARGING_OPS else None

    optimizer.fold_constants(model, output_size_limit=1 << 62, should_fold=should_fold)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _weight_producers(model: ir.Model) -> set[ir.Node]:
    """Nodes that compute, from constants alone, an input of a layer or of a BatchNormalization."""
    constant: set[ir.Node] = set()
    wanted: set[ir.Node] = set()
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        if all(v.is_initializer() or v.producer() in constant for v in inputs):
            constant.add(node)
        if node.op_type in (*QUANTIZABLE_OPS, "BatchNormalization"):
            wanted.update(p for v in inputs if (p := v.producer()) is not None)
    for node in reversed(list(model.graph)):
        if node in wanted & constant:
            wanted.update(p for v in node.inputs if v is not None and (p := v.producer()))
    return wanted & constant


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
