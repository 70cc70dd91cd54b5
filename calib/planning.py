"""Which tensors get a QDQ pair, at which width and granularity, by which calibrator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from calib.errors import ModelError, OptionError, one_line
from calib.granularity import Blocked, Granularity, PerTensor
from calib.graph import Kind, Model, Skipped, Use, quantizable_uses
from calib.placement import Placed, Target, place
from calib.prepare import QUANTIZABLE_OPS
from calib.rules import REDUCED_BITS, Rules, TensorRule, found
from calib.targets import TARGETS

# By the graph of a model, which does not change: many plans are made for one model.
_USES: WeakKeyDictionary[object, tuple[tuple[Use, ...], tuple[Skipped, ...]]] = WeakKeyDictionary()
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
    if model.ir not in _USES:
        _USES[model.ir] = quantizable_uses(model)
    uses, skipped = _USES[model.ir]
    if not uses:
        first = one_line(f": {skipped[0].name}: {skipped[0].reason}" if skipped else "")
        raise ModelError(
            f"{model.path}: nothing to quantize: no {', '.join(QUANTIZABLE_OPS)} with float32 or "
            f"float16 inputs{first}"
        )
    target = TARGETS[rules.target]
    _check_target(rules, target)
    _check_patterns(_all_uses(model, uses, target), rules)
    chosen: dict[str, list[Use]] = {}
    left_out: list[Skipped] = []
    for use in uses:
        if rules.weights_only and use.kind == "activation":
            continue
        reason = _reason_against(use, rules) or _refused(use, target)
        reason = reason or _tied(use, uses, target)
        if reason is None:
            chosen.setdefault(use.tensor, []).append(use)
        else:
            left_out.append(Skipped(f"{use.tensor} of {use.node}", reason))
    if not chosen:
        raise OptionError(_nothing_left(model, uses, rules))
    specs = tuple(_specs(model, chosen, target, rules))
    _check_finite(model, [spec.name for spec in specs if spec.kind == "weight"])
    if rules.block_size is not None:
        _check_blocks(model, specs, rules.block_size)
    return Plan(specs, (*left_out, *_without_weights(uses, rules), *skipped))


def _nothing_left(model: Model, uses: tuple[Use, ...], rules: Rules) -> str:
    """Why none of ``uses`` is to be quantized."""
    target = TARGETS[rules.target]
    if rules.weights_only and all(use.kind == "activation" for use in uses):
        return (
            f"{model.path}: activation-bits none leaves nothing to quantize: none of its "
            f"{len(uses)} quantizable tensors is a weight"
        )
    refusals = (_refused(use, target) or _tied(use, uses, target) for use in uses)
    if reason := next(filter(None, refusals), None):
        return f"target {target.name}: nothing left to quantize: {reason}: use target generic"
    last = ", --op-types and rules" if rules.overrides else " and --op-types"
    return f"nothing left to quantize: --only, --exclude{last} leave none"


def _without_weights(uses: tuple[Use, ...], rules: Rules) -> list[Skipped]:
    """Layers that stay float as only weights are quantized, and they have none."""
    weighted = {use.node for use in uses if use.kind == "weight"}
    nodes = dict.fromkeys(use.node for use in uses if use.node not in weighted)
    reason = "it has no weight, and activation-bits is none"
    return [Skipped(node, reason) for node in nodes] if rules.weights_only else []


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


def _specs(
    model: Model, chosen: dict[str, list[Use]], target: Target, rules: Rules
) -> Iterator[TensorSpec]:
    if not target.spreads:
        for group in chosen.values():
            yield _on_target(_merge(group, rules), rules, group)
        return

    def allowed(use: Use) -> bool:
        return _reason_against(replace(use, op_type=rules.selection.op_types[0]), rules) is None

    for placed in place(model, target, chosen, allowed).values():
        yield _on_target(_placed(placed, rules), rules, placed.uses)


def _placed(placed: Placed, rules: Rules) -> TensorSpec:
    spec = replace(
        _merge(list(placed.uses), rules),
        consumers=placed.readers,
        everyone=placed.everyone,
        shares=placed.shares,
    )
    if placed.shares:
        others = len(placed.shares) - 1
        note = f"one grid with {others} other{'s' if others > 1 else ''}"
        spec = replace(spec, notes=(*spec.notes, note))
    return spec


def _on_target(spec: TensorSpec, rules: Rules, uses: Sequence[Use]) -> TensorSpec:
    """``spec`` on the grid of the target.

    Raises:
        OptionError: if the target has no kernels for its width.
    """
    target = TARGETS[rules.target]
    allowed = target.weight_bits if spec.kind == "weight" else target.activation_bits
    allowed = target.alone_bits if rules.weights_only else allowed
    if allowed and spec.bits not in allowed:
        if spec.kind == "weight" and rules.reduce_range:
            raise OptionError(
                f"target {target.name}: reduce-range is for CPUs without VNNI, {target.runtime} "
                f"computes with {allowed[0]} bits: leave it out"
            )
        widths = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else f"{allowed[0]}"
        raise OptionError(
            f"target {target.name}: {spec.kind} {spec.name!r} of {spec.bits} bits: "
            f"{target.runtime} computes with {widths}{' beside floats' * rules.weights_only}: use "
            f"{spec.kind}-bits {allowed[-1]}{_and_edges(spec, rules)}, or target generic"
        )
    of_layer = any(use.op_type in QUANTIZABLE_OPS for use in uses)
    of_layer = of_layer and spec.kind == "weight"
    return spec if of_layer or target.grid == "any" else replace(spec, grid=target.grid)


def _and_edges(spec: TensorSpec, rules: Rules) -> str:
    edges = spec.bits != rules.widths.of(spec.kind, edge=False)
    return " and edge-bits the same" if edges else ""


def _check_finite(model: Model, weights: list[str]) -> None:
    known = _FINITE.setdefault(model.ir, set())
    for name in weights:
        if name not in known and not np.isfinite(model.weight(name)).all():
            raise ModelError(f"{model.path}: weight {name!r} holds NaN or infinity")
        known.add(name)


def _all_uses(model: Model, uses: tuple[Use, ...], target: Target) -> tuple[Use, ...]:
    """All that a rule may name: with a target, also what other operators read and make."""
    if not target.spreads:
        return uses
    of_layers: dict[str, list[Use]] = {}
    for use in uses:
        of_layers.setdefault(use.tensor, []).append(use)
    placed = place(model, target, of_layers, lambda _: True)
    return tuple(use for each in placed.values() for use in each.uses)


def _check_patterns(uses: tuple[Use, ...], rules: Rules) -> None:
    """Raises `OptionError` if a regular expression is found nowhere."""
    nowhere = "matches no node and no tensor; --dry-run lists their names"
    selection = rules.selection
    for what, pattern in (("--only", selection.only), ("--exclude", selection.exclude)):
        if pattern is not None and not any(found(pattern, use) for use in uses):
            raise OptionError(f"{what} {pattern!r} {nowhere}")
    for number, rule in enumerate(rules.overrides):
        if not any(rule.matches(use) for use in uses):
            of_kind = f" of kind {rule.kind}" if rule.kind else ""
            raise OptionError(f"rules[{number}].match: {rule.match!r}{of_kind} {nowhere}")


def _reason_against(use: Use, rules: Rules) -> str | None:
    selection = rules.selection
    if use.op_type not in selection.op_types:
        return f"{use.op_type} is not among --op-types"
    if selection.only is not None and not found(selection.only, use):
        return f"not matched by --only {selection.only!r}"
    if selection.exclude is not None and found(selection.exclude, use):
        return f"matched by --exclude {selection.exclude!r}"
    rule = _rule_for([use], rules)
    return f"matched by rule {rule.match!r}" if rule is not None and rule.skip else None


def _refused(use: Use, target: Target) -> str | None:
    if use.dtype == "float16" and not target.half:
        return f"{use.tensor!r} is float16, the integer kernels of {target.runtime} give float32"
    return None


def _tied(use: Use, uses: Sequence[Use], target: Target) -> str | None:
    """OpenVINO 2026.4 computes something else where two convolutions, one of them with a bias,
    read one quantized weight; also through DequantizeLinear nodes of their own."""
    if target.tied:
        return None
    for weight in uses:
        if weight.node == use.node and weight.kind == "weight":
            readers = {other.node for other in uses if other.tensor == weight.tensor}
            if len(readers) > 1:
                return f"{target.runtime} mixes up layers that share {weight.tensor!r}"
    return None


def _rule_for(uses: list[Use], rules: Rules) -> TensorRule | None:
    """The first rule that matches any of ``uses``."""
    return next((r for r in rules.overrides if any(r.matches(use) for use in uses)), None)


def _merge(uses: list[Use], rules: Rules) -> TensorSpec:
    """One set of parameters for all uses of a tensor: what a rule says; otherwise the widest, and
    per-channel only where all agree on the axis."""
    kind = uses[0].kind
    rule = _rule_for(uses, rules) or TensorRule("")
    bits = rule.bits or max(rules.widths.of(kind, use.edge) for use in uses)
    if kind == "weight" and rules.reduce_range:
        bits = min(bits, REDUCED_BITS)
    granularity, notes = _granularity(uses, rules, rule)
    if rule.bits is not None and rule.bits > bits:
        notes = (*notes, f"{bits} bits instead of {rule.bits}, for reduce-range")
    return TensorSpec(
        uses[0].tensor,
        kind,
        bits,
        granularity,
        consumers=tuple(dict.fromkeys(use.node for use in uses)),
        method=rule.method or rules.method_for(kind),
        dtype=uses[0].dtype,
        notes=notes,
        grid=rules.activations if kind == "activation" else "symmetric",
    )


def _granularity(
    uses: list[Use], rules: Rules, rule: TensorRule
) -> tuple[Granularity, tuple[str, ...]]:
    """Of a tensor, and what is to be said of it."""
    if uses[0].kind == "activation":
        return PerTensor(), ()
    axes = {use.inputs for use in uses}
    axis = axes.pop() if len(axes) == 1 else None
    notes = list[str]()
    if rules.block_size is not None:
        if axis is not None and rule.granularity is None:
            return Blocked(axis, rules.block_size), ()
        notes.append("no blocks: only a weight that MatMul or Gemm reads along one axis has any")
    if (rule.granularity or rules.weight_granularity) == "per-channel":
        wanted = {use.granularity for use in uses}
        if len(wanted) == 1:
            return wanted.pop(), tuple(notes)
        notes.append("per-tensor: its consumers want channels along different axes")
    return PerTensor(), tuple(notes)
