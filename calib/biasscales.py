"""Biases in int32 at s_x·s_w, the scale at which integer kernels add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.distribution import Floats
from calib.graph import Model
from calib.prepare import QUANTIZABLE_OPS, is_constant
from calib.table import CalibrationTable, TensorRecord

# Half of what int32 holds: the sum of products has to fit beside the bias.
_MOST = float(1 << 30)
_SMALLEST = 2.0**-126  # of s_x·s_w: a normal number
_WITH_BIAS = 3


@dataclass(frozen=True, slots=True)
class IntegerBias:
    """The bias of a layer of which both inputs are quantized.

    Attributes:
        node, name: of the layer and of its bias, an initializer.
        data, weight: records of the layer's inputs.
    """

    node: str
    name: str
    data: TensorRecord
    weight: TensorRecord

    @property
    def scale(self) -> NDArray[np.float32]:
        """float32 ``(G,)``, the product rounded as kernels that multiply in float32 round it."""
        product: NDArray[np.float32] = self.data.scale * self.weight.scale
        return product

    def integers(self, values: NDArray[np.floating]) -> NDArray[np.int32]:
        """``values`` ``(C,)`` at `scale`: int32 ``(C,)``."""
        levels = np.rint(values.astype(np.float64) / self.scale.astype(np.float64))
        bounds = np.iinfo(np.int32)
        integers: NDArray[np.int32] = np.clip(levels, bounds.min, bounds.max).astype(np.int32)
        return integers


def integer_biases(graph: Any, table: CalibrationTable) -> Iterator[IntegerBias]:
    """All biases of a graph that can be int32; in graph order."""
    records = {record.name: record for record in table.records}
    for node in graph:
        if (found := integer_bias(node, records)) is not None:
            yield found


def integer_bias(node: Any, records: dict[str, TensorRecord]) -> IntegerBias | None:
    """The bias of ``node``, if it is constant, one value for each output channel, and both other
    inputs are quantized for ``node``."""
    name = _bias_name(node)
    if name is None:
        return None
    data, weight = (records.get(str(v.name)) for v in node.inputs[:2] if v is not None)
    if data is None or weight is None:
        return None
    kinds = data.spec.kind, weight.spec.kind
    read = all(node.name in record.spec.consumers for record in (data, weight))
    if kinds != ("activation", "weight") or not read:
        return None
    fits = weight.scale.size in (1, node.inputs[2].shape[0])
    return IntegerBias(str(node.name), name, data, weight) if fits else None


def _bias_name(node: Any) -> str | None:
    """Of a layer with a constant bias ``(C,)`` that is added as it is."""
    if node.op_type not in QUANTIZABLE_OPS or len(node.inputs) < _WITH_BIAS:
        return None
    bias = node.inputs[2]
    if bias is None or not is_constant(bias) or bias.shape is None or len(bias.shape) != 1:
        return None
    scaled = node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0
    return None if scaled else str(bias.name)


def fit_biases(model: Model, table: CalibrationTable) -> CalibrationTable:
    """``table`` with larger scales of weights where a bias at s_x·s_w would overflow int32."""
    least: dict[str, Floats] = {}
    for bias in integer_biases(model.ir.graph, table):
        values = np.abs(model.weight(bias.name).astype(np.float64))
        if bias.weight.scale.size == 1:
            values = values.max(keepdims=True)
        needed = np.maximum(values / _MOST, _SMALLEST) / float(bias.data.scale[0])
        name = bias.weight.name
        least[name] = np.maximum(least.get(name, needed), needed)
    records = [_raised(record, least.get(record.name)) for record in table.records]
    return replace(table, records=tuple(records))


def _raised(record: TensorRecord, least: Floats | None) -> TensorRecord:
    if least is None or not (record.scale < least).any():
        return record
    n = int((record.scale < least).sum())
    scale = np.maximum(record.scale, np.nextafter(least.astype(np.float32), np.float32(np.inf)))
    note = f"{n} of {len(scale)} scales raised, for the bias to fit into int32"
    return replace(
        record,
        scale=scale,
        threshold=scale.astype(np.float64) * record.qtype.steps,
        notes=(*record.notes, note),
    )
