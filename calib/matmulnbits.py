"""Weights in blocks as onnxruntime's own operator ``com.microsoft.MatMulNBits`` takes them.

onnxruntime's optimiser makes that operator of a DequantizeLinear with blocks before a MatMul, too,
and then chooses how it computes; written here, the file says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.biases import move_bias
from calib.blocks import FUSED_SIZES
from calib.editing import Editor
from calib.granularity import Blocked, for_onnx
from calib.prepare import remove_unused
from calib.saving import Quantized
from calib.table import TensorRecord

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
# As the operator's documentation has them: 0, whatever is not set, is float32 on a CPU.
ACCURACY_LEVELS = {"matmulnbits": 0, "matmulnbits-int8": 4}
_PACKED_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight of K inputs and N outputs as the operator takes it.

    Attributes:
        blob: uint8 ``(N, blocks, block_size · bits / 8)``: the integers along the inputs, each
            the level plus half the range, at 4 bits two a byte, the first in the low half. The
            last block is filled up with level 0, which the operator does not read.
        scales: float ``(N, blocks)``, in the type of the other input.
        bits: 4 or 8.
        inputs, outputs: K and N.
        block_size: how many inputs share a scale.
    """

    blob: NDArray[np.uint8]
    scales: NDArray[np.floating]
    bits: int
    inputs: int
    outputs: int
    block_size: int


def pack(levels: NDArray[np.integer], record: TensorRecord) -> Packed:
    """The weight of which ``levels`` are the levels, ``(K, N)`` or ``(N, K)``, in the blocks of
    ``record``.

    Raises:
        ValueError: for a weight that is not in blocks, or whose integers are stored in 16 bits.
    """
    granularity, bits = record.spec.granularity, record.qtype.storage.bits
    if not isinstance(granularity, Blocked) or bits not in _PACKED_BITS:
        raise ValueError(f"{record.name}: {granularity} of {bits} bits cannot be packed")
    scales = for_onnx(record.scale, levels.shape, granularity)
    inputs, size = granularity.length(levels.shape), granularity.block_size
    levels, scales = inputs_first(levels, record).T, inputs_first(scales, record).T
    outputs, blocks = scales.shape
    integers = np.full((outputs, blocks * size), 1 << (bits - 1), np.uint8)
    integers[:, :inputs] = levels + (1 << (bits - 1))
    blob = integers.reshape(outputs, blocks, size)
    if bits == 4:
        blob = blob[..., 0::2] | (blob[..., 1::2] << 4)
    scales = np.ascontiguousarray(scales.astype(record.spec.dtype))
    return Packed(blob, scales, bits, inputs, outputs, size)


def unpack(packed: Packed) -> NDArray[np.float32]:
    """The weight ``(K, N)`` that the operator multiplies with, by its definition: ``(integer -
    half the range) · scale``, float32."""
    blob = packed.blob
    if packed.bits == 4:
        blob = np.stack([blob & 15, blob >> 4], axis=-1)
    integers = blob.reshape(packed.outputs, -1)[:, : packed.inputs]
    scales = np.repeat(packed.scales, packed.block_size, axis=1)[:, : packed.inputs]
    levels = integers.astype(np.float32) - np.float32(1 << (packed.bits - 1))
    return np.ascontiguousarray((levels * scales.astype(np.float32)).T)


def inputs_first(tensor: NDArray[Any], record: TensorRecord) -> NDArray[Any]:
    """A weight or its scales, of the blocks of ``record``, as ``(inputs, outputs)``."""
    granularity = record.spec.granularity
    return tensor.T if isinstance(granularity, Blocked) and granularity.axis == 1 else tensor


def in_format(quantized: Quantized, weight_format: str | None) -> Quantized:
    """A QDQ model with its blocks in one of `calib.blocks.WEIGHT_FORMATS`."""
    if weight_format in (None, "qdq"):
        return quantized
    return with_operator(quantized, ACCURACY_LEVELS[weight_format])


