"""Tell which tensors of an exported graph belong to which quantizer.

While a model is exported, each quantizer leaves a node ``Mark`` with its name in place of its
arithmetic: names of nodes and values may then be the exporter's, and what it folds or merges the
optimizer's, and the tensors are still found.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from calib.errors import TrainingError
from calib.prepare import QUANTIZABLE_OPS

DOMAIN = "octav_calibrate"
_MARK = "Mark"

# What a quantized value may pass on its way to a layer and still be quantized the same.
_MOVEMENTS = (
    *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Pad", "Expand"),
    *("Slice", "Concat", "Gather"),
)

Places = dict[tuple[str, int], str]


def mark(x: Tensor, name: str) -> Tensor:
    """``x``, and in the exported graph a mark that it is the tensor ``name``."""
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_MARK}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return marked


def resolve_marks(model: ir.Model, parameters: Mapping[str, Hashable]) -> Places:
    """Takes the marks out of ``model``; (node, input position) → name of the marked tensor.

    Args:
        model: changed in place.
        parameters: of each name. A tensor that is marked with different ones is read through
            an Identity by those of the second kind, as a tensor has one QDQ pair.

    Raises:
        TrainingError: if a marked value does not reach a layer.
    """
    marks = [n for n in model.graph if n.domain == DOMAIN and n.op_type == _MARK]
    places: Places = {}
    first: dict[ir.Value, Hashable] = {}
    shared: dict[tuple[ir.Value, Hashable], ir.Value] = {}
    for node in marks:
        name = node.attributes["name"].as_string()
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        places.update(dict.fromkeys(_readers(output, name), name))
        key = parameters[name]
        if first.setdefault(source, key) == key:
            replacement = source
        else:
            replacement = shared.setdefault((source, key), output)
        if replacement is output:
            node.domain, node.op_type, node.version = "", "Identity", None
            node.attributes.clear()
        else:
            output.replace_all_uses_with(replacement, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    _keep_grouped_apart(model)
    return places


def _keep_grouped_apart(model: ir.Model) -> None:
    """Puts an Identity behind each ConvTranspose with groups, whose channels of one scale lie in
    several of them: a BatchNormalization must not be folded into it."""
    for node in list(model.graph):
        if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) > 1:
            output = node.outputs[0]
            kept = ir.Value(name=f"{output.name}_kept", type=output.type, shape=output.shape)
            output.replace_all_uses_with(kept, replace_graph_outputs=True)
            name = f"{node.name}_kept"
            model.graph.insert_after(
                node, ir.Node("", "Identity", [output], outputs=[kept], name=name)
            )


def _readers(value: ir.Value, name: str) -> list[tuple[str, int]]:
    """The layers' inputs that ``value`` becomes."""
    found: list[tuple[str, int]] = []
    for use in value.uses():
        node = use.node
        if node.op_type in QUANTIZABLE_OPS and node.domain == "":
            found.append((str(node.name), use.idx))
        elif (node.op_type in _MOVEMENTS and use.idx == 0) or node.op_type == "Concat":
            found.extend(_readers(node.outputs[0], name))
        elif node.op_type not in ("Shape", "Size"):
            raise TrainingError(
                f"{name}: cannot be exported: in the ONNX graph it is read by {node.op_type} "
                f"{node.name!r}, not by one of {', '.join(QUANTIZABLE_OPS)}"
            )
    return found
