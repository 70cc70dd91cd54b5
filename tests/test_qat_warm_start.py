"""Real training: each threshold, found from that of the step before, against one from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.calibrators.octav import Octav
from calib.distribution import Floats, Samples, Tail
from calib.qat import prepare, quantizer
from calib.qat.distribution import TensorSamples
from calib.qat.grid import to_groups
from calib.qat.observing import ACTIVATION, observe
from calib.qtypes import QuantType

torch.set_num_threads(1)  # of tensors this small, on machines this busy: many times faster

STEPS = 60


@dataclass
class Found:
    """Of each solve: the tensor, how far it is from one from scratch, and its passes."""

    names: list[str] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def mean_passes(self) -> tuple[float, float]:
        """Passes over the values in a solve of the first step and of later ones, on average."""
        n_tensors = len(set(self.names))
        return float(np.mean(self.passes[:n_tensors])), float(np.mean(self.passes[n_tensors:]))


def from_scratch(x: Tensor, signed: bool, bits: int, axis: int) -> Floats:
    groups = to_groups(x.detach().float(), axis if axis >= 0 else None).numpy()
    qtype = QuantType(bits, signed, narrow=axis != ACTIVATION)
    return Octav()(Samples(groups), qtype)


@contextmanager
def recorded() -> Iterator[Found]:
    """Watches every solve, in float64, and every pass over values."""
    found, tail = Found(), TensorSamples.tail

    def counted(dist: TensorSamples, t: Floats) -> Tail:
        found.passes[-1] += bool(np.any(t))
        return tail(dist, t)

    def watched(x: Tensor, stored: Tensor, signed: Tensor, *rest: Any) -> Tensor:
        found.passes.append(0)
        used: Tensor = observe(x, stored, signed, *rest)
        _, _, _, bits, axis, _, name = rest
        expected = from_scratch(x, bool(signed), bits, axis)
        found.names.append(name)
        found.off.append(float(np.abs(used.numpy() / expected - 1).max()))
        return used

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorSamples, "tail", counted)
        patch.setattr(quantizer, "observe", watched)
        yield found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    second = (nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.GELU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 32), nn.Linear(32, 10))


def train(model: nn.Module, *, halves: bool) -> list[float]:
    """The losses of some steps on scanned digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images[:, None]).float() / 16
    labels = torch.from_numpy(digits.target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(STEPS):
        batch = order[(step * 64) % 1600 :][:64]
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@cache
def training(bits: int, halves: bool) -> Found:
    """What happened in a training that learned something."""
    model = prepare(network(), bits=bits, edge_bits=8)
    with recorded() as found:
        losses = train(model, halves=halves)
    assert np.mean(losses[-10:]) < 0.4 * losses[0]
    assert len(found.off) == len(found.passes) == STEPS * 2 * 5
    return found


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_threshold_of_a_training_is_that_from_scratch(bits: int, halves: bool) -> None:
    """Of each channel at each step, first and last layer (8 bits) included: within 0.1 %."""
    found = training(bits, halves)
    worst = int(np.argmax(found.off))
    assert found.off[worst] <= 1e-3, f"{found.names[worst]} in solve {worst}"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_warm_start_saves_most_passes_over_the_values(bits: int) -> None:
    first, later = training(bits, False).mean_passes()
    assert later < first / 2
    assert later < 3.5
