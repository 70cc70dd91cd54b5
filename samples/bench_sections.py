"""The sections of bench_calibration.py's table: what is measured, and the rows it makes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "shufflenet", "resnet20")
BATCHES = {"resnet50": 1, "shufflenet": 1, "resnet20": 32}
TURNS = {"resnet50": 1, "shufflenet": 3, "resnet20": 7}  # short runs differ more
BOTH = ("numba", "NumPy")
RIVALS = ("MinMax", "Percentile", "Entropy")
OTHER_RIVALS = ("neural_compressor",)
Values = list[float | None]
Environment = dict[str, str]
ALL: Environment = {}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
PLAIN = {"OCTAV_CALIBRATE_PLAIN": "1"}
N_WEIGHTS = 72
MORE_IMAGES = 8
MANY_IMAGES = 32  # what outgrows one machine takes longer than starting


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    images: int = 128
    rival_images: int = 8
    rounds: int = 3
    n_values: int = 1 << 24
    tensors: int = N_WEIGHTS
    starts: int = 10
    sequences: int = 8
    every: int = 1
    image: int = 2048
    bound_mb: int = 3000


QUICK = Sizes(2, 2, 1, 1 << 18, 1, 1, 1, 1000, 64, 1000)


@dataclass(slots=True)
class Table:
    """Rows, printed as they are measured, and the figures behind them."""

    figures: dict[str, Any] = field(default_factory=dict)

    def heading(self, text: str, *columns: str) -> None:
        print(f"{text:<60}" + "".join(f"{column:>10}" for column in columns), flush=True)

    def row(self, what: str, key: str, values: Values) -> None:
        """A value with numba and one without, or one alone; ``key``: a name among the figures, or
        a group of them and a name."""
        cells = "".join(f"{'-' if v is None else f'{v:,.2f}':>10}" for v in values)
        print(f"  {what:<58}{cells}", flush=True)
        self._put(key, next(value for value in values if value is not None))
        if len(values) > 1:
            self._put(f"numpy/{key}", values[-1])

    def skip(self, what: str, reason: str) -> None:
        print(f"  {what}: {reason}", flush=True)
        self._put(f"skipped/{what}", reason)

    def _put(self, key: str, value: float | str | None) -> None:
        *groups, name = key.split("/")
        place = self.figures
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and where it is written."""

    sizes: Sizes
    models: dict[str, Path]
    table: Table

    def both(self, job: str, settings: dict[str, Any], threads: Environment = ALL) -> list[Any]:
        """The job's figures with numba, None where it is not installed, and without."""
        there = importlib.util.find_spec("numba") is not None
        compiled = run_job(job, settings, threads) if there else None
        return [compiled, run_job(job, settings, {**threads, **PLAIN})]

    def settings(self, name: str, images: int) -> dict[str, Any]:
        """A model and its images, a batch at least."""
        batch = BATCHES[name]
        return {"model": str(self.models[name]), "images": max(images, batch), "batch": batch}


