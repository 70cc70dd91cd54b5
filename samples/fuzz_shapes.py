"""Operators for the fuzzer that change shapes: reshaping, cutting, pooling, reducing.

As in `fuzz_operators`, what does not fit returns without a word. Attributes became inputs over the
years, and every operator here is written in the form of the graph's opset.
"""

from __future__ import annotations

import numpy as np
from fuzz_builder import Graph, Value
from fuzz_operators import MOST_VALUES, Operator


def concat(g: Graph, x: Value) -> None:
    if x.rank < 2:
        return
    axis = g.whole(1, x.rank - 1)
    rest = [size for i, size in enumerate(x.shape) if i != axis]
    fitting = [
        v
        for v in g.values
        if v.rank == x.rank and [s for i, s in enumerate(v.shape) if i != axis] == rest
    ]
    others = [g.one_of(*fitting) for _ in range(g.whole(1, 2))]
    shape = list(x.shape)
    shape[axis] += sum(v.shape[axis] for v in others)
    if np.prod(shape) <= MOST_VALUES:
        g.add("Concat", [x.name, *(v.name for v in others)], tuple(shape), axis=axis)


def split(g: Graph, x: Value) -> None:
    axis = g.whole(1, x.rank - 1) if x.rank > 1 else 0
    if axis == 0 or x.shape[axis] < 2:
        return
    first = g.whole(1, x.shape[axis] - 1)
    sizes = [first, x.shape[axis] - first]
    if g.opset < 13:
        names = g.emit("Split", [x.name], 2, axis=axis, split=sizes)
    else:
        names = g.emit("Split", [x.name, g.integers(*sizes)], 2, axis=axis)
    for name, size in zip(names, sizes, strict=True):
        g.values.append(Value(name, (*x.shape[:axis], size, *x.shape[axis + 1 :])))


def reshape(g: Graph, x: Value) -> None:
    """To another rank of 2 to 5; the batch stays."""
    total, shape = int(np.prod(x.shape[1:])), []
    for _ in range(g.whole(0, 3)):
        shape.append(g.one_of(*(d for d in range(1, total + 1) if total % d == 0)))
        total //= shape[-1]
    shape.append(total)
    first = g.one_of(0, -1) if g.dynamic else g.one_of(0, -1, x.shape[0])
    g.add("Reshape", [x.name, g.integers(first, *shape)], (x.shape[0], *shape))


def flatten(g: Graph, x: Value) -> None:
    g.add("Flatten", [x.name], (x.shape[0], int(np.prod(x.shape[1:]))), axis=1)


def transpose(g: Graph, x: Value) -> None:
    first = 1 if g.dynamic or g.chance(0.8) else 0
    perm = [*range(first), *(first + g.rng.permutation(x.rank - first)).tolist()]
    g.add("Transpose", [x.name], tuple(x.shape[axis] for axis in perm), perm=perm)


def cut(g: Graph, x: Value) -> None:
    """Slice, of one axis, now and then backwards or from the end."""
    if x.rank < 2:
        return
    axis = g.whole(1, x.rank - 1)
    start = g.whole(0, x.shape[axis] - 1)
    size = x.shape[axis] - start
    end = g.one_of(x.shape[axis], 2**31 - 1)
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    if g.opset < 10:
        g.add("Slice", [x.name], shape, starts=[start], ends=[end], axes=[axis])
        return
    bounds = [g.integers(n) for n in (start, end, axis - g.one_of(0, x.rank))]
    g.add("Slice", [x.name, *bounds], shape)


def pad(g: Graph, x: Value) -> None:
    pads = [0] * (2 * x.rank)
    for axis in range(1, x.rank):
        pads[axis], pads[x.rank + axis] = g.whole(0, 1), g.whole(0, 1)
    shape = tuple(s + pads[i] + pads[x.rank + i] for i, s in enumerate(x.shape))
    if np.prod(shape) > MOST_VALUES:
        return
    value = g.one_of(0.0, 0.0, 1.5)
    if g.opset < 11:
        g.add("Pad", [x.name], shape, pads=pads, value=value)
    else:
        inputs = [x.name, g.integers(*pads), g.constant(np.array(value, np.float32))]
        g.add("Pad", inputs, shape)


