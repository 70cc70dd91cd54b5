"""What the two samples of quantization-aware training share: rows, the loop, times and the table.

    from qat_training import Recipe, Row, prepared, top1, train

`qat_cifar.py` retrains a network at 4 bits, `qat_digits.py` trains one from scratch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import OptionError
from calib.qat import prepare

EVALUATION_BATCH = 500
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One way to train; `calibrator` None is float."""

    name: str
    calibrator: str | None = "octav"
    mode: str = "dynamic"
    gradient: str = "mph"

    @property
    def description(self) -> str:
        if self.calibrator is None:
            return "float"
        if self.gradient in {"pact", "lsq"}:
            return f"{self.gradient}, from {self.calibrator}"
        return f"{self.calibrator} {self.mode}, {self.gradient}"


FLOAT = Row("float", calibrator=None)


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and on what: the same for all rows that are compared."""

    epochs: int
    batch: int
    learning_rate: float
    bits: int
    device: torch.device

    def steps(self, n_images: int) -> int:
        """In all epochs, without short last batches."""
        if self.batch > n_images:
            raise OptionError(f"--batch {self.batch} is more than the {n_images} training images")
        return self.epochs * (n_images // self.batch)

    def __str__(self) -> str:
        return (
            f"W{self.bits}A{self.bits}, {self.epochs} epochs in batches of {self.batch}, "
            f"learning rate {self.learning_rate:g}, {self.device}"
        )


# --- training ---------------------------------------------------------------------------------


def prepared(model: nn.Module, row: Row, recipe: Recipe) -> nn.Module:
    """The model on the recipe's device, set up for the row."""
    model.to(recipe.device)
    if row.calibrator is not None:
        prepare(
            model,
            bits=recipe.bits,
            calibrator=row.calibrator,
            mode=row.mode,
            gradient=row.gradient,
        )
    return model


def drawn(n_images: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one batch after the other, every epoch in a new order, without a short last one.

    Whatever is drawn between batches from the same generator is then the same for every row too.
    """
    n_steps = n_images // recipe.batch
    for _ in range(recipe.epochs):
        order = torch.randperm(n_images, generator=generator)[: n_steps * recipe.batch]
        yield from order.reshape(n_steps, recipe.batch)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=1e-4
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Labelled) -> None:
    images, labels = batch
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    optimizer.step()


def train(model: nn.Module, batches: Iterable[Labelled], recipe: Recipe, n_steps: int) -> nn.Module:
    """The model after one step per batch, in evaluation mode; the rate falls along a cosine."""
    optimizer = make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    model.train()
    for batch in batches:
        step(model, optimizer, batch)
        schedule.step()
    return model.eval()


def top1(model: nn.Module, data: Labelled) -> float:
    """Top-1 in percent."""
    return agreement(predictions(model, data[0]), data[1])


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every image, from the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in parts(images, EVALUATION_BATCH)])


def parts(images: Tensor, size: int) -> Iterator[Tensor]:
    return (images[start : start + size] for start in range(0, len(images), size))


def agreement(one: Tensor, other: Tensor) -> float:
    """Equal elements, in percent."""
    return 100 * float((one == other).double().mean())


# --- time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    warm_up: int
    steps: int


def step_times(
    models: Mapping[str, nn.Module], batch: Labelled, recipe: Recipe, timing: Timing
) -> dict[str, float]:
    """Median seconds of a training step of every model.

    The models take turns step by step, so that a busy machine slows all of them. Warm-up lets the
    solvers, which start from the thresholds of the step before, reach their usual pace.
    """
    optimizers = {name: make_optimizer(model.train(), recipe) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name in itertools.chain(*[models] * (timing.warm_up + timing.steps)):
        synchronize(recipe.device)
        start = time.perf_counter()
        step(models[name], optimizers[name], batch)
        synchronize(recipe.device)
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[timing.warm_up :]) for name, taken in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- output -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One line of the table: top-1 in percent per seed, and a step's time relative to float."""

    name: str
    description: str
    top1: tuple[float, ...]
    step_ratio: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


@dataclass(frozen=True)
class Scale:
    """What counts as none and as all of the accuracy that training can win back."""

    none: float
    all: float

    def gain(self, value: float) -> float | None:
        """In percent of the gap; None where there is no gap to win back."""
        gap = self.all - self.none
        return 100 * (value - self.none) / gap if gap > 0 else None


def table(lines: Sequence[Found], scale: Scale | None = None) -> str:
    """The lines under one heading; with a scale, also what they win back of the gap."""
    gain = f"{'gain':>9}" if scale else ""
    rows = [f"{'row':14}{'what':28}{'top-1':>16}{gain}{'step':>8}"]
    for line in lines:
        accuracy = f"{line.mean:.2f}" + (f" ± {line.std:.2f}" if len(line.top1) > 1 else "")
        won = f"{percent(scale.gain(line.mean)):>9}" if scale else ""
        ratio = "-" if line.step_ratio is None else f"{line.step_ratio:.2f}"
        rows.append(f"{line.name:14}{line.description:28}{accuracy:>16}{won}{ratio:>8}")
    return "\n".join(rows)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def documents(lines: Sequence[Found], scale: Scale | None = None) -> list[dict[str, Any]]:
    """The table's numbers, for JSON."""
    return [
        {
            "name": line.name,
            "what": line.description,
            "top1": list(line.top1),
            "mean": line.mean,
            "std": line.std,
            "step_ratio": line.step_ratio,
        }
        | ({"gain_percent": scale.gain(line.mean)} if scale else {})
        for line in lines
    ]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, document: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=2) + "\n")


# --- command line -----------------------------------------------------------------------------


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def usable_device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {reason}") from None


def file_to_write(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} must be a file in a folder that exists")
    return path


def rows_of(known: Sequence[Row], names: str | None) -> tuple[Row, ...]:
    """The rows that the comma-separated names pick, in the table's order; all without names."""
    if names is None:
        return tuple(known)
    wanted = names.split(",")
    unknown = set(wanted) - {row.name for row in known}
    if unknown:
        listed = ", ".join(row.name for row in known)
        raise argparse.ArgumentTypeError(f"no row {min(unknown)!r}; there are {listed}")
    return tuple(row for row in known if row.name in wanted)


def add_options(parser: argparse.ArgumentParser, known: Sequence[Row], recipe: Recipe) -> None:
    """The options of both samples, with the recipe's values as defaults."""
    add = parser.add_argument
    add("--epochs", type=positive, default=recipe.epochs, metavar="N")
    add("--seeds", type=positive, default=3, metavar="N")
    add("--batch", type=positive, default=recipe.batch, metavar="N")
    add("--bits", type=positive, default=recipe.bits, metavar="N")
    add("--lr", type=rate, default=recipe.learning_rate, metavar="RATE")
    add("--device", type=usable_device, default=recipe.device, help="cpu or cuda")
    add("--json", type=file_to_write, metavar="FILE", help="write all numbers to a file")
    names = ",".join(row.name for row in known)
    add(
        "--rows",
        type=lambda text: rows_of(known, text),
        default=tuple(known),
        metavar="NAMES",
        help=f"any of {names}",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return Recipe(arguments.epochs, arguments.batch, arguments.lr, arguments.bits, arguments.device)
