"""The quantizer of one tensor of a layer: its settings, its threshold, its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.granularity import PerChannel, PerTensor
from calib.graph import Kind
from calib.qat.estimators import (
    LEARNED,
    fake_quantize,
    learn_scale,
    learn_threshold,
    learned_scale,
)
from calib.qat.grid import Grid
from calib.qat.observing import ACTIVATION, ALONE, POOL_SIZE, WHOLE_WEIGHT, observe
from calib.qtypes import QuantType


@dataclass(frozen=True)
class TensorSettings:
    """How one tensor is quantized in training.

    Attributes:
        name: ``layer.weight`` or ``layer.activation``, for messages.
        kind: of the tensor.
        bits: width.
        axis: of the channels that have thresholds of their own; None for one threshold.
        calibrator: as `calib.calibrators.make` reads it.
        batches: 0 in dynamic mode; in static mode, how many batches calibrate.
        pooled: static: one threshold for the values of all batches, instead of a mean.
        gradient: one of `calib.qat.estimators.ESTIMATORS` or `LEARNED`.
    """

    name: str
    kind: Kind
    bits: int
    axis: int | None
    calibrator: str
    batches: int
    pooled: bool
    gradient: str

    @property
    def is_weight(self) -> bool:
        """Whether it is about a weight."""
        return self.kind == "weight"

    @property
    def granularity(self) -> PerTensor | PerChannel:
        """Of the thresholds."""
        return PerTensor() if self.axis is None else PerChannel(self.axis)


class Quantizer(nn.Module):
    """Quantizes and dequantizes a tensor with a threshold that follows it.

    Buffers: ``threshold`` float32 ``(G,)``, what evaluation and export use; ``signed`` bool
    ``()``; ``n_seen`` int64 ``()``, how many batches it stands for, 0 where there is none yet.
    With a learned gradient (``pact``, ``lsq``) the parameter ``learned`` ``(G,)`` takes over from
    the first batch on: a threshold, or a scale.

    Args:
        settings: see there.
        groups: G.
    """

    threshold: Tensor
    signed: Tensor
    n_seen: Tensor
    pool: Tensor

    def __init__(self, settings: TensorSettings, groups: int) -> None:
        super().__init__()
        self.settings = settings
        self.observed = False  # n_seen > 0, without waiting for a GPU
        self.recent: tuple[Tensor, Tensor] | None = None
        self.marker: Callable[[Tensor, str], Tensor] | None = None
        self.register_buffer("threshold", torch.ones(groups, dtype=torch.float32))
        self.register_buffer("signed", torch.tensor(settings.is_weight))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pool", torch.zeros(0), persistent=False)
        self.reset()
        if settings.gradient in LEARNED:
            self.learned = nn.Parameter(torch.ones(groups, dtype=torch.float32))

    @property
    def grid(self) -> Grid:
        """The integers."""
        return Grid(self.settings.bits, narrow=self.settings.is_weight)

    @property
    def qtype(self) -> QuantType:
        """The integers, now that the sign is known."""
        weight = self.settings.is_weight
        return QuantType(self.settings.bits, bool(self.signed), narrow=weight)

    def current(self) -> Tensor:
        """The threshold that evaluation uses: float32 ``(G,)``."""
        if self.settings.gradient == "lsq":
            return learned_scale(self.learned.detach()) * self.grid.steps(self.signed)
        if self.settings.gradient == "pact":
            return self.learned.detach().float().abs()
        return self.threshold

    def reset(self) -> None:
        """Forgets what it has seen."""
        self.observed, self.recent = False, None
        self.n_seen.zero_()
        self.signed.fill_(self.settings.is_weight)
        if self.settings.pooled:
            self.pool = torch.zeros(POOL_SIZE, dtype=torch.float64, device=self.n_seen.device)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` quantized and dequantized: same shape and dtype."""
        if x.is_nested:  # what torch makes of padded sequences in evaluation
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        s = self.settings
        if self.marker is not None:
            return self.marker(x, s.name)
        if not self.observed and not torch.compiler.is_compiling():
            self.observed = bool(self.n_seen > 0)  # buffers may come from another model, or rank
        was_observed = self.observed
        threshold, signed = self._threshold(x)
        if s.gradient in LEARNED and self.observed:
            if not was_observed:
                self._start(threshold)
            if s.gradient == "lsq":
                return learn_scale(x, self.learned, signed, s.bits, s.is_weight, s.axis)
            return learn_threshold(x, self.learned, signed, s.bits)
        estimator = "pwl" if s.gradient in LEARNED else s.gradient
        return fake_quantize(x, threshold, signed, s.bits, s.is_weight, s.axis, estimator)

    def _threshold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Threshold and sign for ``x``: of this step in training, otherwise what is stored; copies,
        as backward needs them and a shared layer moves on before."""
        if self.training or (self.settings.is_weight and not self.observed):
            if self.recent is not None and _recomputing():
                return self.recent
            threshold = self._observe(x, self._state(), self.settings.batches)
            if not self.observed:  # of nothing but zeros nothing is known yet
                self.observed = torch.compiler.is_compiling() or bool(self.n_seen > 0)
            signed = self.signed.clone()
            self.recent = None if torch.compiler.is_compiling() else (threshold, signed)
            return threshold, signed
        if self.observed:
            return self.threshold.clone(), self.signed.clone()
        state = [buffer.clone() for buffer in self._state()]
        return self._observe(x, state, ALONE), state[1]

    def _start(self, threshold: Tensor) -> None:
        """Lets the parameter start from the calibrator's threshold."""
        steps = self.grid.steps(self.signed) if self.settings.gradient == "lsq" else 1.0
        with torch.no_grad():
            self.learned.copy_(threshold / steps)

    def _state(self) -> list[Tensor]:
        return [self.threshold, self.signed, self.n_seen, self.pool]

    def _observe(self, x: Tensor, state: list[Tensor], batches: int) -> Tensor:
        s = self.settings
        axis = (WHOLE_WEIGHT if s.is_weight else ACTIVATION) if s.axis is None else s.axis
        with torch.no_grad():
            threshold: Tensor = observe(
                x.detach(), *state, s.calibrator, s.bits, axis, batches, s.name
            )
        return threshold

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        """Moves to another device as other modules do, but stays float32: a threshold in bfloat16
        would be off by up to 0.4 %."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads a checkpoint; from that of a float model nothing, so that what was seen of other
        weights is forgotten and nothing is missing."""
        if not any(key.startswith(prefix) for key in state_dict):
            self.reset()
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.observed = bool(self.n_seen > 0)

    def extra_repr(self) -> str:
        """Width, granularity, calibrator, mode and gradient."""
        s = self.settings
        mode = f"static over {s.batches} batches" if s.batches else "dynamic"
        return f"{s.bits} bits, {s.granularity}, {s.calibrator}, {mode}, {s.gradient}"


def _recomputing() -> bool:
    """Whether gradient checkpointing runs a layer again, in backward: the threshold is that of the
    first time."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
