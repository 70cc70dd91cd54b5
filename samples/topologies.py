"""Real architectures with random weights, for measuring speed and memory without downloads.

    python samples/topologies.py resnet50 resnet50.onnx
    python samples/topologies.py encoder_decoder unet.onnx --size 2048

ResNet-50 and the others are graphs that the onnx package ships for its own tests, with all weights
constant. Here they are random from a seed and scaled so that activations neither vanish nor
explode: the network has the shapes and the cost of the real one, and knows nothing.
`encoder_decoder` is a U-Net of our own with one large image as its input.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

SHIPPED = ("resnet50", "shufflenet", "squeezenet", "inception_v1")
NAMES = (*SHIPPED, "encoder_decoder")
CHANNELS = (32, 64, 128, 256)
# Of an operator's input at a position: by which power of its data's mean square it is scaled.
SCALED = {("Conv", 1): -0.5, ("Gemm", 1): -0.5, ("BatchNormalization", 4): 1.0}

Floats = NDArray[np.float32]


# --- graphs that onnx ships -------------------------------------------------------------------


def topology(name: str, seed: int = 0) -> ModelProto:
    """The graph ``name``, of `SHIPPED`, with random weights as initializers; its only input is the
    image, 1 x 3 x 224 x 224."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    graph = model.graph
    kept = {t.name: t for t in graph.initializer if t.data_type != TensorProto.FLOAT}
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.name not in kept}
    nodes = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(numpy_helper.to_array(kept[node.input[0]]).tolist())
        else:
            nodes.append(node)
    weights = random_weights(nodes, shapes, np.random.default_rng(seed))
    used = {value for node in nodes for value in node.input}
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    tensors += [tensor for key, tensor in kept.items() if key in used]
    constants = {tensor.name for tensor in tensors}
    inputs = [i for i in graph.input if i.name in used and i.name not in constants]
    made = helper.make_graph(nodes, name, inputs, list(graph.output), tensors)
    return checked(made, model.opset_import[0].version)


def random_weights(
    nodes: list[NodeProto], shapes: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, Floats]:
    """An array for each of ``shapes`` that a node reads. The mean square that each value will have
    is estimated on the way through the graph; layers and batch normalisation divide by it."""
    weights: dict[str, Floats] = {}
    power: dict[str, float] = {}
    for node in nodes:
        data = [power.get(value, 1.0) for value in node.input if value not in shapes]
        for position, name in enumerate(node.input):
            if name in shapes:
                array = parameter(node.op_type, position, shapes[name], rng)
                exponent = SCALED.get((node.op_type, position), 0.0)
                weights[name] = array * np.float32(data[0] ** exponent)
        power.update(dict.fromkeys(node.output, power_after(node.op_type, data)))
    return weights


def parameter(
    op_type: str, position: int, shape: tuple[int, ...], rng: np.random.Generator
) -> Floats:
    if op_type == "BatchNormalization":
        scale_or_variance = position in (1, 4)
        drawn = rng.uniform(0.5, 1.5, shape) if scale_or_variance else rng.normal(0, 0.1, shape)
        return drawn.astype(np.float32)
    return he(shape, rng) if len(shape) > 1 else rng.normal(0, 0.05, shape).astype(np.float32)


def he(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Weights (out, in, ...) that keep the power of activations across layer and Relu."""
    n_inputs = int(np.prod(shape[1:]))
    return rng.standard_normal(shape, np.float32) * np.float32((2 / n_inputs) ** 0.5)


def power_after(op_type: str, data: list[float]) -> float:
    """The mean square of a node's output from those of its inputs, roughly."""
    if op_type == "BatchNormalization":
        return 1.0
    if op_type == "Relu":
        return data[0] / 2
    if op_type == "Sum":  # with a positive shortcut, of which the Relu behind takes nothing
        return 2 * sum(data)
    if op_type in ("Conv", "Gemm"):
        return 2.0
    return (4.0 if op_type == "MaxPool" else 1.0) * float(np.mean(data))


def checked(graph: GraphProto, opset: int) -> ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


# --- an encoder and decoder -------------------------------------------------------------------


class Layers:
    """Nodes and weights of a network, one layer after the other."""

    def __init__(self, rng: np.random.Generator):
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._rng = rng

    def add(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """A node; the name of its output."""
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def constant(self, array: NDArray[np.generic]) -> str:
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, channels: tuple[int, int], stride: int = 1, size: int = 3) -> str:
        """A convolution from ``channels[0]`` to ``channels[1]`` channels."""
        before, after = channels
        weight = self.constant(he((after, before, size, size), self._rng))
        bias = self.constant(self._rng.normal(0, 0.05, after).astype(np.float32))
        pads = [size // 2] * 4
        return self.add("Conv", [x, weight, bias], strides=[stride, stride], pads=pads)

    def relu_conv(self, x: str, channels: tuple[int, int], stride: int = 1) -> str:
        return self.add("Relu", [self.conv(x, channels, stride)])

    def up(self, x: str, channels: tuple[int, int], resize: bool) -> str:
        """Twice the resolution, by Resize and a convolution or by ConvTranspose."""
        before, after = channels
        if resize:
            scales = self.constant(np.array([1, 1, 2, 2], np.float32))
            return self.relu_conv(self.add("Resize", [x, "", scales], mode="nearest"), channels)
        weight = self.constant(he((after, before, 2, 2), self._rng).transpose(1, 0, 2, 3) * 2)
        return self.add("Relu", [self.add("ConvTranspose", [x, weight], strides=[2, 2])])


def encoder_decoder(size: int = 2048, seed: int = 0) -> ModelProto:
    """A U-Net for one image of 3 x ``size`` x ``size``: three levels down and up, 32 channels at
    full resolution, 64 where they are joined with the skip connection."""
    if size < 8 or size % 8:
        raise SystemExit(f"topologies.py: the size must be a multiple of 8, got {size}")
    layers = Layers(np.random.default_rng(seed))
    x = layers.relu_conv("image", (3, CHANNELS[0]))
    skips = []
    for before, after in pairwise(CHANNELS):
        skips.append(x)
        x = layers.relu_conv(x, (before, after), stride=2)
    for level in reversed(range(len(skips))):
        after = CHANNELS[level]
        x = layers.up(x, (CHANNELS[level + 1], after), resize=level == 1)
        joined = layers.add("Concat", [x, skips[level]], axis=1)
        x = layers.relu_conv(joined, (2 * after, after))
    x = layers.conv(x, (CHANNELS[0], 2), size=1)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, size, size])
        for name, channels in (("image", 3), (x, 2))
    ]
    graph = helper.make_graph(layers.nodes, "unet", ends[:1], ends[1:], layers.weights)
    return checked(graph, 17)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a real architecture with random weights.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=2048, help="of encoder_decoder's image")
    arguments = parser.parse_args()
    if arguments.name == "encoder_decoder":
        model = encoder_decoder(arguments.size, arguments.seed)
    else:
        model = topology(arguments.name, arguments.seed)
    onnx.save(model, arguments.out)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    n_weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    print(
        f"wrote {arguments.out}: {model.graph.input[0].name} {shape}, {len(model.graph.node)} "
        f"nodes, {n_weights / 1e6:.1f} M weights"
    )


if __name__ == "__main__":
    main()
