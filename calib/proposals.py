"""What to paste into ``octav.yaml``, and what it was measured to bring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from calib.rules import Rules, TensorRule
from calib.sensitivity import Sensitivity
from calib.table import CalibrationTable
from calib.yaml_text import dump


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change of the rules.

    Attributes:
        title: what it is called.
        what: what it does, in one sentence.
        rules: all rules with it.
        yaml: the part of ``octav.yaml`` that differs, ready to paste.
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
    kinds = {record.name: record.spec.kind for record in table.records}
    proposals = []
    names = [name for name in found.widened() if table_bits(table, name) < wide_bits]
    if names and len(found.widened()) < len(found.tensors):
        new = tuple(
            TensorRule(f"^{re.escape(name)}$", kind=kinds[name], bits=wide_bits) for name in names
        )
        proposals.append(_mixed(new, rules, wide_bits))
    layers = found.excluded()
    if layers and len(layers) < len(found.layers):
        proposals.append(_excluding(layers, rules))
    return tuple(proposals)


def table_bits(table: CalibrationTable, name: str) -> int:
    """The width of one tensor."""
    return next(record.qtype.bits for record in table.records if record.name == name)


def _mixed(new: tuple[TensorRule, ...], rules: Rules, wide_bits: int) -> Proposal:
    bits = rules.widths.weights
    changed = replace(rules, overrides=(*new, *rules.overrides))
    return Proposal(
        title=f"mixed {bits}/{wide_bits} bits",
        what=f"{wide_bits} bits for the {len(new)} tensors that hurt the output most",
        rules=changed,
        yaml=dump({**_general(rules), "rules": [_plain(rule) for rule in changed.overrides]}),
    )


def _excluding(layers: Sequence[str], rules: Rules) -> Proposal:
    pattern = f"^(?:{'|'.join(map(re.escape, layers))})$"
    if rules.selection.exclude is not None:
        pattern = f"{pattern}|(?:{rules.selection.exclude})"
    changed = replace(rules, selection=replace(rules.selection, exclude=pattern))
    plain = [_plain(rule) for rule in rules.overrides]
    return Proposal(
        title="worst layers float",
        what=f"the {len(layers)} layers that hurt the output most stay float",
        rules=changed,
        yaml=dump({**_general(rules), "exclude": pattern, **({"rules": plain} if plain else {})}),
    )


def _general(rules: Rules) -> dict[str, object]:
    widths = rules.widths
    edge = {} if widths.edge is None else {"edge-bits": widths.edge}
    return {"bits": widths.weights, **edge, "method": rules.method}


def _plain(rule: TensorRule) -> dict[str, object]:
    return {k: v for k, v in asdict(rule).items() if v is not None and v is not False}
