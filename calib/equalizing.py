"""Cross-layer equalisation: channels of a layer and of the next, scaled against each other.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1. What the model computes stays the same, up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.distribution import Floats
from calib.editing import Editor
from calib.graph import Model
from calib.prepare import is_constant

_PREFIX = "equalized-"
# f(x / s) = f(x) / s for any s > 0, channel by channel.
_HOMOGENEOUS = (
    *("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool"),
    "Clip",  # with bounds that are divided, too
)
_LARGEST = 1024.0  # of a factor: where a channel is all but dead, its bias would grow without bound
_SETTLED = 1e-3
_MOST_ROUNDS = 50
_OPSET_OF_CLIP_INPUTS = 11


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer, the layer that alone reads what it makes, and the nodes between them."""

    first: ir.Node
    second: ir.Node
    between: tuple[ir.Node, ...]

    @property
    def clips(self) -> list[ir.Node]:
        """The nodes between that cut off at fixed values."""
        return [node for node in self.between if node.op_type == "Clip"]


def equalize(model: Model) -> Model:
    """``model`` with the weights of layers that follow each other balanced: factors
    ``s = sqrt(r1 / r2)`` of every channel between them, where r1 is its largest weight in the first
    and r2 in the second, until they settle.

    Pairs are Conv and Gemm, grouped and depthwise ones too, with nothing but Relu, LeakyRelu,
    PRelu, pooling or Clip between them, and no other reader. A Clip, as ReLU6 is one, gets a bound
    for each channel: it becomes Min and Max, which runtimes do not fuse; a note says so. ``sha256``
    changes, so that observations of the one are not taken for the other's.
    """
    graph = model.ir.clone()
    pairs = list(_pairs(graph.graph))
    weights = {
        name: model.weight(name).astype(np.float64)
        for pair in pairs
        for name in (_weight(pair.first), _weight(pair.second))
    }
    factors = _settled(pairs, weights)
    editor = Editor(graph)
    for pair, factor in zip(pairs, factors, strict=True):
        _scale_bias(editor, pair.first, factor)
        for clip in pair.clips:
            _scale_clip(editor, clip, factor, pair.first.op_type == "Conv")
    for name, weight in weights.items():
        value = graph.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(weight.astype(value.dtype.numpy()), name=name)
    notes = (*model.notes, *_notes(pairs))
    return replace(model, ir=graph, sha256=_PREFIX + model.sha256, notes=notes)


def file_digest(sha256: str) -> str:
    """The digest of a model's files, from `Model.sha256`."""
    return sha256.removeprefix(_PREFIX)


def _notes(pairs: list[_Pair]) -> Iterator[str]:
    yield f"{len(pairs)} pairs of layers equalized"
    clips = sum(len(pair.clips) for pair in pairs)
    if clips:
        yield (
            f"{clips} Clips (ReLU6 and the like) between them became Min and Max with a bound for "
            f"each channel, which runtimes do not fuse; with weights per channel this costs "
            f"accuracy: compare with a run without equalize"
        )


def _settled(pairs: list[_Pair], weights: dict[str, Floats]) -> list[Floats]:
    """The factors by which the channels of each pair are divided; ``weights`` are scaled."""
    totals = [np.ones(len(_ranges(pair.first, weights, outgoing=True))) for pair in pairs]
    for _ in range(_MOST_ROUNDS):
        largest = 1.0
        for number, pair in enumerate(pairs):
            one = _ranges(pair.first, weights, outgoing=True)
            two = _ranges(pair.second, weights, outgoing=False)
            alive = (one > 0) & (two > 0)
            wanted = np.sqrt(np.where(alive, one, 1.0) / np.where(alive, two, 1.0))
            total = np.clip(totals[number] * wanted, 1 / _LARGEST, _LARGEST)
            factor = total / totals[number]
            totals[number] = total
            _scale(pair.first, weights, 1 / factor, outgoing=True)
            _scale(pair.second, weights, factor, outgoing=False)
            largest = max(largest, float(np.maximum(factor, 1 / factor).max()))
        if largest < 1 + _SETTLED:
            break
    return totals


def _pairs(graph: ir.Graph) -> Iterator[_Pair]:
    for node in graph:
        if not _is_scalable(node) or not _has_plain_bias(node):
            continue
        between: list[ir.Node] = []
        reader = _only_reader(node)
        while reader is not None and _passes(reader):
            between.append(reader)
            reader = _only_reader(reader)
        last = (between or [node])[-1].outputs[0]
        if reader is None or not _is_scalable(reader) or reader.inputs[0] is not last:
            continue
        if reader.op_type == node.op_type and not reader.attributes.get_int("transA", 0):
            yield _Pair(node, reader, tuple(between))


