"""Which values of a tensor share one threshold. The only file that knows about axes.

`to_groups` turns any tensor into ``(groups, values)``; behind it, per-tensor, per-channel and
blocked are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One group: shape ``(a, b, c)`` → thresholds of shape ``(1,)``."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One group for every index of ``axis``: shape ``(a, b, c)``, axis 1 → thresholds ``(b,)``.

    ``axis`` means what it means in ONNX's QuantizeLinear, and is not negative.
    """

    axis: int

    def __str__(self) -> str:
        return f"per-channel(axis={self.axis})"


@dataclass(frozen=True, slots=True)
class Blocked:
    """One group for every ``block_size`` values along ``axis``: shape ``(a, b)``, axis 0 →
    thresholds for ``(ceil(a / block_size), b)``, the last block being what is left.

    ``axis`` means what it means in ONNX's QuantizeLinear, and is not negative. Groups run along
    the blocks first, whichever axis these cut: all groups of the first block, then all of the
    second; so that any run of blocks is a run of groups.
    """

    axis: int
    block_size: int

    def __str__(self) -> str:
        return f"blocked(axis={self.axis}, {self.block_size})"

    def blocks(self, length: int) -> int:
        """How many there are along an axis of ``length``."""
        return -(-length // self.block_size)

    def length(self, shape: tuple[int, ...]) -> int:
        """That of the axis that is cut, of a tensor of ``shape``."""
        return shape[self.axis]


Granularity = PerTensor | PerChannel | Blocked


def to_groups(tensor: NDArray[Scalar], granularity: Granularity) -> NDArray[Scalar]:
    """The tensor as ``(groups, values)``, same dtype; a view where the layout allows it.

    Blocks must be as long as each other, or there must be just one; as in each of `pieces`.

    Raises:
        ValueError: if the last of several blocks is shorter.
    """
    if isinstance(granularity, PerTensor):
        return tensor.reshape(1, -1)
    first = np.moveaxis(tensor, granularity.axis, 0)
    channels, others = first.shape[0], int(np.prod(first.shape[1:], dtype=np.int64))
    if isinstance(granularity, PerChannel):
        return first.reshape(channels, others)
    length = max(min(granularity.block_size, channels), 1)
    blocks = first.reshape(channels // length, length, others)
    return np.moveaxis(blocks, 1, 2).reshape(-1, length)


def along_tensor(
    per_group: NDArray[Scalar], shape: tuple[int, ...], granularity: Granularity
) -> NDArray[Scalar]:
    """A ``(groups,)`` vector in a form that broadcasts against a tensor of ``shape``."""
    per_group = for_onnx(per_group, shape, granularity)
    if isinstance(granularity, PerChannel):
        return per_group.reshape([-1 if n == granularity.axis else 1 for n in range(len(shape))])
    if isinstance(granularity, PerTensor):
        return per_group
    axis, length = granularity.axis, shape[granularity.axis]
    long = np.repeat(per_group, granularity.block_size, axis)
    return long[(*[slice(None)] * axis, slice(length))]


def for_onnx(
    per_group: NDArray[Scalar], shape: tuple[int, ...], granularity: Granularity
) -> NDArray[Scalar]:
    """A ``(groups,)`` vector in the shape in which QuantizeLinear and DequantizeLinear take the
    scale of a tensor of ``shape``: a scalar, a vector, or for blocks a tensor."""
    if isinstance(granularity, PerTensor):
        return per_group.reshape(())
    if isinstance(granularity, PerChannel):
        return per_group
    axis = granularity.axis
    first = (granularity.blocks(shape[axis]), *shape[:axis], *shape[axis + 1 :])
    return np.moveaxis(per_group.reshape(first), 0, axis)


def pieces(
    shape: tuple[int, ...], granularity: Granularity, most: int = 1 << 22
) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Cuts a tensor of ``shape`` into parts of about ``most`` values, at least a row, channel or
    block each: the index of each part, and the groups in it. A last block that is shorter than
    the others is a part of its own, so that the groups of a part are of one length."""
    axis = 0 if isinstance(granularity, PerTensor) else granularity.axis
    unit = granularity.block_size if isinstance(granularity, Blocked) else 1
    length = shape[axis] if shape else 1
    values = int(np.prod(shape, dtype=np.int64)) // max(length, 1)
    step = max(1, most // max(values * unit, 1)) * unit
    whole = length - length % unit
    starts = [*range(0, whole, step), *([whole] if whole < length else [])]
    for start in starts:
        stop = length if start == whole else min(start + step, whole)
        index = (*[slice(None)] * axis, slice(start, stop)) if shape else ()
        yield index, _groups_of(start, stop, values, granularity)


def _groups_of(start: int, stop: int, values: int, granularity: Granularity) -> slice:
    """Which groups lie in a part of the axis, across which a tensor holds so many ``values``."""
    if isinstance(granularity, PerTensor):
        return slice(0, 1)
    if isinstance(granularity, PerChannel):
        return slice(start, stop)
    return slice(granularity.blocks(start) * values, granularity.blocks(stop) * values)


def onnx_axis(granularity: Granularity) -> int | None:
    """The ``axis`` attribute of QuantizeLinear and DequantizeLinear; None when per-tensor."""
    return None if isinstance(granularity, PerTensor) else granularity.axis


def onnx_block_size(granularity: Granularity) -> int | None:
    """Their ``block_size``; None where there are no blocks."""
    return granularity.block_size if isinstance(granularity, Blocked) else None
