"""Mutations of ONNX models for samples/fuzz_bytes.py: of the structure, and of the bytes.

A mutation changes a model in place, and returns False where the model has nothing that it could
change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from fuzz_protobuf import field, flipped
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Rng = np.random.Generator
Mutation = Callable[[Rng, onnx.ModelProto], "bool | None"]

SMALL = (-2, -1, 0, 1, 2, 3, 4, 5, 8, 100)
LARGE = (
    *(1000, 65536, 10**6, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)),
    -1000,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, -3e38, np.inf, -np.inf, np.nan)
STRINGS = ("", "x", "NOTSET", "SAME_UPPER", "VALID", "linear", "\n", "a\nb", "é", "\0", "%s", "/..")
TYPES = (*range(26), 99, -1)
# What nodes read as attributes, whether or not they are there.
KNOWN_INTS = ("axis", "group", "to", "transA", "transB", "keepdims", "ceil_mode", "allowzero")
KNOWN_LISTS = ("pads", "strides", "dilations", "kernel_shape", "perm", "axes", "output_shape")
KNOWN_FLOATS = ("alpha", "beta", "epsilon", "momentum")
OPS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "Relu", "Clip", "Identity"),
    *("MaxPool", "AveragePool", "Transpose", "Reshape", "Flatten", "Softmax", "Concat", "Add"),
    *("Split", "Loop", "If", "Scan", "LSTM", "Einsum", "Constant", "ConstantOfShape", "Expand"),
    *("Tile", "Range", "Cast", "QuantizeLinear", "DequantizeLinear", "QLinearConv", "Pad"),
    *("ConvInteger", "Resize", "Dropout", "Shape", "NonZero", "Optional", "Nope", "RandomNormal"),
)
LOCATIONS = (
    "weights.bin",
    "missing",
    "",
    ".",
    "..",
    "../weights.bin",
    "/etc/hostname",
    "a/b",
    "\0",
)


def one_of(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def integer(rng: Rng) -> int:
    """Mostly a small one."""
    return int(one_of(rng, SMALL if rng.random() < 0.7 else LARGE))


def clipped(number: int, bits: int = 64) -> int:
    most = 1 << (bits - 1)
    return max(-most, min(number, most - 1))


# --- nodes --------------------------------------------------------------------------------------


def attribute(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """Another value for an attribute that a node has."""
    there = [a for n in model.graph.node for a in n.attribute if a.type != AttributeProto.GRAPH]
    if not there:
        return False
    changed = one_of(rng, there)
    if changed.type == AttributeProto.INT:
        changed.i = integer(rng)
    elif changed.type == AttributeProto.FLOAT:
        changed.f = one_of(rng, FLOATS)
    elif changed.type == AttributeProto.STRING:
        changed.s = one_of(rng, STRINGS).encode()
    elif changed.type == AttributeProto.INTS:
        _change_list(rng, changed.ints)
    elif changed.type == AttributeProto.TENSOR:
        _change_tensor(rng, changed.t)
    else:
        changed.type = int(rng.integers(0, 15))
    return None


def _change_list(rng: Rng, numbers: Any) -> None:
    kind = int(rng.integers(4))
    if kind == 0 and numbers:
        del numbers[-1]
    elif kind == 1 or not numbers:
        numbers.append(integer(rng))
    elif kind == 2:
        numbers[:] = [integer(rng) for _ in numbers]
    else:
        numbers[int(rng.integers(len(numbers)))] = integer(rng)


def known_attribute(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """An attribute that operators know is set, whether or not this one has it."""
    if not model.graph.node:
        return False
    node = one_of(rng, model.graph.node)
    name = one_of(rng, (*KNOWN_INTS, *KNOWN_LISTS, *KNOWN_FLOATS))
    if name in KNOWN_INTS:
        value: Any = integer(rng)
    elif name in KNOWN_FLOATS:
        value = float(one_of(rng, FLOATS))
    else:
        value = [integer(rng) for _ in range(int(rng.integers(1, 6)))]
    kept = [a for a in node.attribute if a.name != name or rng.random() < 0.1]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return None


def operator(rng: Rng, model: onnx.ModelProto) -> bool | None:
    if not model.graph.node:
        return False
    node = one_of(rng, model.graph.node)
    node.op_type = one_of(rng, OPS)
    if rng.random() < 0.1:
        node.domain = one_of(rng, ("com.microsoft", "ai.onnx", "ai.onnx.ml", "fuzz", "nope"))
    return None


def wiring(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """Another input or output name; a node more or less, or elsewhere."""
    nodes = model.graph.node
    if not nodes:
        return False
    node, other = one_of(rng, nodes), one_of(rng, nodes)
    names = [n for each in nodes for n in (*each.input, *each.output)]
    names += [each.name for each in (*model.graph.initializer, *model.graph.input)]
    kind, position = int(rng.integers(9)), int(rng.integers(len(nodes)))
    if kind < 3 and node.input:
        node.input[int(rng.integers(len(node.input)))] = one_of(rng, names)
    elif kind == 3 and node.input:
        node.input[int(rng.integers(len(node.input)))] = one_of(rng, STRINGS)
    elif kind == 4:
        node.input.append(one_of(rng, names))
    elif kind == 5 and node.input:
        del node.input[-1]
    elif kind == 6:
        node.output.append(one_of(rng, ("", "fresh", *names)))
    elif kind == 7:
        node.CopyFrom(onnx.NodeProto.FromString(other.SerializeToString()))
    else:
        del nodes[position]
    return None


def outputs_of_graph(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """The interface: an input or output more, less, twice, or of another type or shape."""
    infos = one_of(rng, (model.graph.input, model.graph.output, model.graph.value_info))
    names = [n for node in model.graph.node for n in node.output]
    if not infos or rng.random() < 0.1:
        infos.append(helper.make_tensor_value_info(one_of(rng, names or ["x"]), 1, None))
        return None
    info = one_of(rng, infos)
    tensor = info.type.tensor_type
    kind = int(rng.integers(7))
    if kind == 0:
        tensor.elem_type = clipped(int(one_of(rng, TYPES)), 32)
    elif kind == 1 and tensor.shape.dim:
        one_of(rng, tensor.shape.dim).dim_value = integer(rng)
    elif kind == 2 and tensor.shape.dim:
        one_of(rng, tensor.shape.dim).dim_param = one_of(rng, ("N", "", "a\nb", "N*2"))
    elif kind == 3:
        tensor.ClearField("shape")
    elif kind == 4:
        tensor.shape.dim.add()
    elif kind == 5:
        infos.append(onnx.ValueInfoProto.FromString(info.SerializeToString()))
    else:
        info.name = one_of(rng, (*STRINGS, *names))
    return None


# --- tensors ------------------------------------------------------------------------------------


def initializer(rng: Rng, model: onnx.ModelProto) -> bool | None:
    if not model.graph.initializer:
        return False
    _change_tensor(rng, one_of(rng, model.graph.initializer))
    return None


def _change_tensor(rng: Rng, tensor: TensorProto) -> None:
    kind = int(rng.integers(8))
    if kind == 0:
        tensor.data_type = clipped(int(one_of(rng, TYPES)), 32)
    elif kind == 1:
        _change_list(rng, tensor.dims)
    elif kind == 2:  # as many values in another shape
        dims = list(tensor.dims)
        shapes = (dims[::-1], [1, *dims], [*dims, 1], [int(np.prod(dims, dtype=object))])
        tensor.dims[:] = one_of(rng, shapes)
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
    elif kind == 4:
        tensor.raw_data += bytes(int(rng.integers(1, 9)))
    elif kind == 5:
        tensor.raw_data = flipped(rng, tensor.raw_data)
    else:
        _put_values(rng, tensor)


def _put_values(rng: Rng, tensor: TensorProto) -> None:
    """NaN, infinity, what is very large or small; for integers another number."""
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:  # an earlier mutation made it no tensor at all
        tensor.raw_data = b""
        return
    if array.size == 0:
        return
    if array.dtype.kind == "f":
        value = one_of(rng, FLOATS)
    else:
        value = np.array(integer(rng), np.int64).astype(array.dtype)
    where = slice(None) if rng.random() < 0.3 else int(rng.integers(array.size))
    with np.errstate(all="ignore"):
        array.reshape(-1)[where] = value
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def external(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """A tensor becomes external data; `fuzz_bytes` writes ``weights.bin`` with 4096 bytes."""
    if not model.graph.initializer:
        return False
    tensor = one_of(rng, model.graph.initializer)
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = one_of(rng, (1, 1, 1, 1, 0))
    entries = {"location": LOCATIONS[0], "offset": "0", "length": str(length)}
    for key, odd in (
        ("location", LOCATIONS),
        ("offset", ("-1", "-4096", "4095", "4096", "1e3", "", "x", str(2**63 - 1), str(2**70))),
        ("length", ("-1", "0", "3", "4097", "1.5", "", "x", str(2**63 - 1), str(10**30))),
    ):
        if rng.random() < 0.35:
            entries[key] = one_of(rng, odd)
        if rng.random() < 0.1:
            del entries[key]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return None


# --- the model ----------------------------------------------------------------------------------


def header(rng: Rng, model: onnx.ModelProto) -> None:
    """Versions, domains, metadata."""
    kind = int(rng.integers(6))
    if kind == 0:
        model.ir_version = integer(rng)
    elif kind == 1 and model.opset_import:
        model.opset_import[0].version = int(one_of(rng, (*range(-1, 30), *LARGE)))
    elif kind == 2:
        model.opset_import.add(domain=one_of(rng, ("", "ai.onnx", "x")), version=integer(rng))
    elif kind == 3 and model.opset_import:
        del model.opset_import[0]
    elif kind == 4:
        key = one_of(rng, ("octav_calibrate", "", "a\nb", "\0"))
        model.metadata_props.add(key=key, value=one_of(rng, (*STRINGS, "x" * 10**5)))
    else:
        model.graph.name = one_of(rng, STRINGS)


def subgraph(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """A node moves into both branches of an If, whose condition may be anything."""
    if not model.graph.node:
        return False
    node = one_of(rng, model.graph.node)
    branches = []
    for name in ("then_branch", "else_branch"):
        inner = onnx.NodeProto.FromString(node.SerializeToString())
        inner.output[:] = [f"{name}{n}" for n, _ in enumerate(node.output)]
        infos = [helper.make_empty_tensor_value_info(output) for output in inner.output]
        branches.append((name, helper.make_graph([inner], name, [], infos)))
    condition = one_of(rng, ("condition", *(name for name in node.input if name)))
    if condition == "condition":
        truth = np.array(one_of(rng, (True, False)))
        model.graph.initializer.append(numpy_helper.from_array(truth, condition))
    outer = helper.make_node("If", [condition], list(node.output), "fuzz_if")
    dropped = int(rng.integers(8))
    outer.attribute.extend(
        helper.make_attribute(*each) for n, each in enumerate(branches) if n != dropped
    )
    node.CopyFrom(outer)
    return None


def function(rng: Rng, model: onnx.ModelProto) -> bool | None:
    """A node becomes a local function, at times one that calls itself."""
    if not model.graph.node:
        return False
    node = one_of(rng, model.graph.node)
    inner = onnx.NodeProto.FromString(node.SerializeToString())
    if rng.random() < 0.2:
        inner.op_type, inner.domain = "fuzzed", "fuzz"
    if rng.random() < 0.2 and inner.attribute:
        inner.attribute[0].ref_attr_name = one_of(rng, ("given", ""))
    inputs = [name for name in dict.fromkeys(node.input) if name]
    imports = [helper.make_opsetid("", one_of(rng, (7, 13, 17, 21, 99)))]
    if rng.random() < 0.7:
        imports = list(model.opset_import)
    model.functions.append(
        helper.make_function("fuzz", "fuzzed", inputs, list(node.output), [inner], imports)
    )
    if rng.random() < 0.8:
        model.opset_import.append(helper.make_opsetid("fuzz", 1))
    if rng.random() < 0.9:
        model.ir_version = max(model.ir_version, 8)
    if rng.random() < 0.2 and inputs:
        del inputs[-1]
    node.CopyFrom(helper.make_node("fuzzed", inputs, list(node.output), domain="fuzz"))
    return None


MUTATIONS: tuple[Mutation, ...] = (
    *(attribute, attribute, known_attribute, known_attribute, operator, wiring, wiring),
    *(outputs_of_graph, initializer, initializer, external, header, subgraph, function),
    *(field, field),
)


def mutate(rng: Rng, model: onnx.ModelProto) -> list[str]:
    """One to three mutations; their names."""
    done: list[str] = []
    wanted = int(one_of(rng, (1, 1, 1, 2, 3)))
    while len(done) < wanted:
        mutation = one_of(rng, MUTATIONS)
        try:
            changed = mutation(rng, model)
        except ValueError:  # protobuf: not in the bounds of the field, or an unpaired surrogate
            continue
        if changed is not False:
            done.append(mutation.__name__)
    return done
