"""Which tensors get a QDQ pair, at which width and granularity.

The placement is the paper's: both inputs of every Conv, ConvTranspose, Gemm and MatMul.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from calib.calibrators import make
from calib.errors import ModelError, OptionError
from calib.granularity import Granularity, PerTensor
from calib.graph import Kind, Model, Skipped, Use, quantizable_uses
from calib.prepare import QUANTIZABLE_OPS
from calib.qtypes import check_width

WEIGHT_GRANULARITIES = ("per-channel", "per-tensor")
REDUCTIONS = ("pool", "mean")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which uses of tensors are quantized.

    Args:
        only: regular expression; only uses whose node or tensor name it is found in.
        exclude: regular expression; no use whose node or tensor name it is found in.
        op_types: only inputs of nodes of these types.

    Raises:
        OptionError: for an invalid regular expression or an operator that is not supported.
    """

    only: str | None = None
    exclude: str | None = None
    op_types: tuple[str, ...] = QUANTIZABLE_OPS

    def __post_init__(self) -> None:
        for what, pattern in (("only", self.only), ("exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise OptionError(
                    f"{what}: {pattern!r} is no regular expression: {error}"
                ) from None
        for op_type in self.op_types:
            if op_type not in QUANTIZABLE_OPS:
                raise OptionError(
                    f"op-types: {op_type!r} is not supported, only {', '.join(QUANTIZABLE_OPS)}"
                )


@dataclass(frozen=True, slots=True)
class Widths:
    """Bits of weights, of activations, and of both in the first and last weighted layers.

    ``edge`` None: 8, or the width of the rest where that is more.

    Raises:
        OptionError: if one is not 2 to 8 or 16.
    """

    weights: int = 8
    activations: int = 8
    edge: int | None = None

    def __post_init__(self) -> None:
        check_width(self.weights, "weight-bits")
        check_width(self.activations, "activation-bits")
        if self.edge is not None:
            check_width(self.edge, "edge-bits")

    def of(self, kind: Kind, edge: bool) -> int:
        """The bits of a tensor of that kind, used by an edge layer or not."""
        bits = self.weights if kind == "weight" else self.activations
        if not edge:
            return bits
        return max(8, bits) if self.edge is None else self.edge


@dataclass(frozen=True, slots=True)
class Reduction:
    """How activations of many batches become one threshold.

    ``pool``: from the counts of all samples together. ``mean``: one threshold for each of the
    first ``batches`` batches, averaged (OCTAV, section 5, static calibration: 5).

    Raises:
        OptionError: for another name, or fewer than one batch.
    """

    name: Literal["pool", "mean"] = "pool"
    batches: int = 5

    def __post_init__(self) -> None:
        if self.name not in REDUCTIONS:
            raise OptionError(f"reduce must be pool or mean, got {self.name!r}")
        if self.batches < 1:
            raise OptionError(f"mean-batches must be at least 1, got {self.batches}")

    @property
    def kept_batches(self) -> int:
        """How many batches need counters of their own."""
        return self.batches if self.name == "mean" else 0


@dataclass(frozen=True, slots=True)
class Rules:
    """Tensor → width, granularity and calibrator.

    Args:
        widths: bits.
        method: calibrator, as `calib.calibrators.make` reads it.
        weight_method: another one for weights; None for the same.
        weight_granularity: ``per-channel`` or ``per-tensor``.
        reduction: of activations over batches.
        selection: which uses of tensors are quantized at all.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown or out of bounds.
    """

    widths: Widths = field(default_factory=Widths)
    method: str = "octav"
    weight_method: str | None = None
    weight_granularity: str = "per-channel"
    reduction: Reduction = field(default_factory=Reduction)
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        if self.weight_granularity not in WEIGHT_GRANULARITIES:
            raise OptionError(
                f"weight-granularity must be {' or '.join(WEIGHT_GRANULARITIES)}, "
                f"got {self.weight_granularity!r}"
            )
        make(self.method)
        make(self.method_for("weight"))

    def method_for(self, kind: Kind) -> str:
        """The calibrator of tensors of that kind."""
        return self.weight_method or self.method if kind == "weight" else self.method


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to quantize: one QDQ pair, shared by all its ``consumers`` (node names)."""

    name: str
    kind: Kind
    bits: int
    granularity: Granularity
    consumers: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is quantized, and what is not and why."""

    specs: tuple[TensorSpec, ...]
    skipped: tuple[Skipped, ...]

    @property
    def activations(self) -> tuple[str, ...]:
        """Names of the activations to observe."""
        return tuple(spec.name for spec in self.specs if spec.kind == "activation")


def make_plan(model: Model, rules: Rules) -> Plan:
    """Decides for every tensor, in graph order.

    Raises:
        ModelError: if the model has nothing to quantize, or a weight is not finite.
        OptionError: if the selection matches nothing, or leaves nothing.
    """
    uses, skipped = quantizable_uses(model)
    if not uses:
        raise ModelError(
            f"{model.path}: nothing to quantize: no {', '.join(QUANTIZABLE_OPS)} with float32 "
            f"inputs{': ' + skipped[0].name + ': ' + skipped[0].reason if skipped else ''}"
        )
    chosen, left_out = _select(uses, rules.selection)
    specs = tuple(_merge(group, rules) for group in _by_tensor(chosen).values())
    for spec in specs:
        if spec.kind == "weight" and not np.isfinite(model.weight(spec.name)).all():
            raise ModelError(f"{model.path}: weight {spec.name!r} holds NaN or infinity")
    return Plan(specs, (*left_out, *skipped))


def _select(uses: tuple[Use, ...], selection: Selection) -> tuple[list[Use], list[Skipped]]:
    for what, pattern in (("--only", selection.only), ("--exclude", selection.exclude)):
        if pattern is not None and not any(_matches(pattern, use) for use in uses):
            raise OptionError(
                f"{what} {pattern!r} matches no node and no tensor; --dry-run lists their names"
            )
    chosen: list[Use] = []
    left_out: list[Skipped] = []
    for use in uses:
        reason = _reason_against(use, selection)
        if reason is None:
            chosen.append(use)
        else:
            left_out.append(Skipped(f"{use.tensor} of {use.node}", reason))
    if not chosen:
        raise OptionError("nothing left to quantize: --only, --exclude and --op-types leave none")
    return chosen, left_out


def _reason_against(use: Use, selection: Selection) -> str | None:
    if use.op_type not in selection.op_types:
        return f"{use.op_type} is not among --op-types"
    if selection.only is not None and not _matches(selection.only, use):
        return f"not matched by --only {selection.only!r}"
    if selection.exclude is not None and _matches(selection.exclude, use):
        return f"matched by --exclude {selection.exclude!r}"
    return None


def _matches(pattern: str, use: Use) -> bool:
    return bool(re.search(pattern, use.node) or re.search(pattern, use.tensor))


def _by_tensor(uses: list[Use]) -> dict[str, list[Use]]:
    groups: dict[str, list[Use]] = {}
    for use in uses:
        groups.setdefault(use.tensor, []).append(use)
    return groups


def _merge(uses: list[Use], rules: Rules) -> TensorSpec:
    """One set of parameters for all uses of a tensor: the widest, and per-channel only where
    all agree on the axis."""
    kind = uses[0].kind
    bits = max(rules.widths.of(kind, use.edge) for use in uses)
    granularity: Granularity = PerTensor()
    notes: tuple[str, ...] = ()
    if kind == "weight" and rules.weight_granularity == "per-channel":
        wanted = {use.granularity for use in uses}
        if len(wanted) == 1:
            granularity = wanted.pop()
        else:
            notes = ("per-tensor: its consumers want channels along different axes",)
    consumers = tuple(dict.fromkeys(use.node for use in uses))
    return TensorSpec(uses[0].tensor, kind, bits, granularity, consumers, notes)
