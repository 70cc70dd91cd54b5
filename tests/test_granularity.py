"""Axes in, groups out: every value keeps its channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.granularity import (
    Blocked,
    Granularity,
    PerChannel,
    PerTensor,
    along_tensor,
    for_onnx,
    onnx_axis,
    onnx_block_size,
    pieces,
    to_groups,
)

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
    along = along_tensor(per_group, tensor.shape, granularity)
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
        spread = np.broadcast_to(along_tensor(per_group, tensor.shape, granularity), tensor.shape)
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
    assert along_tensor(np.array([0.5], np.float32), (1, 2, 3), PerTensor()).shape == ()


def test_channels_without_values_make_groups_without_values() -> None:
    assert to_groups(np.zeros((3, 0, 2), np.float32), PerChannel(0)).shape == (3, 0)
    assert to_groups(np.zeros((0, 2), np.float32), PerTensor()).shape == (1, 0)


def test_the_onnx_axis_is_the_axis_of_the_channels_and_absent_per_tensor() -> None:
    assert [onnx_axis(PerChannel(axis)) for axis in (0, 1, 3)] == [0, 1, 3]
    assert onnx_axis(PerTensor()) is None


def test_granularities_are_named_as_in_tables() -> None:
    assert [str(PerTensor()), str(PerChannel(1))] == ["per-tensor", "per-channel(axis=1)"]
    assert str(Blocked(0, 32)) == "blocked(axis=0, 32)"


# --- blocks -----------------------------------------------------------------------------------


def scale_index(at: tuple[int, ...], granularity: Blocked) -> tuple[int, ...]:
    """ONNX: which scale holds for the value at ``at``."""
    axis = granularity.axis
    return (*at[:axis], at[axis] // granularity.block_size, *at[axis + 1 :])


@by_property
@given(layouts(), st.integers(1, 6), st.integers(1, 40))
def test_every_value_lies_in_the_group_whose_scale_onnx_multiplies_it_with(
    layout: tuple[NDArray[np.float32], int], size: int, most: int
) -> None:
    tensor, axis = layout
    granularity = Blocked(axis, size)
    shape = list(tensor.shape)
    shape[axis] = -(-shape[axis] // size)
    scale = for_onnx(np.arange(np.prod(shape)), tensor.shape, granularity)
    assert scale.shape == tuple(shape)
    wanted: dict[int, list[float]] = {}
    for at, value in np.ndenumerate(tensor):
        wanted.setdefault(int(scale[scale_index(at, granularity)]), []).append(float(value))
    found: dict[int, list[float]] = {}
    for index, groups in pieces(tensor.shape, granularity, most):
        rows = to_groups(tensor[index], granularity)
        for group, row in zip(range(groups.start, groups.stop), rows, strict=True):
            found[group] = row.tolist()
    assert list(found) == sorted(wanted)
    for group, values in found.items():
        assert sorted(values) == sorted(wanted[group])


@by_property
@given(layouts(), st.integers(1, 6))
def test_what_is_computed_per_block_lies_along_the_tensor_on_its_own_values(
    layout: tuple[NDArray[np.float32], int], size: int
) -> None:
    tensor, axis = layout
    granularity = Blocked(axis, size)
    groups = [to_groups(tensor[i], granularity) for i, _ in pieces(tensor.shape, granularity)]
    per_group = np.concatenate([part.max(axis=1) for part in groups])
    along = along_tensor(per_group, tensor.shape, granularity)
    scale = for_onnx(per_group, tensor.shape, granularity)
    assert along.shape == tensor.shape
    for at in np.ndindex(tensor.shape):
        assert tensor[at] <= along[at] == scale[scale_index(at, granularity)]


def test_a_last_block_that_is_shorter_is_a_part_of_its_own_and_nothing_pads_it() -> None:
    tensor = np.arange(1, 15, dtype=np.float32).reshape(7, 2)
    parts = list(pieces(tensor.shape, Blocked(0, 3)))
    assert [groups for _, groups in parts] == [slice(0, 4), slice(4, 6)]
    whole, rest = (to_groups(tensor[index], Blocked(0, 3)).tolist() for index, _ in parts)
    assert whole == [[1, 3, 5], [2, 4, 6], [7, 9, 11], [8, 10, 12]]
    assert rest == [[13], [14]]
    with pytest.raises(ValueError, match="reshape"):
        to_groups(tensor, Blocked(0, 3))


def test_one_block_longer_than_its_axis_is_a_channel() -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(to_groups(tensor, Blocked(0, 32)), to_groups(tensor, PerChannel(1)))


def test_the_attributes_of_blocks_are_onnxs() -> None:
    assert [onnx_axis(Blocked(1, 32)), onnx_block_size(Blocked(1, 32))] == [1, 32]
    assert onnx_block_size(PerChannel(1)) is None
    assert onnx_block_size(PerTensor()) is None
