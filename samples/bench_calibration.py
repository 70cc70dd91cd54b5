"""Speed and memory of calibration, as one table.

    python samples/bench_calibration.py --json speed.json
    python samples/bench_calibration.py --only ratios,kernel --models shufflenet --rounds 3

Times of calibration are ratios against plain onnxruntime inference over the same images in the same
process: medians of turns, each side with the session that it creates, the model loaded before, the
kernels compiled before. What depends on it is measured with numba and, as OCTAV_CALIBRATE_PLAIN=1
has it, with NumPy alone. All of it takes many minutes, of a machine that does nothing else: threads
of onnxruntime that wait for a core spin. Sections:

  ratios    observing and the thresholds of 4 methods at 2 to 8 bits; reading the activations and
            leaving them; onnxruntime's own calibrators, on fewer images
  memory    the peak while observing 8 times as many images, made on the way
  kernel    counting, for each value and core
  weights   OCTAV at 2 to 8 bits of BERT-Base's linear weights, on one core
  startup   octav-calibrate --help against importing click and NumPy
  scaleout  two workers against one
  table6    paper_table6.py: the 100-point sweep against OCTAV from counts

ResNet-50 and ShuffleNet have random weights (topologies.py); ResNet-20 is one of the fixtures,
found as fixtures.py finds them. What cannot be measured here is named with the reason. In the JSON
file, figures are those with numba where it is installed, and those without it under "numpy".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from bench_sections import MODELS, QUICK, SECTIONS, Bench, Sizes, Table
from fixtures import FixturesError, find_fixtures
from topologies import SHIPPED, topology

SIZES = Sizes()


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"Python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "numba"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        **versions,
    }


def find_models(
    names: Sequence[str], fixtures: Path | None, folder: Path
) -> Iterator[tuple[str, Path | str]]:
    """Each model's path, or why it is not there."""
    for name in names:
        if name in SHIPPED:
            path = folder / f"{name}.onnx"
            onnx.save(topology(name), path)
            yield name, path
            continue
        try:
            path = find_fixtures(fixtures) / "resnet20_cifar10.onnx"
        except FixturesError as error:
            yield name, str(error)
            continue
        yield name, path if path.exists() else f"{path}: no such file"


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = set(text.split(",")) - {*known}
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} not among {', '.join(known)}")
        return text.split(",")

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of calibration, as one table.")
    parser.add_argument("--only", type=names_of(SECTIONS), default=[*SECTIONS], metavar="SECTIONS")
    parser.add_argument("--models", type=names_of(MODELS), default=[*MODELS], metavar="MODELS")
    parser.add_argument("--images", type=int, default=SIZES.images, metavar="N")
    parser.add_argument("--rival-images", type=int, default=SIZES.rival_images, metavar="N")
    parser.add_argument("--rounds", type=int, default=SIZES.rounds, metavar="N")
    parser.add_argument("--quick", action="store_true", help="as little as possible: a trial run")
    parser.add_argument("--fixtures", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    table = Table({"machine": machine()})
    sizes = Sizes(arguments.images, arguments.rival_images, arguments.rounds)
    print(", ".join(f"{name} {value}" for name, value in table.figures["machine"].items()))
    with tempfile.TemporaryDirectory() as folder:
        models = dict[str, Path]()
        names = arguments.models if {"ratios", "memory", "scaleout"} & {*arguments.only} else []
        for name, found in find_models(names, arguments.fixtures, Path(folder)):
            if isinstance(found, Path):
                models[name] = found
            else:
                table.skip(name, found)
        bench = Bench(QUICK if arguments.quick else sizes, models, table)
        for section in arguments.only:
            SECTIONS[section](bench)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table.figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
