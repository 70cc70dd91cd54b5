"""Statistics of torch tensors against those of NumPy, and that nothing but vectors leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from calib.calibrators import Calibrator, make
from calib.calibrators import thresholds as made_safe
from calib.distribution import Distribution, Floats, Samples
from calib.graph import Kind
from calib.qat import observing
from calib.qat.distribution import TensorSamples
from calib.qat.quantizer import Quantizer, TensorSettings
from calib.qtypes import WIDTHS, QuantType
from calib.testing import CALIBRATOR_CHECKS

Values = NDArray[np.float32]

by_property = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
torch.set_num_threads(1)  # of tensors this small, on machines this busy: many times faster

GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=lambda q: f"{q}{'-narrow' * q.narrow}")
SPECS = ("octav", "octav:paper", "octav:paper,iterations=10", "percentile:99", "mse", "max")

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.75]) | st.floats(-9, 9, width=32)
normal = few_values.filter(lambda value: value == 0 or abs(value) > 1e-15)
groups_of_values = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=normal
)


def both(values: Values) -> tuple[TensorSamples, Samples]:
    return TensorSamples(torch.from_numpy(values.copy())), Samples(values)


def same(found: Floats, expected: Floats, rtol: float = 1e-6) -> None:
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=rtol, atol=0), (found, expected)


def nearly(found: Floats, expected: Floats) -> None:
    """As `same`, of errors, in which the rounding of thresholds to float32 shows."""
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=5e-5, atol=1e-11), (found, expected)


@cache
def rows() -> Values:
    """Six groups: Gaussian, heavy-tailed, half zero, rectified, constant, and all zero."""
    values = np.random.default_rng(1).standard_normal((6, 801))
    values[1] **= 3
    values[2] *= np.random.default_rng(2).random(801) < 0.5
    values[3] = np.maximum(values[3], 0)
    values[4:] = [[-0.7], [0.0]]
    found = values.astype(np.float32)
    found.setflags(write=False)
    return found


# --- every question of the protocol -------------------------------------------------------------


@by_property
@given(groups_of_values, st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_one_number_a_group_is_that_of_numpy(values: Values, q: float) -> None:
    mine, numpy = both(values)
    assert mine.groups == numpy.groups
    assert mine.has_negative == numpy.has_negative
    for name in ("count", "max_abs", "mean_abs", "rms"):
        same(getattr(mine, name)(), getattr(numpy, name)())
    assert np.array_equal(mine.max_abs(), numpy.max_abs())
    assert np.array_equal(mine.quantile(q), numpy.quantile(q))


@by_property
@given(groups_of_values, st.data())
def test_tails_and_errors_take_thresholds_of_any_leading_shape(
    values: Values, data: st.DataObject
) -> None:
    mine, numpy = both(values)
    leading = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    on_a_value = st.sampled_from(np.abs(values).ravel().tolist())
    limit = st.floats(0.0625, 10, width=32) | on_a_value | st.just(0.0)
    t = data.draw(hnp.arrays(np.float64, (*leading, values.shape[0]), elements=limit))
    found, expected = mine.tail(t), numpy.tail(t)
    assert np.array_equal(found.count, expected.count)
    assert found.count.shape == t.shape
    same(found.sum, expected.sum)
    qtype = data.draw(st.sampled_from(GRIDS))
    nearly(mine.mse(t, qtype), numpy.mse(t, qtype))
    assert mine.mse(t, qtype).shape == t.shape


@grids
def test_errors_are_those_of_the_written_pair(qtype: QuantType) -> None:
    mine, numpy = both(rows())
    t = np.array([0.03, 0.3, 0.71, 2.9, 30.0])[:, None] * np.ones(6)
    nearly(mine.mse(t, qtype), numpy.mse(t, qtype))
    for alone in range(6):
        one, other = both(rows()[alone : alone + 1])
        nearly(one.mse(t[:, :1], qtype), other.mse(t[:, :1], qtype))


@pytest.mark.parametrize("n", [10, 100, 1000, 99_990])
def test_a_quantile_that_falls_on_a_rank_is_that_rank(n: int) -> None:
    dist = TensorSamples(torch.randperm(n)[None] + 1.0)
    for per_mille in (1, 70, 100, 140, 290, 550, 580, 999, 1000):
        assert dist.quantile(per_mille / 1000)[0] == -(-n * per_mille // 1000)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_value_that_stands_for_many_counts_as_many(groups: int) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((groups, 40)).astype(np.float32)
    counts = rng.integers(1, 9, 40)
    weighted = TensorSamples(torch.from_numpy(values), torch.from_numpy(counts).double())
    plain = Samples(np.repeat(values, counts, axis=1))
    t = np.array([[0.0] * groups, [0.3] * groups, [1.5] * groups])
    for name in ("count", "max_abs", "mean_abs", "rms"):
        same(getattr(weighted, name)(), getattr(plain, name)())
    for q in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        assert np.array_equal(weighted.quantile(q), plain.quantile(q))
    assert np.array_equal(weighted.tail(t).count, plain.tail(t).count)
    same(weighted.tail(t).sum, plain.tail(t).sum)
    assert np.array_equal(weighted.tail(t[0]).count, plain.tail(t[0]).count)
    same(weighted.mse(t, QuantType(4, signed=True)), plain.mse(t, QuantType(4, signed=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_asked_for_their_exact_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor(rows()).to(dtype)
    before = tensor.clone()
    mine, numpy = TensorSamples(tensor), Samples(tensor.float().numpy())
    t = np.full((2, 6), 0.4)
    for name in ("count", "max_abs", "mean_abs", "rms"):
        same(getattr(mine, name)(), getattr(numpy, name)())
    assert np.array_equal(mine.quantile(0.9), numpy.quantile(0.9))
    assert np.array_equal(mine.tail(t).count, numpy.tail(t).count)
    same(mine.tail(t).sum, numpy.tail(t).sum)
    qtype = QuantType(4, signed=True)
    nearly(mine.mse(t, qtype), numpy.mse(t, qtype))
    assert torch.equal(tensor, before)


def test_millions_of_values_are_summed_to_seven_digits() -> None:
    values = np.random.default_rng(0).standard_normal((1, 3_000_000)).astype(np.float32)
    values *= np.float32(0.1)
    mine, t = TensorSamples(torch.from_numpy(values)), np.array([0.05])
    above = np.abs(values) > 0.05
    exact = np.abs(values[above].astype(np.float64)).sum()
    assert mine.tail(t).count == above.sum()
    assert mine.tail(t).sum[0] == pytest.approx(exact, rel=1e-6)
    assert mine.rms()[0] == pytest.approx(
        np.sqrt((values.astype(np.float64) ** 2).mean()), rel=1e-6
    )


def test_a_tensor_that_requires_a_gradient_is_asked_without_one() -> None:
    tensor = torch.ones(1, 5, requires_grad=True)
    assert TensorSamples(tensor).mean_abs() == 1
    assert tensor.grad is None


# --- thresholds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@grids
def test_thresholds_agree_with_those_of_numpy(spec: str, qtype: QuantType) -> None:
    values = rows() if qtype.signed else np.abs(rows())
    for part in (values, values[:1], values[1:2], values[2:3], values[4:5]):
        mine, numpy = both(part)
        found, expected = (made_safe(make(spec), dist, qtype)[0] for dist in (mine, numpy))
        same(found, expected, rtol=1e-5)


@by_property
@given(groups_of_values, st.sampled_from(GRIDS), st.sampled_from(SPECS))
def test_thresholds_of_any_values_agree(values: Values, qtype: QuantType, spec: str) -> None:
    mine, numpy = both(values)
    found, expected = (made_safe(make(spec), dist, qtype)[0] for dist in (mine, numpy))
    if spec != "mse":
        same(found, expected, rtol=1e-5)
        return
    # Of candidates that are equally good, rounding decides: they are as good as each other.
    nearly(numpy.mse(found, qtype), numpy.mse(expected, qtype))


@dataclass
class OnTensors:
    """A calibrator that is given tensors for raw values."""

    calibrator: Any
    asked: int = 0

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        answer: Floats = self.calibrator(self._on_tensors(dist), qtype)
        return answer

    def two_sided(self, dist: Distribution, bits: int, /) -> tuple[Floats, Floats]:
        low, high = self.calibrator.two_sided(self._on_tensors(dist), bits)
        return low, high

    def _on_tensors(self, dist: Distribution) -> Distribution:
        if not isinstance(dist, Samples):
            return dist
        self.asked += 1
        return TensorSamples(torch.tensor(dist._values))


@pytest.mark.parametrize("check", CALIBRATOR_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("spec", ["octav", "percentile:99", "mse:25", "max"])
def test_calibrators_pass_their_battery_on_tensors(spec: str, check: Any) -> None:
    """The battery of third parties, its raw values taken by torch."""
    on_tensors = OnTensors(make(spec))
    check(on_tensors)
    assert on_tensors.asked or "histogram" in check.__name__


@pytest.mark.parametrize("exponent", [-80, -40, 40])
@pytest.mark.parametrize("spec", ["octav", "percentile:99", "max"])
def test_thresholds_of_tiny_and_large_values_agree(spec: str, exponent: int) -> None:
    values, qtype = np.ldexp(rows(), exponent), QuantType(4, signed=True)
    mine, numpy = both(values)
    found, expected = (made_safe(make(spec), dist, qtype)[0] for dist in (mine, numpy))
    same(found, expected, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-80, 70])
def test_the_sweep_of_tiny_and_large_values_agrees(exponent: int) -> None:
    mine, numpy = both(np.ldexp(rows(), exponent))
    qtype = QuantType(4, signed=True)
    same(make("mse")(mine, qtype), make("mse")(numpy, qtype), rtol=1e-5)


def layer(spec: str, kind: Kind, axis: int | None = None) -> Quantizer:
    """A quantizer of three channels, 4 bits wide."""
    settings = TensorSettings("conv1", kind, 4, axis, spec, 0, False, "ste")
    return Quantizer(settings, 1 if axis is None else 3)


@pytest.mark.parametrize("spec", SPECS)
def test_quantizers_ask_the_calibrators_of_calibration(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Calibrator, QuantType]] = []

    def recorded(
        calibrator: Calibrator, dist: Distribution, qtype: QuantType
    ) -> tuple[Floats, tuple[str, ...]]:
        asked.append((calibrator, qtype))
        return made_safe(calibrator, dist, qtype)

    monkeypatch.setattr(observing, "thresholds", recorded)
    layer(spec, "activation")(torch.rand(5, 3))
    layer(spec, "weight", axis=1)(torch.rand(5, 3))
    assert asked == [
        (make(spec), QuantType(4, signed=False)),
        (make(spec), QuantType(4, signed=True, narrow=True)),
    ]


def test_a_third_partys_calibrator_quantizes_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "octav_plugin_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: octav-plugin-example\nVersion: 1.0\n")
    entries = ["meanmax = octav_plugin_example:MeanMax"]
    entries += ["three-sigma = octav_plugin_example:three_sigma"]
    text = "\n".join(["[octav_calibrate.calibrators]", *entries, ""])
    (metadata / "entry_points.txt").write_text(text)
    for folder in (tmp_path, Path(__file__).with_name("plugin")):
        monkeypatch.syspath_prepend(str(folder))
    tensor = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    magnitude = tensor.abs()
    activation, weight = layer("meanmax:0.25", "activation"), layer("three-sigma", "weight", 1)
    activation(tensor)
    weight(tensor)
    mean, largest = magnitude.mean(), magnitude.max()
    assert torch.allclose(activation.threshold, mean + 0.25 * (largest - mean))
    rows_of = magnitude.movedim(1, 0).flatten(1)
    sigmas = 3 * rows_of.square().mean(1).sqrt()
    assert torch.allclose(weight.threshold, sigmas.minimum(rows_of.amax(1)))


# --- what leaves the device ---------------------------------------------------------------------


@contextmanager
def recorded_exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many values each way out of torch has taken along."""
    left: list[int] = []

    def watched(name: str) -> Any:
        original = getattr(Tensor, name)

        def leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            left.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        return leave

    ways = ("numpy", "cpu", "item", "tolist", "__array__", "__bool__", "__float__", "__int__")
    with monkeypatch.context() as patch:
        for name in ways:
            patch.setattr(Tensor, name, watched(name))
        yield left


@pytest.mark.parametrize("spec", [*SPECS, "entropy"])
@pytest.mark.parametrize("groups", [1, 7])
def test_nothing_but_vectors_of_one_number_a_group_leave_torch(
    spec: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(groups, 3000, generator=torch.Generator().manual_seed(0))
    dist = TensorSamples(tensor)
    with recorded_exits(monkeypatch) as left:
        made_safe(make(spec), dist, QuantType(4, signed=True))
        assert dist.has_negative
    assert left
    assert max(left) <= 2 * groups  # the extremes are two such vectors in one
