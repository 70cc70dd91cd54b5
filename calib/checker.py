"""onnx.checker, less strict where onnxruntime is, and stricter where libraries would crash."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from calib.errors import ModelError

# Operator, attribute, least and largest value; others end the process in onnx or onnxruntime.
_LIMITS = (
    ("Conv", "group", 1, 1 << 31),
    ("ConvTranspose", "group", 1, 1 << 31),
    ("DepthToSpace", "blocksize", 1, 1 << 15),
    ("SpaceToDepth", "blocksize", 1, 1 << 15),
    ("GatherND", "batch_dims", 0, 1 << 15),
)
_NO_SHAPE = "Field 'shape' of 'type' is required but missing"


def check_file(path: Path, full_check: bool = False) -> None:
    """Raises what ``onnx.checker`` raises for the model at ``path``; but inputs and outputs need no
    shape: exporters leave it out where not even the rank is known.

    Such a model, without its weights, is checked with made-up shapes, and not for consistency.
    """
    try:
        onnx.checker.check_model(str(path), full_check)
    except onnx.checker.ValidationError as error:
        if _NO_SHAPE not in str(error):
            raise
        model = onnx.load(path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
        external = onnx.TensorProto.EXTERNAL
        if not any(tensor.data_location == external for tensor in model.graph.initializer):
            onnx.checker.check_model(model)


def check_attributes(model: ir.Model, path: Path) -> None:
    """Raises `ModelError` for attributes that crash a library instead of being refused by it."""
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for body in bodies for node in body.all_nodes() if node.domain == ""):
        for op_type, name, least, most in _LIMITS:
            value = node.attributes.get_int(name, least) if node.op_type == op_type else least
            if not least <= value <= most:
                raise ModelError(
                    f"{path}: {op_type} {node.name!r}: {name} must be {least} to {most}, got "
                    f"{value}"
                )
        n = node.attributes.get_int("num_outputs", len(node.outputs))
        if node.op_type == "Split" and n != len(node.outputs):
            raise ModelError(
                f"{path}: Split {node.name!r}: num_outputs is {n}, it has {len(node.outputs)}"
            )


def check_data(model: ir.Model, path: Path) -> None:
    """Raises `ModelError` for data that is longer or shorter than its shape, which the checker
    lets pass."""
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, ir.TensorProtoTensor):
            continue
        if (found := len(tensor.tobytes())) != tensor.nbytes:
            raise ModelError(
                f"{path}: tensor {value.name!r} holds {found} bytes, its type and shape "
                f"{list(tensor.shape.numpy())} need {tensor.nbytes}"
            )


def external_data_files(model: ir.Model, path: Path) -> list[Path]:
    """The files with a model's external data. Raises `ModelError` if a tensor reaches beyond its
    file."""
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    for tensor in external:
        start, length = tensor.offset or 0, tensor.length
        end = start + tensor.nbytes
        if (
            start < 0
            or length not in (None, tensor.nbytes)
            or end > Path(tensor.path).stat().st_size
        ):
            raise ModelError(
                f"{path}: tensor {tensor.name!r} takes {tensor.nbytes} bytes, which do not stand "
                f"at offset {start} of {tensor.path}: is the file whole, and of this model?"
            )
    return [path.parent / location for location in sorted({str(t.location) for t in external})]
