"""What of a plan hangs on neither widths nor calibrators: which tensors get a QDQ pair, where it
stands, and how fine its grid is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from calib.errors import ModelError, OptionError, one_line
from calib.granularity import Blocked, Granularity, PerTensor
from calib.graph import Kind, Model, Skipped, Use, quantizable_uses
from calib.placement import Placed, Target, place
from calib.prepare import QUANTIZABLE_OPS
from calib.rules import REDUCED_BITS, Rules, Selection, TensorRule, found
from calib.targets import TARGETS

_NO_RULE = TensorRule("")


@dataclass(frozen=True, slots=True)
class Choice:
    """Of `Rules`, whose fields these are, what is asked here: rules that agree in it differ in
    nothing but widths and calibrators, as far as a plan goes."""

    target: str
    selection: Selection
    overrides: tuple[TensorRule, ...]
    weights_only: bool
    reduce_range: bool
    activations: str
    weight_granularity: str
    block_size: int | None

    @classmethod
    def of(cls, rules: Rules) -> Choice:
        """That of ``rules``."""
        return cls(
            rules.target,
            rules.selection,
            rules.overrides,
            rules.weights_only,
            rules.reduce_range,
            rules.activations,
            rules.weight_granularity,
            rules.block_size,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides on the width and the calibrator of a tensor.

    Attributes:
        kind: of the tensor.
        edges: of every use, whether it is an edge layer's.
        bits, method: what a rule says; None for what holds in general.
    """

    kind: Kind
    edges: frozenset[bool]
    bits: int | None
    method: str | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A tensor that gets a pair, as in `calib.planning.TensorSpec`; ``setting`` is the place of
    its own among `Drafts.settings`."""

    name: str
    kind: Kind
    granularity: Granularity
    consumers: tuple[str, ...]
    dtype: str
    notes: tuple[str, ...]
    grid: str
    shares: tuple[str, ...]
    everyone: bool
    setting: int


@dataclass(frozen=True, slots=True)
class Drafts:
    """What is quantized, in graph order, and what is not and why.

    Attributes:
        settings: each once, with the first tensor that has it; in the order of these.
    """

    tensors: tuple[Draft, ...]
    settings: tuple[tuple[Setting, str], ...]
    skipped: tuple[Skipped, ...]


# By the graph of a model, which does not change: many plans are made for one model, most of them
# by rules of one choice.
_USES: WeakKeyDictionary[object, tuple[tuple[Use, ...], tuple[Skipped, ...]]] = WeakKeyDictionary()
_LATEST: WeakKeyDictionary[object, tuple[Choice, Drafts]] = WeakKeyDictionary()


def drafts(model: Model, choice: Choice) -> Drafts:
    """All tensors of ``model``, which has some, that get a pair.

    Raises:
        OptionError: if the selection or a rule matches nothing, or they leave nothing.
    """
    known = _LATEST.get(model.ir)
    if known is None or known[0] != choice:
        known = _LATEST[model.ir] = choice, _drafts(model, choice)
    return known[1]


def _drafts(model: Model, choice: Choice) -> Drafts:
    uses, skipped = _uses(model)
    target = TARGETS[choice.target]
    _check_patterns(_all_uses(model, uses, target), choice)
    chosen: dict[str, list[Use]] = {}
    left_out: list[Skipped] = []
    for use in uses:
        if choice.weights_only and use.kind == "activation":
            continue
        reason = _reason_against(use, choice) or _refused(use, target)
        reason = reason or _tied(use, uses, target)
        if reason is None:
            chosen.setdefault(use.tensor, []).append(use)
        else:
            left_out.append(Skipped(f"{use.tensor} of {use.node}", reason))
    if not chosen:
        raise OptionError(_nothing_left(model, uses, choice))
    settings: dict[Setting, tuple[int, str]] = {}
    tensors = []
    for placed in _placed(model, chosen, target, choice):
        setting = _setting(placed.uses, choice)
        number, _ = settings.setdefault(setting, (len(settings), placed.uses[0].tensor))
        tensors.append(_draft(placed, choice, number))
    named = tuple((setting, name) for setting, (_, name) in settings.items())
    everything = (*left_out, *_without_weights(uses, choice), *skipped)
    return Drafts(tuple(tensors), named, everything)


def check_uses(model: Model) -> None:
    """Raises `ModelError` if ``model`` has nothing to quantize."""
    uses, skipped = _uses(model)
    if not uses:
        first = one_line(f": {skipped[0].name}: {skipped[0].reason}" if skipped else "")
        raise ModelError(
            f"{model.path}: nothing to quantize: no {', '.join(QUANTIZABLE_OPS)} with float32 or "
            f"float16 inputs{first}"
        )


def _uses(model: Model) -> tuple[tuple[Use, ...], tuple[Skipped, ...]]:
    if model.ir not in _USES:
        _USES[model.ir] = quantizable_uses(model)
    return _USES[model.ir]


def _placed(
    model: Model, chosen: dict[str, list[Use]], target: Target, choice: Choice
) -> Iterable[Placed]:
    """Which tensors get a pair, and who reads it: where nothing spreads, the layers alone."""
    if not target.spreads:
        return [
            Placed(tuple(uses), (), False, tuple(dict.fromkeys(use.node for use in uses)))
            for uses in chosen.values()
        ]

    def allowed(use: Use) -> bool:
        return _reason_against(replace(use, op_type=choice.selection.op_types[0]), choice) is None

    return place(model, target, chosen, allowed).values()


def _draft(placed: Placed, choice: Choice, setting: int) -> Draft:
    """One pair for all uses of a tensor: what a rule says; otherwise per-channel only where all
    agree on the axis."""
    first, rule = placed.uses[0], _rule_for(placed.uses, choice) or _NO_RULE
    granularity, notes = _granularity(placed.uses, choice, rule)
    if first.kind == "weight" and choice.reduce_range and (rule.bits or 0) > REDUCED_BITS:
        notes = (*notes, f"{REDUCED_BITS} bits instead of {rule.bits}, for reduce-range")
    if placed.shares:
        others = len(placed.shares) - 1
        notes = (*notes, f"one grid with {others} other{'s' if others > 1 else ''}")
    return Draft(
        first.tensor,
        first.kind,
        granularity,
        placed.readers,
        first.dtype,
        notes,
        _grid(placed.uses, choice),
        placed.shares,
        placed.everyone,
        setting,
    )


def _setting(uses: Sequence[Use], choice: Choice) -> Setting:
    rule = _rule_for(uses, choice) or _NO_RULE
    return Setting(uses[0].kind, frozenset(use.edge for use in uses), rule.bits, rule.method)


def _grid(uses: Sequence[Use], choice: Choice) -> str:
    weight = uses[0].kind == "weight"
    if weight and any(use.op_type in QUANTIZABLE_OPS for use in uses):
        return "symmetric"
    if (grid := TARGETS[choice.target].grid) != "any":
        return grid
    return "symmetric" if weight else choice.activations


def _granularity(
    uses: Sequence[Use], choice: Choice, rule: TensorRule
) -> tuple[Granularity, tuple[str, ...]]:
    """Of a tensor, and what is to be said of it."""
    if uses[0].kind == "activation":
        return PerTensor(), ()
    axes = {use.inputs for use in uses}
    axis = axes.pop() if len(axes) == 1 else None
    notes = list[str]()
    if choice.block_size is not None:
        if axis is not None and rule.granularity is None:
            return Blocked(axis, choice.block_size), ()
        notes.append("no blocks: only a weight that MatMul or Gemm reads along one axis has any")
    if (rule.granularity or choice.weight_granularity) == "per-channel":
        wanted = {use.granularity for use in uses}
        if len(wanted) == 1:
            return wanted.pop(), tuple(notes)
        notes.append("per-tensor: its consumers want channels along different axes")
    return PerTensor(), tuple(notes)


def _nothing_left(model: Model, uses: tuple[Use, ...], choice: Choice) -> str:
    """Why none of ``uses`` is to be quantized."""
    target = TARGETS[choice.target]
    if choice.weights_only and all(use.kind == "activation" for use in uses):
        return (
            f"{model.path}: activation-bits none leaves nothing to quantize: none of its "
            f"{len(uses)} quantizable tensors is a weight"
        )
    refusals = (_refused(use, target) or _tied(use, uses, target) for use in uses)
    if reason := next(filter(None, refusals), None):
        return f"target {target.name}: nothing left to quantize: {reason}: use target generic"
    last = ", --op-types and rules" if choice.overrides else " and --op-types"
    return f"nothing left to quantize: --only, --exclude{last} leave none"


def _without_weights(uses: tuple[Use, ...], choice: Choice) -> list[Skipped]:
    """Layers that stay float as only weights are quantized, and they have none."""
    weighted = {use.node for use in uses if use.kind == "weight"}
    nodes = dict.fromkeys(use.node for use in uses if use.node not in weighted)
    reason = "it has no weight, and activation-bits is none"
    return [Skipped(node, reason) for node in nodes] if choice.weights_only else []


def _all_uses(model: Model, uses: tuple[Use, ...], target: Target) -> tuple[Use, ...]:
    """All that a rule may name: with a target, also what other operators read and make."""
    if not target.spreads:
        return uses
    of_layers: dict[str, list[Use]] = {}
    for use in uses:
        of_layers.setdefault(use.tensor, []).append(use)
    placed = place(model, target, of_layers, lambda _: True)
    return tuple(use for each in placed.values() for use in each.uses)


def _check_patterns(uses: tuple[Use, ...], choice: Choice) -> None:
    """Raises `OptionError` if a regular expression is found nowhere."""
    nowhere = "matches no node and no tensor; --dry-run lists their names"
    selection = choice.selection
    for what, pattern in (("--only", selection.only), ("--exclude", selection.exclude)):
        if pattern is not None and not any(found(pattern, use) for use in uses):
            raise OptionError(f"{what} {pattern!r} {nowhere}")
    for number, rule in enumerate(choice.overrides):
        if not any(rule.matches(use) for use in uses):
            of_kind = f" of kind {rule.kind}" if rule.kind else ""
            raise OptionError(f"rules[{number}].match: {rule.match!r}{of_kind} {nowhere}")


def _reason_against(use: Use, choice: Choice) -> str | None:
    selection = choice.selection
    if use.op_type not in selection.op_types:
        return f"{use.op_type} is not among --op-types"
    if selection.only is not None and not found(selection.only, use):
        return f"not matched by --only {selection.only!r}"
    if selection.exclude is not None and found(selection.exclude, use):
        return f"matched by --exclude {selection.exclude!r}"
    rule = _rule_for((use,), choice)
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


def _rule_for(uses: Sequence[Use], choice: Choice) -> TensorRule | None:
    """The first rule that matches any of ``uses``."""
    return next((r for r in choice.overrides if any(r.matches(use) for use in uses)), None)
