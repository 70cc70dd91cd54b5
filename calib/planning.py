"""Which tensors get a QDQ pair, at which width and granularity, by which calibrator."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from calib.drafting import Choice, Draft, Setting, check_uses, drafts
from calib.errors import ModelError, OptionError
from calib.granularity import Blocked, Granularity
from calib.graph import Kind, Model, Skipped
from calib.making import maker
from calib.rules import REDUCED_BITS, Rules
from calib.targets import TARGETS, Target

# By the graph of a model, which does not change: weights that are known to be finite.
_FINITE: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to quantize: one QDQ pair, shared by all its ``consumers`` (node names), with a
    threshold of the calibrator that ``method`` names.

    Attributes:
        grid: of an activation: ``symmetric``, by its sign; ``asymmetric``, with a zero point;
            ``auto``: of these what has the smaller error; or ``signed`` whatever its sign.
        shares: names of all activations of one grid, this one among them; empty where alone.
        everyone: all that read the tensor read the pair, and so does an output of the model.
    """

    name: str
    kind: Kind
    bits: int
    granularity: Granularity
    consumers: tuple[str, ...]
    method: str = "octav"
    dtype: str = "float32"
    notes: tuple[str, ...] = ()
    grid: str = "symmetric"
    shares: tuple[str, ...] = ()
    everyone: bool = False


_spec_of = maker(TensorSpec)


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
        OptionError: if the selection or a rule matches nothing, or they leave nothing.
    """
    check_uses(model)
    _check_target(rules, TARGETS[rules.target])
    found = drafts(model, Choice.of(rules))
    settled = [_settled(setting, name, rules) for setting, name in found.settings]
    specs = tuple([_spec(draft, *settled[draft.setting]) for draft in found.tensors])
    _check_finite(model, [spec.name for spec in specs if spec.kind == "weight"])
    if rules.block_size is not None:
        _check_blocks(model, specs, rules.block_size)
    return Plan(specs, found.skipped)


def _spec(draft: Draft, bits: int, method: str) -> TensorSpec:
    return _spec_of(
        draft.name,
        draft.kind,
        bits,
        draft.granularity,
        draft.consumers,
        method,
        draft.dtype,
        draft.notes,
        draft.grid,
        draft.shares,
        draft.everyone,
    )


def _settled(setting: Setting, name: str, rules: Rules) -> tuple[int, str]:
    """The width, the widest of all uses unless a rule says otherwise, and the calibrator.

    Raises:
        OptionError: if the target has no kernels for its width; the tensor ``name`` is named.
    """
    kind = setting.kind
    bits = setting.bits or max(rules.widths.of(kind, edge) for edge in setting.edges)
    if kind == "weight" and rules.reduce_range:
        bits = min(bits, REDUCED_BITS)
    _check_width(bits, kind, name, rules)
    return bits, setting.method or rules.method_for(kind)


def _check_width(bits: int, kind: Kind, name: str, rules: Rules) -> None:
    target = TARGETS[rules.target]
    allowed = target.weight_bits if kind == "weight" else target.activation_bits
    allowed = target.alone_bits if rules.weights_only else allowed
    if not allowed or bits in allowed:
        return
    if kind == "weight" and rules.reduce_range:
        raise OptionError(
            f"target {target.name}: reduce-range is for CPUs without VNNI, {target.runtime} "
            f"computes with {allowed[0]} bits: leave it out"
        )
    widths = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else f"{allowed[0]}"
    edges = bits != rules.widths.of(kind, edge=False)
    raise OptionError(
        f"target {target.name}: {kind} {name!r} of {bits} bits: "
        f"{target.runtime} computes with {widths}{' beside floats' * rules.weights_only}: use "
        f"{kind}-bits {allowed[-1]}{' and edge-bits the same' * edges}, or target generic"
    )


def _check_blocks(model: Model, specs: tuple[TensorSpec, ...], size: int) -> None:
    """Raises `OptionError` if no weight has blocks, or none has more than one."""
    cut = [spec for spec in specs if isinstance(spec.granularity, Blocked)]
    if not cut:
        raise OptionError(
            f"block-size {size}: no weight of a MatMul or Gemm is quantized, and no other can have "
            f"blocks; leave it out, the weights of Conv have a scale a channel"
        )
    longest = max(
        spec.granularity.length(model.weight(spec.name).shape)
        for spec in cut
        if isinstance(spec.granularity, Blocked)
    )
    if longest <= size:
        raise OptionError(
            f"block-size {size}: no weight has more than {longest} values along its input axis, so "
            f"blocks would be whole channels: choose less, or leave it out"
        )


def _check_target(rules: Rules, target: Target) -> None:
    """Raises `OptionError` for settings that are not for this target."""
    if target.name == "generic":
        return
    if rules.block_size is not None and not rules.weights_only:
        raise OptionError(
            f"target {target.name}: block-size {rules.block_size}: beside quantized activations it "
            f"takes a scale a channel: leave block-size out, or make activation-bits none"
        )
    if rules.weight_format != "qdq" and target.name != "onnxruntime":
        raise OptionError(
            f"target {target.name}: weight-format {rules.weight_format} is onnxruntime's own: use "
            f"qdq"
        )
    if rules.activations not in ("symmetric", target.grid):
        raise OptionError(
            f"target {target.name}: activations {rules.activations}: it has {target.grid} grids "
            f"alone: leave activations out"
        )


def _check_finite(model: Model, weights: list[str]) -> None:
    known = _FINITE.setdefault(model.ir, set())
    for name in weights:
        if name not in known and not np.isfinite(model.weight(name)).all():
            raise ModelError(f"{model.path}: weight {name!r} holds NaN or infinity")
        known.add(name)
