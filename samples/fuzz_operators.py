"""Operators for the fuzzer: each takes a graph and one of its values and adds to the graph.

An operator that the value's shape, or the graph's opset, does not allow returns without a word.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fuzz_builder import DOMAIN, VOCABULARY, Graph, Shape, Value
from onnx import TensorProto, helper, numpy_helper

Operator = Callable[[Graph, Value], object]
MOST_VALUES = 4000


# --- layers -----------------------------------------------------------------------------------


def conv(g: Graph, x: Value) -> None:
    """Any rank; grouped or depthwise; padded by numbers or by name; dilated."""
    if x.rank < 3:
        return
    channels, spatial = x.shape[1], x.shape[2:]
    groups = g.one_of(1, 1, *(d for d in range(2, channels + 1) if channels % d == 0))
    out = groups * g.whole(1, 1 + 6 // groups)
    kernel = [g.whole(1, min(3, size)) for size in spatial]
    strides = [g.whole(1, 2) for _ in spatial]
    pad = g.one_of("NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    dilations = [g.whole(1, 2) if pad == "NOTSET" else 1 for _ in spatial]
    pads = [g.whole(0, 2) for _ in range(2 * len(spatial))] if pad == "NOTSET" else None
    shape = tuple(
        -(-size // s)
        if pad.startswith("SAME")
        else (size + (pads[i] + pads[i + len(spatial)] if pads else 0) - d * (k - 1) - 1) // s + 1
        for i, (size, k, s, d) in enumerate(zip(spatial, kernel, strides, dilations, strict=True))
    )
    if min(shape) < 1:
        return
    fan_in = channels // groups * int(np.prod(kernel))
    inputs = [x.name, g.weight(out, channels // groups, *kernel, fan_in=fan_in)]
    if g.chance(0.6):
        inputs.append(g.weight(out))
    g.add(
        "Conv",
        inputs,
        (x.shape[0], out, *shape),
        group=groups if groups > 1 or g.chance(0.5) else None,
        kernel_shape=kernel if g.chance(0.5) else None,
        strides=strides,
        dilations=dilations if max(dilations) > 1 or g.chance(0.5) else None,
        pads=pads,
        auto_pad=pad if pad != "NOTSET" else None,
    )


def conv_transpose(g: Graph, x: Value) -> None:
    if x.rank < 3:
        return
    channels, spatial = x.shape[1], x.shape[2:]
    groups = g.one_of(1, 1, *(d for d in range(2, channels + 1) if channels % d == 0))
    out = g.whole(1, 4)
    kernel = [g.whole(1, 3) for _ in spatial]
    strides = [g.whole(1, 3) for _ in spatial]
    extra = [g.whole(0, s - 1) for s in strides]
    pads = [g.whole(0, 1) for _ in range(2 * len(spatial))]
    shape = tuple(
        s * (size - 1) + e + k - pads[i] - pads[i + len(spatial)]
        for i, (size, k, s, e) in enumerate(zip(spatial, kernel, strides, extra, strict=True))
    )
    if min(shape) < 1 or np.prod(shape) * out * groups * x.shape[0] > MOST_VALUES:
        return
    inputs = [x.name, g.weight(channels, out, *kernel, fan_in=channels * int(np.prod(kernel)))]
    if g.chance(0.6):
        inputs.append(g.weight(out * groups))
    g.add(
        "ConvTranspose",
        inputs,
        (x.shape[0], out * groups, *shape),
        group=groups,
        strides=strides,
        pads=pads,
        output_padding=extra if any(extra) or g.chance(0.3) else None,
    )


def gemm(g: Graph, x: Value) -> None:
    """With a weight on either side, or none; C in every shape that broadcasts, or absent."""
    if x.rank != 2:
        return
    rows, inner = x.shape
    trans_a, trans_b = 0, g.whole(0, 1)
    if not g.dynamic and g.chance(0.25):
        trans_a, rows, inner = 1, inner, rows
    if not g.dynamic and g.chance(0.1):  # the tensor times itself, turned
        trans_b, columns, b = 1 - trans_a, rows, x.name
    else:
        columns = g.whole(1, 6)
        b = g.weight(*((columns, inner) if trans_b else (inner, columns)), fan_in=inner)
    inputs = [x.name, b]
    if g.opset < 11 or g.chance(0.7):
        shapes: list[Shape] = [(), (1,), (columns,), (1, columns)]
        if not g.dynamic:
            shapes += [(rows, columns), (rows, 1)]
        same = [v.name for v in g.values if v.shape == (rows, columns)]
        inputs.append(g.one_of(*same) if same and g.chance(0.3) else g.weight(*g.one_of(*shapes)))
    g.add(
        "Gemm",
        inputs,
        (rows, columns),
        transA=trans_a or None,
        transB=trans_b or None,
        alpha=g.one_of(None, 0.5, -2.0),
        beta=g.one_of(None, 0.25, 3.0, 0.0),
    )


def matmul_right(g: Graph, x: Value) -> None:
    """A weight on the right: a matrix, several, or a vector."""
    if x.rank < 2:
        return
    inner, columns = x.shape[-1], g.whole(1, 6)
    kind = g.whole(0, 5)
    if kind == 0 and x.rank > 2:
        weight = g.weight(inner, fan_in=inner)
        g.add("MatMul", [x.name, weight], x.shape[:-1])
        return
    batch: Shape = ()
    if kind == 1 and x.rank > 2:
        batch = x.shape[1:-2] if x.rank > 3 else (1,)
    weight = g.weight(*batch, inner, columns, fan_in=inner)
    g.add("MatMul", [x.name, weight], (*x.shape[:-1], columns))


def matmul_left(g: Graph, x: Value) -> None:
    if x.rank < 3:
        return
    rows, inner = g.whole(1, 6), x.shape[-2]
    weight = g.weight(rows, inner, fan_in=inner)
    g.add("MatMul", [weight, x.name], (*x.shape[:-2], rows, x.shape[-1]))


def matmul_activations(g: Graph, x: Value) -> None:
    """``x`` times itself, turned where it must be."""
    if x.rank < 3:
        return
    if x.shape[-1] == x.shape[-2] and g.chance(0.7):
        g.add("MatMul", [x.name, x.name], x.shape)
        return
    perm = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    turned = g.emit("Transpose", [x.name], perm=perm)
    g.add("MatMul", [x.name, turned], (*x.shape[:-1], x.shape[-2]))


def embedding(g: Graph, _x: Value) -> None:
    if g.ids is None:
        return
    width = g.whole(1, 6)
    g.add("Gather", [g.weight(VOCABULARY, width), g.ids.name], (*g.ids.shape, width), axis=0)


def conditional(g: Graph, x: Value) -> None:
    """An If with a Conv or MatMul inside, whose weight is its own or the outer graph's."""
    if x.rank < 2:
        return
    op = "MatMul" if x.rank == 2 else "Conv"
    shape = (x.shape[1], x.shape[1], *[1] * (x.rank - 2))
    names = [g.name("then"), g.name("else")]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in names]
    inner, weight = [], g.name("inner")
    if g.chance(0.5):
        weight = g.weight(*shape, fan_in=x.shape[1])
    else:
        inner = [helper.make_tensor(weight, 1, shape, np.full(shape, 0.3).ravel().tolist())]
    layer = helper.make_node(op, [x.name, weight], names[:1])
    plain = helper.make_node(g.one_of("Identity", "Relu"), [x.name], names[1:])
    flag = g.input("flag", [np.array(g.chance(0.5)) for _ in g.feeds]) if g.chance(0.7) else None
    branches = {
        "then_branch": helper.make_graph([layer], "then", [], infos[:1], inner),
        "else_branch": helper.make_graph([plain], "else", [], infos[1:]),
    }
    g.add("If", [flag or g.constant(np.array(g.chance(0.5)))], x.shape, **branches)


