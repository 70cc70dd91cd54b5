"""Max, percentile, MSE sweep and entropy, each against its definition in plain NumPy or loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.calibrators.entropy import Entropy
from calib.calibrators.max import Max
from calib.calibrators.mse import Mse
from calib.calibrators.percentile import Percentile
from calib.distribution import Floats, Samples
from calib.errors import OptionError
from calib.granularity import PerChannel
from calib.qtypes import WIDTHS, QuantType
from calib.quantize import fake_quantize, scale_from_threshold

Values = NDArray[np.float32]

by_property = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=repr)
INT4 = QuantType(4, signed=True)
groups_of_values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-9, 9, width=32),
)


def rows(n: int = 400) -> Values:
    """Gaussian, heavy-tailed, nine in ten zero, and all zero."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, n))
    values[1] **= 3
    values[2] *= rng.random(n) < 0.1
    values[3] = 0
    return values.astype(np.float32)


# --- max and percentile -------------------------------------------------------------------------


@grids
def test_max_is_the_largest_magnitude_of_each_group(qtype: QuantType) -> None:
    assert np.array_equal(Max()(Samples(rows()), qtype), np.abs(rows()).max(axis=1))


@by_property
@given(groups_of_values, st.floats(1.001, 100), st.sampled_from(GRIDS))
def test_a_percentile_is_numpys_of_the_magnitudes_zeros_included(
    values: Values, percentile: float, qtype: QuantType
) -> None:
    n = values.shape[1]
    rank = max(1, math.ceil(percentile / 100 * n - 1e-9))
    expected = np.sort(np.abs(values), axis=1)[:, rank - 1]
    assert np.array_equal(Percentile(percentile)(Samples(values), qtype), expected)
    numpys = np.quantile(np.abs(values), (rank - 0.5) / n, axis=1, method="inverted_cdf")
    assert np.array_equal(expected, numpys)


def test_the_fields_percentiles_leave_out_the_values_they_say() -> None:
    dist = Samples(np.arange(1, 100_001, dtype=np.float32)[None])
    for percentile, above in ((99.9, 100), (99.99, 10), (99.999, 1), (100, 0)):
        threshold = Percentile(percentile)(dist, INT4)
        assert dist.tail(threshold).count == above


# --- mse ----------------------------------------------------------------------------------------


def written_error(values: Values, t: Floats, qtype: QuantType) -> Floats:
    scale = scale_from_threshold(t, qtype)
    back = fake_quantize(values, scale, qtype, PerChannel(0)).astype(np.float64)
    return np.asarray(((back - values) ** 2).mean(axis=1))


@grids
@pytest.mark.parametrize("points", [1, 7, 100])
def test_mse_is_the_best_of_its_candidates_for_each_group_by_itself(
    qtype: QuantType, points: int
) -> None:
    values = rows()
    largest = np.abs(values).max(axis=1).astype(np.float64)
    candidates = [k / points * largest for k in range(1, points + 1)]
    errors = np.stack([written_error(values, t, qtype) for t in candidates])
    found = Mse(points)(Samples(values), qtype)
    index = np.rint(found[:3] / largest[:3] * points).astype(int) - 1
    assert np.allclose(found[:3], (index + 1) / points * largest[:3], rtol=1e-12, atol=0)
    chosen = errors[index, np.arange(3)]
    assert np.allclose(chosen, errors[:, :3].min(axis=0), rtol=1e-5, atol=0)
    assert found[3] == 0


def test_of_equal_errors_mse_takes_the_smallest_threshold() -> None:
    """Negative values are all 0 on an unsigned grid, whatever its threshold."""
    dist = Samples(np.array([[-1.0, -2.0, -4.0]], np.float32))
    assert Mse(8)(dist, QuantType(4, signed=False)).tolist() == [0.5]


@pytest.mark.parametrize("exponent", [-100, -70, 40, 100])
def test_mse_finds_the_same_threshold_in_any_unit(exponent: int) -> None:
    values = rows()[:3]
    expected = Mse()(Samples(values), QuantType(2, signed=True)) * 2.0**exponent
    found = Mse()(Samples(np.ldexp(values, exponent)), QuantType(2, signed=True))
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


