"""A small transformer that predicts the next character, trained here on real text.

    python samples/transformer.py gpt.onnx [--steps 900] [--data valid.npz]

The text is that of Python's own standard library, which every machine that runs this has; a tenth
of its modules is held out. Two layers 160 wide, trained by torch in two minutes, and written as
ONNX node by node, weights as exporters write them: ``(inputs, outputs)`` before a MatMul.
`transformer` makes such a graph of any size; that of BERT-base has 85 M weights in its layers.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, NDArray[np.float32]]
Tokens = NDArray[np.int64]

OPSET = 21
SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
_BATCH = 16


@dataclass(frozen=True)
class Size:
    """Layers, their width and number of heads, how many characters are looked at, and of how many
    there are."""

    layers: int = 2
    width: int = 160
    heads: int = 5
    context: int = 64
    symbols: int = len(SYMBOLS)


BERT = Size(layers=12, width=768, heads=12, context=128, symbols=96)


def text(most: int = 3_000_000) -> tuple[Tokens, Tokens]:
    """Numbers of `SYMBOLS` to train on, and others; all else in the text is left out."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    numbers = np.full(256, -1)
    numbers[[ord(symbol) for symbol in SYMBOLS]] = range(len(SYMBOLS))
    parts: tuple[list[Tokens], list[Tokens]] = ([], [])
    for number, path in enumerate(modules):
        found = numbers[np.frombuffer(path.read_bytes(), np.uint8)]
        parts[number % 10 == 9].append(found[found >= 0])
    return np.concatenate(parts[0])[:most], np.concatenate(parts[1])[: most // 10]


def windows(tokens: Tokens, n: int, length: int, seed: int) -> Tokens:
    """``(n, length)`` characters from random places."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, n)
    return np.stack([tokens[start : start + length] for start in starts])


def random_weights(size: Size, seed: int = 0) -> Weights:
    """Where training starts."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    width, shrunk = size.width, 1 / math.sqrt(2 * size.layers)
    weights = {
        "embedding": normal(size.symbols, width, scale=0.02),
        "positions": normal(size.context, width, scale=0.02),
        "head": normal(width, size.symbols, scale=width**-0.5),
        "norm.scale": np.ones(width, np.float32),
        "norm.bias": np.zeros(width, np.float32),
    }
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    for layer in range(size.layers):
        for name, (inputs, outputs) in shapes.items():
            scale = inputs**-0.5 * (shrunk if name in ("out", "down") else 1)
            weights[f"{layer}.{name}"] = normal(inputs, outputs, scale=scale)
            weights[f"{layer}.{name}.bias"] = np.zeros(outputs, np.float32)
        for name in ("norm1", "norm2"):
            weights[f"{layer}.{name}.scale"] = np.ones(width, np.float32)
            weights[f"{layer}.{name}.bias"] = np.zeros(width, np.float32)
    return weights


# --- training ---------------------------------------------------------------------------------


def train(size: Size, steps: int, seed: int = 0) -> tuple[Weights, float]:
    """Weights, and the loss of the last steps, in bits a character."""
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    torch.set_num_threads(1)  # on busy cores, two threads wait for each other: 8 times as long
    tokens, _ = text()
    start = random_weights(size, seed)
    weights = {name: torch.from_numpy(a).requires_grad_() for name, a in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    losses = []
    for step in range(steps):
        batch = torch.from_numpy(windows(tokens, _BATCH, size.context + 1, seed + step))
        logits = _forward(weights, batch[:, :-1], size)
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
    trained = {name: w.detach().numpy() for name, w in weights.items()}
    return trained, float(np.mean(losses[-20:]))


def _forward(weights: Any, tokens: Any, size: Size) -> Any:  # torch's, which may be absent
    from torch.nn import functional

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(
            x, x.shape[-1:], weights[f"{name}.scale"], weights[f"{name}.bias"]
        )

    def dense(x: Any, name: str) -> Any:
        return x @ weights[name] + weights[f"{name}.bias"]

    x = weights["embedding"][tokens] + weights["positions"][: tokens.shape[1]]
    for layer in range(size.layers):
        qkv = dense(norm(x, f"{layer}.norm1"), f"{layer}.qkv")
        q, k, v = qkv.unflatten(-1, (3, size.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(mixed.transpose(1, 2).flatten(2), f"{layer}.out")
        x = x + dense(
            functional.gelu(dense(norm(x, f"{layer}.norm2"), f"{layer}.up")), f"{layer}.down"
        )
    return norm(x, "norm") @ weights["head"]


# --- ONNX -------------------------------------------------------------------------------------


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[np.generic]] = {}

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"{op_type}_{len(self.nodes)}_{n}" for n in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=names[0], **attributes)
        self.nodes.append(node)
        return names

    def one(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.add(op_type, *inputs, **attributes)[0]

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        self.constants[name] = array
        return name

    def dense(self, x: str, name: str) -> str:
        return self.one("Add", self.one("MatMul", x, name), f"{name}.bias")

    def norm(self, x: str, name: str) -> str:
        inputs = (x, f"{name}.scale", f"{name}.bias")
        return self.one("LayerNormalization", *inputs, epsilon=1e-5)


def transformer(weights: Mapping[str, NDArray[np.float32]], size: Size) -> onnx.ModelProto:
    """``tokens`` ``(N, T)`` → ``logits`` ``(N, T, symbols)``."""
    graph = _Graph()
    graph.constants.update(weights)
    zero, one = (graph.constant(f"at{n}", np.array([n])) for n in (0, 1))
    graph.constant("root", np.array(math.sqrt(size.width / size.heads), np.float32))
    graph.constant("apart", np.array([0, 0, 3, size.heads, size.width // size.heads]))
    graph.constant("together", np.array([0, 0, size.width]))
    graph.constant("first", np.array([0]))
    future = np.triu(np.full((size.context, size.context), -1e9, np.float32), 1)
    length = graph.one("Shape", "tokens", start=1, end=2)
    rows = graph.one("Slice", graph.constant("future", future), zero, length, zero)
    mask = graph.one("Slice", rows, zero, length, one)
    positions = graph.one("Slice", "positions", zero, length, zero)
    x = graph.one("Add", graph.one("Gather", "embedding", "tokens"), positions)
    for layer in range(size.layers):
        x = graph.one("Add", x, _attention(graph, x, str(layer), mask))
        up = graph.one("Gelu", graph.dense(graph.norm(x, f"{layer}.norm2"), f"{layer}.up"))
        x = graph.one("Add", x, graph.dense(up, f"{layer}.down"))
    graph.one("MatMul", graph.norm(x, "norm"), "head")
    graph.nodes[-1].output[0] = "logits"
    values = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N", "T"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T", size.symbols]),
    ]
    constants = [numpy_helper.from_array(a, name) for name, a in graph.constants.items()]
    made = helper.make_graph(graph.nodes, "transformer", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def _attention(graph: _Graph, x: str, layer: str, mask: str) -> str:
    qkv = graph.dense(graph.norm(x, f"{layer}.norm1"), f"{layer}.qkv")
    turned = graph.one("Transpose", graph.one("Reshape", qkv, "apart"), perm=[2, 0, 3, 1, 4])
    parts = graph.add("Split", turned, outputs=3, axis=0, num_outputs=3)
    q, k, v = (graph.one("Squeeze", part, "first") for part in parts)
    across = graph.one("Transpose", k, perm=[0, 1, 3, 2])
    scores = graph.one("Div", graph.one("MatMul", q, across), "root")
    shares = graph.one("Softmax", graph.one("Add", scores, mask), axis=-1)
    mixed = graph.one("Transpose", graph.one("MatMul", shares, v), perm=[0, 2, 1, 3])
    return graph.dense(graph.one("Reshape", mixed, "together"), f"{layer}.out")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small transformer and write it as ONNX.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=900, metavar="N")
    parser.add_argument("--data", type=Path, metavar="NPZ", help="held-out text to compare on")
    arguments = parser.parse_args()
    size, start = Size(), time.perf_counter()
    weights, bits = train(size, arguments.steps)
    onnx.save(transformer(weights, size), arguments.output)
    print(f"{bits:.2f} bits a character, {time.perf_counter() - start:.0f} s")
    if arguments.data is not None:
        np.savez(arguments.data, tokens=windows(text()[1], 64, size.context, 1))


if __name__ == "__main__":
    main()
