"""Composes random valid graphs and calibrates each, at 16 bits and at 2 to 8.

    python samples/fuzz_graphs.py [--n 2000] [--seed 0]
    python samples/fuzz_graphs.py --one SEED [--save DIR]

At 16 bits every output must be about as close to the float model's as one quantization step of
noise on the layers' inputs leaves it. At 2 to 8 bits what is written must pass `calib.verify`,
which compares every QDQ pair with NumPy. A graph that onnx.checker rejects, or on which the float
model is not finite, is discarded. The exit code is 0 only if no graph failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from corpus import execute
from corpus_cases import Feed
from fuzz_builder import BATCH, OPSETS, VOCABULARY, Array, Graph, Value
from fuzz_operators import BETWEEN, LAYERS
from fuzz_shapes import SHAPING
from isolation import Died, isolated
from onnx import TensorProto, helper, numpy_helper

from calib import CalibError, Rules, Run, Widths, calibrate_model
from calib.capture import Runtime
from calib.rules import Reduction

HALF = TensorProto.FLOAT16
LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STATUSES = ("passed", "refused", "discarded", "failed")
# The only refusals that a valid graph deserves. The second: an activation overflows and later
# operators hide it. The third: onnx's converter fails at an If in a graph of a low opset.
DESERVED = ("nothing to quantize", "the float model overflows on this data", "cannot be raised to")
GOOD_DB = 50.0
# What quantization may be worse than the worst of a few draws of noise.
MARGIN_DB = 10.0
N_DRAWS = 4
# Both levels of onnxruntime must agree at least so well on the float model.
SAME_DB = 80.0
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one graph, and why."""

    seed: int
    status: str
    message: str = ""


# --- building ---------------------------------------------------------------------------------


def build(seed: int) -> tuple[onnx.ModelProto, Sequence[Feed]]:
    """A graph and two feeds for it."""
    rng = np.random.default_rng(seed)
    opset = int(rng.integers(OPSETS.start, OPSETS.stop))
    dynamic, odd_names = rng.random(2) < (0.5, 0.4)
    g = Graph(rng, opset, bool(dynamic), bool(odd_names))
    _inputs(g)
    for _ in range(g.whole(2, 12)):
        recent = g.values[-3:]
        x = g.one_of(*(recent if g.chance(0.7) else g.values))
        group = g.one_of(LAYERS, LAYERS, LAYERS, BETWEEN, BETWEEN, BETWEEN, SHAPING, SHAPING)
        g.one_of(*group)(g, x)
    for _ in range(20):  # tries to find a value that some layer can read
        if any(node.op_type in LAYER_OPS for node in g.nodes):
            break
        g.one_of(*LAYERS)(g, g.one_of(*g.values))
    _outputs(g)
    return g.model(), g.feeds


def _inputs(g: Graph) -> None:
    for _ in range(g.one_of(1, 1, 1, 2, 3)):
        rank = g.one_of(2, 3, 4, 4, 5)
        channels = g.whole(1, {2: 8, 3: 6, 4: 5, 5: 3}[rank])
        spatial = [g.whole(2, {3: 8, 4: 6, 5: 4}[rank]) for _ in range(rank - 2)]
        g.float_input((BATCH, channels, *spatial))
    if g.chance(0.3):
        arrays = [g.rng.integers(0, VOCABULARY, (BATCH, 4)) for _ in g.feeds]
        g.ids = Value(g.input("ids", arrays), (BATCH, 4))


def _outputs(g: Graph) -> None:
    """What nothing reads, or only the last; at times an inner tensor, an input, a constant."""
    read = {name for node in g.nodes for name in node.input}
    fed = {info.name for info in g.inputs}
    made = [v for v in g.values if v.name not in fed]
    ends = [v for v in made if v.name not in read] or made[-1:]
    for value in ends if g.chance(0.6) else ends[-1:]:
        g.output(value)
    if made and g.chance(0.3):
        g.output(g.one_of(*made))
    if g.chance(0.05) or not g.outputs:
        g.output(g.values[0])
    if g.ids is not None and g.chance(0.1):
        g.output(g.ids, TensorProto.INT64)
    if g.chance(0.1):
        g.initializer(g.array((2, 2)), "unused")
    if g.chance(0.03):
        constant = g.array((2,))
        g.output(Value(g.initializer(constant, "answer"), constant.shape))