# --- entropy ------------------------------------------------------------------------------------


def literal_divergence(histogram: list[int], n: int, levels: int) -> float:
    """Of the first ``n`` bins with the rest folded into the last, from their ``levels`` means."""
    kept = histogram[:n]
    folded = [*kept[:-1], kept[-1] + sum(histogram[n:])]
    spread = [0.0] * n
    for level in range(levels):
        mine = [j for j in range(n) if j * levels // n == level]
        occupied = [j for j in mine if kept[j] > 0]
        for j in occupied:
            spread[j] = sum(kept[i] for i in mine) / len(occupied)
    total, total_spread = max(sum(folded), 1), max(sum(spread), 1)
    loss = 0.0
    for count, mean in zip(folded, spread, strict=True):
        if count:
            p, q = count / total, max(mean / total_spread, 1e-10)
            loss += p * math.log(p / q)
    return loss


def literal_entropy(values: Values, bins: int, levels: int) -> float:
    magnitude = [abs(float(v)) for v in values]
    largest = max(magnitude)
    edges = [k / bins * largest for k in range(bins)] + [largest]
    histogram = [sum(low < m <= high for m in magnitude) for low, high in pairwise(edges)]
    losses = {n: literal_divergence(histogram, n, levels) for n in range(levels, bins + 1)}
    least = min(losses.values())
    return edges[next(n for n, loss in losses.items() if loss <= least + 1e-12)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("bins", [40, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_entropy_is_its_definition_in_plain_loops(bits: int, bins: int, signed: bool) -> None:
    qtype = QuantType(bits, signed)
    values = rows() if signed else np.abs(rows())
    found = Entropy(bins)(Samples(values), qtype)
    expected = [literal_entropy(row, bins, levels=qtype.qmax + 1) for row in values]
    assert np.allclose(found, expected, rtol=1e-12, atol=0)
    assert found[3] == 0


def test_entropy_uses_no_more_bins_than_there_are_values() -> None:
    values, qtype = rows(50), QuantType(4, signed=True)
    many, fifty = Entropy(2048)(Samples(values), qtype), Entropy(50)(Samples(values), qtype)
    assert np.array_equal(many, fifty)


def test_entropy_clips_an_outlier() -> None:
    values = np.random.default_rng(1).standard_normal((1, 20_000)).astype(np.float32)
    values[0, 7] = 40
    threshold = Entropy()(Samples(values), QuantType(8, signed=True))[0]
    assert 2 < threshold < 6


@pytest.mark.parametrize("bins", [2, 100, 128])
def test_entropy_with_no_more_bins_than_levels_is_the_maximum(bins: int) -> None:
    values = rows()
    found = Entropy(bins)(Samples(values), QuantType(8, signed=True))
    assert np.array_equal(found, np.abs(values).max(axis=1))
    clipped = Entropy(129)(Samples(values), QuantType(8, signed=True))
    assert (clipped <= found).all()
    assert (clipped < found).any()


@pytest.mark.parametrize("percentile", [-1.0, 0.0, 0.9999, 1.0, 100.1, math.nan, math.inf])
def test_a_percentile_that_is_a_fraction_or_above_100_is_refused(percentile: float) -> None:
    with pytest.raises(OptionError) as caught:
        Percentile(percentile)
    assert str(caught.value) == (
        f"percentile must be above 1 and at most 100, got {percentile}: it is in percent, "
        f"99.99 keeps all but one value in 10,000"
    )


@pytest.mark.parametrize("number", [-5, 0])
def test_mse_and_entropy_need_candidates(number: int) -> None:
    with pytest.raises(OptionError, match=f"^mse: points must be at least 1, got {number}$"):
        Mse(number)
    with pytest.raises(OptionError, match=f"^entropy: bins must be at least 2, got {number}$"):
        Entropy(number)
