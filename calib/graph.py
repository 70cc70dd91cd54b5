"""Read and check an ONNX model, and list the uses of tensors that could be quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.checker import check_attributes, check_data, check_file, external_data_files
from calib.errors import ModelError, OptionError, one_line
from calib.granularity import Granularity, PerChannel, PerTensor
from calib.prepare import QUANTIZABLE_OPS, inner_nodes, is_constant, prepare, sources

Kind = Literal["weight", "activation"]

# Other operators that multiply weights, or two activations: named when they stay float.
_UNSUPPORTED_OPS = ("Attention", "Einsum", "GRU", "LSTM", "RNN", "DeformConv", "LinearAttention")
_INTEGER_OPS = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_QDQ_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# What a quantized value may pass without being another.
_MOVEMENTS = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast")
_FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """An input or output of the model. ``shape`` is None where not even the rank is known; an
    axis is a number, a symbol, or None. ``dtype`` is the NumPy one. An ``optional`` input has a
    value of its own where none is fed."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...] | None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """One input of a node, read from a tensor that could be quantized.

    Attributes:
        edge: the node is a weighted layer with none before it, or none behind it.
        granularity: one group for each output channel of the node, for weights that have one
            axis for them.
        inputs: the axis of a MatMul's or Gemm's weight that its products are summed along.
        dtype: of the values, float32 or float16.
    """

    tensor: str
    kind: Kind
    node: str
    op_type: str
    edge: bool
    granularity: Granularity
    dtype: str = "float32"
    inputs: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A node or tensor that stays float, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to be quantized: BatchNormalization folded, every node and value named.

    Attributes:
        path: the file it came from, never written to.
        sha256: digest of that file and of its external data, hex.
        n_bytes: their size.
        ir: the prepared graph. Not to be changed: `write_qdq` works on a clone.
        notes: what preparing changed.
        feedback: input → output that is fed back into it at the next feed; such an input is
            optional in the data, and starts at zero.
        files: ``path`` and the files with its external data.
    """

    path: Path
    sha256: str
    n_bytes: int
    ir: ir.Model
    notes: tuple[str, ...]
    feedback: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """What the model must be fed, or may be."""
        specs = map(_value_spec, self.ir.graph.inputs)
        return tuple(replace(s, optional=s.optional or s.name in self.feedback) for s in specs)

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """What the model returns."""
        return tuple(map(_value_spec, self.ir.graph.outputs))

    def weight(self, name: str) -> NDArray[np.floating]:
        """The initializer ``name`` as an array of its own type, any shape, possibly read-only.

        From a file of external data it is read anew each time, so that nothing stays in memory.
        """
        tensor = self.ir.graph.initializers[name].const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        array = tensor.numpy().copy()
        tensor.release()
        return array

    def weight_size(self, name: str) -> int:
        """How many values the initializer ``name`` has; none is read."""
        tensor = self.ir.graph.initializers[name].const_value
        assert tensor is not None
        return int(tensor.size)


