"""What a comparison of methods has found, on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ._show import samples, stdout_console

if TYPE_CHECKING:
    from pathlib import Path

    from calib.sensitivity import Damage
    from calib.survey import Measured, Row, Survey

_FEW = 5


def show_survey(survey: Survey, files: tuple[Path, ...], verbose: bool) -> None:
    """The table, the tensors that hurt, and what mends them; ``verbose``: every tensor."""
    console = stdout_console()
    console.print(_rows(survey))
    if survey.sensitivity is not None:
        ranked = survey.sensitivity.tensors
        console.print(_damages(survey, ranked if verbose else ranked[:_FEW]))
    for measured in survey.proposals:
        console.print(_proposal(measured), soft_wrap=True)
        if survey.run.report is None:
            console.print(escape(measured.proposal.yaml), soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for title, text in (*(("written", str(path)) for path in files), *_facts(survey)):
        grid.add_row(f"[bold]{title}[/]", escape(text))
    console.print(grid)


def _rows(survey: Survey) -> Table:
    first = next((row.comparison for row in survey.rows if row.comparison), None)
    columns: dict[str, Callable[[Row], str]] = {
        "bits": lambda row: str(row.bits),
        "method": lambda row: row.method,
        "SQNR dB": lambda row: _decibels(row.sqnr_db),
        "vs max": lambda row: "" if row.gain_db is None else f"{row.gain_db:+.1f}",
        "agreement": lambda row: _share(row.comparison.agreement if row.comparison else None),
        "top-1": _top1,
        "metric": _metric,
        "size": lambda row: _share(row.size_ratio, 0),
        "seconds": lambda row: f"{row.seconds:.2f}",
    }
    if first is None or first.agreement is None:
        del columns["agreement"]
    if first is None or first.top1 is None:
        del columns["top-1"]
    if first is None or first.scores is None:
        del columns["metric"]
    table = Table(box=None)
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    best = _best(survey)
    for row in survey.rows:
        style = "bold" if row in best else None
        table.add_row(*(escape(cell(row)) for cell in columns.values()), style=style)
    if first is not None and first.top1 is not None:
        table.caption = f"float top-1: {first.top1.float_model:.2f} %"
    return table


def _best(survey: Survey) -> list[Row]:
    """The row with the highest output SQNR at each width."""
    known = [row for row in survey.rows if row.sqnr_db is not None]
    widths = dict.fromkeys(row.bits for row in known)
    return [max((r for r in known if r.bits == b), key=lambda r: r.sqnr_db or 0.0) for b in widths]


def _damages(survey: Survey, ranked: tuple[Damage, ...]) -> Table:
    assert survey.sensitivity is not None
    method, bits = survey.detailed
    low = f"{method} at {bits} bits"
    table = Table(f"tensors that hurt, {low}", "kind", box=None)
    for title in ("alone dB", "all but it dB"):
        table.add_column(title, justify="right")
    for damage in ranked:
        alone = _decibels(damage.alone_db) + ("?" if damage.estimated else "")
        cells = (damage.name, damage.kind, alone, _decibels(damage.all_but_db))
        table.add_row(*map(escape, cells))
    return table


def _proposal(measured: Measured) -> str:
    before, after = measured.before, measured.after
    text = f"{_decibels(before.sqnr_db)} -> {_decibels(after.sqnr_db)} dB"
    if (top1 := _top1(after)) != "-":
        text = f"{text}, top-1 {_top1(before)} -> {top1} %"
    text = f"{text}, weights {_share(before.size_ratio, 0)} -> {_share(after.size_ratio, 0)}"
    if not measured.saves:
        text = f"{text}: no smaller than all at more bits ({_share(measured.wide_size_ratio, 0)})"
    return f"[bold]{measured.proposal.title}[/]: {escape(measured.proposal.what)}: {text}"


def _facts(survey: Survey) -> list[tuple[str, str]]:
    n_samples = next((row.comparison.n_samples for row in survey.rows if row.comparison), 0)
    seen = "that calibration did not see" if survey.held_out else "of the calibration samples"
    what = f"{samples(n_samples)} {seen}"
    facts = [("compared on", f"{n_samples} made-up inputs" if survey.made_up else what)]
    if survey.confidence is not None:
        facts.append(("thresholds", survey.confidence.text))
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in survey.seconds.items())
    facts.append(("seconds", stages))
    facts.extend(("note", note) for note in survey.notes)
    return facts


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "inf" if value > 0 else "-inf"


def _share(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _top1(row: Row) -> str:
    top1 = row.comparison.top1 if row.comparison else None
    return "-" if top1 is None else f"{top1.quantized_model:.2f}"


def _metric(row: Row) -> str:
    scores = row.comparison.scores if row.comparison else None
    return "-" if scores is None else f"{scores.quantized_model:.6g}"
