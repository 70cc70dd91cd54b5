"""Measure this tool on ResNet-20: accuracy, thresholds, memory and time, as one text.

    python samples/fixtures.py resnet20 resnet20.npz
    python samples/bench_resnet20.py ../shared/fixtures/resnet20_cifar10.onnx resnet20.npz

The data holds 320 calibration images, then those to evaluate on. Times are ratios against plain
onnxruntime inference over the same images, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib import (
    Histogram,
    Model,
    QuantType,
    Rules,
    Run,
    Samples,
    Widths,
    calibrate,
    calibrate_model,
    load_model,
    make_plan,
    observe,
)
from calib.arrays import Batch
from calib.calibrators import make
from calib.capture import Session
from calib.granularity import to_groups

N_CALIBRATION = 320
METHODS = (
    "octav",
    "octav:kappa=paper",
    "mse",
    "percentile:99.9",
    "percentile:99.99",
    "max",
    "entropy",
)
Images = NDArray[np.float32]


def batches(images: Images, size: int = 32) -> list[Batch]:
    return [Batch({"input": images[i : i + size]}) for i in range(0, len(images), size)]


def accuracy(model: Path, data: Path, widths: tuple[tuple[int, int], ...]) -> None:
    print("Top-1 on images that calibration did not see, in percent")
    names = [f"W{w}A{a}" for w, a in widths]
    print(f"{'method':20}" + "".join(f"{name:>8}" for name in names))
    run = Run(samples=N_CALIBRATION, force=True)
    float_top1 = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            row = []
            for w, a in widths:
                rules = Rules(widths=Widths(w, a), method=method)
                result = calibrate_model(model, data, rules, Path(folder) / "q.onnx", run)
                top1 = result.comparison.top1
                if top1 is None:
                    raise SystemExit(f"{data}: holds no labels")
                row.append(top1.quantized_model)
                float_top1 = top1.float_model
            print(f"{method:20}" + "".join(f"{top1:8.2f}" for top1 in row))
    print(f"{'float':20}{float_top1:8.2f}\n")


def thresholds(model: Model, images: Images) -> None:
    """Thresholds from counters against raw values, and OCTAV's MSE against an exhaustive sweep."""
    names = make_plan(model, Rules()).activations
    counters = observe(model, batches(images), names).counters
    session = Session(model.ir, values=names)
    raw: dict[str, list[Images]] = {name: [] for name in names}
    for batch in batches(images):
        for name, values in session.run(batch.feed).items():
            raw[name].append(values.ravel())
    octav, sweep = make("octav"), make("mse:1000")
    print("Worst activation, in percent: OCTAV threshold from counters against raw values,")
    print("the raw MSE of the two thresholds, the MSE read from counters, OCTAV against a sweep")
    for bits in (2, 3, 4, 6, 8):
        rows = []
        for name in names:
            exact, counted = Samples(np.concatenate(raw[name])[None]), Histogram(counters[name])
            qtype = QuantType(bits, signed=counted.has_negative)
            ours, best = octav(counted, qtype), octav(exact, qtype)
            mse = exact.mse(ours, qtype)
            swept = exact.mse(sweep(counted, qtype), qtype)
            ratios = (ours / best, mse / exact.mse(best, qtype), counted.mse(ours, qtype) / mse)
            rows.append([*(abs(float(r[0]) - 1) for r in ratios), float((mse / swept)[0]) - 1])
        worst = 100 * np.max(rows, axis=0)
        print(f"  {bits} bits" + "".join(f"{value:9.3f}" for value in worst))


def weights(model: Model) -> None:
    print("Worst layer, in percent: MSE of per-channel OCTAV weights against an exhaustive sweep")
    octav, sweep = make("octav"), make("mse:1000")
    for bits in (3, 4, 5, 6, 8):
        qtype = QuantType(bits, signed=True, narrow=True)
        gaps = []
        for spec in make_plan(model, Rules()).specs:
            if spec.kind == "weight":
                dist = Samples(to_groups(model.weight(spec.name), spec.granularity))
                found, best = (dist.mse(c(dist, qtype), qtype).sum() for c in (octav, sweep))
                gaps.append(100 * (float(found / best) - 1))
        print(f"  {bits} bits {max(gaps):9.3f}")


def batch_sizes(model: Model, images: Images) -> None:
    rules = Rules(widths=Widths(4, 4))
    plan = make_plan(model, rules)
    found = []
    for size in (32, 1, len(images)):
        observations = observe(model, batches(images, size), plan.activations)
        records = calibrate(model, observations, plan, rules).records
        found.append(np.concatenate([record.threshold for record in records]))
    worst = [float(np.abs(other / found[0] - 1).max()) for other in found[1:]]
    print(
        f"Thresholds at batch size 1 and {len(images)} against 32: {worst[0]:.1e}, {worst[1]:.1e}"
    )


def speed(model: Model, images: Images) -> None:
    rules = Rules(widths=Widths(4, 4))
    plan = make_plan(model, rules)
    ours, plain = [], []
    for _ in range(9):
        session = Session(model.path)
        start = time.perf_counter()
        for batch in batches(images):
            session.run(batch.feed)
        plain.append(time.perf_counter() - start)
        del session
        start = time.perf_counter()
        calibrate(model, observe(model, batches(images), plan.activations), plan, rules)
        ours.append(time.perf_counter() - start)
    ratio = statistics.median(ours) / statistics.median(plain)
    print(f"Observe and calibrate, relative to plain inference: {ratio:.2f}")


def memory(model: Path, images: Images) -> None:
    # VmHWM (Linux) starts anew in the child; ru_maxrss would inherit the parent's peak.
    script = (
        "import pathlib, sys; from octav_calibrate_cli.calibrate import main; "
        "code = main(sys.argv[1:]); "
        "status = pathlib.Path('/proc/self/status').read_text().split(); "
        "print(code, int(status[status.index('VmHWM:') + 1]) / 1024)"
    )
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "q.onnx"
        for n in (64, 512):
            data = Path(folder) / f"{n}.npz"
            np.savez(data, input=np.resize(images, (n, *images.shape[1:])))
            arguments = [
                model,
                "--data",
                data,
                "--bits",
                4,
                "--output",
                output,
                "--force",
                "--quiet",
            ]
            command = [sys.executable, "-c", script, *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
            code, peak = done.stdout.split()
            if code != "0":
                raise SystemExit(done.stderr)
            peaks.append(float(peak))
    print(f"Peak memory at 64 and 512 samples: {peaks[0]:.1f} and {peaks[1]:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure octav-calibrate on ResNet-20.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        images = arrays["input"][:N_CALIBRATION]
    model = load_model(arguments.model)
    accuracy(arguments.model, arguments.data, ((8, 8), (4, 8), (4, 4), (3, 3)))
    thresholds(model, images)
    weights(model)
    batch_sizes(model, images)
    speed(model, images)
    memory(arguments.model, images)


if __name__ == "__main__":
    main()