def load_model(path: str | Path, feedback: Mapping[str, str] | None = None) -> Model:
    """The model at ``path``, checked and prepared.

    Args:
        path: an ONNX file.
        feedback: see `Model.feedback`.

    Raises:
        ModelError: if the file is missing, unreadable, not ONNX, or fails ``onnx.checker``.
        OptionError: if ``feedback`` names no input, no output, or two that do not match.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file"
        )
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: is empty, not an ONNX model")
    try:
        check_file(path)
        model = ir.load(path)
        if "ai.onnx" in model.opset_imports:  # another name of the default domain
            model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
        check_attributes(model, path)
        files = (path, *external_data_files(model, path))
        digest, n_bytes = _digest(files)
        notes = (*prepare(model), *_qdq_note(model))
        check_data(model, path)
    except OSError as error:
        where = error.filename or path
        raise ModelError(f"{where}: cannot be read: {error.strerror or one_line(error)}") from error
    except (MemoryError, ModelError):
        raise
    except Exception as error:  # protobuf, checker and passes each raise types of their own
        raise ModelError(f"{path}: not a valid ONNX model: {one_line(error)}") from error
    loaded = Model(path, digest, n_bytes, model, notes, dict(feedback or {}), files)
    _check_feedback(loaded)
    return loaded


def _qdq_note(model: ir.Model) -> tuple[str, ...]:
    n = sum(node.op_type in _QDQ_OPS and node.domain == "" for node in model.graph)
    text = f"{n} QuantizeLinear and DequantizeLinear nodes were there before: left alone"
    return (text,) if n else ()


def _check_feedback(model: Model) -> None:
    graph = model.ir.graph
    inputs, outputs = ({v.name: v for v in values} for values in (graph.inputs, graph.outputs))
    for entry in model.feedback.items():
        for name, what, there in zip(entry, ("input", "output"), (inputs, outputs), strict=True):
            if name not in there:
                known = ", ".join(repr(v) for v in there)
                raise OptionError(f"feed-back: {name!r} is no {what} of the model; it has {known}")
        source, target = inputs[entry[0]], outputs[entry[1]]
        if source.dtype != target.dtype:
            raise OptionError(
                f"feed-back: input {source.name!r} is {source.dtype}, output {target.name!r} is "
                f"{target.dtype}: they must be of one type"
            )
        shapes = [spec.shape for spec in map(_value_spec, (source, target))]
        if None not in shapes and not _match(*shapes):
            raise OptionError(
                f"feed-back: input {source.name!r} is {shapes[0]}, output {target.name!r} is "
                f"{shapes[1]}: their shapes must match"
            )
    if model.feedback and all(spec.optional for spec in model.inputs):
        raise OptionError("feed-back: every input is fed back, none is left for data")


def _match(one: tuple[object, ...] | None, other: tuple[object, ...] | None) -> bool:
    """Whether two shapes have the same number of axes and, where both say how long, lengths."""
    assert one is not None
    assert other is not None
    return len(one) == len(other) and all(
        a == b for a, b in zip(one, other, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def quantizable_uses(model: Model) -> tuple[tuple[Use, ...], tuple[Skipped, ...]]:
    """Every use of a float tensor that QDQ could stand before, in graph order, and what
    multiplies but must stay float."""
    edges = _edge_nodes(model.ir.graph)
    uses: list[Use] = []
    skipped: list[Skipped] = []
    for node in model.ir.graph:
        if node.op_type in QUANTIZABLE_OPS and node.domain == "":
            for position in (0, 1):
                reason = _obstacle(node, position)
                if reason:
                    skipped.append(Skipped(f"{node.name}[{position}]", reason))
                else:
                    uses.append(_use(node, position, node in edges))
        elif node.op_type in _INTEGER_OPS:
            skipped.append(Skipped(str(node.name), f"{node.op_type} is quantized already"))
        elif node.op_type in _UNSUPPORTED_OPS or (node.domain != "" and _multiplies(node)):
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            skipped.append(Skipped(str(node.name), f"{name} is not supported"))
    skipped.extend(_inside_subgraphs(model.ir.graph))
    return tuple(uses), tuple(skipped)


def _use(node: ir.Node, position: int, edge: bool) -> Use:
    value = node.inputs[position]
    assert value is not None
    assert value.name is not None
    assert node.name is not None
    kind: Kind = "weight" if is_constant(value) else "activation"
    granularity: Granularity = PerTensor()
    if kind == "weight":
        axis = _channel_axis(node, position, len(value.shape or ()))
        granularity = PerTensor() if axis is None else PerChannel(axis)
    dtype = "float16" if _float_type(node, position) is ir.DataType.FLOAT16 else "float32"
    inputs = 1 - granularity.axis if isinstance(granularity, PerChannel) else None
    if node.op_type not in ("MatMul", "Gemm"):
        inputs = None
    return Use(value.name, kind, node.name, node.op_type, edge, granularity, dtype, inputs)


def _obstacle(node: ir.Node, position: int) -> str | None:
    value = node.inputs[position]
    assert value is not None
    dtype = _float_type(node, position)
    if dtype is ir.DataType.BFLOAT16:
        return f"{value.name!r} is bfloat16, for which onnxruntime has no CPU kernels"
    if dtype not in _FLOAT_TYPES:
        found = dtype.name.lower() if dtype else "of unknown type"
        return f"{value.name!r} is {found}, not float32 or float16"
    if _is_quantized(value):
        return f"{value.name!r} is quantized already"
    if value.is_graph_input() and value.is_initializer():
        return f"{value.name!r} is an optional input"
    if is_constant(value) and value.const_value is not None and value.const_value.size == 0:
        return f"{value.name!r} is empty"
    return None


def _is_quantized(value: ir.Value) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVEMENTS and producer.inputs[0]:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _float_type(node: ir.Node, position: int) -> ir.DataType | None:
    """The type of an input; both operands have the same, should inference not reach one."""
    for value in (node.inputs[position], node.inputs[1 - position], node.outputs[0]):
        if value is not None and value.dtype is not None:
            return value.dtype
    return None


def _channel_axis(node: ir.Node, position: int, rank: int) -> int | None:
    """The axis of a weight that runs over the output channels of its node; None if none does."""
    if node.op_type in ("Conv", "ConvTranspose"):
        axis = {"Conv": 0, "ConvTranspose": 1}[node.op_type]
        return axis if position == 1 else None
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB" if position else "transA", 0)
        return int(bool(transposed) != bool(position))
    # onnxruntime 1.31 fails to run an int8 MatMul with scales for the columns of several matrices.
    return position if rank == 2 else None


def _edge_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Weighted layers that no other weighted layer precedes, or that none follows."""
    nodes = list(graph)
    weighted = {n for n in nodes if n.op_type in QUANTIZABLE_OPS and _has_weight(n)}
    preceded: set[ir.Node] = set()
    followed: set[ir.Node] = set()
    for node in nodes:
        if any(p in preceded or p in weighted for p in sources(node)):
            preceded.add(node)
    for node in reversed(nodes):
        if node in followed or node in weighted:
            followed.update(sources(node))
    return {n for n in weighted if n not in preceded or n not in followed}


