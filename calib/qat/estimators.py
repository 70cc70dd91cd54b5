"""Fake quantization with the gradient estimators of QAT (OCTAV, section 4; PACT; LSQ).

Forward is the QDQ pair that is exported. Of `fake_quantize` the threshold is never differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib.qat.grid import SMALLEST_SCALE, Grid, along_tensor, apply_scale, as_numbers, scale_of

Gradients = tuple[Tensor | None, ...]

ESTIMATORS = ("ste", "pwl", "mad")
LEARNED = ("pact", "lsq")


def fake_quantize(
    x: Tensor,
    threshold: Tensor,
    signed: Tensor,
    bits: int,
    narrow: bool,
    axis: int | None,
    estimator: str,
) -> Tensor:
    """``x`` quantized and dequantized, in its own shape and dtype.

    Backward multiplies the upstream gradient by

    - ``ste``: 1 (Bengio et al. 2013, arXiv 1308.3432),
    - ``pwl``: 1{|x| ≤ s},
    - ``mad``: min(1, s / |x|) (OCTAV, section 4.2),

    on unsigned grids by 0 where x is below 0; s is the threshold.

    Args:
        x: any shape, any float type.
        threshold: float32 ``(G,)``, positive.
        signed: bool ``()``, the kind of grid.
        bits: width.
        narrow: without the most negative integer, where signed.
        axis: along which the groups run; None for one.
        estimator: one of `ESTIMATORS`.
    """
    quantized: Tensor = _FakeQuantize.apply(x, threshold, signed, bits, narrow, axis, estimator)  # type: ignore[no-untyped-call]
    return quantized


def learn_threshold(x: Tensor, threshold: Tensor, signed: Tensor, bits: int) -> Tensor:
    """As `fake_quantize` per tensor, with the gradients of PACT (Choi et al. 2018, arXiv
    1805.06085).

    x gets that of ``pwl``; the threshold, a float ``(1,)`` of which the magnitude counts, the sum
    of what is clipped from above, and on signed grids minus that of what is clipped from below.
    """
    quantized: Tensor = _LearnedThreshold.apply(x, threshold, signed, bits)  # type: ignore[no-untyped-call]
    return quantized


def learn_scale(
    x: Tensor, scale: Tensor, signed: Tensor, bits: int, narrow: bool, axis: int | None
) -> Tensor:
    """As `fake_quantize`, with the gradients of LSQ (Esser et al. 2020, arXiv 1902.08153).

    x gets its gradient where it is not clipped. The scale Δ, ``(G,)`` of which the magnitude
    counts, gets by group the sum of the upstream gradient times ``round(x/Δ) - x/Δ`` where x is
    not clipped and the smallest or largest integer where it is, and all that times
    ``1 / √(N·qmax)``, N the number of values in a group.
    """
    quantized: Tensor = _LearnedScale.apply(x, scale, signed, bits, narrow, axis)  # type: ignore[no-untyped-call]
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        signed: Tensor,
        bits: int,
        narrow: bool,
        axis: int | None,
        estimator: str,
    ) -> Tensor:
        grid = Grid(bits, narrow)
        ctx.save_for_backward(x, threshold, signed)
        ctx.axis, ctx.estimator = axis, estimator
        scale = along_tensor(scale_of(threshold, grid, signed), x.ndim, axis)
        return apply_scale(x.float(), scale, grid, signed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        x, threshold, signed = ctx.saved_tensors
        s = along_tensor(threshold, x.ndim, ctx.axis)
        passed = _ESTIMATES[ctx.estimator](gradients[0], x.float(), s, signed)
        return passed.to(x.dtype), None, None, None, None, None, None


def _straight_through(gradient: Tensor, x: Tensor, _s: Tensor, signed: Tensor) -> Tensor:
    return torch.where(signed | (x >= 0), gradient, 0.0)


def _piecewise_linear(gradient: Tensor, x: Tensor, s: Tensor, signed: Tensor) -> Tensor:
    low = torch.where(signed, -s, 0.0)
    if s.ndim == 0 and s.is_cpu and not torch.compiler.is_compiling():
        # One pass instead of three; it excludes the bounds, which belong to what is passed on.
        below = float(np.nextafter(np.float32(low.item()), np.float32(-math.inf)))
        above = float(np.nextafter(np.float32(s.item()), np.float32(math.inf)))
        return torch.ops.aten.hardtanh_backward(gradient.float(), x, below, above)  # type: ignore[no-any-return]
    return torch.where((x >= low) & (x <= s), gradient, 0.0)


def _magnitude_aware(gradient: Tensor, x: Tensor, s: Tensor, signed: Tensor) -> Tensor:
    return _straight_through(gradient * (s / x.abs()).clamp(max=1.0), x, s, signed)


_ESTIMATES = {"ste": _straight_through, "pwl": _piecewise_linear, "mad": _magnitude_aware}


class _LearnedThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, signed: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, threshold, signed)
        grid = Grid(bits)
        scale = scale_of(threshold.float().abs(), grid, signed).reshape(())
        return apply_scale(x.float(), scale, grid, signed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        (gradient,) = gradients
        x, threshold, signed = ctx.saved_tensors
        s = threshold.float().abs().reshape(())
        values, upstream = x.float(), gradient.float()
        inside = _piecewise_linear(upstream, values, s, signed)
        above = torch.where(values > s, upstream, 0.0).sum()
        below = torch.where(signed & (values < -s), upstream, 0.0).sum()
        slope = (above - below) * _sign(threshold)
        return inside.to(x.dtype), slope.reshape(threshold.shape).to(threshold.dtype), None, None


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        signed: Tensor,
        bits: int,
        narrow: bool,
        axis: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, signed)
        grid = Grid(bits, narrow)
        ctx.grid, ctx.axis = grid, axis
        divisor = along_tensor(learned_scale(scale), x.ndim, axis)
        return apply_scale(x.float(), divisor, grid, signed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        x, scale, signed = ctx.saved_tensors
        upstream, grid, axis = gradients[0].float(), ctx.grid, ctx.axis
        levels = x.float() / along_tensor(learned_scale(scale), x.ndim, axis)
        low, high = as_numbers(grid.lowest(signed), grid.steps(signed))
        inside = (levels >= low) & (levels <= high)
        rounded = levels.round().clamp_(low, high)
        slope = (rounded - torch.where(inside, levels, 0.0)) * upstream
        if axis is None:
            total = slope.sum().reshape(scale.shape)
        else:
            total = slope.sum([n for n in range(x.ndim) if n != axis])
        damping = (grid.steps(signed) * max(x.numel() // scale.numel(), 1)).rsqrt()
        slopes = (total * damping * _sign(scale)).to(scale.dtype)
        passed = torch.where(inside, upstream, 0.0).to(x.dtype)
        return passed, slopes, None, None, None, None


def learned_scale(scale: Tensor) -> Tensor:
    """A learned scale as it is used: float32, its magnitude, so that no step makes it negative."""
    return scale.float().abs().clamp(min=SMALLEST_SCALE)


def _sign(learned: Tensor) -> Tensor:
    return torch.where(learned < 0, -1.0, 1.0)
