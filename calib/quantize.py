"""Quantize and dequantize in NumPy: the oracle that every written model is held against.

The arithmetic is that of ONNX's QuantizeLinear and DequantizeLinear, to the bit: in float32 divide,
round half to even, saturate; multiply, and round to float16 where the tensor is that. Integers are
levels throughout: what is stored is a level plus the zero point.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calib.granularity import Granularity, along_tensor
from calib.qtypes import QuantType

Float = TypeVar("Float", bound=np.floating)

# float32: the smallest normal number, as a runtime that flushes subnormals to zero would divide by
# zero below. float16: the smallest number, as runtimes compute with it in float32.
_SMALLEST_SCALE = {"float32": 2.0**-126, "float16": 2.0**-24}
_LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": float(np.finfo(np.float16).max)}


def scale_from_threshold(
    threshold: NDArray[np.floating], qtype: QuantType, dtype: str = "float32"
) -> NDArray[np.float32]:
    """``threshold / steps``, same shape, float32 but rounded to what ``dtype`` can hold; the one
    place where a scale is made.

    Kept within the numbers of ``dtype``, and so that every integer times the scale is finite.
    Rounded to nearest in float32, up in float16.
    """
    most = max(qtype.qmax, -qtype.qmin)
    smallest, largest = _SMALLEST_SCALE[dtype], _LARGEST[dtype] / most
    scale = np.minimum(np.maximum(threshold / qtype.steps, smallest), largest)
    rounded = scale.astype(dtype)
    if dtype == "float16":  # where it is subnormal, rounding down would clip much
        up = np.nextafter(rounded, np.finfo(np.float16).max)
        rounded = np.where(rounded < scale, up, rounded)
    above = rounded * np.float64(most) > _LARGEST[dtype]
    if above.any():
        rounded = np.where(above, np.nextafter(rounded, rounded.dtype.type(0)), rounded)
    return np.asarray(rounded, np.float32)


def quantize(
    tensor: NDArray[np.floating],
    scale: NDArray[np.float32],
    qtype: QuantType,
    granularity: Granularity,
) -> NDArray[np.int32]:
    """The levels of ``tensor`` on the grid: shape kept, int32, within ``qmin … qmax``.

    Args:
        tensor: float32 or float16, any shape, finite.
        scale: float32 ``(groups,)``.
        qtype: the grid.
        granularity: which axis the groups run along.
    """
    with np.errstate(over="ignore"):
        levels = np.rint(tensor / along_tensor(scale, tensor.shape, granularity))
    integers: NDArray[np.int32] = np.clip(levels, qtype.qmin, qtype.qmax).astype(np.int32)
    return integers


def dequantize(
    integers: NDArray[np.integer], scale: NDArray[np.float32], granularity: Granularity
) -> NDArray[np.float32]:
    """``integers · scale`` in float32, shape kept."""
    return integers.astype(np.float32) * along_tensor(scale, integers.shape, granularity)


def fake_quantize(
    tensor: NDArray[Float],
    scale: NDArray[np.float32],
    qtype: QuantType,
    granularity: Granularity,
) -> NDArray[Float]:
    """What remains of ``tensor`` after a QDQ pair: shape and dtype kept."""
    integers = quantize(tensor, scale, qtype, granularity)
    return dequantize(integers, scale, granularity).astype(tensor.dtype, copy=False)
