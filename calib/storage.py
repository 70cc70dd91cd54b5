"""In which ONNX types the integers of a calibration table are stored, and the opset they need."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnxscript import version_converter

from calib.errors import ModelError, one_line
from calib.granularity import Blocked
from calib.prepare import QUANTIZABLE_OPS, is_constant
from calib.qtypes import Storage
from calib.table import CalibrationTable, TensorRecord

_PASSED = (
    *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Expand"),
    *("Slice", "Split", "Gather", "Tile", "MaxPool", "Resize", "DepthToSpace", "SpaceToDepth"),
)
_LAST_OPSET_OF_OLD_RESIZE = 10
_OPSET_OF_BLOCKS = 21
_FLOAT16_OPSET = 19  # the first whose QuantizeLinear and DequantizeLinear take float16


def choose_storages(model: ir.Model, table: CalibrationTable) -> dict[str, Storage]:
    """How each tensor's integers are stored."""
    mishandled = _made_from(model, ("Clip", "MaxPool")) | _read_with_int8_weights(table)
    after_relu = _made_from(model, ("Relu",))

    def storage(record: TensorRecord) -> Storage:
        narrowest = record.qtype.storage
        if record.spec.kind == "weight":
            return narrowest
        wider = record.name in mishandled or record.qtype.exceeds(narrowest)
        wider = wider or (record.qtype.signed and record.name in after_relu)
        return record.qtype.clipped_storage if wider else narrowest

    return {record.name: storage(record) for record in table.records}


def widened_note(table: CalibrationTable, storages: dict[str, Storage]) -> tuple[str, ...]:
    """A note where activations with a type of their own are stored in a wider one."""
    names = [
        record.name
        for record in table.records
        if not record.qtype.exceeds(record.qtype.storage)
        and storages[record.name] != record.qtype.storage
    ]
    note = (
        f"4-bit activations that are stored in 8 bits, as onnxruntime mishandles 4-bit ones "
        f"there: {len(names)}, the first {names[:1]}"
    )
    return (note,) if names else ()


def _made_from(model: ir.Model, op_types: tuple[str, ...]) -> set[str | None]:
    """Values that such an operator gives, or that are made from one by anything but a layer.

    onnxruntime 1.31 moves a QuantizeLinear to before many operators, and drops others, and then
    cannot load a 4-bit one behind a Clip, or before a MaxPool; before a signed 4-bit one it drops
    a Relu, and computes another thing.
    """
    found: set[str | None] = set()
    for node in model.graph:
        floats = [v.name for v in node.inputs if v is not None and _is_float_activation(v)]
        follows = len(floats) == 1 and floats[0] in found and node.op_type not in QUANTIZABLE_OPS
        if node.op_type in op_types or follows:
            found.update(value.name for value in node.outputs)
    return found


def _is_float_activation(value: ir.Value) -> bool:
    return not is_constant(value) and (value.dtype is None or value.dtype.is_floating_point())


def _read_with_int8_weights(table: CalibrationTable) -> set[str]:
    """Activations of layers whose weights are stored in 8 bits.

    onnxruntime 1.31 makes a QLinearConv of such a Conv, which it then cannot load with 4-bit data.
    """
    readers = {
        name
        for record in table.records
        if record.spec.kind == "weight" and record.qtype.storage.bits == 8
        for name in record.spec.consumers
    }
    return {r.name for r in table.records if not readers.isdisjoint(r.spec.consumers)}


def guarded(model: ir.Model) -> set[str]:
    """Values that an output of the model reaches by being moved, or that are such an output.

    onnxruntime 1.31 moves a QDQ pair to before such movements, and then returns the output
    dequantized; it does not move a pair over Min and Max.
    """
    outputs = set(model.graph.outputs)
    reached: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in _PASSED:
            source = node.inputs[0]
            for value in node.outputs:
                if source in outputs or source in reached or value in outputs:
                    reached.add(value)
    return {str(value.name) for value in reached}


def raise_opset(
    model: ir.Model, table: CalibrationTable, storages: dict[str, Storage]
) -> tuple[str, ...]:
    """Raises opset and IR version to what the QDQ pairs need, where they are lower; says so.

    Raises:
        ModelError: if an operator cannot be converted.
    """
    before, needed = model.opset_imports[""], _needed_opset(table, storages)
    if needed:
        model.ir_version = max(model.ir_version, _ir_version(needed))
    if before >= needed:
        return ()
    names = ", ".join(sorted({s.name for s in storages.values() if s.opset == needed}))
    names = names or ("blocks" if _has_blocks(table) else "float16")
    read = _read_by_layers(model, table)
    logger = logging.getLogger("onnxscript.version_converter")
    silenced, logger.disabled = logger.disabled, True  # our note says all that it warns of
    try:
        version_converter.convert_version(model, needed, fallback=True)
    except Exception as error:  # the converter raises types of its own
        raise ModelError(
            f"opset {before} cannot be raised to {needed}, which {names} needs: {one_line(error)}"
        ) from error
    finally:
        logger.disabled = silenced
    if model.opset_imports[""] != needed:
        raise ModelError(
            f"opset {before} cannot be raised to {needed}, which {names} needs: export the model "
            f"with opset {needed}, or use widths of 5 to 8 bits (opset 13)"
        )
    if before <= _LAST_OPSET_OF_OLD_RESIZE:
        _keep_resizing(model)
    kept = {value.name for node in model.graph for value in node.outputs}
    kept |= set(model.graph.initializers)
    for place, value in _read_by_layers(model, table).items():  # new nodes come with new names
        if place in read and read[place].name not in kept:
            value.name = read[place].name
    return (f"opset raised from {before} to {needed} for {names}",)


def _keep_resizing(model: ir.Model) -> None:
    """What Upsample and Resize meant up to opset 10; the converter leaves the newer default."""
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and node.domain == "":
            mode = ir.AttrString("coordinate_transformation_mode", "asymmetric")
            node.attributes.update({mode.name: mode})
            nearest = ir.AttrString("nearest_mode", "floor")
            node.attributes.update({nearest.name: nearest})


def _read_by_layers(model: ir.Model, table: CalibrationTable) -> dict[tuple[str, int], ir.Value]:
    """What the layers of the table read, by the layer's name and the input's position."""
    layers = {name for record in table.records for name in record.spec.consumers}
    return {
        (str(node.name), position): value
        for node in model.graph
        if node.name in layers
        for position, value in enumerate(node.inputs)
        if value is not None
    }


def _ir_version(opset: int) -> int:
    """The lowest IR version that the release introducing ``opset`` wrote."""
    version: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return version


def _needed_opset(table: CalibrationTable, storages: dict[str, Storage]) -> int:
    """The lowest opset that has all that the table's QDQ pairs need; 0 for an empty table."""
    opsets = [storage.opset for storage in storages.values()]
    half = any(record.spec.dtype == "float16" for record in table.records)
    blocks = _OPSET_OF_BLOCKS if _has_blocks(table) else 0
    return max([*opsets, _FLOAT16_OPSET if half else 0, blocks])


def _has_blocks(table: CalibrationTable) -> bool:
    return any(isinstance(record.spec.granularity, Blocked) for record in table.records)
