"""Quantize and dequantize in NumPy: the oracle that every written model is held against.

The arithmetic is that of ONNX's QuantizeLinear and DequantizeLinear in float32, to the bit:
divide, round half to even, saturate; multiply. Zero points are 0 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.granularity import Granularity, along_tensor
from calib.qtypes import QuantType

# Smallest normal float32: a runtime that flushes subnormals to zero would divide by zero below.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_LARGEST = np.finfo(np.float32).max


def scale_from_threshold(threshold: NDArray[np.floating], qtype: QuantType) -> NDArray[np.float32]:
    """``threshold / steps`` as float32, same shape; the one place where a scale is made.

    Kept within normal float32, and so that the largest integer times the scale is finite.
    """
    largest = np.nextafter(_LARGEST / np.float32(qtype.qmax), np.float32(0))
    return np.clip(threshold / qtype.steps, _SMALLEST_SCALE, largest).astype(np.float32)


def quantize(
    tensor: NDArray[np.float32],
    scale: NDArray[np.float32],
    qtype: QuantType,
    granularity: Granularity,
) -> NDArray[np.int32]:
    """The integers of ``tensor`` on the grid: shape kept, int32, within ``qmin … qmax``.

    Args:
        tensor: float32, any shape, finite.
        scale: float32 ``(groups,)``.
        qtype: the grid.
        granularity: which axis the groups run along.
    """
    with np.errstate(over="ignore"):
        levels = np.rint(tensor / along_tensor(scale, tensor.ndim, granularity))
    integers: NDArray[np.int32] = np.clip(levels, qtype.qmin, qtype.qmax).astype(np.int32)
    return integers


def dequantize(
    integers: NDArray[np.integer], scale: NDArray[np.float32], granularity: Granularity
) -> NDArray[np.float32]:
    """``integers · scale`` in float32, shape kept."""
    return integers.astype(np.float32) * along_tensor(scale, integers.ndim, granularity)


def fake_quantize(
    tensor: NDArray[np.float32],
    scale: NDArray[np.float32],
    qtype: QuantType,
    granularity: Granularity,
) -> NDArray[np.float32]:
    """What remains of ``tensor`` after a QDQ pair: float32, shape kept."""
    return dequantize(quantize(tensor, scale, qtype, granularity), scale, granularity)
