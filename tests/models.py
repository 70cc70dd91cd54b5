"""Small models for the tests, each with one thing worth testing in it, and ways to run them.

The builders know nothing of calib: what they make, and `run`, serve as oracles for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Feed = dict[str, Array]


def values(*shape: int, seed: int = 0, scale: float = 0.5) -> NDArray[np.float32]:
    """Gaussian float32 values, the same for the same arguments."""
    rng = np.random.default_rng((seed, *shape))
    return np.asarray(scale * rng.standard_normal(shape), np.float32)


def norm(channels: int, prefix: str = "", seed: int = 0) -> dict[str, Array]:
    """Parameters of a BatchNormalization; one channel is scaled by a negative number."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2, channels) * np.where(np.arange(channels) == 1, -1, 1)
    return {
        f"{prefix}scale": scale.astype(np.float32),
        f"{prefix}shift": values(channels, seed=seed + 1),
        f"{prefix}mean": values(channels, seed=seed + 2),
        f"{prefix}var": rng.uniform(0.3, 3, channels).astype(np.float32),
    }


def parsed(
    text: str,
    given: Mapping[str, Array] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    node_name: str = "/{0.op_type}/{0.output[0]}",
) -> onnx.ModelProto:
    """``text`` in ONNX's own syntax; initializers are ``given`` and, Gaussian, what it declares
    between ``<`` and ``>``. Nodes are named after their output."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{header} g {text}")
    weights = dict(given or {})
    for seed, v in enumerate(model.graph.value_info):
        shape = (d.dim_value for d in v.type.tensor_type.shape.dim)
        weights.setdefault(v.name, values(*shape, seed=seed))
    del model.graph.value_info[:]
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for node in model.graph.node:
        node.name = node_name.format(node)
    return model


CONV_BN_RELU = """(float[N,3,6,6] image) => (float[N,5] logits)
<float[4,3,3,3] kernel, float[5,4] head, float[5] head_bias> {
  conv = Conv<pads=[1,1,1,1]>(image, kernel)
  normal = BatchNormalization(conv, scale, shift, mean, var)
  hidden = Relu(normal)
  pooled = GlobalAveragePool(hidden)
  flat = Flatten(pooled)
  logits = Gemm<transB=1>(flat, head, head_bias)
}"""

CONV_BIAS = """(float[N,3,6,6] image) => (float[N,5,6,6] output)
<float[4,3,3,3] kernel1, float[4] bias1, float[6,2,3,3] kernel2, float[6] bias2,
 float[5,6,1,1] kernel3, float[5] bias3> {
  first = Conv<pads=[1,1,1,1]>(image, kernel1, bias1)
  hidden = Relu(first)
  second = Conv<pads=[1,1,1,1], group=2>(hidden, kernel2, bias2)
  inner = Relu(second)
  third = Conv(inner, kernel3, bias3)
  output = Relu(third)
}"""

# A Conv with a bias makes the output, and nothing but an input is an activation.
CONV_OUTPUT = """(float[N,3,6,6] image) => (float[N,4,4,4] output)
<float[4,3,3,3] kernel, float[4] bias> { output = Conv(image, kernel, bias) }"""

CONV_TRANSPOSE = """(float[N,4,3,3] code) => (float[N,3,6,6] image)
<float[4,3,2,2] kernel, float[6] bias, float[6,3,1,1] last, float[3] last_bias> {
  up = ConvTranspose<strides=[2,2], group=2>(code, kernel, bias)
  normal = BatchNormalization(up, scale, shift, mean, var)
  hidden = Relu(normal)
  image = ConvTranspose(hidden, last, last_bias)
}"""

GEMM_ACTIVATION = """(float[N,6] x, float[N,5] z) => (float[N,5] y) <float[6,5] weight> {
  hidden = Relu(x)
  y = Gemm<beta=0.5>(hidden, weight, z) }"""

MATMUL_LEFT = """(float[N,6,3] x) => (float[N,4,3] y) <float[4,6] weight> {
  hidden = Tanh(x)
  y = MatMul(weight, hidden) }"""

MATMUL_BATCHED = """(float[N,2,3,6] x) => (float[N,2,3,4] y) <float[2,6,4] weight> {
  hidden = Tanh(x)
  y = MatMul(hidden, weight) }"""

# Two products of activations between products with weights.
ATTENTION = """(float[N,4,6] tokens) => (float[N,4,6] mixed)
<float[6,6] weight_q, float[6,6] weight_k, float[6,6] weight_v> {
  query = MatMul(tokens, weight_q)
  key = MatMul(tokens, weight_k)
  keys = Transpose<perm=[0,2,1]>(key)
  scores = MatMul(query, keys)
  shares = Softmax(scores)
  value = MatMul(tokens, weight_v)
  mixed = MatMul(shares, value)
}"""

# One weight read by two layers, along the same axis, and by a Mul.
TIED = """(float[N,6] x) => (float[N,6] y, float[6,6] scaled) <float[6,6] weight> {
  hidden = MatMul(x, weight)
  positive = Relu(hidden)
  y = MatMul(positive, weight)
  mean = ReduceMean<keepdims=0>(x)
  scaled = Mul(weight, mean) }"""

# One weight read by two layers that want channels along different axes.
TIED_TRANSPOSED = """(float[N,6] x) => (float[N,6] y) <float[6,6] weight, float[6] bias> {
  hidden = Gemm(x, weight, bias)
  positive = Relu(hidden)
  y = Gemm<transB=1>(positive, weight, bias)
}"""

# An activation read by two Convs and an Add.
RESIDUAL = """(float[N,3,6,6] image) => (float[N,2,6,6] output)
<float[4,3,1,1] kernel0, float[4] bias0, float[4,4,3,3] kernel1, float[4] bias1,
 float[4,4,1,1] kernel2, float[2,4,1,1] kernel3, float[2] bias3> {
  stem = Conv(image, kernel0, bias0)
  shared = Relu(stem)
  left = Conv<pads=[1,1,1,1]>(shared, kernel1, bias1)
  right = Conv(shared, kernel2)
  sum = Add(left, shared)
  joined = Add(sum, right)
  hidden = Relu(joined)
  output = Conv(hidden, kernel3, bias3)
}"""

TWO_INPUTS = """(float[N,6] x, float[N,4] z) => (float[N,3] y, float[N,2] second)
<float[6,5] weight_x, float[4,5] weight_z, float[5,3] head1, float[3] bias1, float[5,2] head2> {
  a = MatMul(x, weight_x)
  b = MatMul(z, weight_z)
  sum = Add(a, b)
  hidden = Relu(sum)
  y = Gemm(hidden, head1, bias1)
  second = Gemm(hidden, head2)
}"""

EMBEDDING = """(int64[N,4] ids) => (float[N,4,3] y) <float[6,5] table, float[5,3] weight> {
  vectors = Gather(table, ids)
  y = MatMul(vectors, weight) }"""

# A Conv in float16 before a MatMul in float32.
FLOAT16_CONV = """(float[N,3,4,4] image) => (float[N,2,4,5] output) <float[4,5] weight> {
  half = Cast<to=10>(image)
  conv = Conv(half, kernel)
  full = Cast<to=1>(conv)
  output = MatMul(full, weight) }"""

# A layer between QDQ pairs, its weight stored as integers, before a plain one.
ALREADY_QUANTIZED = """(float[N,6] x) => (float[N,3] y) <float[4,3] weight> {
  q = QuantizeLinear(x, step, zero)
  dq = DequantizeLinear(q, step, zero)
  wdq = DequantizeLinear<axis=1>(stored, steps, zeros)
  linear = MatMul(dq, wdq)
  hidden = Relu(linear)
  y = MatMul(hidden, weight)
}"""
QUANTIZED_WEIGHTS: dict[str, Array] = {
    "step": np.array(0.05, np.float32), "zero": np.array(0, np.int8),
    "steps": np.full(4, 0.1, np.float32), "zeros": np.zeros(4, np.int8),
    "stored": np.arange(-12, 12, dtype=np.int8).reshape(6, 4),
}  # fmt: skip

# Weights behind Constant → Transpose → Identity, and behind Constants that are multiplied.
WEIGHT_CHAIN = """(float[N,6] x) => (float[N,3] y) <float[4,3] base> {
  stored = Constant()
  factor = Constant<value = float {3.0}>()
  turned = Transpose<perm=[1,0]>(stored)
  same = Identity(turned)
  linear = MatMul(x, same)
  hidden = Relu(linear)
  product = Mul(factor, base)
  y = MatMul(hidden, product)
}"""

# A Conv inside an If, between two outside.
IF_SUBGRAPH = """(float[N,3,6,6] image) => (float[N,2,6,6] output)
<float[4,3,1,1] kernel1, float[4] bias1, float[2,4,1,1] kernel2, float limit> {
  first = Conv(image, kernel1, bias1)
  hidden = Relu(first)
  sum = ReduceSum<keepdims=0>(hidden)
  positive = Greater(sum, limit)
  chosen = If(positive)
  output = Conv(chosen, kernel2)
}"""


def gemm(
    c: Array | None = None, attributes: str = "", weight: Array | None = None, end: str = "Identity"
) -> onnx.ModelProto:
    """Relu → Gemm → ``end`` on a fixed (6, 6) input, so that ``transA`` fits too."""
    last = "linear, scale, shift, mean, var" if end == "BatchNormalization" else "linear"
    text = f"""(float[6,6] x) => (float[6,5] y) <float[6,5] weight> {{
      hidden = Relu(x)
      linear = Gemm<{attributes or "alpha=1.0"}>(hidden, weight{"" if c is None else ", c"})
      y = {end}({last})
    }}"""
    given = {name: a for name, a in (("c", c), ("weight", weight)) if a is not None}
    return parsed(text, given | (norm(5) if end == "BatchNormalization" else {}))


def relu6(between: str = "Identity(clipped)", rank: int = 4) -> onnx.ModelProto:
    """A Clip to 0 … 6 that clips, before a layer; ``between`` reads ``clipped``."""
    layer, shape, kernel = {
        4: ("Conv", "N,2,a,b", values(2, 4, 1, 1)),
        2: ("Gemm", "N,2", values(144, 2)),
    }[rank]
    text = f"""(float[N,3,6,6] image) => (float[{shape}] output) <float[4] bias1, float[2] bias2> {{
      first = Conv<pads=[1,1,1,1]>(image, kernel1, bias1)
      clipped = Clip(first, zero, six)
      ready = {between}
      output = {layer}(ready, kernel2, bias2)
    }}"""
    kernels: Feed = {"kernel1": values(4, 3, 3, 3, scale=2), "kernel2": kernel}
    bounds: Feed = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return parsed(text, kernels | bounds | {"flat": np.array([-1, 144]), "one": np.array([1])})


def weight_chain() -> onnx.ModelProto:
    model = parsed(WEIGHT_CHAIN)
    stored = numpy_helper.from_array(values(4, 6))
    model.graph.node[0].attribute.append(helper.make_attribute("value", stored))
    return model


def weights_are_inputs(opset: int = 9) -> onnx.ModelProto:
    """As exporters wrote it before IR version 4."""
    model = parsed(CONV_BIAS, opset=opset, ir_version=3)
    for tensor in model.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    return model


def if_subgraph(inner_name: str = "inner_kernel") -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("then", "else")]
    inner = helper.make_node("Conv", ["hidden", inner_name], ["then"], "inner")
    kernel = numpy_helper.from_array(values(4, 4, 1, 1), inner_name)
    plain = helper.make_node("Identity", ["hidden"], ["else"], "plain")
    branches = {
        "then_branch": helper.make_graph([inner], "then", [], info[:1], [kernel]),
        "else_branch": helper.make_graph([plain], "else", [], info[1:]),
    }
    model = parsed(IF_SUBGRAPH)
    model.graph.node[4].attribute.extend(helper.make_attribute(*b) for b in branches.items())
    return model


def fixed_batch(size: int) -> onnx.ModelProto:
    return parsed(f"""(float[{size},6] x) => (float[{size},3] y)
    <float[6,8] weight1, float[8] bias, float[8,3] weight2> {{
      hidden = Relu(x)
      linear = Gemm(hidden, weight1, bias)
      inner = Relu(linear)
      y = MatMul(inner, weight2)
    }}""")


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv_bn_relu": partial(parsed, CONV_BN_RELU, norm(4)),
    "conv_bias": partial(parsed, CONV_BIAS),
    "conv_output": partial(parsed, CONV_OUTPUT),
    "conv_transpose": partial(parsed, CONV_TRANSPOSE, norm(6)),
    "gemm_scalar": partial(gemm, values(scale=0.7), "beta=0.5"),
    "gemm_scaled": partial(
        gemm, values(6, 5), "alpha=0.5, beta=2.0, transA=1, transB=1", values(5, 6)
    ),
    "gemm_activation": partial(parsed, GEMM_ACTIVATION),
    "matmul_left": partial(parsed, MATMUL_LEFT),
    "matmul_batched": partial(parsed, MATMUL_BATCHED),
    "attention": partial(parsed, ATTENTION),
    "tied": partial(parsed, TIED),
    "tied_transposed": partial(parsed, TIED_TRANSPOSED),
    "residual": partial(parsed, RESIDUAL),
    "relu6": relu6,
    "weight_chain": weight_chain,
    "weights_are_inputs": weights_are_inputs,
    "unnamed": partial(parsed, ATTENTION, node_name=""),
    "if_subgraph": if_subgraph,
    "float16_conv": partial(parsed, FLOAT16_CONV, {"kernel": values(2, 3, 1, 1).astype("f2")}),
    "already_quantized": partial(parsed, ALREADY_QUANTIZED, QUANTIZED_WEIGHTS),
    "two_inputs": partial(parsed, TWO_INPUTS),
    "embedding": partial(parsed, EMBEDDING),
    "fixed_batch_1": partial(fixed_batch, 1),
    "fixed_batch_4": partial(fixed_batch, 4),
}


def feed_for(model: onnx.ModelProto, n: int = 8, seed: int = 0) -> Feed:
    """Random values for the inputs; symbolic axes are ``n`` long."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    feed: Feed = {}
    for info in model.graph.input:
        if info.name not in constants:
            kind = info.type.tensor_type
            shape = [n if d.dim_param else d.dim_value for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            made = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 6, shape)
            feed[info.name] = made.astype(dtype)
    return feed


def run(
    model: onnx.ModelProto | Path,
    feed: Mapping[str, Array],
    *,
    optimized: bool = False,
    names: Iterable[str] | None = None,
) -> Feed:
    """The outputs, or the values ``names``, as onnxruntime computes them."""
    if names is not None:
        copy = onnx.ModelProto()
        copy.CopyFrom(onnx.load(model) if isinstance(model, Path) else model)
        del copy.graph.output[:]
        copy.graph.output.extend(map(helper.make_empty_tensor_value_info, names))
        model = copy
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    level = "ORT_ENABLE_ALL" if optimized else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, dict(feed)), strict=True))
