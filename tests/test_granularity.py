"""Axes in, groups out: every value keeps its channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.granularity import Granularity, PerChannel, PerTensor, along_tensor, onnx_axis, to_groups

by_property = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[NDArray[np.float32], int]:
    """A tensor of distinct values in any memory order, and one of its axes."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    stored = np.arange(np.prod(shape), dtype=np.float32).reshape([shape[axis] for axis in order])
    tensor = stored.transpose(np.argsort(order))
    assert list(tensor.shape) == shape
    return tensor, draw(st.integers(0, len(shape) - 1))


@by_property
@given(layouts())
def test_a_group_holds_exactly_the_values_of_its_channel(
    layout: tuple[NDArray[np.float32], int],
) -> None:
    tensor, axis = layout
    groups = to_groups(tensor, PerChannel(axis))
    assert groups.shape == (tensor.shape[axis], tensor.size // tensor.shape[axis])
    for channel in range(tensor.shape[axis]):
        expected = [v for at, v in np.ndenumerate(tensor) if at[axis] == channel]
        assert sorted(groups[channel].tolist()) == sorted(expected)


@by_property
@given(layouts())
def test_per_tensor_is_one_group_of_all_values_in_their_order(
    layout: tuple[NDArray[np.float32], int],
) -> None:
    tensor, _ = layout
    groups = to_groups(tensor, PerTensor())
    assert groups.shape == (1, tensor.size)
    assert np.array_equal(groups.reshape(tensor.shape), tensor)


@by_property
@given(layouts())
def test_what_is_computed_per_group_lies_along_the_tensor_on_its_own_values(
    layout: tuple[NDArray[np.float32], int],
) -> None:
    tensor, axis = layout
    granularity = PerChannel(axis)
    per_group = to_groups(tensor, granularity).max(axis=1)
    along = along_tensor(per_group, tensor.ndim, granularity)
    spread = np.broadcast_to(along, tensor.shape)
    assert along.size == tensor.shape[axis]
    for at in np.ndindex(tensor.shape):
        assert spread[at] == per_group[at[axis]]
        assert tensor[at] <= spread[at]


@by_property
@given(layouts())
def test_groups_of_a_vector_along_the_tensor_give_the_vector_back(
    layout: tuple[NDArray[np.float32], int],
) -> None:
    tensor, axis = layout
    channels = np.arange(tensor.shape[axis], dtype=np.int32) * 7 - 3
    for granularity, per_group in ((PerChannel(axis), channels), (PerTensor(), channels[:1])):
        spread = np.broadcast_to(along_tensor(per_group, tensor.ndim, granularity), tensor.shape)
        groups = to_groups(spread, granularity)
        assert np.array_equal(groups, np.repeat(per_group[:, None], groups.shape[1], axis=1))


@by_property
@given(layouts())
def test_a_tensor_can_be_rebuilt_from_its_groups(layout: tuple[NDArray[np.float32], int]) -> None:
    tensor, axis = layout
    groups = to_groups(tensor, PerChannel(axis))
    others = [size for at, size in enumerate(tensor.shape) if at != axis]
    rebuilt = np.moveaxis(groups.reshape([tensor.shape[axis], *others]), 0, axis)
    assert np.array_equal(rebuilt, tensor)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(2)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_the_type_of_the_values_is_kept_and_read_only_is_accepted(
    granularity: Granularity, dtype: type[np.generic]
) -> None:
    tensor = np.arange(24).reshape(2, 3, 4).astype(dtype)
    before = tensor.copy()
    tensor.setflags(write=False)
    assert to_groups(tensor, granularity).dtype == dtype
    assert np.array_equal(tensor, before)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_no_copy_is_made_of_a_tensor_that_already_lies_in_groups(granularity: Granularity) -> None:
    tensor = np.zeros((4, 3, 3, 3), np.float32)
    assert np.shares_memory(to_groups(tensor, granularity), tensor)


def test_the_scalar_along_a_tensor_is_a_scalar_as_onnx_wants_it() -> None:
    assert along_tensor(np.array([0.5], np.float32), 3, PerTensor()).shape == ()


def test_channels_without_values_make_groups_without_values() -> None:
    assert to_groups(np.zeros((3, 0, 2), np.float32), PerChannel(0)).shape == (3, 0)
    assert to_groups(np.zeros((0, 2), np.float32), PerTensor()).shape == (1, 0)


def test_the_onnx_axis_is_the_axis_of_the_channels_and_absent_per_tensor() -> None:
    assert [onnx_axis(PerChannel(axis)) for axis in (0, 1, 3)] == [0, 1, 3]
    assert onnx_axis(PerTensor()) is None


def test_granularities_are_named_as_in_tables() -> None:
    assert [str(PerTensor()), str(PerChannel(1))] == ["per-tensor", "per-channel(axis=1)"]
