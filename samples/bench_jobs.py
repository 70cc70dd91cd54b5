"""What bench_calibration.py measures, one job at a time.

    python samples/bench_jobs.py kernel '{"n_values": 16000000, "rounds": 5}'

prints one JSON object. Each job is a process of its own: memory and threads stay apart. Only one
onnxruntime session lives at a time: a second one's spinning threads would double its time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import paper_table6
import topologies
from numpy.typing import NDArray
from onnxruntime.quantization import calibrate as theirs  # type: ignore[import-untyped, unused-ignore]

from calib import (
    Model,
    Observations,
    QuantType,
    Rules,
    Samples,
    Widths,
    load_model,
    make_plan,
    observe,
)
from calib.arrays import Batch
from calib.calibration import calibrate_each
from calib.calibrators import make
from calib.cluster import connected, observe_on
from calib.compiled import enabled
from calib.counter import Counter
from calib.data import Reading, open_data
from calib.granularity import PerChannel, pieces, to_groups
from calib.observing import Observing
from calib.prepare import QUANTIZABLE_OPS
from calib.shards import Task

METHODS = ("octav", "percentile", "mse", "max")
WIDTHS = tuple(range(2, 9))
ARRAY = 1 << 20
BLOCK = 32
PAUSE_S = 0.2  # idle threads of what ran before, as a BLAS has, spin no longer

Figures = dict[str, float]
Feed = dict[str, NDArray[Any]]
Way = Callable[[], object]


# --- whole calibration ------------------------------------------------------------------------


def ratios(model: str, images: int, batch: int, rounds: int) -> Figures:
    """Seconds of plain inference, of reading all observed activations and leaving them, and of the
    whole calibration, over the same images; each with the session it creates."""
    start = time.perf_counter()
    loaded = load_model(model)
    loading = time.perf_counter() - start
    feeds = random_feeds(loaded, images, batch)
    whole_calibration(loaded, feeds[:1])  # compiles
    ways: dict[str, Way] = {
        "plain_s": partial(infer, model, feeds),
        "exposed_s": partial(infer, exposing(loaded), feeds),
        "observed_s": partial(observed, loaded, feeds),
        "ours_s": partial(whole_calibration, loaded, feeds),
    }
    found = interleaved(ways, rounds)
    return {"load_model_s": loading, "compiled": enabled(), **found}


def rivals(model: str, images: int, batch: int, rounds: int) -> Figures:
    """Seconds of plain inference and of onnxruntime's own calibrators, over the same images."""
    feeds = random_feeds(load_model(model), images, batch)
    ways: dict[str, Way] = {"plain_s": partial(infer, model, feeds)}
    for name in ("MinMax", "Percentile", "Entropy"):
        ways[name] = partial(their_calibration, model, feeds, theirs.CalibrationMethod[name])
    return interleaved(ways, rounds)


def random_feeds(model: Model, images: int, batch: int) -> list[Feed]:
    return [dict(one.feed) for one in random_batches(model, images, batch)]


def random_batches(model: Model, images: int, batch: int) -> Iterator[Batch]:
    """Gaussian images, made one batch at a time."""
    rng = np.random.default_rng(0)
    spec = model.inputs[0]
    assert spec.shape is not None
    sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
    for first in range(0, images, batch):
        shape = (min(batch, images - first), *sizes)
        yield Batch({spec.name: rng.standard_normal(shape, np.float32)})


def whole_calibration(model: Model, feeds: list[Feed]) -> None:
    """What the tool computes: one pass over the images, then the thresholds of every method at
    every width."""
    observations = observed(model, feeds)
    rules = [Rules(widths=Widths(b, b), method=method) for method in METHODS for b in WIDTHS]
    calibrate_each(model, observations, [(make_plan(model, one), one) for one in rules])


def observed(model: Model, feeds: list[Feed]) -> Observations:
    """One pass over the images."""
    return observe(model, map(Batch, feeds), make_plan(model, Rules()).activations)


def infer(model: str | bytes, feeds: list[Feed]) -> None:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for feed in feeds:
        session.run(None, feed)


def exposing(model: Model) -> bytes:
    """The model with every activation that is observed as an output."""
    clone = model.ir.clone()
    wanted = set(make_plan(model, Rules()).activations)
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(v for n in clone.graph for v in n.outputs if v.name in wanted)
    return bytes(ir.to_proto(clone).SerializeToString())


def their_calibration(model: str, feeds: list[Feed], method: object) -> None:
    """onnxruntime's ranges of the tensors around the operators that are quantized here too."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        calibrator = theirs.create_calibrator(
            model,
            list(QUANTIZABLE_OPS),
            augmented_model_path=str(Path(folder, "augmented.onnx")),
            calibrate_method=method,
            providers=["CPUExecutionProvider"],
        )
        calibrator.collect_data(Reader(iter(feeds)))
        calibrator.compute_data()


class Reader(theirs.CalibrationDataReader):  # type: ignore[misc, unused-ignore]
    """Feeds as onnxruntime asks for them."""

    def __init__(self, feeds: Iterator[Feed]):
        self._feeds = feeds

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def interleaved(ways: dict[str, Way], rounds: int) -> Figures:
    """Seconds of each way, the median of ``rounds`` in turn; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


