"""Whether a model computes each sample by itself, so that a batch can be run in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import onnx_ir as ir

from calib.arrays import Batch
from calib.graph import Model
from calib.prepare import inner_nodes, is_constant


class _Of(Enum):
    """What a value holds.

    FIXED: the same whatever the samples are. SAMPLES: along its first axis one entry for each
    sample, computed from that one alone. COUNT: how many samples there are, as a number or before
    others that are fixed. MIXED: anything else.
    """

    FIXED = 0
    SAMPLES = 1
    COUNT = 2
    MIXED = 3


_BROADCASTING = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Mean", "Sum", "And", "Or", "Xor"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "PRelu", "Clip"),
    *("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "Tanh"),
    *("HardSigmoid", "HardSwish", "Swish", "Mish", "Softplus", "Softsign", "Erf", "Exp", "Log"),
    *("Sqrt", "Reciprocal", "Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Not", "Cast"),
    *("Sin", "Cos", "IsNaN", "IsInf", "Identity"),
}
_ALONG_OTHER_AXES = {
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "LRN", "InstanceNormalization"),
    *("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool", "GroupNormalization"),
    *("DepthToSpace", "SpaceToDepth", "BatchNormalization", "Dropout"),
}
# Operators of one axis, and the one that is meant where none is named.
_OF_ONE_AXIS = {
    "Softmax": -1,
    "LogSoftmax": -1,
    "Hardmax": -1,
    "LayerNormalization": -1,
    "TopK": -1,
    "RMSNormalization": -1,
    "QuantizeLinear": 1,
    "DequantizeLinear": 1,
    "ArgMax": 0,
    "ArgMin": 0,
    "Split": 0,
}
_OF_AXES = {
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum", "Squeeze", "Unsqueeze", "Slice"),
}
_COUNT_STAYS_FIRST = ("Identity", "Squeeze", "Unsqueeze", "Concat")
_HOLD_COUNTS = (ir.DataType.INT64, ir.DataType.INT32)
_ROOM = 8_000_000  # bytes; found best
_FEWEST = 2  # samples; of a single one, some operators compute in another order
_TRAINED_DROPOUT = 2  # inputs: a third says whether it is trained
_MATRIX = 2  # axes
_STEPS_OF_SLICE, _AXES_OF_PAD, _SCALES_OF_RESIZE = 4, 3, 2  # before opset 11 and of Upsample at 1
_RANDOM = {
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    *("Multinomial", "Bernoulli"),
}

_Kinds = Sequence[_Of]


def part_size(model: Model, names: Sequence[str], batch: Batch) -> int | None:
    """How many samples of ``batch`` to run at a time, so that what is captured of them is still in
    a cache when it is read, on whatever machine; None for all of them, as it may be that they
    depend on each other, or that smaller parts would have the weights, which are about as large as
    the model's files, read too often."""
    n = batch.n_samples
    if n <= _FEWEST or not can_be_cut(model, batch):
        return None
    of_one = sample_bytes(model, names, batch)
    if not of_one or not samples_apart(model, names, batch):
        return None
    parts = -(-n // max(_FEWEST, max(_ROOM, model.n_bytes) // of_one))
    return -(-n // (parts + parts % 2)) if parts > 1 else None  # two are under way at a time


def can_be_cut(model: Model, batch: Batch) -> bool:
    """Whether the model takes fewer samples at a time than the batch holds."""
    if model.feedback or batch.n_samples <= 1:
        return False
    rows = batch.rows()
    shapes = {spec.name: spec.shape for spec in model.inputs}
    fixed = any(isinstance((shapes.get(name) or (None,))[0], int) for name in rows)
    return not fixed and {len(array) for array in rows.values()} == {batch.n_samples}


def samples_apart(model: Model, names: Sequence[str], batch: Batch) -> bool:
    """Whether the values ``names`` have one entry for each sample of ``batch`` along their first
    axis, none of which depends on other samples; of operators not known here, it is doubted."""
    graph, rows = model.ir.graph, batch.rows()
    known = {v: _Of.SAMPLES if v.name in rows else _Of.FIXED for v in graph.inputs}
    for node in graph:
        found = _held(node, [_kind(value, known) for value in node.inputs])
        known.update(dict.fromkeys(node.outputs, found))
    by_name = {value.name: kind for value, kind in known.items()}
    return all(by_name.get(name) is _Of.SAMPLES for name in names)


def sample_bytes(model: Model, names: Sequence[str], batch: Batch) -> int | None:
    """Bytes that the values ``names`` take for each sample of ``batch``; None where that cannot be
    told from their shapes."""
    graph = model.ir.graph
    lengths = dict[object, int]()
    for value in graph.inputs:
        if value.shape is not None and (array := batch.feed.get(str(value.name))) is not None:
            lengths.update(zip(value.shape.dims, array.shape, strict=False))
    values = {value.name: value for node in graph for value in node.outputs}
    total = 0
    for value in (values[name] for name in names if name in values):
        if value.shape is None or value.dtype is None:
            return None
        dims = [d if isinstance(d, int) else lengths.get(d) for d in value.shape.dims[1:]]
        if None in dims:
            return None
        total += math.ceil(math.prod(d for d in dims if d is not None) * value.dtype.itemsize)
    return total


def _kind(value: ir.Value | None, known: Mapping[ir.Value, _Of]) -> _Of:
    return _Of.FIXED if value is None or is_constant(value) else known.get(value, _Of.MIXED)


def _held(node: ir.Node, kinds: _Kinds) -> _Of:
    """What the outputs of ``node`` hold."""
    has_body = next(inner_nodes(node), None) is not None
    if _Of.MIXED in kinds or node.op_type in _RANDOM or has_body:
        return _Of.MIXED
    if all(kind is _Of.FIXED for kind in kinds):
        return _Of.FIXED
    if node.domain:
        return _Of.MIXED
    if _Of.COUNT in kinds or node.op_type == "Shape":
        return _counted(node, kinds)
    return _Of.SAMPLES if _keeps_apart(node, kinds) else _Of.MIXED


def _counted(node: ir.Node, kinds: _Kinds) -> _Of:
    """What a node makes of the number of samples, or a Shape of samples."""
    first, others = kinds[0], {*kinds[1:]}
    if node.op_type == "Shape":
        start, end = (node.attributes.get_int(name, n) for name, n in (("start", 0), ("end", 1)))
        has_first = start > 0 or (start == 0 and _reaches(end, _rank(node.inputs[0])))
        is_known = first is _Of.SAMPLES and has_first
        return (_Of.FIXED if start else _Of.COUNT) if is_known else _Of.MIXED
    if node.op_type in ("Reshape", "Expand", "ConstantOfShape"):
        return _Of.SAMPLES if _is_shaped(node, kinds) else _Of.MIXED
    places = _numbers(node, 1) if node.op_type == "Gather" else None
    if first is not _Of.COUNT or others - {_Of.FIXED}:
        return _Of.MIXED
    if node.op_type in _COUNT_STAYS_FIRST or places == [0] or _still_counts(node):
        return _Of.COUNT
    of_other_axes = node.op_type == "Gather" and places and min(places) > 0
    return _Of.FIXED if of_other_axes else _Of.MIXED


def _still_counts(node: ir.Node) -> bool:
    """Whether a Cast leaves the number of samples as it is, or a Slice begins with it."""
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) in _HOLD_COUNTS
    if node.op_type != "Slice" or len(node.inputs) > _STEPS_OF_SLICE or _numbers(node, 1) != [0]:
        return False
    value, end = node.inputs[0], _numbers(node, 2)
    length = value.shape[0] if value is not None and value.shape else None
    return end is not None and _reaches(end[0], length)


def _reaches(end: int, length: object) -> bool:
    """Whether what ends there, of so many, has the first."""
    return end > 0 or (isinstance(length, int) and 0 > end > -length)


def _is_shaped(node: ir.Node, kinds: _Kinds) -> bool:
    """Whether a shape of which the first axis counts samples makes an entry for each of what is one
    for each already, or the same for all."""
    if node.op_type == "Expand" and tuple(kinds) == (_Of.FIXED, _Of.COUNT):
        value, target = node.inputs[:2]
        rank = target.shape[0] if target is not None and target.shape else None
        return isinstance(rank, int) and value is not None and _is_same_for_all(value, rank)
    return (node.op_type, *kinds) in {
        ("Reshape", _Of.SAMPLES, _Of.COUNT),
        ("ConstantOfShape", _Of.COUNT),
    }


def _keeps_apart(node: ir.Node, kinds: _Kinds) -> bool:
    """Whether each entry of the outputs depends on those of one sample."""
    if rule := _OF_SEVERAL.get(node.op_type):
        return rule(node, kinds)
    rule_of_one = _OF_THE_FIRST.get(node.op_type)
    only = kinds[0] is _Of.SAMPLES and _Of.SAMPLES not in kinds[1:]
    return only and rule_of_one is not None and rule_of_one(node)


def _has_other_axes(node: ir.Node) -> bool:
    """Whether a node that works along other axes than the first does nothing more."""
    training = node.attributes.get_int("training_mode", 0)
    training = training or (node.op_type == "Dropout" and len(node.inputs) > _TRAINED_DROPOUT)
    return not training and len(node.outputs) == 1  # MaxPool: the second counts through samples


def _has_another_axis(node: ir.Node) -> bool:
    rank = _rank(node.inputs[0]) or 0  # scales and shifts may be broadcast, or one a block
    alike = all(value is None or _is_same_for_all(value, rank) for value in node.inputs[1:])
    axis = node.attributes.get_int("axis", _OF_ONE_AXIS[node.op_type])
    return alike and _is_not_first(node, (axis,))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_aligned(node: ir.Node, kinds: _Kinds) -> bool:
    """Whether first axes meet first axes, and what is fixed is the same for every entry."""
    ranks = [_rank(value) for value in node.inputs]
    samples = {r for r, kind in zip(ranks, kinds, strict=True) if kind is _Of.SAMPLES}
    if len(kinds) == 1:
        return True
    if None in samples or len(samples) > 1:
        return False
    rank = next(iter(samples)) or 0
    fixed = (v for v, kind in zip(node.inputs, kinds, strict=True) if kind is _Of.FIXED)
    return all(v is None or _is_same_for_all(v, rank) for v in fixed)


def _is_same_for_all(value: ir.Value, rank: int) -> bool:
    """Whether, broadcast to ``rank`` axes, a value is the same along the first."""
    own = _rank(value)
    if own is None or value.shape is None:
        return False
    return own < rank or (own == rank and value.shape[0] == 1)


def _is_not_first(node: ir.Node, axes: Sequence[int] | None) -> bool:
    """Whether none of ``axes`` is the first; none given stands for all."""
    if not axes:
        return False
    counted = node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]
    rank = _rank(counted)
    return all(axis > 0 if axis >= 0 else rank is not None and axis + rank > 0 for axis in axes)


