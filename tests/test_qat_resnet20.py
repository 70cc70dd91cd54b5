"""A ResNet-20 on CIFAR-10: calibrated, trained, exported, and the exported one beside it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import Array, run
from qat_models import layer_differences
from torch import Tensor, nn

from calib.qat import calibrate, export, prepare

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
N_CALIBRATION, N_VALIDATION, N_STEPS = 320, 2000, 10


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two of PyTorch beside those of onnxruntime take several times as long on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cifar() -> Any:
    """The sample that has the network in PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SAMPLES)
        return import_module("qat_cifar")


@pytest.fixture(scope="module")
def validation(cifar: Any, fixtures_dir: Path) -> tuple[Array, Array]:
    images, labels = cifar.read_cifar(fixtures_dir / "cifar10_val.npz", N_VALIDATION, "--val")
    return np.asarray(images), np.asarray(labels)


@pytest.fixture(scope="module")
def network(cifar: Any, fixtures_dir: Path) -> nn.Module:
    """At 4 bits with 8-bit edges, calibrated and then trained for some steps."""
    model: nn.Module = prepare(cifar.load_network(fixtures_dir / cifar.MODEL), bits=4)
    images, labels = (
        torch.from_numpy(array)
        for array in cifar.read_cifar(fixtures_dir / "cifar10_calib.npz", N_CALIBRATION, "--calib")
    )
    calibrate(model, torch.split(images[:128], 64))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for step in range(N_STEPS):
        rows = slice(step * 32, step * 32 + 32)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def exported(
    network: nn.Module, validation: tuple[Array, Array], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("resnet20") / "w4a4.onnx"
    return export(network, torch.from_numpy(validation[0][:32]), path, input_names=["input"]).output


def logits(network: nn.Module, images: Array) -> Array:
    with torch.no_grad():
        parts = [network(part) for part in torch.split(torch.from_numpy(images), 250)]
    return np.asarray(torch.cat(parts).numpy())


def test_the_exported_network_answers_as_the_one_in_pytorch(
    network: nn.Module, exported: Path, validation: tuple[Array, Array]
) -> None:
    """At onnxruntime's default level, on 2,000 images. One level that flips moves an image, hence
    a median."""
    images, labels = validation
    expected = logits(network, images)
    parts = np.array_split(images, 8)
    found = np.concatenate(
        [next(iter(run(exported, {"input": part}, optimized=True).values())) for part in parts]
    )
    moved = np.abs(found - expected).max(1) / np.abs(expected).max(1)
    same = found.argmax(1) == expected.argmax(1)
    assert np.median(moved) <= 1e-4
    assert same.mean() >= 0.995
    assert (found.argmax(1) == labels).mean() > 0.7


def test_every_layer_of_the_exported_network_computes_what_it_does_in_pytorch(
    network: nn.Module, exported: Path, validation: tuple[Array, Array]
) -> None:
    norms = {
        name: network.get_submodule(name.replace("conv", "bn"))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    images: Tensor = torch.from_numpy(validation[0][:20])
    differences = layer_differences(network, exported, images, norms)
    assert len(differences) == 20
    assert max(differences.values()) < 1e-5, differences


def test_its_weights_are_4_bit_integers_but_those_of_the_first_and_the_last_layer(
    exported: Path,
) -> None:
    graph = onnx.load(exported).graph
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    made = {name: node for node in graph.node for name in node.output}
    weights = [types[made[node.input[1]].input[0]] for node in layers]
    assert weights == ["INT8", *["INT4"] * 18, "INT8"]
    assert exported.stat().st_size < 300_000
