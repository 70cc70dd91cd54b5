"""Quantize and dequantize on torch tensors: the arithmetic of `calib.quantize`, bit for bit.

Whether a grid is signed is a tensor, known only once data was seen: nothing here waits for a GPU,
and compiled graphs need not be made anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calib.qtypes import WIDTHS, QuantType
from calib.quantize import scale_from_threshold

SMALLEST_SCALE = 2.0**-126  # as in calib.quantize


def _largest_scale(bits: int, *, signed: bool, narrow: bool) -> float:
    """The largest scale at which every integer is finite, as a plain number: nothing of NumPy may
    stand in what torch compiles."""
    qtype = QuantType(bits, signed, narrow)
    return float(scale_from_threshold(np.array(np.finfo(np.float64).max), qtype))


_LARGEST_SCALES = {
    (bits, narrow): (
        _largest_scale(bits, signed=True, narrow=narrow),
        _largest_scale(bits, signed=False, narrow=False),
    )
    for bits in WIDTHS
    for narrow in (False, True)
}


@dataclass(frozen=True)
class Grid:
    """The integers of a `calib.QuantType` whose sign is yet to be known.

    Args:
        bits: width.
        narrow: without the most negative integer, where signed.
    """

    bits: int
    narrow: bool = False

    def steps(self, signed: Tensor) -> Tensor:
        """Steps from 0 to the threshold, which is the largest integer: float32 ``()``."""
        high = (1 << self.bits) - 1.0
        return torch.where(signed, float((1 << (self.bits - 1)) - 1), high)

    def lowest(self, signed: Tensor) -> Tensor:
        """The smallest integer: float32 ``()``."""
        return torch.where(signed, float(-(1 << (self.bits - 1)) + self.narrow), 0.0)


def scale_of(threshold: Tensor, grid: Grid, signed: Tensor) -> Tensor:
    """``threshold / steps`` within the bounds of `calib.quantize.scale_from_threshold`: float32,
    same shape."""
    largest = torch.where(signed, *_LARGEST_SCALES[grid.bits, grid.narrow])
    return (threshold / grid.steps(signed)).clamp(min=SMALLEST_SCALE).minimum(largest)


def apply_scale(x: Tensor, scale: Tensor, grid: Grid, signed: Tensor) -> Tensor:
    """What remains of ``x``, float32, after quantization: divide, round half to even, saturate,
    multiply (OCTAV, equation 1, on the grid that is written).

    Args:
        x: float32, any shape.
        scale: float32, of a shape that broadcasts against ``x``.
        grid: the integers.
        signed: bool ``()``.
    """
    levels = (x / scale).round_()
    low, high = as_numbers(grid.lowest(signed), grid.steps(signed))
    return levels.clamp_(low, high).mul_(scale)


def as_numbers(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors ``()``, as plain numbers where that costs nothing: clamping by tensors takes
    seven times as long on a CPU."""
    if low.is_cpu and not torch.compiler.is_compiling():
        return low.item(), high.item()  # type: ignore[return-value]
    return low, high


def to_groups(tensor: Tensor, axis: int | None) -> Tensor:
    """The tensor as ``(groups, values)``: one group, or one for each index of ``axis``."""
    if axis is None:
        return tensor.reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def along_tensor(per_group: Tensor, rank: int, axis: int | None) -> Tensor:
    """A ``(groups,)`` vector reshaped so that it broadcasts against a tensor of ``rank`` axes."""
    if axis is None:
        return per_group.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return per_group.reshape(shape)