def run_job(job: str, settings: dict[str, Any], environment: Environment) -> Any:
    """What `bench_jobs.py` prints, run in a process of its own."""
    script = Path(__file__).with_name("bench_jobs.py")
    command = [sys.executable, str(script), job, json.dumps(settings)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
    if done.returncode:
        raise SystemExit(f"bench_jobs.py {job} {settings}:\n{done.stderr}")
    return json.loads(done.stdout)


def each(found: list[Any], key: str) -> Values:
    return [None if figures is None else figures[key] for figures in found]


# --- sections ---------------------------------------------------------------------------------


def ratios(bench: Bench) -> None:
    for name in bench.models:
        settings = bench.settings(name, bench.sizes.images)
        images, batch = settings["images"], settings["batch"]
        found = bench.both("ratios", {**settings, "rounds": bench.sizes.rounds * TURNS[name]})
        bench.table.heading(f"{name}, {images} images, {batch} at a time", *BOTH)
        for figures in filter(None, found):
            figures["ratios"] = figures["ours_s"] / figures["plain_s"]
            figures["observed"] = figures["observed_s"] / figures["plain_s"]
            figures["exposed"] = figures["exposed_s"] / figures["plain_s"]
            figures["plain_ms"] = 1e3 * figures["plain_s"] / images
        for what, key in (
            ("observed, 28 thresholds of each tensor: inferences", "ratios"),
            ("observed alone: inferences", "observed"),
            ("activations read and left: inferences", "exposed"),
            ("plain inference: ms an image", "plain_ms"),
            ("model loaded, not counted above: s", "load_model_s"),
        ):
            bench.table.row(what, f"{key}/{name}", each(found, key))
        rivals(bench, name)


def rivals(bench: Bench, name: str) -> None:
    settings = bench.settings(name, bench.sizes.rival_images)
    found = run_job("rivals", {**settings, "rounds": min(3, bench.sizes.rounds)}, ALL)
    bench.table.heading(f"{name}, {settings['images']} images: inferences")
    for rival in RIVALS:
        ratio = found[rival] / found["plain_s"]
        bench.table.row(f"onnxruntime's {rival}", f"rivals/{name}/{rival}", [ratio])
    for package in OTHER_RIVALS:
        there = importlib.util.find_spec(package) is not None
        bench.table.skip(package, "installed, but not measured here" if there else "not installed")


def memory(bench: Bench) -> None:
    bench.table.heading("peak memory of observing", *BOTH)
    name = next((name for name in ("resnet20", "shufflenet") if name in bench.models), None)
    if name is None:
        bench.table.skip("memory", "needs resnet20 or shufflenet")
    else:
        few = bench.settings(name, bench.sizes.images)
        many = {**few, "images": MORE_IMAGES * few["images"]}
        found = [peaks(bench, settings) for settings in (few, many)]
        for settings, one in zip((few, many), found, strict=True):
            images = settings["images"]
            what = f"{name}, {images} images: MB"
            bench.table.row(what, f"memory_mb/{images}", each(one, "peak_mb"))
        for one, other in zip(*found, strict=True):
            if one is not None:
                other["ratio"] = other["peak_mb"] / one["peak_mb"]
                other["more"] = other["peak_mb"] - one["peak_mb"]
        bench.table.row("many beside few: ratio", "memory_ratio", each(found[1], "ratio"))
        bench.table.row("many beside few: MB more", "memory_more_mb", each(found[1], "more"))
    max_memory(bench)


def peaks(bench: Bench, settings: dict[str, Any]) -> list[Any]:
    """Medians of several processes: from one to the next, peaks differ by some MB."""
    turns = [bench.both("memory", settings) for _ in range(bench.sizes.rounds)]
    return [
        None if None in way else {"peak_mb": statistics.median(f["peak_mb"] for f in way)}
        for way in zip(*turns, strict=True)
    ]


def max_memory(bench: Bench) -> None:
    """An encoder-decoder for one large image, whose activations do not fit at once."""
    size, bound = bench.sizes.image, bench.sizes.bound_mb
    found = run_job("max_memory", {"size": size, "bound_mb": bound}, ALL)
    bench.table.heading(f"encoder-decoder, one image of {size} x {size}, at most {bound} MB")
    for what, key in (("all activations: MB", "activations_mb"), ("peak: MB", "peak_mb")):
        bench.table.row(what, f"max_memory/{key}", [found[key]])
    for note in found["note"]:
        print(f"  {note}")


def kernel(bench: Bench) -> None:
    bench.table.heading(
        f"counting {bench.sizes.n_values / 1e6:.1f} M values: ns each, one core", *BOTH
    )
    settings = {"n_values": bench.sizes.n_values, "rounds": bench.sizes.rounds}
    found = bench.both("kernel", settings, ONE_THREAD)
    for what, key in (("Gaussian", "gaussian"), ("Gaussian behind Relu", "half_zero")):
        bench.table.row(what, f"kernel_ns/{key}", each(found, key))


def weights(bench: Bench) -> None:
    found = bench.both("weights", {"tensors": bench.sizes.tensors}, ONE_THREAD)
    n_values = found[-1]["values"] / 1e6
    what = f"OCTAV, 2 to 8 bits, {n_values:.1f} M weights of BERT-Base: s"
    bench.table.heading(what, *BOTH)
    for what, key in (("per channel", "per_channel_s"), ("in blocks of 32", "blocked_s")):
        bench.table.row(what, f"weights/{key}", each(found, key))


def startup(bench: Bench) -> None:
    """Medians of starting the command and Python with what every start needs, in turn."""
    bench.table.heading("start-up")
    script = shutil.which("octav-calibrate", path=str(Path(sys.executable).parent))
    if script is None:
        bench.table.skip("octav-calibrate --help", "not installed beside this Python")
        return
    commands = {
        "help": [script, "--help"],
        "imports": [sys.executable, "-c", "import click, numpy"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(bench.sizes.starts + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - our own
            taken[name].append(time.perf_counter() - start)
    shown, imports = (statistics.median(taken[name][1:]) for name in commands)
    bench.table.row("octav-calibrate --help: s", "startup/help_s", [shown])
    bench.table.row("import click, numpy: s", "startup/imports_s", [imports])
    bench.table.row("ratio", "startup/ratio", [shown / imports])


def scaleout(bench: Bench) -> None:
    """Two workers of onnxruntime with one thread against one such worker."""
    bench.table.heading("scale-out, workers of one thread each")
    name = next((name for name in ("resnet20", "shufflenet") if name in bench.models), None)
    if name is None or importlib.util.find_spec("distributed") is None:
        bench.table.skip("two workers", "needs resnet20 or shufflenet, and the extra distributed")
        return
    settings = bench.settings(name, bench.sizes.images * MANY_IMAGES)
    found = run_job("scaleout", {**settings, "rounds": bench.sizes.rounds}, ALL)
    for workers in ("1", "2"):
        images = settings["images"]
        what = f"{name}, {images} images, {workers} at work: s"
        bench.table.row(what, f"scaleout/{workers}_s", [found[f"{workers}_s"]])
    bench.table.row("ratio", "scaleout/ratio", [found["1_s"] / found["2_s"]])


def table6(bench: Bench) -> None:
    settings = {"sequences": bench.sizes.sequences, "every": bench.sizes.every}
    found = run_job("table6", settings, ONE_THREAD)
    tensors, n_values = found["tensors"], found["values"] / 1e6
    bench.table.heading(f"{tensors:,} tensors of BERT-Base, {n_values:,.0f} M values, 4 to 8 bits")
    for what, key in (
        ("sweep of raw values, scaled from a part: s", "sweep_s"),
        ("OCTAV of raw values: s", "octav_s"),
        ("ours, counting included: s", "ours_s"),
        ("sweep beside ours: times", "sweep_over_ours"),
        ("OCTAV of raw values beside ours: times", "octav_over_ours"),
    ):
        bench.table.row(what, f"table6/{key}", [found[key]])


SECTIONS = {
    section.__name__: section
    for section in (ratios, memory, kernel, weights, startup, scaleout, table6)
}
