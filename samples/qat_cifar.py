"""Retrain a CIFAR-10 ResNet-20 at 4 bits for two epochs: OCTAV beside max, percentile, PACT, LSQ.

    python samples/qat_cifar.py [--epochs 2] [--seeds 3] [--rows octav,max] [--json FILE]
    python samples/qat_cifar.py --device cuda --epochs 20 --batch 256

Starts every row from the weights inside the fixtures' resnet20_cifar10.onnx and shows it the same
batches of cifar10_train10k.npz in the same order; top-1 is on the 2,000 images of cifar10_val.npz.
The column "gain" says how much of the gap a row wins back: 0 % is what calibration without training
reaches, 100 % what the float network reaches with the same training. "step" is a training step's
time relative to the float network's. The fixtures are looked for where samples/fixtures.py says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
from fixtures import CIFAR_MEAN, CIFAR_STD, FixturesError, cifar, find_fixtures, read_cifar
from onnx import numpy_helper

from calib import CalibError, Rules, Run, Widths, calibrate_model

try:
    import torch
    from qat_training import (
        FLOAT,
        Found,
        Labelled,
        Recipe,
        Row,
        Scale,
        Timing,
        add_options,
        agreement,
        documents,
        drawn,
        parts,
        positive,
        predictions,
        prepared,
        progress,
        recipe_of,
        step_times,
        table,
        top1,
        train,
        write_json,
    )
    from torch import Tensor, nn

    from calib.qat import export
except ModuleNotFoundError as missing:
    print(
        f"qat_cifar.py needs {missing.name}, which is not installed: "
        "pip install octav-calibrate[samples]",
        file=sys.stderr,
    )
    sys.exit(2)

MODEL = "resnet20_cifar10.onnx"
N_CALIBRATION = 320
N_TRAINING = 10_000
N_EVALUATION = 2_000
PADDING = 4
STAGES = ((16, 1), (32, 2), (64, 2))
EXPORTED_ROW = "octav"
DEFAULTS = Recipe(epochs=2, batch=64, learning_rate=0.003, bits=4, device=torch.device("cpu"))
ROWS = (
    Row("max", "max"),
    Row("percentile", "percentile:99.9"),
    Row("octav-static", mode="static"),
    Row("octav"),
    Row("octav-ste", gradient="ste"),
    Row("octav-pwl", gradient="pwl"),
    Row("octav-mad", gradient="mad"),
    Row("pact", gradient="pact"),
    Row("lsq", gradient="lsq"),
)


# --- network ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions around a shortcut without weights: every other pixel, and zero channels."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride = stride
        self.n_added = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.n_added:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.n_added, self.n_added))
        return torch.relu(inner + x)


class ResNet20(nn.Module):
    """Stem, three stages of three blocks, pool, linear head; parameters named as in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        n_in = STAGES[0][0]
        self.conv1 = nn.Conv2d(3, n_in, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_in)
        stages = []
        for n_out, stride in STAGES:
            first = Block(n_in, n_out, stride)
            stages.append(nn.Sequential(first, *(Block(n_out, n_out, 1) for _ in range(2))))
            n_in = n_out
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(n_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def load_network(path: Path) -> ResNet20:
    """The network with the weights of the ONNX file, in evaluation mode."""
    weights = {
        one.name: torch.from_numpy(numpy_helper.to_array(one).copy())
        for one in onnx.load(path).graph.initializer
    }
    network = ResNet20()
    outcome = network.load_state_dict(weights, strict=False)
    # The counters of BatchNorm steps are PyTorch's own.
    missed = [key for key in outcome.missing_keys if not key.endswith("num_batches_tracked")]
    if missed or outcome.unexpected_keys:
        raise FixturesError(f"{path}: not the ResNet-20 that this sample knows")
    return network.eval()


# --- data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Where the fixtures are, and their images on the device."""

    fixtures: Path
    training: Labelled
    evaluation: Labelled


def load_data(arguments: argparse.Namespace) -> Data:
    folder = find_fixtures(arguments.fixtures)
    training = read_cifar(folder / "cifar10_train10k.npz", arguments.limit, "--limit")
    evaluation = read_cifar(folder / "cifar10_val.npz", arguments.val, "--val")
    on_device = [
        (torch.from_numpy(x).to(arguments.device), torch.from_numpy(y).to(arguments.device))
        for x, y in (training, evaluation)
    ]
    return Data(folder, *on_device)


def augmented(data: Labelled, recipe: Recipe, seed: int) -> Iterator[Labelled]:
    """Batches of images, half of them mirrored, each shifted by up to four pixels; the same ones
    for every row of one seed."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    black = torch.from_numpy(-CIFAR_MEAN / CIFAR_STD).to(images.device)[:, None, None]
    padded = nn.functional.pad(images - black, (PADDING,) * 4) + black
    size = images.shape[-1]
    for chosen in drawn(len(images), recipe, generator):
        n = len(chosen)
        corner = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
        rows, columns = corner + torch.arange(size)
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        picked = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        yield picked.permute(0, 3, 1, 2).contiguous(), labels[chosen]


# --- measurements -----------------------------------------------------------------------------


def post_training(data: Data, bits: int) -> tuple[float, float]:
    """Top-1 of the float ONNX model and of the one calibrated without training."""
    n_evaluation = len(data.evaluation[1])
    images, labels = cifar(data.fixtures, N_CALIBRATION, n_evaluation)
    rules = Rules(widths=Widths(bits, bits), method="octav")
    run = Run(samples=N_CALIBRATION, force=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cifar.npz")
        np.savez(path, input=images, labels=labels)
        output = Path(folder, "calibrated.onnx")
        result = calibrate_model(data.fixtures / MODEL, path, rules, output, run)
    found = result.comparison.top1
    assert found is not None  # the data holds labels
    return found.float_model, found.quantized_model


@dataclass(frozen=True)
class Exported:
    """The last trained network as a file: top-1 there, and how often it agrees with PyTorch."""

    top1: float
    agreement: float


def exported(model: nn.Module, data: Labelled) -> Exported:
    images, labels = data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trained.onnx")
        export(model, (images[:2],), path, force=True)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        logits = [session.run(None, {name: x.numpy()})[0] for x in parts(images.cpu(), 100)]
    predicted = torch.from_numpy(np.concatenate(logits)).argmax(1)
    there = predictions(model, images).cpu()
    return Exported(agreement(predicted, labels.cpu()), agreement(predicted, there))


def trained(data: Data, row: Row, recipe: Recipe, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = prepared(load_network(data.fixtures / MODEL), row, recipe)
    batches = augmented(data.training, recipe, seed)
    return train(model, batches, recipe, recipe.steps(len(data.training[1])))


def accuracies(
    data: Data, rows: Sequence[Row], recipe: Recipe, n_seeds: int
) -> tuple[dict[str, list[float]], Exported | None]:
    """Top-1 per row and seed, and the exported row of the last seed."""
    found: dict[str, list[float]] = {row.name: [] for row in rows}
    file = None
    for seed in range(n_seeds):
        for row in rows:
            model = trained(data, row, recipe, seed)
            found[row.name].append(top1(model, data.evaluation))
            progress(f"seed {seed}: {row.name} {found[row.name][-1]:.2f}")
            if row.name == EXPORTED_ROW and seed == n_seeds - 1:
                file = exported(model, data.evaluation)
    return found, file


def step_ratios(
    data: Data, rows: Sequence[Row], recipe: Recipe, timing: Timing
) -> dict[str, float]:
    """A training step's time relative to float training."""
    models = {row.name: prepared(load_network(data.fixtures / MODEL), row, recipe) for row in rows}
    batch = next(augmented(data.training, recipe, seed=0))
    seconds = step_times(models, batch, recipe, timing)
    progress(f"a float step takes {1000 * seconds[FLOAT.name]:.1f} ms")
    return {name: taken / seconds[FLOAT.name] for name, taken in seconds.items()}


# --- command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Retrain ResNet-20 at 4 bits, in several ways.")
    add_options(parser, ROWS, DEFAULTS)
    add = parser.add_argument
    add("--limit", type=positive, default=N_TRAINING, metavar="N", help="training images")
    add("--val", type=positive, default=N_EVALUATION, metavar="N", help="evaluation images")
    add("--timed-steps", type=positive, default=15, metavar="N")
    add("--fixtures", type=Path, metavar="DIR")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    recipe, data = recipe_of(arguments), load_data(arguments)
    recipe.steps(arguments.limit)  # refuses a batch that is too large before anything takes time
    rows = (FLOAT, *arguments.rows)
    as_is, calibrated = post_training(data, recipe.bits)
    progress(f"float {as_is:.2f}, calibrated without training {calibrated:.2f}")
    timing = Timing(warm_up=10, steps=arguments.timed_steps)
    ratios = step_ratios(data, rows, recipe, timing)
    found, file = accuracies(data, rows, recipe, arguments.seeds)
    tuned = Found("float-tuned", "float, trained as the rows", tuple(found.pop(FLOAT.name)), 1.0)
    lines = [
        Found("float", "the ONNX model as it is", (as_is,)),
        tuned,
        Found("post-training", "octav, no training", (calibrated,)),
        *(
            Found(r.name, r.description, tuple(found[r.name]), ratios[r.name])
            for r in arguments.rows
        ),
    ]
    scale = Scale(none=calibrated, all=tuned.mean)
    print(f"{recipe}; {arguments.limit} images, means of {arguments.seeds} seeds")
    print(table(lines, scale))
    if {"octav", "max"} <= ratios.keys():
        print(f"A step of octav takes {ratios['octav'] / ratios['max']:.2f} times one of max.")
    if file is not None:
        print(
            f"{EXPORTED_ROW}, last seed, as an ONNX file in onnxruntime: top-1 {file.top1:.2f}; "
            f"{file.agreement:.2f} % of the images in the same class as in PyTorch."
        )
    document = {
        "recipe": asdict(recipe) | {"device": str(recipe.device)},
        "images": arguments.limit,
        "seeds": arguments.seeds,
        "rows": documents(lines, scale),
        "exported": None if file is None else asdict(file),
    }
    write_json(arguments.json, document)


def main() -> int:
    try:
        measure(parse_arguments())
    except (FixturesError, CalibError, OSError) as error:
        print(f"qat_cifar.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
