"""Train the digits network from scratch at 4 bits: float, max, OCTAV, and the gradients.

    python samples/qat_digits.py [--epochs 8] [--seeds 3] [--rows octav,max] [--json FILE]

The network and the data are those of samples/digits/train.py. All rows of one seed start from the
same weights and see the same batches in the same order; top-1 is on the 540 test images. "step" is
a training step's time relative to the float network's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from calib import CalibError

try:
    import torch
    from qat_training import (
        FLOAT,
        Found,
        Labelled,
        Recipe,
        Row,
        Timing,
        add_options,
        documents,
        drawn,
        prepared,
        progress,
        recipe_of,
        step_times,
        table,
        top1,
        train,
        write_json,
    )
    from torch import nn
except ModuleNotFoundError as missing:
    print(
        f"qat_digits.py needs {missing.name}, which is not installed: "
        "pip install octav-calibrate[samples]",
        file=sys.stderr,
    )
    sys.exit(2)

DEFAULTS = Recipe(epochs=8, batch=64, learning_rate=0.1, bits=4, device=torch.device("cpu"))
TIMING = Timing(warm_up=10, steps=30)
# The gradient of the rows that do not name theirs is MPH, the best of the paper.
ROWS = (
    Row("max", "max"),
    Row("octav-static", mode="static"),
    Row("octav"),
    Row("octav-ste", gradient="ste"),
    Row("octav-pwl", gradient="pwl"),
    Row("octav-mad", gradient="mad"),
)
# A folder without __init__.py: a static import would give the script two names for mypy.
digits = importlib.import_module("digits.train")


def load_data(device: torch.device) -> tuple[Labelled, Labelled]:
    """Images and labels to train on and to test on."""
    training, test = (
        (torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))
        for images, labels in digits.load_split()
    )
    return training, test


def network(row: Row, recipe: Recipe, seed: int) -> nn.Module:
    """An untrained network, with the same weights for every row of one seed."""
    torch.manual_seed(seed)
    return prepared(digits.DigitsNet(), row, recipe)


def shuffled(data: Labelled, recipe: Recipe, seed: int) -> Iterator[Labelled]:
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    return ((images[i], labels[i]) for i in drawn(len(images), recipe, generator))


def accuracies(
    data: tuple[Labelled, Labelled], rows: Sequence[Row], recipe: Recipe, n_seeds: int
) -> dict[str, list[float]]:
    """Top-1 per row and seed."""
    training, test = data
    n_steps = recipe.steps(len(training[1]))
    found: dict[str, list[float]] = {row.name: [] for row in rows}
    for seed in range(n_seeds):
        for row in rows:
            batches = shuffled(training, recipe, seed)
            model = train(network(row, recipe, seed), batches, recipe, n_steps)
            found[row.name].append(top1(model, test))
            progress(f"seed {seed}: {row.name} {found[row.name][-1]:.2f}")
    return found


def step_ratios(training: Labelled, rows: Sequence[Row], recipe: Recipe) -> dict[str, float]:
    """A training step's time relative to float training."""
    batch = next(shuffled(training, recipe, seed=0))
    models = {row.name: network(row, recipe, seed=0) for row in rows}
    seconds = step_times(models, batch, recipe, TIMING)
    return {name: taken / seconds[FLOAT.name] for name, taken in seconds.items()}


def measure(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(arguments)
    # At this size more threads cost time.
    torch.set_num_threads(1)
    data = load_data(recipe.device)
    recipe.steps(len(data[0][1]))  # refuses a batch that is too large before anything takes time
    rows = (FLOAT, *arguments.rows)
    ratios = step_ratios(data[0], rows, recipe)
    found = accuracies(data, rows, recipe, arguments.seeds)
    lines = [Found(r.name, r.description, tuple(found[r.name]), ratios[r.name]) for r in rows]
    print(f"Digits from scratch at {recipe}; means of {arguments.seeds} seeds")
    print(table(lines))
    document = {
        "recipe": asdict(recipe) | {"device": str(recipe.device)},
        "seeds": arguments.seeds,
        "rows": documents(lines),
    }
    write_json(arguments.json, document)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train digits from scratch at 4 bits.")
    add_options(parser, ROWS, DEFAULTS)
    try:
        measure(parser.parse_args())
    except (CalibError, OSError) as error:
        print(f"qat_digits.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
