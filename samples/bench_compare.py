"""Measure octav-compare on ResNet-20: what the thresholds of many methods and widths take.

    OMP_NUM_THREADS=1 python samples/bench_compare.py ../shared/fixtures/resnet20_cifar10.onnx \\
        resnet20.npz

`python samples/fixtures.py resnet20 resnet20.npz` makes the data. The model is observed once; then
the thresholds of 5 methods at 3 widths are computed from the saved observations for all tensors,
and nothing is executed any more. Process time counts every core: give it one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calib import Model, Observations, Rules, Widths, calibrate, load_model, make_plan, observe
from calib.arrays import Batch
from calib.survey import Candidates

BATCH = 32


def read_batches(data: Path, name: str, n_samples: int) -> Iterator[Batch]:
    """The first ``n_samples`` of the array ``name``."""
    with np.load(data) as arrays:
        samples = arrays[name][:n_samples]
    return (Batch({name: samples[i : i + BATCH]}) for i in range(0, len(samples), BATCH))


def thresholds(model: Model, observations: Observations, method: str, bits: int) -> float:
    """Seconds of process time that one method at one width takes."""
    start = time.process_time()
    rules = Rules(widths=Widths(bits, bits), method=method)
    calibrate(model, observations, make_plan(model, rules), rules)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure octav-compare's thresholds.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=320, metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    model, candidates = load_model(arguments.model), Candidates()
    plan = make_plan(model, Rules())
    batches = read_batches(arguments.data, model.inputs[0].name, arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seen.npz")
        observe(model, batches, plan.activations).save(path)
        start = time.process_time()
        observations = Observations.load(path, model)
        loading = time.process_time() - start
    print(f"{len(plan.specs)} tensors, {observations.n_samples} samples, medians of process time")
    print(f"{'saved observations read':24}{loading:8.3f} s")
    total = 0.0
    for method in candidates.methods:
        row = [
            statistics.median(
                thresholds(model, observations, method, bits) for _ in range(arguments.runs)
            )
            for bits in candidates.bits
        ]
        total += sum(row)
        print(f"{method:24}" + "".join(f"{seconds:8.3f}" for seconds in row))
    widths = ", ".join(map(str, candidates.bits))
    print(f"{len(candidates.methods)} methods at {widths} bits: {total:.2f} s")


if __name__ == "__main__":
    main()
