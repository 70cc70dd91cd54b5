"""Small PyTorch models for the tests of training, and ways to train, compare and run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import Array, Feed, run
from torch import Tensor, nn

from calib.errors import CalibError
from calib.qat import MatMul, ScaledDotProductAttention, calibrate, prepare, quantizers
from calib.qat.hooks import prepared_layers


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian values, the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with the same parameters for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


class ConvNet(nn.Module):
    """Conv, BatchNorm, Conv, Linear: takes ``(N, 3, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = signed_norm(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        logits: Tensor = self.head(torch.relu(self.conv2(x)).mean((2, 3)))
        return logits


def images(n: int = 8, seed: int = 0) -> Tensor:
    """Input of a `ConvNet`."""
    return draw(n, 3, 8, 8, seed=seed)


def signed_norm(channels: int) -> nn.BatchNorm2d:
    """As after training; one channel is scaled by a negative number, one by 0."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.weight[1], norm.weight[2] = -0.7, 0.0
        norm.bias.copy_(torch.linspace(-0.4, 0.8, channels))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(torch.linspace(0.3, -0.2, channels))
        norm.running_var.copy_(torch.linspace(0.5, 2, channels))
    return norm


def two_layers() -> nn.Module:
    """A Conv2d and a Linear, for the input of a `ConvNet`."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


class SideBySide(nn.Module):
    """Every kind of layer, each with an input and an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(3, 4, 3, stride=2)
        self.conv2d = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect")
        self.conv3d = nn.Conv3d(2, 3, 2)
        self.up1d = nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1)
        self.up2d = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.up3d = nn.ConvTranspose3d(2, 3, 2, bias=False)
        self.linear = nn.Linear(7, 5)
        self.tokens = nn.Linear(7, 5, bias=False)
        self.product = MatMul()

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        *given, a, b = x
        layers = [layer for _, layer in self.named_children()][:-1]
        outputs = [layer(one) for layer, one in zip(layers, given, strict=True)]
        return (*outputs, self.product(a, b))


def side_by_side_inputs(n: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Of a `SideBySide`; some are never negative."""
    shapes = [(3, 9), (4, 5, 5), (2, 3, 4, 4), (3, 6), (4, 5, 5), (2, 3, 3, 3), (7,), (3, 7)]
    inputs = [draw(n, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
    inputs[1::2] = [torch.relu(x) for x in inputs[1::2]]
    return (*inputs, draw(n, 3, 4, seed=seed + 20), draw(n, 4, 5, seed=seed + 21).softmax(-1))


class Attention(nn.Module):
    """One head over ``(N, T, 8)``; queries, keys and values read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.attention = ScaledDotProductAttention()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = self.attention(self.query(x), self.key(x), self.value(x), mask)
        mixed: Tensor = self.out(attended)
        return mixed


class Shared(nn.Module):
    """One layer called twice: on signed values and behind a Relu."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.twice(torch.relu(self.twice(self.first(x))))))
        return y


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight: takes ids ``(N, T)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.inner(self.embedding(ids))))
        return scores


class Called(nn.Module):
    """Its layers are called by keyword: takes ``(N, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.product = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.product(b=x.transpose(0, 1), a=self.linear(input=x))
        return y


def refusal(kind: type[CalibError], call: Callable[[], object]) -> str:
    """The message of an error, which is one line."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- training ---------------------------------------------------------------------------------


def train(
    model: nn.Module,
    batches: Iterable[Any],
    rate: float = 0.1,
    compiled: Callable[..., Any] | None = None,
) -> list[Any]:
    """Steps of SGD on the mean square of the outputs; returns all outputs, of
    several the first."""
    forward = model if compiled is None else compiled
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    outputs: list[Any] = []
    for batch in batches:
        optimizer.zero_grad()
        output = forward(*batch) if isinstance(batch, tuple) else forward(batch)
        several = output if isinstance(output, tuple) else (output,)
        sum(one.float().square().mean() for one in several).backward()
        optimizer.step()
        outputs.extend(one.detach() for one in several[:1])
    return outputs


def image_batches(n: int = 3, seed: int = 0) -> Iterator[Tensor]:
    """Batches for a `ConvNet`."""
    return (images(seed=100 * seed + i) for i in range(n))


def ready(model: nn.Module, inputs: object, **settings: Any) -> nn.Module:
    """Prepared and calibrated on the inputs, in evaluation mode."""
    return calibrate(prepare(model, **settings), [inputs]).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a checkpoint holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Same keys, types and values, bit for bit."""
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def hooks(model: nn.Module) -> list[str]:
    """Names of all hooks that are registered anywhere."""
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hook" in attribute and isinstance(value, dict) and value
    ]


def thresholds(model: nn.Module) -> dict[str, Tensor]:
    """What evaluation uses, by tensor."""
    return {name: quantizer.current().clone() for name, quantizer in quantizers(model).items()}


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Collects the names of prepared layers and their outputs, in the order of calls."""
    calls: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: calls.append((name, output.detach()))

    handles = [
        layer.register_forward_hook(record(name)) for name, layer, _ in prepared_layers(model)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# --- written files ----------------------------------------------------------------------------


def feed_of(path: Path, inputs: object) -> Feed:
    """Tensors as the written model takes them, in order or by name."""
    if isinstance(inputs, Mapping):
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    names = [value.name for value in onnx.load(path).graph.input]
    return {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}


def written_outputs(path: Path, inputs: object, *, optimized: bool = True) -> list[Array]:
    return list(run(path, feed_of(path, inputs), optimized=optimized).values())


def relative(found: Array, expected: Array) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def layer_nodes(path: Path) -> list[tuple[str, list[str], str]]:
    """Of each layer in graph order: operator, the float tensors that its pairs read (weights left
    out), and its output with the bias."""
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            sources = [_source(made, name) for name in node.input[:2]]
            output = node.output[0]
            for reader in graph.node:
                if reader.op_type == "Add" and output in reader.input:
                    (other,) = [name for name in reader.input if name != output]
                    output = reader.output[0] if other in constants else output
            found.append((node.op_type, [s for s in sources if s not in constants], output))
    return found


def _source(made: Mapping[str, onnx.NodeProto], name: str) -> str:
    """What a QDQ pair, with a Clip perhaps, was made from."""
    while name in made and made[name].op_type in (
        *("DequantizeLinear", "QuantizeLinear", "Clip", "Min", "Max"),
    ):
        name = made[name].input[0]
    return name


def layer_differences(
    model: nn.Module, path: Path, inputs: object, after: Mapping[str, nn.Module]
) -> dict[str, float]:
    """For each layer `relative` of what the written model makes of the tensors it has there, and
    the layer in PyTorch of the same, with the module ``after`` it."""
    with recorded(model) as calls, torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    nodes = layer_nodes(path)
    assert len(nodes) == len(calls)
    layers = {name: layer for name, layer, _ in prepared_layers(model)}
    inner = dict.fromkeys([t for _, sources, out in nodes for t in (*sources, out)])
    values = run(path, feed_of(path, inputs), names=inner)
    differences = {}
    for number, ((name, _), (_, sources, output)) in enumerate(zip(calls, nodes, strict=True)):
        with torch.no_grad():
            expected = layers[name](*(torch.from_numpy(values[s]) for s in sources))
            expected = after[name](expected) if name in after else expected
        differences[f"{number} {name}"] = relative(values[output], expected.numpy())
    return differences