def _axes(node: ir.Node) -> Sequence[int] | None:
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    return _numbers(node, 3 if node.op_type == "Slice" else 1)


def _numbers(node: ir.Node, position: int) -> list[Any] | None:
    """What the constant input at ``position`` holds; None if it is none."""
    value = node.inputs[position] if len(node.inputs) > position else None
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    numbers: list[Any] = value.const_value.numpy().reshape(-1).tolist()
    return numbers


def _keeps_rows(node: ir.Node) -> bool:
    """Whether a Reshape leaves what is of one sample in one entry: the values keep their order,
    so it does if there are as many entries as before."""
    value, reshaped = node.inputs[0], node.outputs[0]
    target = _numbers(node, 1)
    if target and target[0] == 0 and not node.attributes.get_int("allowzero", 0):
        return True
    if value is None or not value.shape or not reshaped.shape:
        return False
    (first, *before), (entries, *after) = value.shape.dims, reshaped.shape.dims
    named = isinstance(entries, ir.SymbolicDim) and entries.value is not None
    if named and entries == first and not reshaped.is_graph_output():  # which is but declared
        return True
    sizes = [d for d in (*before, *after) if isinstance(d, int)]
    numbers = len(sizes) == len(before) + len(after) and not isinstance(entries, int)
    return numbers and math.prod(sizes[: len(before)]) == math.prod(sizes[len(before) :])


