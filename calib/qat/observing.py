"""From the values of a tensor in one step to its threshold; the state lies in a layer's buffers.

One operator of torch, so that a compiled model need not be broken up for it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from calib.calibrators import Calibrator, WarmStarting, make, thresholds
from calib.distribution import Distribution, Floats
from calib.errors import TrainingError
from calib.qat.distribution import TensorSamples
from calib.qat.grid import to_groups
from calib.qtypes import QuantType

# Weight of the present batch in a running mean, as BatchNorm has it; at first a plain mean.
MOMENTUM = 0.1
# In place of a number of batches: a threshold of this batch alone, and nothing is stored.
ALONE = -1
# In place of an axis.
ACTIVATION, WHOLE_WEIGHT = -1, -2
# Counts of all bfloat16 codes, then the minimum and the maximum.
POOL_SIZE = (1 << 16) + 2


@cache
def _made(spec: str) -> tuple[Calibrator, WarmStarting | None]:
    """The calibrator, and the same again where it takes a warm start."""
    calibrator = make(spec)
    return calibrator, calibrator if isinstance(calibrator, WarmStarting) else None


_qtype = lru_cache(maxsize=None)(QuantType)


@dataclass(frozen=True)
class _State:
    """The buffers of a quantizer."""

    stored: Tensor
    signed: Tensor
    n_seen: Tensor
    pool: Tensor


@dataclass(frozen=True)
class _Spec:
    """The settings of a quantizer."""

    calibrator: str
    bits: int
    axis: int
    batches: int
    name: str

    @property
    def is_weight(self) -> bool:
        return self.axis != ACTIVATION


@torch.library.custom_op(
    "octav_calibrate::observe",
    mutates_args=("stored", "signed", "n_seen", "pool"),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def observe(
    x: Tensor,
    stored: Tensor,
    signed: Tensor,
    n_seen: Tensor,
    pool: Tensor,
    calibrator: str,
    bits: int,
    axis: int,
    batches: int,
    name: str,
) -> Tensor:
    """The threshold to quantize ``x`` with in this step, float32 ``(G,)``.

    Args:
        x: values of any shape and float type; finite.
        stored: float32 ``(G,)``, what evaluation uses; updated: in dynamic mode the running mean
            of an activation's and the last of a weight's thresholds, in static mode their mean
            over the batches so far, or the threshold of all values so far.
        signed: bool ``()``, whether any value ever was negative; updated.
        n_seen: int64 ``()``, how many batches ``stored`` stands for; updated.
        pool: float64 ``(POOL_SIZE,)``, counts of the values so far; updated; or empty.
        calibrator: as `calib.calibrators.make` reads it.
        bits: width.
        axis: of the groups, or `ACTIVATION` or `WHOLE_WEIGHT`.
        batches: of static mode, after which nothing changes; 0 in dynamic mode; or `ALONE`.
        name: of the tensor, for errors.

    Raises:
        TrainingError: if ``x`` holds NaN or infinity; while thresholds are found on all ranks of a
            distributed run.
    """
    state = _State(stored, signed, n_seen, pool)
    spec = _Spec(calibrator, bits, axis, batches, name)
    if x.numel() == 0 and (spec.is_weight or batches == ALONE):
        return stored.clone()
    if 0 < batches <= int(n_seen):
        if x.numel():
            _check_finite(TensorSamples(to_groups(x, None)), name)
        return stored.clone()
    if batches == ALONE:
        warnings.warn(
            "a prepared model is evaluated before it has seen a training batch: activations are "
            "quantized with thresholds of each batch alone",
            stacklevel=2,
        )
    used = _observe_weight(x, state, spec) if spec.is_weight else _observe_input(x, state, spec)
    return stored.clone() if batches > 0 else used


@observe.register_fake
def _shape_of_observed(_x: Tensor, stored: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(stored)


def _observe_weight(x: Tensor, state: _State, spec: _Spec) -> Tensor:
    dist = TensorSamples(to_groups(x, spec.axis if spec.axis >= 0 else None))
    _check_finite(dist, spec.name)
    threshold = _to_tensor(_solve(dist, state, spec, signed=True), state)
    state.stored.copy_(threshold)
    state.signed.fill_(True)
    state.n_seen.add_(1)
    return threshold


def _observe_input(x: Tensor, state: _State, spec: _Spec) -> Tensor:
    # Without values no group: a rank with an empty batch still has to hear of the others'.
    dist = TensorSamples(to_groups(x, None) if x.numel() else x.reshape(0, 1))
    if state.pool.numel():
        finite = x.numel() > 0 and bool(np.isfinite(dist.max_abs()).all())
        _count(x if finite else x.reshape(-1)[:0], state.pool)
        if finite or not x.numel():
            dist = _pooled(state.pool)
    was_signed = bool(state.signed)
    threshold, negative = _agree(dist, state, spec, signed=was_signed)
    if negative and not was_signed:
        state.signed.fill_(True)
        state.n_seen.zero_()  # what is stored belongs to another grid
        threshold, _ = _agree(dist, state, spec, signed=True)
    if threshold is None:  # all zero: no threshold exists
        return state.stored.clone()
    used, n_seen = torch.full_like(state.stored, threshold), int(state.n_seen)
    share = 1 / (n_seen + 1)
    if state.pool.numel():
        share = 1.0
    elif spec.batches == 0:
        share = max(share, MOMENTUM)
    state.stored.lerp_(used, share)
    state.n_seen.add_(1)
    return used


def _agree(
    dist: TensorSamples, state: _State, spec: _Spec, *, signed: bool
) -> tuple[float | None, bool]:
    """The mean threshold over ranks that have one, and whether any saw a negative value."""
    largest = float(dist.max_abs()[0]) if dist.groups else 0.0
    finite, known = bool(np.isfinite(largest)), bool(np.isfinite(largest) and largest > 0)
    threshold = float(_solve(dist, state, spec, signed=signed)[0]) if known else 0.0
    facts = [threshold, known, known and dist.has_negative, not finite]
    ranks = _ranks()
    if spec.batches != ALONE and ranks is not None:
        shared = torch.tensor(facts, dtype=torch.float64, device=state.stored.device)
        distributed.all_reduce(shared, group=ranks)
        facts = shared.tolist()
    total, n_known, negative, broken = facts
    if broken:
        raise _not_finite(spec.name)
    return (total / n_known if n_known else None), bool(negative)


def _solve(dist: TensorSamples, state: _State, spec: _Spec, *, signed: bool) -> Floats:
    calibrator, warm = _made(spec.calibrator)
    qtype = _qtype(spec.bits, signed, spec.is_weight)
    if warm is not None and spec.batches == 0 and int(state.n_seen):
        start = state.stored.double().cpu().numpy()
        calibrator = partial(_refined, warm, start)
    return thresholds(calibrator, dist, qtype)[0]


def _refined(
    calibrator: WarmStarting, start: Floats, dist: Distribution, qtype: QuantType, /
) -> Floats:
    return calibrator.refine(dist, qtype, start)


def _count(x: Tensor, pool: Tensor) -> None:
    """Adds the values of ``x``, on all ranks, to ``pool`` by their bfloat16, as `calib.counter`
    does."""
    values = x.detach().float().reshape(-1)
    codes = ((values.view(torch.int32) + 0x8000) >> 16) & 0xFFFF
    counts = torch.bincount(codes, minlength=POOL_SIZE - 2).to(pool.dtype)
    low, high = values.aminmax() if values.numel() else (pool[-2], pool[-1])
    extremes = torch.stack([-low, high]).to(pool.dtype)
    ranks = _ranks()
    if ranks is not None:
        distributed.all_reduce(counts, group=ranks)
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX, ranks)
    pool[:-2] += counts
    pool[-2] = torch.minimum(pool[-2], -extremes[0])
    pool[-1] = torch.maximum(pool[-1], extremes[1])


def _ranks() -> Any:
    """The process group of the DistributedDataParallel that is running its model; None where none
    is, as only then do all ranks get here together."""
    active = DistributedDataParallel._active_ddp_module
    return None if active is None else active.process_group


def _pooled(pool: Tensor) -> TensorSamples:
    codes = pool[:-2].nonzero()[:, 0]
    if not codes.numel():
        return TensorSamples(pool.new_zeros(0, 1))
    values = (codes << 16).to(torch.int32).view(torch.float32)
    low, high = pool[-2].float(), pool[-1].float()
    values = values.clamp(low, high)
    values[values.argmin()], values[values.argmax()] = low, high  # a bin's centre lies within
    return TensorSamples(values[None], pool[codes])


def _check_finite(dist: TensorSamples, name: str) -> None:
    if not np.isfinite(dist.max_abs()).all():
        raise _not_finite(name)


def _not_finite(name: str) -> TrainingError:
    return TrainingError(
        f"{name}: holds NaN or infinity: the training data does, or training has diverged (try a "
        f"lower learning rate)"
    )


def _to_tensor(vector: Floats, state: _State) -> Tensor:
    return torch.from_numpy(vector).to(state.stored.device, state.stored.dtype)
