"""How many bytes each value of a model takes on a batch, without holding them all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from calib.arrays import Batch
from calib.capture import Runtime, Session
from calib.graph import Model
from calib.prepare import all_names, unique_name


def value_bytes(model: Model, batch: Batch, runtime: Runtime) -> dict[str, int]:
    """Bytes by name of every value that is an array of known type, and of the inputs.

    Where shapes are not all numbers, the model is run on ``batch`` with a Size node behind each
    value, so that only numbers leave onnxruntime.

    Raises:
        ModelError: if onnxruntime fails to run the model.
    """
    values = [v for node in model.ir.graph for v in node.outputs if v.name and v.dtype is not None]
    values = [v for v in values if isinstance(v.type, ir.TensorType)]
    elements = {
        str(v.name): math.prod(v.shape.numpy())
        for v in values
        if v.shape is not None and v.shape.is_static()
    }
    unknown = [str(v.name) for v in values if v.name not in elements]
    if unknown:
        elements |= _sizes(model, unknown, batch, runtime)
    found = {str(v.name): _bytes(v, elements[str(v.name)]) for v in values if v.name in elements}
    return found | {name: array.nbytes for name, array in batch.feed.items()}


def _bytes(value: ir.Value, elements: int) -> int:
    assert value.dtype is not None
    return math.ceil(elements * value.dtype.itemsize)


def _sizes(model: Model, names: Iterable[str], batch: Batch, runtime: Runtime) -> dict[str, int]:
    """How many elements each of the values has; those that are not produced are left out."""
    probe, taken = model.ir.clone(), all_names(model.ir)
    by_name = {v.name: v for node in probe.graph for v in node.outputs}
    sizes = {}
    for name in names:
        size = ir.val(unique_name("size", taken), ir.DataType.INT64, [])
        probe.graph.append(ir.Node("", "Size", [by_name[name]], outputs=[size]))
        probe.graph.outputs.append(size)
        sizes[str(size.name)] = name
    results = Session(probe, runtime, feedback=model.feedback).run(batch.feed)
    return {sizes[name]: int(array) for name, array in results.items() if name in sizes}