# --- judging ----------------------------------------------------------------------------------


def judge(seed: int, folder: Path) -> Verdict:
    """Builds, checks and calibrates the graph of ``seed`` in ``folder``."""
    model, feeds = build(seed)
    path = folder / f"fuzz{seed}.onnx"
    onnx.save(model, path)
    if reason := _invalid(path, feeds):
        return Verdict(seed, "discarded", reason)
    rng = np.random.default_rng((seed, 1))
    for rules in (Rules(widths=Widths(16, 16, 16)), _random_rules(rng)):
        widths = rules.widths
        target = path.with_name(f"{path.stem}-w{widths.weights}a{widths.activations}.onnx")
        try:
            calibrate_model(path, feeds, rules, target, Run(runtime=Runtime(threads=1), force=True))
        except CalibError as error:
            message = f"{type(error).__name__} with {_said(rules)}: {error}"
            deserved = "\n" not in message and any(text in message for text in DESERVED)
            return Verdict(seed, "refused" if deserved else "failed", message)
        if widths.weights == 16 and (reason := _far(path, target, feeds)):
            return Verdict(seed, "failed", reason)
    return Verdict(seed, "passed")


def _random_rules(rng: np.random.Generator) -> Rules:
    weights, activations, edge = map(int, rng.integers(2, 9, 3))
    return Rules(
        widths=Widths(weights, activations, edge),
        method=str(rng.choice(["octav", "octav", "max", "mse:20", "percentile:99", "entropy:64"])),
        weight_granularity=str(rng.choice(["per-channel", "per-channel", "per-tensor"])),
        reduction=Reduction("mean" if rng.random() < 0.3 else "pool", 2),
        activations=str(rng.choice(["symmetric", "asymmetric", "auto"])),
    )


def _said(rules: Rules) -> str:
    widths = f"w{rules.widths.weights}a{rules.widths.activations}e{rules.widths.edge}"
    return (
        f"{widths} {rules.method} {rules.weight_granularity} {rules.reduction.name} "
        f"{rules.activations}"
    )


