"""Turns the images of the fixtures into an npz file that `octav-calibrate --data` reads.

    python samples/fixtures.py resnet20 OUT.npz [--calib 320] [--val 2000]
    python samples/fixtures.py mobilenet OUT.npz [--calib 100] [--val 400]

The file holds the model's input under its own name (`input` or `t0`, float32, calibration images
first) and `labels` (int64). `--calib` is then the number to give to `octav-calibrate --samples`.
The fixtures are looked for in --fixtures, else in the folder that the environment variable
OCTAV_FIXTURES names, else in ../shared/fixtures beside the repository.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

CIFAR_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
CIFAR_STD = np.array([0.229, 0.224, 0.225], np.float32)
# Of the ImageNet sample, the images by name up to here calibrate and the others evaluate.
IMAGENET_SPLIT = 100
IMAGENET_SIZE = 128
IMAGENET_CROP = 0.875


class FixturesError(Exception):
    """What is wrong, in one line for the user."""


# --- resnet20 ---------------------------------------------------------------------------------


def cifar(fixtures: Path, n_calibration: int, n_evaluation: int) -> tuple[Images, Labels]:
    """Images (N, 3, 32, 32), normalised per channel, and labels (N,)."""
    parts = [
        read_cifar(fixtures / "cifar10_calib.npz", n_calibration, "--calib"),
        read_cifar(fixtures / "cifar10_val.npz", n_evaluation, "--val"),
    ]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def read_cifar(path: Path, n: int, option: str) -> tuple[Images, Labels]:
    with np.load(path) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    check_count(n, len(images), option, path)
    scaled = images[:n].astype(np.float32) / np.float32(255)
    normalised = (scaled - CIFAR_MEAN) / CIFAR_STD
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)), labels[:n].astype(np.int64)


# --- mobilenet --------------------------------------------------------------------------------


def imagenet(fixtures: Path, n_calibration: int, n_evaluation: int) -> tuple[Images, Labels]:
    """Images (N, 3, 128, 128) in -1..1 and labels (N,)."""
    folder = fixtures / "imagenet_sample"
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as lines:
        rows = sorted((row["file"], int(row["label"])) for row in csv.DictReader(lines))
    calibration, evaluation = rows[:IMAGENET_SPLIT], rows[IMAGENET_SPLIT:]
    check_count(n_calibration, len(calibration), "--calib", folder)
    check_count(n_evaluation, len(evaluation), "--val", folder, least=0)
    chosen = calibration[:n_calibration] + evaluation[:n_evaluation]
    images = np.stack([read_jpeg(folder / name) for name, _ in chosen])
    return images, np.array([label for _, label in chosen], np.int64)


def read_jpeg(path: Path) -> Images:
    try:
        from PIL import Image  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise FixturesError(
            "mobilenet needs Pillow, which is not installed: pip install pillow"
        ) from None
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = round(min(image.size) * IMAGENET_CROP)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    small = square.resize((IMAGENET_SIZE, IMAGENET_SIZE), Image.Resampling.BILINEAR)
    planes = np.asarray(small, np.float32).transpose(2, 0, 1)
    scaled: Images = planes / np.float32(127.5) - np.float32(1)
    return scaled


# --- command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a model's images come from, and what its input is called."""

    input_name: str
    read: Callable[[Path, int, int], tuple[Images, Labels]]
    n_calibration: int
    n_evaluation: int


SOURCES = {
    "resnet20": Source("input", cifar, 320, 2000),
    "mobilenet": Source("t0", imagenet, 100, 400),
}


def check_count(n: int, n_there: int, option: str, source: Path, least: int = 1) -> None:
    if not least <= n <= n_there:
        raise FixturesError(
            f"{option} must be in {least}..{n_there}, the images for it in {source}; got {n}"
        )


def find_fixtures(given: Path | None) -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    folder = given or Path(os.environ.get("OCTAV_FIXTURES") or beside)
    if not folder.is_dir():
        raise FixturesError(
            f"no fixtures folder at {folder}: give it with --fixtures or OCTAV_FIXTURES"
        )
    return folder


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Writes beside `path` and renames, so that a stopped run leaves no half file behind."""
    if path.is_dir() or not path.parent.is_dir():
        raise FixturesError(f"cannot write {path}: it must be a file in a folder that exists")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn the fixtures' images into an npz file.")
    commands = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    for model, source in SOURCES.items():
        command = commands.add_parser(model, help=f"data for the fixtures' {model}")
        command.add_argument("out", type=Path, metavar="OUT.npz")
        command.add_argument("--calib", type=int, default=source.n_calibration)
        command.add_argument("--val", type=int, default=source.n_evaluation)
        command.add_argument("--fixtures", type=Path, metavar="DIR")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    source = SOURCES[arguments.model]
    try:
        fixtures = find_fixtures(arguments.fixtures)
        images, labels = source.read(fixtures, arguments.calib, arguments.val)
        save(arguments.out, {source.input_name: images, "labels": labels})
    except (FixturesError, OSError) as error:
        print(f"fixtures.py: {error}", file=sys.stderr)
        return 2
    shape = " x ".join(str(size) for size in images.shape[1:])
    print(
        f"wrote {arguments.out}: `{source.input_name}` holds {arguments.calib} calibration images, "
        f"then {arguments.val} evaluation images, {shape}; calibrate with "
        f"--samples {arguments.calib}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
