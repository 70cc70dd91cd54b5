"""A graph under construction: values, weights in many guises, names that provoke."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Shape = tuple[int, ...]

BATCH = 3
VOCABULARY = 6
DOMAIN = "fuzz"
OPSETS = range(7, 27)
# Suffixes that calib itself gives to new values; names are made with them to provoke a clash.
SUFFIXES = (
    "_quantized", "_dequantized", "_scale", "_zero_point", "_clipped", "_clip_min", "/float",
    "_with_bias", "_without_bias", "_bias", "_channels", "_scaled", "_beta",
)  # fmt: skip
ODD = ("{}/x", "{} y", "{}:0", "é{}", "{}'s", 'a"{}', "{}[0]", "{}.weight", "%{}", "\\{}", "{}\n")


@dataclass(frozen=True, slots=True)
class Value:
    """A float32 activation; the first axis is the batch."""

    name: str
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(slots=True)
class Graph:
    """What has been built so far.

    Attributes:
        dynamic: the batch is symbolic, so that nothing may depend on its size.
        values: activations that further operators may read.
        weights: names of constants by shape, to share.
    """

    rng: np.random.Generator
    opset: int
    dynamic: bool
    odd_names: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    weights: dict[Shape, list[str]] = field(default_factory=dict)
    ids: Value | None = None
    names: set[str] = field(default_factory=set)
    feeds: list[dict[str, Array]] = field(default_factory=lambda: [{}, {}])

    # --- chance ---------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def whole(self, low: int, high: int) -> int:
        """One of ``low … high``."""
        return int(self.rng.integers(low, high + 1))

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    # --- names and nodes ------------------------------------------------------------------------

    def name(self, hint: str) -> str:
        """A new name, at times an odd one or one that a writer might want for itself."""
        name = f"{hint}{len(self.names)}"
        if self.odd_names and self.chance(0.3):
            name = self.one_of(*ODD).format(name)
        elif self.odd_names and self.names and self.chance(0.3):
            name = self.one_of(*sorted(self.names)) + self.one_of(*SUFFIXES)
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def emit(self, op: str, inputs: Sequence[str], n_outputs: int = 1, **attributes: Any) -> Any:
        """A new node; the name of its output, or a list of several."""
        outputs = [self.name(op.lower()) for _ in range(n_outputs)]
        name = "" if self.chance(0.35) else self.name(f"n_{op}")
        kept = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name, **kept))
        return outputs if n_outputs > 1 else outputs[0]

    def add(self, op: str, inputs: Sequence[str], shape: Shape, **attributes: Any) -> Value:
        """A new node with one float output, which later nodes may read."""
        value = Value(self.emit(op, inputs, **attributes), shape)
        self.values.append(value)
        return value

    # --- constants ------------------------------------------------------------------------------

    def initializer(self, array: Array, hint: str = "c") -> str:
        name = self.name(hint)
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def constant(self, array: Array, hint: str = "c") -> str:
        """As an initializer or a Constant node."""
        if self.chance(0.8):
            return self.initializer(array, hint)
        tensor = numpy_helper.from_array(np.asarray(array), "")
        return str(self.emit("Constant", [], value=tensor))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "i")

    def weight(self, *shape: int, fan_in: int = 1) -> str:
        """A float constant: a new one in some guise, or one that something else reads already."""
        known = self.weights.setdefault(shape, [])
        if known and self.chance(0.3):
            return str(self.one_of(*known))
        array = self.array(shape, fan_in)
        name = self._disguised(array) if self.chance(0.25) else self.constant(array, "w")
        known.append(name)
        return name

    def array(self, shape: Shape, fan_in: int = 1) -> Array:
        """Gaussian, now and then with what is hard to quantize."""
        values = np.asarray(self.rng.standard_normal(shape) / np.sqrt(fan_in))
        kind = self.whole(0, 39)
        if kind == 0:
            values *= 1e-30
        elif kind == 1:
            values *= 1e30
        elif kind == 2:
            values[...] = 0.25
        elif kind == 3:
            values[...] = self.one_of(0.0, -0.0)
        elif kind == 4:
            values = np.abs(values)
        elif kind == 5:
            values.flat[0] *= 1e4
        elif kind < 10 and shape:
            values[tuple(self.whole(0, 1) * (size - 1) for size in shape[:1])] = 0
        elif kind < 12 and shape:  # some channels matter far more than others
            values *= 10.0 ** self.rng.integers(-6, 6, (*shape[:1], *[1] * (len(shape) - 1)))
        return np.asarray(values, np.float32)

    def _disguised(self, array: Array) -> str:
        """The array as what a chain of nodes makes from constants."""
        kind = self.whole(0, 6)
        op, inputs, attributes = "Identity", [array], {}
        if kind == 0 and array.ndim > 1:
            perm = self.rng.permutation(array.ndim)
            op, attributes = "Transpose", {"perm": perm.tolist()}
            inputs = [array.transpose(np.argsort(perm)).copy()]
        elif kind == 1:
            op, inputs = "Reshape", [array.reshape(-1), np.array(array.shape, np.int64)]
        elif kind == 2:
            op, inputs = "Mul", [array * np.float32(2), np.array(0.5, np.float32)]
        elif kind == 3 and array.ndim and array.shape[0] > 1:
            op, inputs, attributes = "Concat", [array[:1], array[1:]], {"axis": 0}
        elif kind == 4 and np.abs(array).max(initial=0) < 6e4:
            op, inputs = "Cast", [array.astype(np.float16)]
            attributes = {"to": int(TensorProto.FLOAT)}
        names = [self.constant(each, "w") for each in inputs]
        if kind == 5 and self.values:  # no constant at all: it depends on an activation
            op, names = "Mul", [*names, self.scalar_of(self.one_of(*self.values))]
        return str(self.emit(op, names, **attributes))

    def scalar_of(self, value: Value) -> str:
        """A number between 0 and 1 that is made of all of ``value``."""
        mean = self.reduce("ReduceMean", value.name, list(range(value.rank)), keepdims=0)
        return str(self.emit("Sigmoid", [mean]))

    def reduce(self, op: str, name: str, axes: list[int], **attributes: Any) -> str:
        if self.opset >= 18:
            return str(self.emit(op, [name, self.integers(*axes)], **attributes))
        return str(self.emit(op, [name], axes=axes, **attributes))

    # --- inputs and outputs ---------------------------------------------------------------------

    def declare(self, name: str, kind: int, shape: Shape) -> onnx.ValueInfoProto:
        dims: list[Any] = list(shape)
        if dims and self.dynamic:
            dims[0] = "N"
            if self.chance(0.1):
                first = self.one_of(1, 2)
                dims[first:] = [f"{name}_{axis}" for axis in range(first, len(dims))]
        return helper.make_tensor_value_info(name, kind, dims)

    def input(self, hint: str, arrays: Sequence[Array]) -> str:
        """A graph input that is fed with one of ``arrays`` in each batch."""
        name = self.name(hint)
        kind = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
        self.inputs.append(self.declare(name, kind, arrays[0].shape))
        for feed, array in zip(self.feeds, arrays, strict=True):
            feed[name] = array
        return name

    def float_input(self, shape: Shape) -> Value:
        offset = self.one_of(0.0, 0.0, 0.5, 5.0)
        scale = self.one_of(1.0, 1.0, 1.0, 1e-3, 255.0)
        arrays = [scale * (offset + self.rng.standard_normal(shape)) for _ in self.feeds]
        value = Value(self.input("x", [a.astype(np.float32) for a in arrays]), shape)
        self.values.append(value)
        return value

    def output(self, value: Value, kind: int = TensorProto.FLOAT) -> None:
        if value.name not in {info.name for info in self.outputs}:
            dims: list[Any] = list(value.shape)
            if self.dynamic or self.chance(0.2):
                dims[:1] = ["N"]
            if self.chance(0.2):
                dims = [f"{value.name}_{axis}" for axis in range(len(dims))]
            self.outputs.append(helper.make_tensor_value_info(value.name, kind, dims))

    # --- the model ------------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        imports = [helper.make_opsetid("", self.opset)]
        lowest = helper.find_min_ir_version_for(imports)
        ir_version = max(lowest, self.one_of(3, 4, 8, 10), 8 * bool(self.functions))
        declared = list(self.inputs)
        share = 1.0 if ir_version < 4 else self.one_of(0.0, 0.0, 0.3)
        declared += [
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in self.initializers
            if self.chance(share)
        ]
        graph = helper.make_graph(self.nodes, "g", declared, self.outputs, self.initializers)
        imports += [helper.make_opsetid(DOMAIN, 1)] * bool(self.functions)
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=ir_version, functions=self.functions
        )
        return onnx.shape_inference.infer_shapes(model) if self.chance(0.3) else model
