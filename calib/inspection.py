"""Where the error of a quantized model begins: its inner tensors beside the float model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import Runtime, Session, Values
from calib.comparison import Difference
from calib.graph import Model

# Enough to tell a broken layer from a rounded one; every inner value is held for a batch.
_MOST_SAMPLES = 64
# What 8 bits keep of most tensors; below it, errors of a sound model add up by a few dB a layer.
_GOOD_DB = 30.0
_JUMP_DB = 10.0
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16)
_INPUT = "input"


@dataclass(frozen=True, slots=True)
class InnerTensor:
    """A tensor of the float model beside the quantized model's of the same name.

    Attributes:
        op_type: of the node that makes it in the float model; ``input`` for the model's inputs.
        sqnr_db: infinite where nothing differs, minus infinite where the quantized model's holds
            NaN or infinity.
    """

    name: str
    op_type: str
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class Jump:
    """A tensor whose error stands out. ``before_db`` is the lowest SQNR before it in the graph,
    infinite where nothing differed."""

    tensor: InnerTensor
    before_db: float

    @property
    def text(self) -> str:
        """One sentence."""
        where = f"{self.tensor.name!r} ({self.tensor.op_type})"
        found = _decibels(self.tensor.sqnr_db, "it holds NaN or infinity")
        before = _decibels(self.before_db, "none")
        return (
            f"the first tensor whose error stands out is {where}: {found}; lowest before it: "
            f"{before}"
        )


@dataclass(frozen=True, slots=True)
class Inspection:
    """The inner tensors that both models have, in the float model's graph order.

    Attributes:
        n_samples: how many samples they were compared on.
        reason: why there are none; empty if there are some.
    """

    tensors: tuple[InnerTensor, ...] = ()
    n_samples: int = 0
    reason: str = ""

    @property
    def first(self) -> Jump | None:
        """The first tensor more than 10 dB below the lowest before it, or, where all before it have
        more than 30 dB, below 20 dB.

        Error adds up slowly along a graph, and a tensor may recover from it: a jump, not the lowest
        SQNR, names the culprit. Above 30 dB, a jump does no harm.
        """
        lowest = math.inf
        for tensor in self.tensors:
            if tensor.sqnr_db < min(lowest, _GOOD_DB) - _JUMP_DB:
                return Jump(tensor, lowest)
            lowest = min(lowest, tensor.sqnr_db)
        return None

    @property
    def text(self) -> str:
        """One sentence: which tensor stands out, or that none does."""
        if not self.tensors:
            return self.reason
        if self.first is not None:
            return self.first.text
        worst = min(self.tensors, key=lambda tensor: tensor.sqnr_db)
        if math.isinf(worst.sqnr_db):
            return f"no tensor stands out: none of {len(self.tensors)} differs"
        return (
            f"no tensor stands out: the error grows evenly, down to {worst.sqnr_db:.1f} dB at "
            f"{worst.name!r}"
        )


@dataclass(frozen=True, slots=True)
class _Counterpart:
    """The value of the quantized graph that is a tensor of the float one; integers with their
    ``scale`` and ``zero_point``."""

    name: str
    scale: NDArray[Any] | None = None
    zero_point: NDArray[Any] | None = None

    def read(self, values: Values) -> NDArray[Any] | None:
        array = values.get(self.name)
        if array is None or self.scale is None:
            return array
        zero_point = 0 if self.zero_point is None else self.zero_point.astype(np.int64)
        return np.asarray((array.astype(np.int64) - zero_point) * self.scale.astype(np.float64))


def inspect(
    model: Model, quantized: Path, batches: Iterable[Batch], runtime: Runtime | None = None
) -> Inspection:
    """Compares the inner tensors that both graphs have under one name, on the first 64 samples or
    a few more, at onnxruntime's default level.

    A tensor of the quantized model is taken as its readers get it, behind its QDQ pair. The float
    graph is the file's, or the prepared one (functions inlined) if that has more of the names.
    Tensors that are all zero, or not finite, in the float model are left out.

    Raises:
        ModelError: if onnxruntime cannot run one of the models with inner values as outputs.
    """
    other = ir.load(quantized)
    graphs = (ir.load(model.path), model.ir)
    matched = [(graph, dict(_matches(graph.graph, other.graph))) for graph in graphs]
    reference, pairs = max(matched, key=lambda found: len(found[1]))
    if not pairs:
        return Inspection(
            reason="no inner tensor can be compared: none has the same name in both models"
        )
    sessions = (
        Session(reference, runtime, values=list(pairs), feedback=model.feedback),
        Session(other, runtime, values=[c.name for c in pairs.values()], feedback=model.feedback),
    )
    differences: dict[str, Difference | None] = {}
    n_samples = 0
    for batch in batches:
        expected, actual = (session.run(batch.feed, batch.restart) for session in sessions)
        for name, counterpart in pairs.items():
            _add(differences, name, expected.get(name), counterpart.read(actual))
        n_samples += batch.n_samples
        if n_samples >= _MOST_SAMPLES:
            break
    return _inspection(reference.graph, differences, n_samples)


def _inspection(
    graph: ir.Graph, differences: dict[str, Difference | None], n_samples: int
) -> Inspection:
    tensors = tuple(
        InnerTensor(name, op_type, difference.sqnr_db)
        for name, op_type in _values(graph)
        if (difference := differences.get(name)) is not None
        and (difference.signal > 0 or not difference.noise > 0)
    )
    reason = "" if tensors else "no inner tensor can be compared: types or shapes differ"
    return Inspection(tensors, n_samples, reason)


def _add(
    differences: dict[str, Difference | None],
    name: str,
    expected: NDArray[Any] | None,
    actual: NDArray[Any] | None,
) -> None:
    """Adds two arrays to what belongs to ``name``; None from where they cannot be compared on."""
    if expected is None or actual is None:
        return
    comparable = (
        expected.dtype.kind == actual.dtype.kind == "f"
        and expected.shape == actual.shape
        and not np.isnan(expected).any()
    )
    difference = differences.setdefault(name, Difference())
    if not comparable:
        differences[name] = None
    elif difference is not None:
        difference.add(expected, actual)


def _values(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Names of what may be a float tensor, with what makes it, in graph order."""
    for value in graph.inputs:
        if not value.is_initializer() and value.dtype in _FLOATS:
            yield str(value.name), _INPUT
    for node in graph:
        for value in node.outputs:
            if value.name and value.dtype in _FLOATS and node.op_type != "Constant":
                yield value.name, node.op_type