def half_precision(g: Graph, x: Value) -> None:
    """A MatMul in float16."""
    if x.rank < 2:
        return
    inner, columns = x.shape[-1], g.whole(1, 6)
    weight = g.rng.standard_normal((inner, columns)).astype(np.float16)
    half = g.emit("Cast", [x.name], to=TensorProto.FLOAT16)
    product = g.emit("MatMul", [half, g.initializer(weight, "w")])
    g.add("Cast", [product], (*x.shape[:-1], columns), to=TensorProto.FLOAT)


def function(g: Graph, x: Value) -> None:
    """A MatMul inside a function of the model's own, called once or twice."""
    if x.rank < 2:
        return
    name, shape = f"Block{len(g.functions)}", (x.shape[-1],) * 2
    weight = numpy_helper.from_array(g.array(shape, x.shape[-1]), "")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("MatMul", ["a", "w"], ["p"], g.one_of("", "inner")),
        helper.make_node("Relu", ["p"], ["b"]),
    ]
    imports = [helper.make_opsetid("", g.opset)]
    g.functions.append(helper.make_function(DOMAIN, name, ["a"], ["b"], nodes, imports))
    for _ in range(g.whole(1, 2)):
        x = g.add(name, [x.name], x.shape, domain=DOMAIN)


# --- what stands between layers ---------------------------------------------------------------