def _passes(node: ir.Node) -> bool:
    """Whether factors can go past a node."""
    if node.domain != "" or len(node.outputs) != 1 or node.op_type not in _HOMOGENEOUS:
        return False
    return all(value is None or is_constant(value) for value in node.inputs[1:])


def _only_reader(node: ir.Node) -> ir.Node | None:
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.graph is not node.graph:
        return None
    return uses[0].node


def _is_scalable(node: ir.Node) -> bool:
    """Whether it is a Conv or Gemm with a constant weight of its own."""
    if node.op_type not in ("Conv", "Gemm") or node.domain != "":
        return False
    weight = node.inputs[1]
    return weight is not None and is_constant(weight) and len(list(weight.uses())) == 1


def _has_plain_bias(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    weight = node.inputs[1]
    if not is_constant(bias) or bias.shape is None or weight is None or weight.shape is None:
        return False
    channels = weight.shape.numpy()[_out_axis(node)]
    return bias.shape.numpy() in ((channels,), (1, channels))


def _weight(node: ir.Node) -> str:
    value = node.inputs[1]
    assert value is not None
    return str(value.name)


def _out_axis(node: ir.Node) -> int:
    return 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1 else 1


def _view(node: ir.Node, weight: Floats, *, outgoing: bool) -> tuple[Floats, tuple[int, ...]]:
    """A view of a weight and its axes that together run over the output, or input, channels."""
    if outgoing:
        return weight, (_out_axis(node),)
    if node.op_type == "Gemm":
        return weight, (1 - _out_axis(node),)
    groups = node.attributes.get_int("group", 1)
    return weight.reshape(groups, -1, weight.shape[1], *weight.shape[2:]), (0, 2)


def _ranges(node: ir.Node, weights: dict[str, Floats], *, outgoing: bool) -> Floats:
    view, axes = _view(node, weights[_weight(node)], outgoing=outgoing)
    others = tuple(axis for axis in range(view.ndim) if axis not in axes)
    return np.asarray(np.abs(view).max(axis=others, initial=0.0)).reshape(-1)


def _scale(node: ir.Node, weights: dict[str, Floats], by: Floats, *, outgoing: bool) -> None:
    view, axes = _view(node, weights[_weight(node)], outgoing=outgoing)
    shape = [view.shape[axis] if axis in axes else 1 for axis in range(view.ndim)]
    scaled = view * by.reshape(shape)
    weights[_weight(node)] = scaled.reshape(weights[_weight(node)].shape)


def _scale_bias(editor: Editor, node: ir.Node, factor: Floats) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return
    array = bias.const_value.numpy()
    scaled = (array.astype(np.float64) / factor).astype(array.dtype)
    node.replace_input_with(2, editor.constant(f"{bias.name}_equalized", scaled))


def _scale_clip(editor: Editor, clip: ir.Node, factor: Floats, is_conv: bool) -> None:
    """Puts bounds for each channel in the place of a Clip's."""
    source, output = clip.inputs[0], clip.outputs[0]
    assert source is not None
    rank = None if output.shape is None else len(output.shape)
    shape = (-1,) if not is_conv or rank is None else (-1, *[1] * (rank - 2))
    name, value = str(output.name), source
    readers = [(use.node, use.idx) for use in output.uses()]
    for op_type, bound in zip(("Max", "Min"), _bounds(editor, clip), strict=True):
        if bound is not None:
            scaled = (bound.astype(np.float64) / factor.reshape(shape)).astype(bound.dtype)
            constant = editor.constant(f"{name}_{op_type.lower()}", scaled)
            value = editor.node(op_type, [value, constant], f"{name}_{op_type}", output)
    for node, position in readers:
        node.replace_input_with(position, value)
    output.name, value.name = editor.new_name(f"{name}_clip"), name
    editor.graph.remove(clip, safe=True)


def _bounds(editor: Editor, clip: ir.Node) -> list[NDArray[np.floating] | None]:
    """The least and the largest value; None where there is none."""
    dtype = (clip.outputs[0].dtype or ir.DataType.FLOAT).numpy()
    found: list[NDArray[np.floating] | None] = []
    for number, name in enumerate(("min", "max"), 1):
        if editor.opset < _OPSET_OF_CLIP_INPUTS:
            attribute = clip.attributes.get(name)
            found.append(None if attribute is None else np.asarray(attribute.as_float(), dtype))
        else:
            value = clip.inputs[number] if len(clip.inputs) > number else None
            tensor = None if value is None else value.const_value
            found.append(None if tensor is None else tensor.numpy())
    return found
