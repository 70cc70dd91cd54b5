"""What to paste into ``octav.yaml``, and what it was measured to bring."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from calib.planning import TensorSpec
from calib.rules import Rules, TensorRule
from calib.sensitivity import Sensitivity
from calib.settings import key_of
from calib.table import CalibrationTable
from calib.yaml_text import dump

_WHEN_UNUSUAL = (
    *("weight_granularity", "activations", "block_size", "weight_format", "target"),
    *("reduce_range", "bias_correction", "equalize"),
)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change of the rules.

    Attributes:
        title: what it is called.
        what: what it does, in one sentence.
        rules: all rules with it.
        yaml: them as ``octav.yaml`` has them, ready to paste.
    """

    title: str
    what: str
    rules: Rules
    yaml: str


def propose(
    found: Sensitivity, rules: Rules, table: CalibrationTable, wide_bits: int
) -> tuple[Proposal, ...]:
    """Rules that give the worst tensors ``wide_bits``, and a list of layers to keep float, each
    as short as reaches ``found.target_db``; nothing where all tensors or layers would be in it."""
    records = {record.name: record for record in table.records}
    proposals = []
    worst = [records[name] for name in found.widened()]
    narrow = [record.spec for record in worst if record.qtype.bits < wide_bits]
    if narrow and len(worst) < len(found.tensors):
        proposals.append(_mixed(narrow, rules, wide_bits))
    layers = found.excluded()
    if layers and len(layers) < len(found.layers):
        proposals.append(_excluding(layers, rules))
    return tuple(proposals)


def _mixed(worst: Sequence[TensorSpec], rules: Rules, wide_bits: int) -> Proposal:
    """Each tensor gets a rule before the one that decides on it now, of which it keeps the rest."""
    overrides = list(rules.overrides)
    for spec in worst:
        old = next((rule for rule in rules.overrides if _decides(rule, spec)), None)
        match = f"^{re.escape(spec.name)}$"
        new = replace(old or TensorRule(match), match=match, kind=spec.kind, bits=wide_bits)
        overrides.insert(overrides.index(old) if old else len(overrides), new)
    changed = replace(rules, overrides=tuple(overrides))
    return Proposal(
        title=f"mixed {rules.widths.weights}/{wide_bits} bits",
        what=f"{wide_bits} bits for the {_most(len(worst), 'tensor')}",
        rules=changed,
        yaml=_yaml(changed),
    )


def _decides(rule: TensorRule, spec: TensorSpec) -> bool:
    names = (spec.name, *spec.consumers)
    return rule.kind in (None, spec.kind) and any(re.search(rule.match, name) for name in names)


def _excluding(layers: Sequence[str], rules: Rules) -> Proposal:
    pattern = f"^(?:{'|'.join(map(re.escape, layers))})$"
    if rules.selection.exclude is None:
        changed = replace(rules, selection=replace(rules.selection, exclude=pattern))
    else:  # the user's pattern may have flags, which can stand at its beginning alone
        skipping = TensorRule(pattern, skip=True)
        changed = replace(rules, overrides=(skipping, *rules.overrides))
    return Proposal(
        title="worst layers float",
        what=f"float for the {_most(len(layers), 'layer')}",
        rules=changed,
        yaml=_yaml(changed),
    )


def _most(n: int, thing: str) -> str:
    which = f"{n} {thing}s that hurt" if n > 1 else f"{thing} that hurts"
    return f"{which} the output most"


def _yaml(rules: Rules) -> str:
    """All of ``rules`` that is not what holds without saying so."""
    selection, usual = rules.selection, Rules()
    settings: dict[str, object] = {"bits": rules.widths.weights, "edge-bits": rules.widths.edge}
    settings["method"] = rules.method
    for name in _WHEN_UNUSUAL:
        if (value := getattr(rules, name)) != getattr(usual, name):
            settings[key_of(name)] = value
    if rules.reduction.name != usual.reduction.name:
        settings |= {"reduce": rules.reduction.name, "mean-batches": rules.reduction.batches}
    settings |= {"only": selection.only, "exclude": selection.exclude}
    if selection.op_types != usual.selection.op_types:
        settings["op-types"] = list(selection.op_types)
    if rules.overrides:
        settings["rules"] = [_plain(asdict(rule)) for rule in rules.overrides]
    return dump(_plain(settings))


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in settings.items() if v is not None and v is not False}
