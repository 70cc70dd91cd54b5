"""What lowers the error of quantized models without training, at each width (README, "Low bits").

    python samples/low_bits.py
    python samples/low_bits.py --nets resnet20 --widths W8A8,W4A4 --evaluate 200       quick

On the ResNet-20 and the MobileNetV1 of the fixtures: plain OCTAV, with bias correction, with
equalisation, with both, the paper's kappa without and with correction, and onnxruntime's
calibrators at the same placement. Calibrated on 320 CIFAR and 100 ImageNet images; top-1 in points
on 2,000 and on the other 400. Weights per channel, activations per tensor, first and last layer at
8 bits, inputs of weighted layers only.

It looks for the fixtures in --fixtures, else in the folder that the environment variable
OCTAV_FIXTURES names, else in ../shared/fixtures beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fixtures import cifar

from calib import (
    CalibrationTable,
    Model,
    Preprocessing,
    Reading,
    Rules,
    Widths,
    calibrate,
    correct_biases,
    equalize,
    load_model,
    make_plan,
    observe,
    open_data,
    write_qdq,
)
from calib.arrays import Batch
from calib.reference import Reference
from calib.rivals import RIVALS, rival_ranges, rival_table

NAMES = ("W8A8", "W6A6", "W5A8", "W4A8", "W4A4", "W3A3")
WIDTHS = {name: (int(name[1]), int(name[3])) for name in NAMES}
NETS = ("resnet20", "mobilenet")
PAPER = "octav:kappa=paper"
OWN = ("octav", "+ bias correction", "+ equalisation", "+ both", PAPER, f"{PAPER} + correction")
ROWS = (*OWN, *RIVALS)
BATCH = 32

Table = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Net:
    """A model, what it is calibrated on, and what it is judged by."""

    model: Model
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]


def resnet20(fixtures: Path, most: int | None) -> Net:
    images, labels = cifar(fixtures, 320, min(most or 2000, 2000))
    batches = tuple(
        Batch({"input": images[n : n + BATCH]}, labels[n : n + BATCH])
        for n in range(0, len(images), BATCH)
    )
    first = 320 // BATCH
    return Net(load_model(fixtures / "resnet20_cifar10.onnx"), batches[:first], batches[first:])


def mobilenet(fixtures: Path, most: int | None) -> Net:
    model = load_model(fixtures / "mobilenet_v1_025_128.onnx")
    folder = fixtures / "imagenet_sample"
    images = Preprocessing(crop="87.5%", resize="128", mean=(0.5,), std=(0.5,))
    data = open_data(
        model, str(folder), Reading(BATCH, labels=folder / "labels.csv", images=images)
    )
    rest = data.batches(100)
    judged = rest if most is None else islice(rest, max(1, most // BATCH))
    return Net(model, tuple(data.batches(0, 100)), tuple(judged))


def tables(
    net: Net, widths: Mapping[str, tuple[int, int]], rows: Sequence[str]
) -> Iterator[tuple[str, str, Model, CalibrationTable]]:
    """Row, width, model and table of each figure."""
    plain, balanced = net.model, equalize(net.model)
    names = make_plan(plain, Rules()).activations
    seen = {id(m): observe(m, net.calibration, names) for m in (plain, balanced)}
    rivals = [row for row in rows if row in RIVALS]
    ranges = rival_ranges(plain, lambda: net.calibration, names, methods=rivals)
    for width, (weights, activations) in widths.items():
        for row in rows:
            method = PAPER if row.startswith(PAPER) else "octav"
            rules = Rules(widths=Widths(weights, activations), method=method)
            model = balanced if row in ("+ equalisation", "+ both") else plain
            plan = make_plan(model, rules)
            if row in RIVALS:
                table = rival_table(model, seen[id(model)], plan, ranges[row], row)
            else:
                table = calibrate(model, seen[id(model)], plan, rules)
            if row.endswith("correction") or row == "+ both":
                table = correct_biases(model, table, lambda: net.calibration)
            yield row, width, model, table


def measure(net: Net, widths: Mapping[str, tuple[int, int]], rows: Sequence[str]) -> Table:
    """Top-1 in points, by row and width."""
    found: Table = {"float": {}}
    with Reference(net.model, lambda: iter(net.evaluation)) as reference:
        for row, width, model, table in tables(net, widths, rows):
            top1 = reference.compare(write_qdq(model, table).ir).top1
            assert top1 is not None
            found.setdefault(row, {})[width] = round(top1.quantized_model, 2)
            found["float"][width] = round(top1.float_model, 2)
    return found


def show(name: str, found: Table) -> None:
    widths = list(found["float"])
    print(f"\n{name:30}" + "".join(f"{width:>7}" for width in widths))
    for row, figures in found.items():
        print(f"{row:30}" + "".join(f"{figures[width]:7.1f}" for width in widths), flush=True)


def chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"{option}: no {name!r}, only {','.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="What lowers the error, width by width.")
    beside = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    folder = Path(os.environ.get("OCTAV_FIXTURES", beside))
    parser.add_argument("--fixtures", type=Path, default=folder, metavar="FOLDER")
    parser.add_argument("--nets", default=",".join(NETS), metavar="LIST")
    parser.add_argument("--widths", default=",".join(WIDTHS), metavar="LIST")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="LIST")
    parser.add_argument("--evaluate", type=int, metavar="N", help="images at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    given = parser.parse_args()
    widths = {name: WIDTHS[name] for name in chosen(given.widths, list(WIDTHS), "--widths")}
    rows = chosen(given.rows, ROWS, "--rows")
    makers = {"resnet20": resnet20, "mobilenet": mobilenet}
    figures = {}
    for name in chosen(given.nets, NETS, "--nets"):
        net = makers[name](given.fixtures, given.evaluate)
        figures[name] = measure(net, widths, rows)
        show(name, figures[name])
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
