"""Signed queries: every distribution answers as brute force on the values does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.counter import Counter
from calib.distribution import Distribution, Histogram, Samples

RNG = np.random.default_rng(3)


def bfloat16(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Values that a counter keeps exactly."""
    return (np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


DATA = {
    "Gaussian": bfloat16(RNG.standard_normal((2, 500))),
    "shifted": bfloat16(RNG.standard_normal((2, 500)) + 2),
    "half zero": bfloat16(np.maximum(RNG.standard_normal((2, 500)), 0)),
    "negative": bfloat16(-np.abs(RNG.standard_normal((2, 500)))),
    "few magnitudes": bfloat16(RNG.choice([-2.0, -0.0, 0.0, 0.5], (2, 500))),
    "one value": bfloat16(np.full((2, 1), -3.0)),
    "zeros of either sign": np.array([[0.0, -0.0], [-0.0, 0.0]], np.float32),
}


def samples(values: NDArray[np.float32]) -> Distribution:
    return Samples(values)


def counted_samples(values: NDArray[np.float32]) -> Distribution:
    rows = [np.unique(row, return_counts=True) for row in values]
    width = max(row.size for row, _ in rows)
    padded = [np.pad(row, (0, width - row.size), mode="edge") for row, _ in rows]
    counts = [np.pad(times, (0, width - times.size)) for _, times in rows]
    return Samples(np.stack(padded), np.stack(counts).astype(np.int64))


def histogram(values: NDArray[np.float32]) -> Distribution:
    counters = [Counter() for _ in values]
    for counter, row in zip(counters, values, strict=True):
        counter.update(row)
    return Histogram(*counters)


def on_torch(values: NDArray[np.float32]) -> Distribution:
    torch = pytest.importorskip("torch")
    from calib.qat.distribution import TensorSamples

    return TensorSamples(torch.from_numpy(values))


every_kind = pytest.mark.parametrize("make", [samples, counted_samples, histogram, on_torch])
all_data = pytest.mark.parametrize("values", DATA.values(), ids=DATA)


@every_kind
@all_data
def test_extremes_are_the_smallest_and_the_largest_value(make, values) -> None:  # type: ignore[no-untyped-def]
    low, high = make(values).extremes()
    assert np.array_equal(low, values.min(axis=1))
    assert np.array_equal(high, values.max(axis=1))


@every_kind
@all_data
@pytest.mark.parametrize("q", [0.001, 0.05, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_a_signed_quantile_is_the_smallest_value_that_so_many_do_not_exceed(  # type: ignore[no-untyped-def]
    make, values, q
) -> None:
    expected = np.quantile(values, q, axis=1, method="inverted_cdf")
    assert np.array_equal(make(values).signed_quantile(q), expected)


@every_kind
@all_data
def test_tails_are_counts_and_sums_of_what_lies_strictly_beyond(make, values) -> None:  # type: ignore[no-untyped-def]
    dist = make(values)
    for low, high in ((-0.75, 0.5), (0.0, 0.0), (-2.0, 0.5), (-9.0, 9.0), (0.5, 1.0)):
        below, above = dist.tails(np.full(2, low), np.full(2, high))
        for tail, mask in ((below, values < low), (above, values > high)):
            assert np.array_equal(tail.count, mask.sum(axis=1))
            expected = np.where(mask, values, 0).sum(axis=1, dtype=np.float64)
            assert np.allclose(tail.sum, expected, rtol=1e-6)