def _matches(graph: ir.Graph, other: ir.Graph) -> Iterator[tuple[str, _Counterpart]]:
    inputs = {value.name: value for value in other.inputs}
    made = {value.name: value for node in other for value in node.outputs}
    read_by = {v.name: list(v.consumers()) for node in graph for v in node.outputs}
    for name, op_type in _values(graph):
        source = (inputs if op_type == _INPUT else made).get(name)
        pair = _behind_pair(source) if source is not None else None
        counterpart = _Counterpart(pair) if pair is not None else _integers(name, made, other)
        if counterpart is not None:
            yield _after_dropped(read_by.get(name, []), made) or name, counterpart
        elif source is not None and op_type != _INPUT:
            yield name, _Counterpart(name)


def _after_dropped(readers: list[ir.Node], made: Mapping[Any, ir.Value]) -> str | None:
    """What the float model makes of a value that only a Relu or Clip reads which the quantized
    model does not have: onnxruntime's tools let the zero point do it, and keep the first name."""
    if not readers or any(node.op_type not in ("Relu", "Clip") for node in readers):
        return None
    names = [str(node.outputs[0].name) for node in readers]
    return None if any(_is_computed(name, made) for name in names) else names[0]


def _is_computed(name: str, made: Mapping[Any, ir.Value]) -> bool:
    """Whether there is such a value, and not only as what a DequantizeLinear makes of another."""
    producer = made[name].producer() if name in made else None
    dequantized = producer is not None and producer.op_type == "DequantizeLinear"
    return f"{name}_quantized" in made or (name in made and not dequantized)


def _behind_pair(value: ir.Value) -> str | None:
    """The dequantized value, where a QDQ pair reads ``value``. Before the pair it may be another:
    onnxruntime's tools drop a Relu that the zero point does as well, and keep its name."""
    for quantize in value.consumers():
        if quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is value:
            for dequantize in quantize.outputs[0].consumers():
                if dequantize.op_type == "DequantizeLinear":
                    return dequantize.outputs[0].name
    return None


def _integers(name: str, made: Mapping[Any, ir.Value], graph: ir.Graph) -> _Counterpart | None:
    """The integers that onnxruntime's QOperator format has instead, by its names for them."""
    values = [graph.initializers.get(f"{name}_{what}") for what in ("scale", "zero_point")]
    scale, zero_point = (None if value is None else value.const_value for value in values)
    if f"{name}_quantized" not in made or scale is None or zero_point is None or scale.size != 1:
        return None
    if zero_point.dtype not in _INTEGERS:
        return None
    return _Counterpart(f"{name}_quantized", scale.numpy(), zero_point.numpy())


def _decibels(value: float, otherwise: str) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else otherwise