def _pad(node: ir.Node) -> bool:
    if len(node.inputs) > _AXES_OF_PAD and node.inputs[_AXES_OF_PAD] is not None:
        return _is_not_first(node, _numbers(node, _AXES_OF_PAD))
    pads = _numbers(node, 1) or [*node.attributes.get_ints("pads", (1,))]
    return bool(pads[0] == pads[len(pads) // 2] == 0)


def _resize(node: ir.Node) -> bool:
    if "axes" in node.attributes:
        return _is_not_first(node, node.attributes["axes"].as_ints())
    scales = _numbers(node, _SCALES_OF_RESIZE if len(node.inputs) > _SCALES_OF_RESIZE else 1)
    return (scales or (0,))[0] == 1


def _gather(node: ir.Node, kinds: _Kinds) -> bool:
    axis = node.attributes.get_int("axis", 0)
    if tuple(kinds) == (_Of.SAMPLES, _Of.FIXED):
        return _is_not_first(node, (axis,))
    is_first = axis in (0, -(_rank(node.inputs[0]) or 0))
    return is_first and tuple(kinds) == (_Of.FIXED, _Of.SAMPLES)


def _matmul(node: ir.Node, kinds: _Kinds) -> bool:
    left, right = node.inputs[:2]
    ranks = _rank(left) or 0, _rank(right) or 0
    if tuple(kinds) == (_Of.SAMPLES, _Of.SAMPLES):
        return ranks[0] == ranks[1] > _MATRIX
    if kinds[0] is _Of.SAMPLES and right is not None:
        if not 0 < ranks[1] <= ranks[0] or ranks[0] < _MATRIX:
            return False
        return ranks[1] <= _MATRIX or _is_same_for_all(right, ranks[0])
    return left is not None and ranks[1] > _MATRIX and _is_same_for_all(left, ranks[1])


def _gemm(node: ir.Node) -> bool:
    fixed = all(bias is None or _is_same_for_all(bias, _MATRIX) for bias in node.inputs[2:])
    return fixed and not node.attributes.get_int("transA", 0)


# Of samples in the first input, the others fixed, and of those where it is otherwise.
_OF_THE_FIRST: dict[str, Callable[[ir.Node], bool]] = {
    **dict.fromkeys(_ALONG_OTHER_AXES, _has_other_axes),
    **dict.fromkeys(_OF_ONE_AXIS, _has_another_axis),
    **dict.fromkeys(_OF_AXES, lambda node: _is_not_first(node, _axes(node))),
    "Reshape": _keeps_rows,
    "Flatten": lambda node: node.attributes.get_int("axis", 1) == 1,
    "Transpose": lambda node: [*node.attributes.get_ints("perm", ()), 1][0] == 0,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "Gemm": _gemm,
}
_OF_SEVERAL: dict[str, Callable[[ir.Node, _Kinds], bool]] = {
    **dict.fromkeys(_BROADCASTING, _is_aligned),
    "Concat": lambda node, kinds: (
        _Of.FIXED not in kinds and _is_not_first(node, (node.attributes.get_int("axis", 0),))
    ),
    "Gather": _gather,
    "MatMul": _matmul,
}
