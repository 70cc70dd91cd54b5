"""Recipes for the models of the fixtures, and the data that two of them need.

    cd ../shared/fixtures
    octav-calibrate mobilenet_v1_025_128.onnx --data imagenet_sample \\
        --labels imagenet_sample/labels.csv --samples 100 \\
        --crop 87.5% --resize 128 --mean 0.5 --std 0.5
    octav-calibrate ultraface_rfb_320.onnx --data imagenet_sample --samples 100 \\
        --resize 240x320 --pixel-scale 1 --mean 127 --std 128

    octav-calibrate gtcrn_stream.onnx --data fixtures:voices --samples 1000 --bits 16 \\
        --feed-back conv_cache=conv_cache_out --feed-back tra_cache=tra_cache_out \\
        --feed-back inter_cache=inter_cache_out

    python samples/fixtures.py resnet20 OUT.npz [--calib 320] [--val 2000]
    octav-calibrate resnet20_cifar10.onnx --data OUT.npz --samples 320

The third finds `voices` where this folder is on PYTHONPATH. `resnet20` writes the model's `input`
(float32, calibration images first) and `labels` (int64); it looks for the fixtures in --fixtures,
else in the folder that the environment variable OCTAV_FIXTURES names, else in ../shared/fixtures
beside the repository.

GTCRN does not bear 8 bits: its output keeps 2.7 dB; with 16 bits, 39.5 dB. octav-compare on the
same data with --bits 8,16 names the three tensors behind most of that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

CIFAR_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
CIFAR_STD = np.array([0.229, 0.224, 0.225], np.float32)
SAMPLE_RATE = 16_000
HOP = 256


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


# --- gtcrn ------------------------------------------------------------------------------------


def frames(rng: np.random.Generator, n_frames: int) -> NDArray[np.float32]:
    """The spectrum (n_frames, 257, 1, 2), real and imaginary, of a voice in noise at 0 to 15 dB, as
    GTCRN takes it: frames of 512 samples at 16 kHz, half of each new, under the root of a Hann
    window."""
    n_samples = (n_frames + 1) * HOP
    clean = voice(rng, n_samples)
    noise = coloured(rng, n_samples, rng.uniform(0, 1))
    noise *= rms(clean) / rms(noise) * 10 ** (-rng.uniform(0, 15) / 20)
    mixed = (clean + noise) * rng.uniform(0.02, 0.1) / rms(clean)
    window = np.sqrt(np.hanning(2 * HOP + 1)[:-1])
    cut = np.lib.stride_tricks.sliding_window_view(mixed, 2 * HOP)[::HOP] * window
    spectrum = np.fft.rfft(cut)[:n_frames]
    parts = np.stack([spectrum.real, spectrum.imag], axis=-1)
    return parts[:, :, None].astype(np.float32)


def voice(rng: np.random.Generator, n_samples: int) -> NDArray[np.float64]:
    """Syllables of 0.1 to 0.3 s: harmonics of a gliding pitch under three formants, every fourth or
    so hissed, with pauses between some."""
    sound = np.zeros(n_samples)
    pitch = rng.uniform(90, 240)
    start = 0
    while start < n_samples:
        n = int(rng.uniform(0.1, 0.3) * SAMPLE_RATE)
        glide = pitch * np.exp(
            rng.uniform(-0.15, 0.15) + rng.uniform(-0.3, 0.3) * np.linspace(0, 1, n)
        )
        phase = np.cumsum(glide) * 2 * np.pi / SAMPLE_RATE
        if rng.random() < 0.25:
            syllable = 0.3 * np.diff(rng.standard_normal(n + 1))
        else:
            formants = rng.uniform((250, 900, 2200), (900, 2300, 3500))
            harmonics = np.arange(1, int(0.45 * SAMPLE_RATE / pitch / 1.2))
            distance = (harmonics[:, None] * pitch - formants) / (60 + 0.06 * formants)
            loudness = (1 / (1 + distance**2)).sum(axis=1) / harmonics**0.5
            offsets = rng.uniform(0, 2 * np.pi, len(harmonics))
            waves = np.sin(harmonics[:, None] * phase + offsets[:, None])
            syllable = loudness @ waves
        room = sound[start : start + n]
        room += (syllable * np.hanning(n) * rng.uniform(0.3, 1))[: len(room)]
        start += int(n * (0.85 if rng.random() < 0.8 else 2))
    return sound


def coloured(rng: np.random.Generator, n_samples: int, slope: float) -> NDArray[np.float64]:
    """Noise whose amplitude falls with the frequency to the power of ``slope``."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** slope
    return np.fft.irfft(spectrum, n_samples)


def rms(sound: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(sound**2)))


def voices() -> Iterator[dict[str, NDArray[np.float32]]]:
    """16 sequences of 125 frames (2 s), always the same; each starts with an empty cache."""
    empty = np.zeros((2, 1, 16, 16, 33), np.float32)
    for number in range(16):
        yield {"mix": frames(np.random.default_rng(number), 125), "conv_cache": empty}


# --- command line -----------------------------------------------------------------------------


def check_count(n: int, n_there: int, option: str, source: Path) -> None:
    if not 1 <= n <= n_there:
        raise FixturesError(
            f"{option} must be in 1..{n_there}, the images for it in {source}; got {n}"
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
    parser = argparse.ArgumentParser(description="Make data for the models of the fixtures.")
    commands = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    resnet = commands.add_parser("resnet20", help="images as an npz")
    resnet.add_argument("out", type=Path, metavar="OUT.npz")
    resnet.add_argument("--calib", type=int, default=320)
    resnet.add_argument("--val", type=int, default=2000)
    resnet.add_argument("--fixtures", type=Path, metavar="DIR")
    return parser.parse_args()


def make_resnet20(arguments: argparse.Namespace) -> str:
    fixtures = find_fixtures(arguments.fixtures)
    images, labels = cifar(fixtures, arguments.calib, arguments.val)
    save(arguments.out, {"input": images, "labels": labels})
    shape = " x ".join(str(size) for size in images.shape[1:])
    return (
        f"wrote {arguments.out}: `input` holds {arguments.calib} calibration images, then "
        f"{arguments.val} evaluation images, {shape}; calibrate with --samples {arguments.calib}"
    )


def main() -> int:
    arguments = parse_arguments()
    try:
        print(make_resnet20(arguments))
    except (FixturesError, OSError) as error:
        print(f"fixtures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