def _inside_subgraphs(graph: ir.Graph) -> Iterator[Skipped]:
    for outer in graph:
        for node in inner_nodes(outer):
            if node.op_type in QUANTIZABLE_OPS and node.domain == "":
                yield Skipped(str(node.name), f"inside a subgraph of {outer.name!r}")


def _has_weight(node: ir.Node) -> bool:
    return any(v is not None and is_constant(v) and len(v.shape or ()) > 1 for v in node.inputs[:2])


def _multiplies(node: ir.Node) -> bool:
    """Whether an operator of another domain has a weight, or is called after what multiplies."""
    named = any(part in node.op_type for part in ("MatMul", "Gemm", "Conv", "Attention"))
    values = (v for v in node.inputs if v is not None)
    return named or any(is_constant(v) and len(v.shape or ()) > 1 for v in values)


def _value_spec(value: ir.Value) -> ValueSpec:
    if not isinstance(value.type, ir.TensorType) or value.dtype in (
        None,
        ir.DataType.STRING,
        ir.DataType.UNDEFINED,
    ):
        raise ModelError(f"{value.name!r}: only tensors of numbers can be fed, got {value.type}")
    shape = None
    if value.shape is not None:
        dims = (d if isinstance(d, int) else d.value for d in value.shape.dims)
        # Some exporters write -1 for an axis that is free.
        shape = tuple(None if isinstance(d, int) and d < 0 else d for d in dims)
    dtype = value.dtype or ir.DataType.FLOAT
    return ValueSpec(str(value.name), dtype.numpy(), shape, value.is_initializer())


def _digest(files: tuple[Path, ...]) -> tuple[str, int]:
    digest = hashlib.sha256()
    n_bytes = 0
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                n_bytes += len(block)
    return digest.hexdigest(), n_bytes
