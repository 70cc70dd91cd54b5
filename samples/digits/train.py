"""Trains the small digits model that the samples calibrate, in a few seconds on one CPU core.

    python samples/digits/train.py [--epochs 30] [--seed 0] [--out DIR]

Writes two files next to this script, or into DIR:

digits.onnx  a residual network for 8x8 digits; input `image` float32 (N, 1, 8, 8) in 0..1, output
             `logits` float32 (N, 10); BatchNormalization is kept as nodes of its own
digits.npz   `image` and `labels` (int64): 256 training images to calibrate on, then all 540 test
             images to evaluate on

The images are scikit-learn's digits (UCI optical recognition of handwritten digits), which come
with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

try:
    import torch
    from sklearn import datasets, model_selection  # type: ignore[import-untyped,unused-ignore]
    from torch import Tensor, nn
except ModuleNotFoundError as missing:
    print(
        f"train.py needs {missing.name}, which is not installed: "
        "pip install octav-calibrate[samples]",
        file=sys.stderr,
    )
    sys.exit(2)

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]

N_CALIBRATION = 256
N_CLASSES = 10
STEM_CHANNELS = 16
# name, channels in, channels out, stride
BLOCKS = (("block1", 16, 16, 1), ("block2", 16, 32, 2))
BATCH = 64
LEARNING_RATE = 0.01
OPSET = 17
# The lowest IR version that allows opset 17, so that older runtimes load the file too.
IR_VERSION = 8


# --- data -------------------------------------------------------------------------------------


def load_split() -> tuple[Arrays, Arrays]:
    """Training part (1257 images) and test part (540 images), the same ones for every --seed."""
    values, labels = datasets.load_digits(return_X_y=True)
    images = (values / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        images, labels.astype(np.int64), test_size=0.3, stratify=labels, random_state=0
    )
    return (train_x, train_y), (test_x, test_y)


# --- model ------------------------------------------------------------------------------------


class ConvBn(nn.Module):
    """Convolution without bias, then batch normalisation."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


class Block(nn.Module):
    """Two convolutions around a shortcut; the shortcut is a 1x1 convolution where shapes change."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvBn(n_in, n_out, stride=stride)
        self.second = ConvBn(n_out, n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = ConvBn(n_in, n_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(torch.relu(self.first(x)))
        return torch.relu(inner + self.shortcut(x))


class DigitsNet(nn.Module):
    """Stem, the residual blocks, global average pool, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(1, STEM_CHANNELS)
        self.blocks = nn.ModuleDict({name: Block(*shape) for name, *shape in BLOCKS})
        self.head = nn.Linear(BLOCKS[-1][2], N_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        for block in self.blocks.values():
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def train(data: Arrays, epochs: int, seed: int) -> DigitsNet:
    """The network after `epochs` passes, in evaluation mode; the same for the same seed."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # At this size more threads cost time, and a fixed number keeps the sums in one order.
    torch.set_num_threads(1)
    images, labels = (torch.from_numpy(part) for part in data)
    model = DigitsNet()
    n_steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * n_steps
    )
    for _ in range(epochs):
        order = torch.randperm(len(images))[: n_steps * BATCH].reshape(n_steps, BATCH)
        for chosen in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: DigitsNet, data: Arrays) -> float:
    """Top-1 accuracy in 0..1."""
    images, labels = data
    with torch.no_grad():
        predicted = model(torch.from_numpy(images)).argmax(1).numpy()
    return float(np.mean(predicted == labels))


# --- export -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphBuilder:
    """Adds nodes one by one; every method returns the name of the value it made."""

    weights: dict[str, NDArray[np.float32]]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def add(self, op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def weight(self, key: str) -> str:
        self.initializers.append(numpy_helper.from_array(self.weights[key], key))
        return key

    def conv_bn(self, name: str, x: str, stride: int = 1) -> str:
        kernel = self.weights[f"{name}.conv.weight"].shape[-1]
        convolved = self.add(
            "Conv",
            f"{name}.conv",
            [x, self.weight(f"{name}.conv.weight")],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )
        parameters = ("weight", "bias", "running_mean", "running_var")
        inputs = [convolved, *(self.weight(f"{name}.bn.{key}") for key in parameters)]
        return self.add("BatchNormalization", f"{name}.bn", inputs, epsilon=1e-5)

    def block(self, name: str, x: str, stride: int) -> str:
        first = self.add("Relu", f"{name}.first.relu", [self.conv_bn(f"{name}.first", x, stride)])
        second = self.conv_bn(f"{name}.second", first)
        shortcut = x
        if f"{name}.shortcut.conv.weight" in self.weights:
            shortcut = self.conv_bn(f"{name}.shortcut", x, stride)
        total = self.add("Add", f"{name}.add", [second, shortcut])
        return self.add("Relu", f"{name}.relu", [total])


def to_onnx(model: DigitsNet) -> onnx.ModelProto:
    """The network as a checked ONNX model with a dynamic batch dimension `N`."""
    state = model.state_dict()
    graph = GraphBuilder({key.removeprefix("blocks."): state[key].numpy() for key in state})
    x = graph.add("Relu", "stem.relu", [graph.conv_bn("stem", "image")])
    for name, _, _, stride in BLOCKS:
        x = graph.block(name, x, stride)
    x = graph.add("GlobalAveragePool", "pool", [x])
    x = graph.add("Flatten", "flatten", [x], axis=1)
    head = [x, graph.weight("head.weight"), graph.weight("head.bias")]
    graph.nodes.append(helper.make_node("Gemm", head, ["logits"], "head", transB=1))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", N_CLASSES])]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "digits", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="octav-calibrate samples/digits",
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


# --- command line -----------------------------------------------------------------------------


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits model of the samples.")
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    training, test = load_split()
    model = train(training, arguments.epochs, arguments.seed)
    out: Path = arguments.out
    image = np.concatenate([training[0][:N_CALIBRATION], test[0]])
    labels = np.concatenate([training[1][:N_CALIBRATION], test[1]])
    try:
        out.mkdir(parents=True, exist_ok=True)
        onnx.save(to_onnx(model), str(out / "digits.onnx"))
        np.savez_compressed(out / "digits.npz", image=image, labels=labels)
    except OSError as error:
        print(f"train.py: cannot write to {out}: {error.strerror}", file=sys.stderr)
        return 2
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {out / 'digits.onnx'} ({n_parameters} parameters) and {out / 'digits.npz'}")
    print(f"float test accuracy: {accuracy(model, test):.2%} of {len(test[1])} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