def batch_norm(g: Graph, x: Value) -> None:
    """Behind a layer it can be folded, elsewhere it cannot."""
    if x.rank < 2:
        return
    variance = g.constant(g.rng.uniform(0.1, 2, x.shape[1]).astype(np.float32))
    parameters = [g.weight(x.shape[1]) for _ in range(3)]
    epsilon = g.one_of(None, 1e-3)
    g.add("BatchNormalization", [x.name, *parameters, variance], x.shape, epsilon=epsilon)


def unary(g: Graph, x: Value) -> None:
    op = g.one_of("Relu", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Identity", "Softmax")
    axis = g.whole(1, x.rank - 1) if op == "Softmax" and x.rank > 1 else None
    if op != "Softmax" or axis is not None:
        g.add(op, [x.name], x.shape, axis=axis)


def clip(g: Graph, x: Value) -> None:
    low, high = g.one_of((0.0, 6.0), (-1.0, 1.0), (0.0, 1.0), (-0.5, 3.0), (0.1, 0.2))
    if g.opset < 11:
        g.add("Clip", [x.name], x.shape, min=low, max=high)
        return
    bounds = [g.constant(np.array(bound, np.float32)) for bound in (low, high)]
    absent = g.whole(0, 5)
    if absent == 0:
        bounds = bounds[:1]
    elif absent == 1:
        bounds[0] = ""
    g.add("Clip", [x.name, *bounds], x.shape)


def dropout(g: Graph, x: Value) -> None:
    if g.opset < 12:
        g.add("Dropout", [x.name], x.shape, ratio=0.3)
        return
    inputs = [x.name]
    if g.chance(0.5):
        inputs.append(g.constant(np.array(0.3, np.float32)))
        if g.chance(0.5):
            inputs.append(g.constant(np.array(False)))
    g.add("Dropout", inputs, x.shape)


def casts(g: Graph, x: Value) -> None:
    half = g.emit("Cast", [x.name], to=TensorProto.FLOAT16)
    g.add("Cast", [half], x.shape, to=TensorProto.FLOAT)


def with_constant(g: Graph, x: Value) -> None:
    """Add, Mul or Sub with a constant that broadcasts, on either side."""
    shape = tuple(size if g.chance(0.5) else 1 for size in x.shape[1:])
    names = [x.name, g.weight(*g.one_of((), shape, shape))]
    if g.chance(0.3):
        names.reverse()
    g.add(g.one_of("Add", "Mul", "Sub"), names, x.shape)


def with_value(g: Graph, x: Value) -> None:
    """Add, Mul or Sub of two activations, at times of one and itself."""
    others = [v for v in g.values if v.shape == x.shape]
    other = g.one_of(*others)
    # A tensor less itself is zero in float and noise when one of two equal branches is quantized.
    op = g.one_of("Add", "Mul") if other is x else g.one_of("Add", "Mul", "Sub")
    g.add(op, [x.name, other.name], x.shape)


def masked(g: Graph, x: Value) -> None:
    shape = (x.shape[0], *[1] * (x.rank - 1))
    mask = g.input("mask", [g.rng.random(shape) < 0.7 for _ in g.feeds])
    factor = g.emit("Cast", [mask], to=TensorProto.FLOAT)
    g.add("Mul", [x.name, factor], x.shape)


LAYERS: tuple[Operator, ...] = (
    conv, conv, conv, conv_transpose, gemm, gemm, matmul_right, matmul_right, matmul_left,
    matmul_activations, conditional, embedding, half_precision, function,
)  # fmt: skip
BETWEEN: tuple[Operator, ...] = (
    batch_norm, batch_norm, unary, unary, unary, clip, dropout, casts, with_constant, with_constant,
    with_value, with_value, masked,
)  # fmt: skip
