"""The rules of each target, checked on a written graph.

TensorRT's are those of "Working with Quantized Types" in its documentation (explicit quantization),
one function each. There is no TensorRT here: they say what it states, not what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.errors import VerificationError
from calib.prepare import QUANTIZABLE_OPS, is_constant

Rule = Callable[[ir.Graph], Iterator[str]]

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_BIAS = 2


def check_target(model: ir.Model, target: str) -> None:
    """Raises `VerificationError` for the first rule of ``target`` that ``model`` breaks."""
    broken = next(broken_rules(model, target), None)
    if broken is not None:
        raise VerificationError(
            f"target {target}: {broken}; keep that tensor float with --exclude, or use target "
            f"generic"
        )


def broken_rules(model: ir.Model, target: str) -> Iterator[str]:
    """One line for each place where ``model`` breaks a rule of ``target``."""
    for rule in RULES[target]:
        yield from rule(model.graph)


# --- TensorRT ---------------------------------------------------------------------------------


def trt_types(graph: ir.Graph) -> Iterator[str]:
    """Quantized types are INT8 and INT4; there is no UINT8."""
    for node in _pairs(graph):
        dtype = _integer_type(node)
        if dtype not in (ir.DataType.INT8, ir.DataType.INT4):
            yield f"{_where(node)} is {dtype.name}, TensorRT takes INT8 and INT4"


def trt_symmetric(graph: ir.Graph) -> Iterator[str]:
    """Quantization is symmetric: all zero points are 0."""
    for node in _pairs(graph):
        zero_point = _constant(node, 2)
        if zero_point is not None and zero_point.astype(np.int64).any():
            yield f"{_where(node)} has a zero point other than 0"


def trt_positive_scales(graph: ir.Graph) -> Iterator[str]:
    """Scales are positive, finite floats."""
    for node in _pairs(graph):
        scale = _constant(node, 1)
        if scale is not None and not ((scale > 0) & np.isfinite(scale)).all():
            yield f"{_where(node)} has a scale that is not positive"


def trt_constant_scales(graph: ir.Graph) -> Iterator[str]:
    """Scales and zero points are known when the engine is built."""
    for node in _pairs(graph):
        if any(v is not None and not is_constant(v) for v in node.inputs[1:]):
            yield f"{_where(node)} has a scale or zero point that is not constant"


def trt_no_quantized_bias(graph: ir.Graph) -> Iterator[str]:
    """Biases are float: no DequantizeLinear stands on one."""
    for node in _layers(graph):
        if len(node.inputs) > _BIAS and _dequantize(node.inputs[_BIAS]) is not None:
            yield f"the bias of {node.name!r} comes from a DequantizeLinear"


def trt_activations_per_tensor(graph: ir.Graph) -> Iterator[str]:
    """Activations have one scale; channels and blocks are for weights."""
    for node in _pairs(graph):
        scale = _constant(node, 1)
        if scale is not None and scale.size != 1 and not _of_constant(node):
            yield f"{_where(node)} is an activation with {scale.size} scales"


def trt_channel_axis(graph: ir.Graph) -> Iterator[str]:
    """Scales of a convolution's weight run along its output channels: axis 0, of a ConvTranspose
    axis 1."""
    for node in _layers(graph):
        wanted = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)
        pair = _dequantize(node.inputs[1])
        if wanted is None or pair is None or "block_size" in pair.attributes:
            continue
        scale, axis = _constant(pair, 1), pair.attributes.get_int("axis", 1)
        if scale is not None and scale.size != 1 and axis != wanted:
            yield f"{_where(pair)} has scales along axis {axis}, not {wanted}"


def trt_int4_weights_only(graph: ir.Graph) -> Iterator[str]:
    """INT4 is for weights alone: activations are not INT4, nor beside such a weight quantized."""
    for node in _pairs(graph):
        if _integer_type(node) is ir.DataType.INT4 and not _of_constant(node):
            yield f"{_where(node)} is an INT4 activation"
    for node in _layers(graph):
        weight, data = _dequantize(node.inputs[1]), _dequantize(node.inputs[0])
        if weight is None or data is None:
            continue
        if _integer_type(weight) is ir.DataType.INT4:
            yield f"{node.name!r} has an INT4 weight and a quantized activation"


def trt_both_inputs(graph: ir.Graph) -> Iterator[str]:
    """A layer runs in INT8 where both its inputs are quantized; INT8 on one is refused or slow."""
    for node in _layers(graph):
        pairs = [_dequantize(value) for value in node.inputs[:2]]
        int8 = [p is not None and _integer_type(p) is ir.DataType.INT8 for p in pairs]
        if int8[0] != int8[1]:
            yield f"{node.name!r} has one INT8 input and one float input"


def trt_one_branch(graph: ir.Graph) -> Iterator[str]:
    """Of a residual Add, the branch that a layer makes for it has no pair: layer and Add fuse."""
    for node in graph:
        if node.op_type != "Add":
            continue
        pairs = [_dequantize(value) for value in node.inputs]
        if None in pairs or any(p is not None and _of_constant(p) for p in pairs):
            continue
        if any(p is not None and _own_layer(p) for p in pairs):
            yield f"both branches of {node.name!r} are quantized: one alone may be"


def trt_pairs_meet(graph: ir.Graph) -> Iterator[str]:
    """Every QuantizeLinear leads to a DequantizeLinear with the same scale."""
    for node in _pairs(graph):
        if node.op_type != "QuantizeLinear":
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        same = all(r.op_type == _PAIR[1] and _same_scale(node, r) for r in readers)
        if not readers or not same:
            yield f"{_where(node)} is not followed by its own DequantizeLinear"


# --- onnxruntime and OpenVINO -----------------------------------------------------------------


def byte_types(graph: ir.Graph) -> Iterator[str]:
    """Integer kernels are for 8 bits, biases apart; so are not weights that floats multiply."""
    alone = {
        pair
        for node in _layers(graph)
        if (pair := _dequantize(node.inputs[1])) is not None and _dequantize(node.inputs[0]) is None
    }
    for node in _pairs(graph):
        dtype = _integer_type(node)
        if dtype not in (*_BYTES, ir.DataType.INT32) and node not in alone:
            yield f"{_where(node)} is {dtype.name}, integer kernels take 8 bits"


def signed_weights(graph: ir.Graph) -> Iterator[str]:
    """Weights of layers are signed, with zero point 0: else kernels add up corrections."""
    for node in _layers(graph):
        pair = _dequantize(node.inputs[1])
        if pair is None or not _of_constant(pair):
            continue
        zero_point = _constant(pair, 2)
        signed = _integer_type(pair) in (ir.DataType.INT8, ir.DataType.INT4)
        if not signed or (zero_point is not None and zero_point.any()):
            yield f"the weight of {node.name!r} is not signed and symmetric"


def bias_scales(graph: ir.Graph) -> Iterator[str]:
    """The scale of an int32 bias is s_x·s_w to the bit: kernels add its integers without reading
    it."""
    for node in _layers(graph):
        pairs = [_dequantize(value) for value in node.inputs]
        if len(pairs) <= _BIAS or pairs[_BIAS] is None:
            continue
        data, weight, bias = (None if p is None else _constant(p, 1) for p in pairs)
        if data is None or weight is None or bias is None:
            yield f"the bias of {node.name!r} is quantized, and not both its inputs are"
        elif not np.array_equal((data * weight).ravel(), bias.ravel()):
            yield f"the scale of the bias of {node.name!r} is not that of its inputs' product"


def concat_one_grid(graph: ir.Graph) -> Iterator[str]:
    """All inputs of a Concat share one scale and zero point."""
    for node in graph:
        pairs = [p for value in node.inputs if (p := _dequantize(value)) is not None]
        same = all(_same_scale(pairs[0], other) for other in pairs)
        if node.op_type == "Concat" and not same:
            yield f"the inputs of {node.name!r} have several scales"


def weights_apart(graph: ir.Graph) -> Iterator[str]:
    """No two layers read one quantized weight: OpenVINO 2026.4 mixes them up."""
    readers: dict[str, str] = {}
    for node in _layers(graph):
        pair = _dequantize(node.inputs[1])
        if pair is None or not _of_constant(pair) or pair.inputs[0] is None:
            continue
        first = readers.setdefault(str(pair.inputs[0].name), str(node.name))
        if first != node.name:
            yield f"{first!r} and {node.name!r} share a quantized weight"


def float_biases(graph: ir.Graph) -> Iterator[str]:
    """Biases are float."""
    yield from trt_no_quantized_bias(graph)


RULES: dict[str, tuple[Rule, ...]] = {
    "generic": (),
    "onnxruntime": (byte_types, signed_weights, bias_scales, concat_one_grid),
    "openvino": (byte_types, signed_weights, weights_apart, float_biases, trt_positive_scales),
    "tensorrt": (
        *(trt_types, trt_symmetric, trt_positive_scales, trt_constant_scales),
        *(trt_no_quantized_bias, trt_activations_per_tensor, trt_channel_axis),
        *(trt_int4_weights_only, trt_both_inputs, trt_one_branch, trt_pairs_meet),
    ),
}


# --- looking around ---------------------------------------------------------------------------


def _pairs(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in _PAIR and node.domain == "")


def _layers(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in QUANTIZABLE_OPS and node.domain == "")


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == _PAIR[1] else None


def _constant(node: ir.Node, position: int) -> NDArray[Any] | None:
    value = node.inputs[position] if len(node.inputs) > position else None
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def _integer_type(node: ir.Node) -> ir.DataType:
    """Of what a QuantizeLinear gives or a DequantizeLinear takes; UINT8 where nothing says it."""
    named = node.inputs[2] if len(node.inputs) > _BIAS else None
    for value in (node.inputs[0] if node.op_type == _PAIR[1] else None, named):
        if value is not None and value.dtype is not None:
            return value.dtype
    return ir.DataType.UINT8


def _source(node: ir.Node) -> ir.Value | None:
    """What a pair is made from: before the QuantizeLinear, where there is one."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    quantize = producer is not None and producer.op_type == _PAIR[0]
    return producer.inputs[0] if quantize and producer is not None else value


def _of_constant(node: ir.Node) -> bool:
    value = _source(node)
    return value is not None and is_constant(value)


def _own_layer(pair: ir.Node) -> bool:
    """Whether a layer makes what the pair takes, for its sole reader."""
    value = _source(pair)
    producer = None if value is None else value.producer()
    sole = len(pair.outputs[0].uses()) == 1
    return producer is not None and producer.op_type in QUANTIZABLE_OPS and sole


def _same_scale(one: ir.Node, other: ir.Node) -> bool:
    for position in (1, 2):
        mine, its = _constant(one, position), _constant(other, position)
        if mine is None or its is None:
            if mine is not its:
                return False
        elif not np.array_equal(mine, its):
            return False
    return True


def _where(node: ir.Node) -> str:
    value = _source(node)
    return f"{node.op_type} of {'' if value is None else value.name!r}"
