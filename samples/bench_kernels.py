"""The kernels' speed with a history: counting, the sweep and OCTAV.

    pytest samples/bench_kernels.py --benchmark-autosave
    pytest samples/bench_kernels.py --benchmark-compare              beside the last one saved
    OCTAV_CALIBRATE_PLAIN=1 pytest samples/bench_kernels.py          without numba

pytest-benchmark keeps the runs in .benchmarks, apart for each machine. No time is asserted; that
the kernels compute something is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calib import Distribution, Histogram, QuantType, Samples
from calib.calibrators import make
from calib.counter import Counter

N_VALUES = 1 << 20
WIDTHS = range(2, 9)

Benchmark = Callable[..., Any]
Values = NDArray[np.floating]


def gaussian() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(N_VALUES, np.float32)


DATA: dict[str, Callable[[], Values]] = {
    "gaussian": gaussian,
    "half_zero": lambda: np.maximum(gaussian(), 0),
    "float16": lambda: gaussian().astype(np.float16),
}


def counted(values: Values) -> Counter:
    counter = Counter()
    counter.update(values)
    return counter


def at_all_widths(method: str, dist: Distribution) -> list[float]:
    """The first group's threshold at each width."""
    calibrator = make(method)
    signed = dist.has_negative
    return [float(calibrator(dist, QuantType(bits, signed=signed))[0]) for bits in WIDTHS]


@pytest.mark.parametrize("data", DATA)
def test_counting_a_million_values(benchmark: Benchmark, data: str) -> None:
    counter = benchmark(counted, DATA[data]())
    assert counter.n_finite == N_VALUES


@pytest.mark.parametrize("data", ["gaussian", "half_zero"])
@pytest.mark.parametrize("method", ["octav", "mse"])
def test_thresholds_from_counts(benchmark: Benchmark, method: str, data: str) -> None:
    counter = counted(DATA[data]())
    found = benchmark(lambda: at_all_widths(method, Histogram(counter)))
    assert found == sorted(found)


@pytest.mark.parametrize("length", [32, 1024])
def test_octav_of_raw_weights(benchmark: Benchmark, length: int) -> None:
    groups = gaussian().reshape(-1, length)
    found = benchmark(lambda: at_all_widths("octav", Samples(groups)))
    assert found == sorted(found)