# --- memory -----------------------------------------------------------------------------------


def memory(model: str, images: int, batch: int) -> Figures:
    """The peak of resident memory of observing images that are made on the way."""
    loaded = load_model(model)
    names = make_plan(loaded, Rules()).activations
    observe(loaded, random_batches(loaded, images, batch), names)
    return {"peak_mb": peak_mb()}


def max_memory(size: int, bound_mb: int) -> dict[str, Any]:
    """The peak, in millions of bytes, of observing an encoder-decoder on one large image within a
    bound; what its activations take together; and what was done."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "encoder_decoder.onnx")
        path.write_bytes(topologies.encoder_decoder(size).SerializeToString())
        model = load_model(path)
    names = make_plan(model, Rules()).activations
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    how = Observing(max_memory=bound_mb * 1_000_000)
    seen = observe(model, [Batch({model.inputs[0].name: image})], names, how)
    values = sum(counter.n_finite for counter in seen.counters.values())
    return {"peak_mb": peak_mb() * 1.048576, "activations_mb": 4e-6 * values, "note": seen.notes}


def peak_mb() -> float:
    """Of this process. ru_maxrss starts from the parent's, VmHWM (Linux) does not."""
    status = Path("/proc/self/status")
    if status.exists():
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


# --- several processes ------------------------------------------------------------------------


def scaleout(model: str, images: int, batch: int, rounds: int) -> Figures:
    """Seconds of observing on one worker and on two, of one thread each, that run already."""
    loaded = load_model(model)
    names = make_plan(loaded, Rules()).activations
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npz")
        feeds = random_feeds(loaded, images, batch)
        arrays: Any = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        np.savez(path, **arrays)
        data = open_data(loaded, path, Reading(batch_size=batch))
        task = Task.of(loaded, data, names, Observing())
        taken = {}
        for workers in (1, 2):
            with connected(workers=workers) as client:
                work = partial(observe_on, client, task, data, images)
                taken[f"{workers}_s"] = interleaved({"s": work}, rounds)["s"]
    return taken


# --- kernels ----------------------------------------------------------------------------------


def kernel(n_values: int, rounds: int) -> Figures:
    """Nanoseconds of process time that counting takes for each value."""
    rng = np.random.default_rng(0)
    sizes = [min(ARRAY, n_values - first) for first in range(0, n_values, ARRAY)]
    gaussian = [rng.standard_normal(size, np.float32) for size in sizes]
    data = {"gaussian": gaussian, "half_zero": [np.maximum(x, 0) for x in gaussian]}
    return {
        name: 1e9 / n_values * median_process_time(partial(count, arrays), rounds)
        for name, arrays in data.items()
    }


def count(arrays: Iterable[NDArray[np.float32]]) -> None:
    counter = Counter()
    for array in arrays:
        counter.update(array)


def median_process_time(way: Way, rounds: int) -> float:
    way()
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        way()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def weights(tensors: int) -> Figures:
    """Seconds of process time that OCTAV takes at 2 to 8 bits for the first ``tensors`` of
    BERT-Base's linear weights, per output channel and in blocks of 32 inputs."""
    chosen = [t for t in paper_table6.weights() if min(t.shape) >= paper_table6.HIDDEN][:tensors]
    figures: Figures = {"values": sum(tensor.size for tensor in chosen)}
    for name, length in (("per_channel_s", None), ("blocked_s", BLOCK)):
        solve(chosen[0].values().reshape(-1, length or chosen[0].shape[1]))
        figures[name] = 0.0
        for tensor in chosen:
            groups = tensor.values().reshape(-1, length or tensor.shape[1])
            start = time.process_time()
            solve(groups)
            figures[name] += time.process_time() - start
    return figures


def solve(groups: NDArray[np.float32]) -> None:
    octav = make("octav")
    for index, _ in pieces(groups.shape, PerChannel(0)):
        dist = Samples(to_groups(groups[index], PerChannel(0)))
        for bits in WIDTHS:
            octav(dist, QuantType(bits, signed=True, narrow=True))


# --- the paper's table ------------------------------------------------------------------------


def table6(sequences: int, every: int) -> Figures:
    tensors = [*paper_table6.weights(), *paper_table6.activations(sequences, 128)]
    return paper_table6.measure(tensors, every).figures()


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job
    for job in (ratios, rivals, memory, max_memory, scaleout, kernel, weights, table6)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One job of bench_calibration.py.")
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("settings", type=json.loads, help="its arguments, as JSON")
    arguments = parser.parse_args()
    print(json.dumps(JOBS[arguments.job](**arguments.settings)))


if __name__ == "__main__":
    main()