def squeeze(g: Graph, x: Value) -> None:
    axes = [axis for axis in range(1, x.rank) if x.shape[axis] == 1]
    if not axes:
        return
    shape = tuple(s for axis, s in enumerate(x.shape) if axis not in axes)
    if g.opset < 13:
        g.add("Squeeze", [x.name], shape, axes=axes)
    else:
        g.add("Squeeze", [x.name, g.integers(*axes)], shape)


def unsqueeze(g: Graph, x: Value) -> None:
    if x.rank > 4:
        return
    axis = g.whole(1, x.rank)
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    if g.opset < 13:
        g.add("Unsqueeze", [x.name], shape, axes=[axis])
    else:
        g.add("Unsqueeze", [x.name, g.integers(axis)], shape)


def pool(g: Graph, x: Value) -> None:
    if x.rank < 3:
        return
    spatial = x.shape[2:]
    op = g.one_of("MaxPool", "MaxPool", "AveragePool", "GlobalAveragePool")
    if op == "GlobalAveragePool":
        g.add(op, [x.name], (*x.shape[:2], *[1] * len(spatial)))
        return
    kernel = [g.whole(1, min(3, size)) for size in spatial]
    strides = [g.whole(1, 2) for _ in spatial]
    pads = [g.whole(0, k - 1) for k in kernel]
    shape = tuple(
        (size + 2 * p - k) // s + 1
        for size, p, k, s in zip(spatial, pads, kernel, strides, strict=True)
    )
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": [*pads, *pads]}
    g.add(op, [x.name], (*x.shape[:2], *shape), **attributes)


def resize(g: Graph, x: Value) -> None:
    if x.rank not in (4, 5) or np.prod(x.shape) * 4 > MOST_VALUES:
        return
    factors = [1.0, 1.0, 2.0, *[g.one_of(1.0, 2.0) for _ in range(x.rank - 3)]]
    shape = tuple(int(s * f) for s, f in zip(x.shape, factors, strict=True))
    if g.opset < 9:
        g.add("Upsample", [x.name], shape, scales=factors, mode="nearest")
        return
    scales = g.constant(np.array(factors, np.float32))
    if g.opset < 11:
        op = "Upsample" if g.opset == 9 else "Resize"
        g.add(op, [x.name, scales], shape, mode="nearest")
        return
    region = g.initializer(np.zeros(0, np.float32)) if g.opset < 13 else ""
    g.add("Resize", [x.name, region, scales], shape, mode="nearest")


def gather(g: Graph, x: Value) -> None:
    if x.rank < 2:
        return
    axis = g.whole(1, x.rank - 1)
    chosen = [g.whole(0, x.shape[axis] - 1) for _ in range(g.whole(1, 3))]
    shape = (*x.shape[:axis], len(chosen), *x.shape[axis + 1 :])
    g.add("Gather", [x.name, g.integers(*chosen)], shape, axis=axis)


def reduce_mean(g: Graph, x: Value) -> None:
    if x.rank < 2:
        return
    axes = sorted(set(g.rng.integers(1, x.rank, g.whole(1, 2)).tolist()))
    keep = g.whole(0, 1)
    shape = tuple(
        1 if axis in axes else s for axis, s in enumerate(x.shape) if keep or axis not in axes
    )
    g.values.append(Value(g.reduce("ReduceMean", x.name, axes, keepdims=keep), shape))


SHAPING: tuple[Operator, ...] = (
    concat, split, reshape, flatten, transpose, cut, pad, squeeze, unsqueeze, pool, pool, resize,
    gather, reduce_mean,
)  # fmt: skip
