"""Fake quantization on torch tensors against that of NumPy, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib import granularity
from calib.granularity import Granularity, PerChannel, PerTensor
from calib.qat.estimators import fake_quantize
from calib.qat.grid import Grid, along_tensor, apply_scale, to_groups
from calib.qtypes import WIDTHS, QuantType
from calib.quantize import fake_quantize as numpy_fake_quantize
from calib.quantize import scale_from_threshold

Values = NDArray[Any]

by_property = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
torch.set_num_threads(1)  # of tensors this small, on machines this busy: many times faster

GRIDS = [QuantType(bits, signed) for bits in WIDTHS for signed in (True, False)]
GRIDS += [QuantType(bits, signed=True, narrow=True) for bits in WIDTHS]
grids = pytest.mark.parametrize("qtype", GRIDS, ids=lambda q: f"{q}{'-narrow' * q.narrow}")
LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)

any_float = st.floats(-9, 9, width=32) | st.floats(width=32, allow_nan=False, allow_infinity=False)
thresholds = st.floats(2.0**-149, 2.0**120, width=32) | st.floats(0.125, 8, width=32)


def in_torch(
    values: Values, threshold: Values, qtype: QuantType, axis: int | None = None
) -> Values:
    """What the quantizers of training make of ``values``."""
    x, limit = torch.from_numpy(values.copy()), torch.from_numpy(threshold.copy())
    sign = torch.tensor(qtype.signed)
    back = fake_quantize(x, limit, sign, qtype.bits, qtype.narrow, axis, "ste")
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    assert torch.equal(x, torch.from_numpy(values)), "the input was changed"
    answer: Values = back.numpy()
    return answer


def in_numpy(
    values: Values, threshold: Values, qtype: QuantType, axis: int | None = None
) -> Values:
    """What the file that is written makes of them."""
    scale = scale_from_threshold(threshold.astype(np.float64), qtype)
    return numpy_fake_quantize(values, scale, qtype, along(axis))


def along(axis: int | None) -> Granularity:
    return PerTensor() if axis is None else PerChannel(axis)


def bits_of(values: Values) -> list[int]:
    """The bits of each float, of a zero those of +0: which of the two zeros is no concern."""
    kind = np.uint32 if values.dtype == np.float32 else np.uint16
    codes: list[int] = (values + values.dtype.type(0)).view(kind).ravel().tolist()
    return codes


@by_property
@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=any_float),
    thresholds,
    st.sampled_from(GRIDS),
)
def test_torch_and_numpy_have_the_same_bits(
    values: Values, threshold: float, qtype: QuantType
) -> None:
    t = np.array([threshold], np.float32)
    assert bits_of(in_torch(values, t, qtype)) == bits_of(in_numpy(values, t, qtype))


@by_property
@given(st.data(), st.sampled_from(GRIDS), st.sampled_from([0, 1, 2]))
def test_channels_along_any_axis_have_the_same_bits(
    data: st.DataObject, qtype: QuantType, axis: int
) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    values = data.draw(hnp.arrays(np.float32, shape, elements=any_float))
    t = data.draw(hnp.arrays(np.float32, shape[axis], elements=thresholds))
    expected = bits_of(in_numpy(values, t, qtype, axis))
    assert bits_of(in_torch(values, t, qtype, axis)) == expected


@grids
@pytest.mark.parametrize("step", [0.25, 0.3, 2.0**-70, 1e-20, 7e30])
def test_values_half_way_between_two_levels_go_to_the_even_one(
    qtype: QuantType, step: float
) -> None:
    t = np.array([qtype.steps * step], np.float32)
    low, high = max(qtype.qmin, -40), min(qtype.qmax, 40)
    halves = (np.arange(low - 2, high + 2) + 0.5).astype(np.float32) * np.float32(step)
    values = np.concatenate([halves, np.nextafter(halves, 0), np.nextafter(halves, 1e35)])
    found = in_torch(values, t, qtype)
    assert bits_of(found) == bits_of(in_numpy(values, t, qtype))
    if np.log2(step) % 1 == 0:  # exactly half way
        inside = found[: halves.size][2:-2] / step
        assert inside.size
        assert not (inside % 2).any()


@grids
@pytest.mark.parametrize("threshold", [2.0**-149, 2.0**-130, TINY, 1e-35, 1e30, 1e38])
def test_huge_and_tiny_values_have_the_same_bits(qtype: QuantType, threshold: float) -> None:
    near = np.linspace(-1.5, 1.5, 91) * threshold
    values = np.array([*near, 0.0, LARGEST, -LARGEST, TINY, -TINY, 2.0**-149], np.float32)
    t = np.array([threshold], np.float32)
    found = in_torch(values, t, qtype)
    assert np.isfinite(found).all()
    assert bits_of(found) == bits_of(in_numpy(values, t, qtype))


def test_at_the_largest_threshold_every_level_is_finite() -> None:
    values, t = (
        np.array([LARGEST, -LARGEST, LARGEST / 2], np.float32),
        np.array([LARGEST], np.float32),
    )
    for qtype in GRIDS:
        found = in_torch(values, t, qtype)
        assert np.isfinite(found).all()
        assert bits_of(found) == bits_of(in_numpy(values, t, qtype))


@grids
def test_half_precision_is_quantized_in_float32_and_rounded_once(qtype: QuantType) -> None:
    values = (np.random.default_rng(0).standard_normal(500) * 2).astype(np.float16)
    t = np.array([1.3], np.float32)
    expected = in_numpy(values.astype(np.float32), t, qtype)
    assert bits_of(in_torch(values, t, qtype)) == bits_of(expected.astype(np.float16))
    exact = torch.from_numpy(values).bfloat16()
    sign = torch.tensor(qtype.signed)
    back = fake_quantize(exact, torch.from_numpy(t), sign, qtype.bits, qtype.narrow, None, "ste")
    assert back.dtype == torch.bfloat16
    expected = in_numpy(exact.float().numpy(), t, qtype)
    assert torch.equal(back, torch.from_numpy(expected).bfloat16())


@grids
def test_layouts_of_memory_do_not_matter(qtype: QuantType) -> None:
    plain = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32))
    t, sign = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.1, 0.9]), torch.tensor(qtype.signed)
    rest = (sign, qtype.bits, qtype.narrow, 1, "ste")
    expected = fake_quantize(plain, t, *rest)
    apart = torch.stack([plain, plain], dim=-1)[..., 1]
    turned = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for same in (apart, turned):
        assert not same.is_contiguous()
        assert torch.equal(fake_quantize(same, t, *rest), expected)
    assert fake_quantize(plain[:0], t, *rest).shape == (0, 6, 5)


@grids
def test_a_grid_has_the_integers_of_its_type(qtype: QuantType) -> None:
    grid, sign = Grid(qtype.bits, qtype.narrow), torch.tensor(qtype.signed)
    assert grid.steps(sign).item() == qtype.steps == qtype.qmax
    assert grid.lowest(sign).item() == qtype.qmin
    assert {grid.steps(sign).dtype, grid.lowest(sign).dtype} == {torch.float32}


@grids
def test_a_compiled_graph_clamps_to_the_same_bits(
    qtype: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, and on a GPU, the bounds stay tensors."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(300).astype(np.float32))
    grid, sign = Grid(qtype.bits, qtype.narrow), torch.tensor(qtype.signed)
    scale = torch.tensor([1.1 / qtype.steps])
    plain = apply_scale(x, scale, grid, sign)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "item", None)
    assert torch.equal(apply_scale(x, scale, grid, sign), plain)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_groups_are_those_of_the_file_that_knows_about_axes(axis: int | None) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    groups = to_groups(torch.from_numpy(values), axis).numpy()
    assert np.array_equal(groups, granularity.to_groups(values, along(axis)))
    per_group = groups[:, 0].copy()
    spread = along_tensor(torch.from_numpy(per_group), 3, axis).numpy()
    expected = granularity.along_tensor(per_group, (1, 1, 1), along(axis))
    assert spread.shape == expected.shape
    assert np.array_equal(spread, expected)
