"""Which values of a tensor share one threshold. The only file that knows about axes.

`to_groups` turns any tensor into ``(groups, values)``; behind it, per-tensor and per-channel
are the same code.
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


Granularity = PerTensor | PerChannel


def to_groups(tensor: NDArray[Scalar], granularity: Granularity) -> NDArray[Scalar]:
    """The tensor as ``(groups, values)``, same dtype; a view where the layout allows it."""
    if isinstance(granularity, PerTensor):
        return tensor.reshape(1, -1)
    channels = tensor.shape[granularity.axis]
    return np.moveaxis(tensor, granularity.axis, 0).reshape(channels, -1)


def along_tensor(
    per_group: NDArray[Scalar], rank: int, granularity: Granularity
) -> NDArray[Scalar]:
    """A ``(groups,)`` vector reshaped so that it broadcasts against a tensor of ``rank`` axes."""
    if isinstance(granularity, PerTensor):
        return per_group.reshape(())
    shape = [1] * rank
    shape[granularity.axis] = -1
    return per_group.reshape(shape)


def pieces(
    shape: tuple[int, ...], granularity: Granularity, most: int = 1 << 22
) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Cuts a tensor of ``shape`` into parts of about ``most`` values, at least a row or channel
    each: the index of each part, and the groups in it."""
    axis = granularity.axis if isinstance(granularity, PerChannel) else 0
    length = shape[axis] if shape else 1
    values = int(np.prod(shape, dtype=np.int64)) // max(length, 1)
    step = max(1, most // max(values, 1))
    for start in range(0, length, step):
        part = slice(start, start + step)
        index = (*[slice(None)] * axis, part) if shape else ()
        yield index, part if isinstance(granularity, PerChannel) else slice(0, 1)


def onnx_axis(granularity: Granularity) -> int | None:
    """The ``axis`` attribute of QuantizeLinear and DequantizeLinear; None when per-tensor."""
    return granularity.axis if isinstance(granularity, PerChannel) else None
