"""OCTAV against the sweep on tensors shaped as BERT-Base's (OCTAV, table 6), and from counters.

    OMP_NUM_THREADS=1 python samples/paper_table6.py
    python samples/paper_table6.py --sequences 1 --every 100         quick, of a part of the tensors

74 weights: in each of 12 layers query, key, value and attention output 768 x 768, 3072 x 768 and
768 x 3072; the pooler 768 x 768 and the answers' 2 x 768. 1,220 activations: 10 batches of 122, the
inputs of those 74 layers and both operands of two products of matrices in each layer. Values are
random: layer normalisation's and weights' with heavy tails, GELU's, softmax's.

Three ways to the thresholds of all tensors at 4 to 8 bits, per tensor, on the grid that is written:

  octav   the paper's 10 updates, each a pass over the raw values, in NumPy
  sweep   100 thresholds, each quantized and compared with the raw values, in NumPy; of every 20th
          tensor of a shape, and scaled to all of them
  ours    the values counted once, then OCTAV from the counts

Times are of the process, counting included, making the values excluded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calib import Histogram, QuantType
from calib.calibrators import make
from calib.counter import Counter

WIDTHS = (4, 5, 6, 7, 8)
LAYERS, HEADS, HIDDEN, INNER, ANSWERS = 12, 12, 768, 3072, 2
N_BATCHES = 10
N_UPDATES = 10
N_POINTS = 100

Values = NDArray[np.float32]
Answer = TypeVar("Answer")
Thresholds = list[float]


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a tensor holds, its shape, and the seed of its values."""

    kind: str
    shape: tuple[int, ...]
    seed: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def values(self) -> Values:
        rng = np.random.default_rng(self.seed)
        return MAKERS[self.kind](rng, self.shape)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Gaussian in each channel, the scales of the channels log-normal."""
    scale = np.exp(0.5 * rng.standard_normal(shape[-1], np.float32))
    return np.asarray(rng.standard_normal(shape, np.float32) * scale)


def gelu(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    x = heavy_tailed(rng, shape)
    inner = np.float32(0.79788456) * (x + np.float32(0.044715) * x**3)
    return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)


def softmax(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    powers = np.exp(2 * rng.standard_normal(shape, np.float32))
    return np.asarray(powers / powers.sum(-1, keepdims=True), np.float32)


MAKERS = {"weight": heavy_tailed, "normed": heavy_tailed, "gelu": gelu, "softmax": softmax}


def weights() -> list[Tensor]:
    layer = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN), (HIDDEN, INNER)]
    shapes = [*layer * LAYERS, (HIDDEN, HIDDEN), (ANSWERS, HIDDEN)]
    return [Tensor("weight", shape, seed) for seed, shape in enumerate(shapes)]


def activations(sequences: int, length: int) -> list[Tensor]:
    """Those of batches of ``sequences`` sequences of ``length`` tokens."""
    hidden = ("normed", (sequences, length, HIDDEN))
    head = ("normed", (sequences, HEADS, length, HIDDEN // HEADS))
    attended = ("softmax", (sequences, HEADS, length, length))
    inner = ("gelu", (sequences, length, INNER))
    layer = [hidden] * 5 + [inner, head, head, attended, head]
    one_batch = [*layer * LAYERS, ("normed", (sequences, HIDDEN)), hidden]
    return [Tensor(*what, 1000 + seed) for seed, what in enumerate(one_batch * N_BATCHES)]


# --- three ways -------------------------------------------------------------------------------


def grids(values: Values) -> list[QuantType]:
    signed = bool(values.min() < 0)
    return [QuantType(bits, signed=signed) for bits in WIDTHS]


def octav(values: Values) -> Thresholds:
    return [octav_at(values, qtype) for qtype in grids(values)]


def octav_at(values: Values, qtype: QuantType) -> float:
    magnitude = np.abs(values)
    n_nonzero = np.count_nonzero(magnitude)
    s = float(magnitude.sum(dtype=np.float64)) / n_nonzero
    for _ in range(N_UPDATES):
        clipped = magnitude[magnitude > s]
        if not clipped.size:
            return float(magnitude.max())
        inside = qtype.rounding_noise * (n_nonzero - clipped.size)
        s = float(clipped.sum(dtype=np.float64)) / (inside + clipped.size)
    return s


def sweep(values: Values) -> Thresholds:
    return [sweep_at(values, qtype) for qtype in grids(values)]


def sweep_at(values: Values, qtype: QuantType) -> float:
    candidates = np.abs(values).max() * np.arange(1, N_POINTS + 1, dtype=np.float32) / N_POINTS
    errors = [error(values, float(threshold), qtype) for threshold in candidates]
    return float(candidates[np.argmin(errors)])


def error(values: Values, threshold: float, qtype: QuantType) -> float:
    """The mean squared error of quantizing ``values`` with ``threshold``."""
    scale = np.float32(threshold / qtype.steps)
    quantized = np.clip(np.rint(values / scale), qtype.qmin, qtype.qmax) * scale
    return float(np.mean(np.square(quantized - values)))


def ours(values: Values) -> Thresholds:
    counter = Counter()
    counter.update(values)
    dist = Histogram(counter)
    method = make("octav")
    return [float(method(dist, QuantType(bits, signed=dist.has_negative))[0]) for bits in WIDTHS]


# --- measuring --------------------------------------------------------------------------------


@dataclass(slots=True)
class Totals:
    """Seconds of all tensors; at each width the relative differences between our thresholds and
    the others', and between their errors and the sweep's."""

    n_tensors: int = 0
    n_values: int = 0
    octav_s: float = 0.0
    sweep_s: float = 0.0
    ours_s: float = 0.0
    n_swept: int = 0
    from_octav: list[NDArray[np.float64]] = field(default_factory=list)
    from_sweep: list[NDArray[np.float64]] = field(default_factory=list)
    error_above: list[NDArray[np.float64]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        return {
            "tensors": self.n_tensors,
            "values": self.n_values,
            "octav_s": self.octav_s,
            "sweep_s": self.sweep_s,
            "ours_s": self.ours_s,
            "sweep_over_octav": self.sweep_s / self.octav_s,
            "sweep_over_ours": self.sweep_s / self.ours_s,
            "octav_over_ours": self.octav_s / self.ours_s,
        }


def timed(way: Callable[[Values], Answer], values: Values) -> tuple[float, Answer]:
    start = time.process_time()
    answer = way(values)
    return time.process_time() - start, answer


def difference(one: Thresholds, other: Thresholds) -> NDArray[np.float64]:
    return np.asarray(np.abs(np.array(one) / np.array(other) - 1))


def errors(values: Values, thresholds: Thresholds) -> NDArray[np.float64]:
    pairs = zip(thresholds, grids(values), strict=True)
    return np.array([error(values, threshold, qtype) for threshold, qtype in pairs])


def by_shape(tensors: list[Tensor], every: int) -> Iterator[list[Tensor]]:
    """Every ``every``-th tensor of each kind and shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.kind, tensor.shape), []).append(tensor)
    return (group[::every] for group in groups.values())