def _invalid(path: Path, feeds: Sequence[Feed]) -> str:
    """Why the float model is no fair test; empty if it is one."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return f"onnx.checker: {str(error).strip().splitlines()[0]}"
    for feed in feeds:
        try:
            plain, optimized = (execute(path, feed, optimized=level) for level in (False, True))
        except Exception as error:
            return f"onnxruntime: {' '.join(str(error).split())}"
        if not all(np.isfinite(a).all() for a in plain.values() if a.dtype.kind == "f"):
            return "the outputs are not finite"
        if any(sqnr_db(plain[name], optimized[name]) < SAME_DB for name in plain):
            return "onnxruntime's levels differ on the float model"
    return ""


def _far(path: Path, target: Path, feeds: Sequence[Feed]) -> str:
    """Which output is too far from the float model's; empty if none is.

    A cancellation, or a division by a small number, amplifies errors without end, and what is as
    small as the smallest float32 has no digits to lose. So the measure is the float model with
    noise of one 16-bit step on all that is quantized, where that leaves less than 50 dB. The step
    is that of both feeds together, as an If may make one much larger than the other.
    """
    feed = feeds[0]
    expected = execute(path, feed, optimized=False)
    draws: list[Feed] = []
    for level in (False, True):
        actual = execute(target, feed, optimized=level)
        for name, reference in expected.items():
            if (found := sqnr_db(reference, actual[name])) >= GOOD_DB:
                continue
            draws = draws or [
                execute(_with_noise(path, feeds, draw), feed, optimized=False)
                for draw in range(N_DRAWS)
            ]
            noise = min(sqnr_db(reference, noisy[name]) for noisy in draws)
            if found < noise - MARGIN_DB:
                return f"16 bits: {found:.1f} dB in output {name!r}, with noise {noise:.1f} dB"
    return ""


def sqnr_db(reference: Array, other: Array) -> float:
    """0 for integers that differ; at most 999."""
    if np.array_equal(reference, other):
        return 999.0
    if reference.dtype.kind != "f":
        return 0.0
    exact = reference.astype(np.float64)
    noise = np.square(exact - other).sum()
    return float(10 * np.log10(max(np.square(exact).sum(), 1e-300) / max(noise, 1e-300)))


def _with_noise(path: Path, feeds: Sequence[Feed], draw: int) -> Path:
    """The model with uniform noise of a 16-bit step added to both inputs of its layers.

    A float16 gets noise of one of its own steps, wherever one is made: onnxruntime leaves out the
    rounding to float16 and back where nothing stands between, and a QDQ pair may.
    """
    model = onnx.inliner.inline_local_functions(onnx.load(path))
    graph = model.graph
    layers = [node for node in graph.node if node.op_type in LAYER_OPS]
    halves = [n.output[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == HALF]
    names = list(dict.fromkeys([*(name for n in layers for name in n.input[:2]), *halves]))
    del graph.output[:]
    graph.output.extend(map(helper.make_empty_tensor_value_info, names))
    onnx.save(model, probe := path.with_name("probe.onnx"))
    rng = np.random.default_rng(draw)
    seen = [execute(probe, feed, optimized=False) for feed in feeds]
    for name in names:
        step = max(float(np.abs(values[name]).max(initial=0)) for values in seen) / 32767
        values = seen[0][name]
        if values.dtype == np.float16:
            step = max(2.0**-23, step * 32)  # twice the smallest number, and 10 of 15 bits
        noise = (step * rng.uniform(-0.5, 0.5, values.shape)).astype(values.dtype)
        graph.initializer.append(numpy_helper.from_array(noise, f"{name}~noise"))
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name in halves or (at < 2 and name in names and node.op_type in LAYER_OPS):
                node.input[at] = f"{name}~noisy"
    noisy = {n: helper.make_node("Add", [n, f"{n}~noise"], [f"{n}~noisy"]) for n in names}
    nodes = [*(noisy[n] for n in names if n not in _made(graph))]
    for node in graph.node:
        nodes += [node, *(noisy[name] for name in node.output if name in noisy)]
    original = onnx.load(path).graph.output
    for field, items in ((graph.node, nodes), (graph.output, original)):
        kept = list(items)
        del field[:]
        field.extend(kept)
    onnx.save(model, probe)
    return probe


def _made(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output}


# --- many seeds -------------------------------------------------------------------------------


def verdict(seed: int) -> Verdict:
    """As `judge`, in a child process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = isolated(partial(judge, seed, Path(folder)), SECONDS)
    return Verdict(seed, "failed", result.reason) if isinstance(result, Died) else result


def report(verdicts: Sequence[Verdict]) -> None:
    """Prints counts, reasons, and every seed that failed."""
    for status in STATUSES:
        print(f"{status:10}{sum(v.status == status for v in verdicts):>7}")
    for status in ("refused", "discarded"):
        reasons = Counter(
            re.sub(r"'[^']*'|\S*\d+\S*|/\S+", "#", v.message)[:150]
            for v in verdicts
            if v.status == status
        )
        print(f"\n{status}:")
        for reason, count in reasons.most_common(12):
            print(f"{count:5}  {reason}")
    print("\nfailed:")
    for v in verdicts:
        if v.status == "failed":
            print(f"  --one {v.seed}: {v.message}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="how many graphs (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first graph (0)")
    parser.add_argument("--one", type=int, help="only this seed, in this process")
    parser.add_argument("--save", type=Path, help="with --one: keep the models in this folder")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no graph after that")
    chosen = parser.parse_args(arguments)
    if chosen.one is not None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = chosen.save or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            verdicts = [judge(chosen.one, folder)]
    else:
        verdicts, start = [], time.monotonic()
        for seed in range(chosen.seed, chosen.seed + chosen.n):
            if time.monotonic() - start > chosen.seconds:
                break
            verdicts.append(verdict(seed))
    report(verdicts)
    return int(any(v.status == "failed" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
