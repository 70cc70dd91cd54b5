"""Compare `--target onnxruntime` with onnxruntime's own quantize_static: latency, size, top-1.

    python samples/bench_targets.py --fixtures ../shared/fixtures [--models resnet20,squeezenet]
    python samples/bench_targets.py --json targets.json

Both quantize the same model with the same calibration samples, ours with --bias-correction, which
changes no operator; quantize_static as QDQ, U8S8, per-channel, all else by default, from the float
model of opset 13 that its quant_pre_process makes.
ResNet-50, ShuffleNet and SqueezeNet are the topologies of `topologies.py`, with random weights and
random images: they have a latency, and no accuracy. Latency is of one image on one thread: sessions
are made and dropped in turn, one alive at a time, float, theirs, ours; the median of a session's
runs counts, and of those the median over all rounds. `ratio` is ours over theirs, the median of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
from fixtures import cifar
from numpy.typing import NDArray
from onnxruntime.quantization import (  # type: ignore[import-untyped,unused-ignore]
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import (  # type: ignore[import-untyped,unused-ignore]
    quant_pre_process,
)
from topologies import topology

from calib import Rules, calibrate_model, load_model
from calib.data import Reading, open_data
from calib.images import Preprocessing
from calib.run import Run

TOPOLOGIES = ("resnet50", "shufflenet", "squeezenet")
FIXTURES = ("resnet20", "mobilenet")
KINDS = ("float", "quantize_static", "ours")
RANDOM_IMAGES = 8
FIRST_OPSET_PER_CHANNEL = 13
N_CIFAR = 320
N_IMAGENET = 100

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """A float model, its input, calibration images, and images with labels where there are."""

    name: str
    path: Path
    input: str
    calibration: Images
    images: Images
    labels: Labels | None


@dataclass(frozen=True)
class Row:
    """What was measured of a model; lists are of float, quantize_static and ours."""

    name: str
    ms: list[float]
    ratio: float
    kilobytes: list[float]
    top1: list[float] | None


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, case: Case):
        self.feeds = iter([{case.input: image[None]} for image in case.calibration])

    def get_next(self) -> dict[str, Images] | None:
        return next(self.feeds, None)


# --- models and data --------------------------------------------------------------------------


def topology_case(name: str, folder: Path) -> Case:
    path = folder / f"{name}.onnx"
    onnx.save(topology(name), path)
    (spec,) = load_model(path).inputs
    shape = (RANDOM_IMAGES, 3, 224, 224)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return Case(name, path, spec.name, images, images[:1], None)


def resnet20_case(fixtures: Path) -> Case:
    images, labels = cifar(fixtures, N_CIFAR, 2000)
    path = fixtures / "resnet20_cifar10.onnx"
    held_out = images[N_CIFAR:], labels[N_CIFAR:]
    return Case("resnet20", path, "input", images[:N_CIFAR], *held_out)


def mobilenet_case(fixtures: Path) -> Case:
    path, folder = fixtures / "mobilenet_v1_025_128.onnx", fixtures / "imagenet_sample"
    model = load_model(path)
    shaping = Preprocessing(crop="87.5%", resize="128", mean=(0.5,), std=(0.5,))
    reading = Reading(labels=folder / "labels.csv", images=shaping)
    batches = list(open_data(model, folder, reading).batches())
    name = model.inputs[0].name
    images = np.concatenate([batch.feed[name] for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    first, rest = slice(N_IMAGENET), slice(N_IMAGENET, None)
    return Case("mobilenet", path, name, images[first], images[rest], labels[rest])


def case_of(name: str, folder: Path, fixtures: Path) -> Case:
    if name in TOPOLOGIES:
        return topology_case(name, folder)
    return resnet20_case(fixtures) if name == "resnet20" else mobilenet_case(fixtures)


def theirs(case: Case, folder: Path) -> Path:
    source, ready, out = (folder / f"{case.name}_{part}.onnx" for part in ("13", "pre", "qs"))
    model = onnx.load(case.path)
    if model.opset_import[0].version < FIRST_OPSET_PER_CHANNEL:
        model = onnx.version_converter.convert_version(model, FIRST_OPSET_PER_CHANNEL)
    onnx.save(model, source)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        quant_pre_process(source, ready)
        quantize_static(
            ready,
            out,
            Reader(case),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return out


def ours(case: Case, folder: Path, method: str) -> Path:
    data, out = folder / f"{case.name}.npz", folder / f"{case.name}_ours.onnx"
    arrays: dict[str, Any] = {case.input: case.calibration}
    np.savez(data, **arrays)
    rules = Rules(target="onnxruntime", method=method, bias_correction=True)
    calibrate_model(case.path, data, rules, out, Run())
    return out


# --- measuring --------------------------------------------------------------------------------


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def median_ms(path: Path, feed: dict[str, Images], n_runs: int, threads: int) -> float:
    runs = []
    running = session(path, threads)
    for _ in range(n_runs + 3):
        start = time.perf_counter()
        running.run(None, feed)
        runs.append(1000 * (time.perf_counter() - start))
    return statistics.median(runs[3:])


def top1(path: Path, case: Case) -> float:
    running = session(path, 0)
    found = [running.run(None, {case.input: image[None]})[0].reshape(-1) for image in case.images]
    return 100 * float(np.mean(np.argmax(found, axis=1) == case.labels))


def measured(case: Case, paths: list[Path], how: argparse.Namespace) -> Row:
    feed = {case.input: case.images[:1]}
    rounds = []
    for number in range(how.rounds):
        # In turn from either end, so that no kind always follows the same one.
        order = paths if number % 2 else paths[::-1]
        times = {path: median_ms(path, feed, how.runs, how.threads) for path in order}
        rounds.append([times[path] for path in paths])
    ratio = statistics.median(own / other for _, other, own in rounds)
    ms = [statistics.median(column) for column in zip(*rounds, strict=True)]
    sizes = [path.stat().st_size / 1000 for path in paths]
    accuracy = [top1(path, case) for path in paths] if case.labels is not None else None
    return Row(case.name, ms, ratio, sizes, accuracy)


def rows(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    for name in arguments.models:
        case = case_of(name, folder, arguments.fixtures)
        paths = [case.path, theirs(case, folder), ours(case, folder, arguments.method)]
        yield measured(case, paths, arguments)


# --- command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    beside = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    parser = argparse.ArgumentParser(description="Compare with onnxruntime's quantize_static.")
    parser.add_argument("--models", default=",".join((*TOPOLOGIES, *FIXTURES)), metavar="NAMES")
    parser.add_argument("--method", default="octav")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--runs", type=int, default=15, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    known = Path(os.environ.get("OCTAV_FIXTURES") or beside)
    parser.add_argument("--fixtures", type=Path, default=known, metavar="DIR")
    arguments = parser.parse_args()
    arguments.models = arguments.models.split(",")
    for name in arguments.models:
        if name not in (*TOPOLOGIES, *FIXTURES):
            parser.error(f"no model {name!r}, only {', '.join((*TOPOLOGIES, *FIXTURES))}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    print(f"{'':12}{'ms: float':>10}{'theirs':>8}{'ours':>8}{'ratio':>7}", end="")
    print(f"{'kB: float':>12}{'theirs':>8}{'ours':>8}{'top-1: float':>14}{'theirs':>8}{'ours':>8}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(arguments, Path(folder)):
            found.append(row)
            cells = (
                f"{row.name:12}{row.ms[0]:10.2f}{row.ms[1]:8.2f}{row.ms[2]:8.2f}{row.ratio:7.3f}"
            )
            cells += "{:12.0f}{:8.0f}{:8.0f}".format(*row.kilobytes)
            if row.top1 is not None:
                cells += "{:14.2f}{:8.2f}{:8.2f}".format(*row.top1)
            print(cells, flush=True)
    if arguments.json is not None:
        versions = {"onnxruntime": ort.__version__, "numpy": np.__version__}
        document = {"kinds": KINDS, "versions": versions, "models": [asdict(row) for row in found]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