def measure(tensors: list[Tensor], every: int = 1, sweep_every: int = 20) -> Totals:
    """Times on every ``every``-th tensor of each shape; the sweep on every ``sweep_every``-th of
    those, scaled to them all."""
    ours(tensors[0].values())  # compiles where numba is there
    totals = Totals()
    for taken in by_shape(tensors, every):
        swept_s = []
        for number, tensor in enumerate(taken):
            values = tensor.values()
            took, found = timed(ours, values)
            totals.ours_s += took
            took, raw = timed(octav, values)
            totals.octav_s += took
            totals.from_octav.append(difference(found, raw))
            if number % sweep_every == 0:
                took, best = timed(sweep, values)
                swept_s.append(took)
                totals.from_sweep.append(difference(found, best))
                totals.error_above.append(errors(values, found) / errors(values, best) - 1)
        totals.sweep_s += sum(swept_s) * len(taken) / len(swept_s)
        totals.n_swept += len(swept_s)
        totals.n_tensors += len(taken)
        totals.n_values += sum(tensor.size for tensor in taken)
    return totals


def show(totals: Totals) -> None:
    figures = totals.figures()
    print(f"{totals.n_tensors:,} tensors, {totals.n_values / 1e6:,.0f} M values, 4 to 8 bits")
    print(f"{'seconds of':<34}{'total':>10}{'per value':>12}{'sweep is':>10}")
    swept = f"sweep ({totals.n_swept} tensors, scaled)"
    for way, seconds in (
        (swept, totals.sweep_s),
        ("octav, raw values", totals.octav_s),
        ("ours, counting included", totals.ours_s),
    ):
        ns, times = 1e9 * seconds / totals.n_values, totals.sweep_s / seconds
        print(f"  {way:<32}{seconds:>8.2f} s{ns:>9.1f} ns{times:>9.1f}x")
    print(f"octav on raw values is {figures['octav_over_ours']:.1f}x ours\n")
    print("ours, in percent" + " " * 21 + "".join(f"{f'B={b}':>9}" for b in WIDTHS))
    for what, found in (
        ("threshold beside octav's", totals.from_octav),
        ("threshold beside the sweep's", totals.from_sweep),
        ("error above the sweep's", totals.error_above),
    ):
        for name, row in (("median", np.median(found, 0)), ("most", np.max(found, 0))):
            print(f"  {f'{what}, {name}':<35}" + "".join(f"{100 * x:>9.3f}" for x in row))


def main() -> None:
    parser = argparse.ArgumentParser(description="OCTAV against the sweep on BERT-Base's shapes.")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="in a batch")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="of a sequence")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="tensor of a shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    arguments = parser.parse_args()
    tensors = [*weights(), *activations(arguments.sequences, arguments.length)]
    totals = measure(tensors, arguments.every)
    show(totals)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(totals.figures(), indent=2) + "\n")


if __name__ == "__main__":
    main()