def with_operator(quantized: Quantized, accuracy_level: int) -> Quantized:
    """The same model with every layer that MatMulNBits can compute as that; ``stored`` then names
    the blobs.

    What it cannot keeps its DequantizeLinear, and a note counts them: weights that are the first
    operand, stored in 16 bits or float16, and layers whose other input is quantized.

    Args:
        quantized: with DequantizeLinear before its weights; it stays as it is.
        accuracy_level: 0 or 1: float32; 4: the other input is rounded to int8.
    """
    model = quantized.ir.clone()
    editor, stored = Editor(model), dict(quantized.stored)
    of_value = {quantized.dequantized[record.name]: record for record in _blocked(quantized)}
    packed: dict[str, list[ir.Value]] = {}
    left = 0
    for node in [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]:
        read = [of_value.get(str(v.name)) for v in node.inputs[:2] if v is not None]
        record = next((record for record in read if record is not None), None)
        if record is None:
            continue
        if not _fits(node, read[1], record):
            left += 1
            continue
        if record.name not in packed:
            packed[record.name] = _constants(editor, node, record)
            stored[record.name] = str(packed[record.name][0].name)
        _replace(editor, node, packed[record.name], _attributes(node, record, accuracy_level))
    remove_unused(model)
    model.opset_imports[DOMAIN] = 1
    note = f"layers with blocks that MatMulNBits cannot compute, left as qdq: {left}"
    notes = (*quantized.notes, *([note] if left else []))
    return replace(quantized, ir=model, stored=stored, notes=notes)


def read_packed(node: ir.Node) -> Packed:
    """What a MatMulNBits node of a model multiplies with."""
    blob, scales = (_array(node.inputs[position]) for position in (1, 2))
    names = ("bits", "K", "N", "block_size")
    bits, inputs, outputs, size = (node.attributes[name].as_int() for name in names)
    return Packed(blob, scales.reshape(outputs, -1), bits, inputs, outputs, size)


def _blocked(quantized: Quantized) -> Iterator[TensorRecord]:
    for record in quantized.table.records:
        if isinstance(record.spec.granularity, Blocked):
            yield record


def _fits(node: ir.Node, second: TensorRecord | None, record: TensorRecord) -> bool:
    data, granularity = node.inputs[0], record.spec.granularity
    producer = None if data is None else data.producer()
    return (
        second is record
        and not (producer is not None and producer.op_type == "DequantizeLinear")
        and record.qtype.storage.bits in _PACKED_BITS
        and record.spec.dtype == "float32"
        and isinstance(granularity, Blocked)
        and granularity.block_size in FUSED_SIZES
        and node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_int("transA", 0) == 0
    )


def _constants(editor: Editor, node: ir.Node, record: TensorRecord) -> list[ir.Value]:
    """The second and third input of the operator."""
    packed = pack(_array(_dequantizer(node).inputs[0]).astype(np.int16), record)
    named = {"packed": packed.blob, "packed_scale": packed.scales}
    return [editor.constant(f"{record.name}_{name}", array) for name, array in named.items()]


def _attributes(node: ir.Node, record: TensorRecord, accuracy_level: int) -> dict[str, int]:
    granularity, weight = record.spec.granularity, node.inputs[1]
    assert isinstance(granularity, Blocked)
    assert weight is not None
    assert weight.shape is not None
    shape = weight.shape.numpy()
    return {
        "K": granularity.length(shape),
        "N": math.prod(shape) // granularity.length(shape),
        "bits": record.qtype.storage.bits,
        "block_size": granularity.block_size,
        "accuracy_level": accuracy_level,
    }


def _replace(
    editor: Editor, node: ir.Node, constants: list[ir.Value], attributes: dict[str, int]
) -> None:
    """Puts the operator in the place of ``node``; the bias of a Gemm becomes an Add behind it."""
    if node.op_type == "Gemm":
        move_bias(editor, node)
    old = node.outputs[0]
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    operator = ir.Node(
        DOMAIN,
        OPERATOR,
        [node.inputs[0], *constants],
        [ir.AttrInt64(name, value) for name, value in attributes.items()],
        outputs=[new],
        name=node.name,
    )
    editor.graph.insert_before(node, operator)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    editor.graph.remove(node, safe=True)


def _dequantizer(node: ir.Node) -> ir.Node:
    producer = None if node.inputs[1] is None else node.inputs[1].producer()
    assert producer is not None
    return producer


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
