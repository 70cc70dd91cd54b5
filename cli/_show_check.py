"""What a check has found, on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ._show import stdout_console

if TYPE_CHECKING:
    from calib.comparison import Comparison
    from calib.gate import Check


def show_check(check: Check, verbose: bool) -> None:
    """The figures, the verdicts, and the tensor that stands out; ``verbose``: every tensor."""
    console = stdout_console()
    if verbose and check.inspection.tensors:
        console.print(_tensors(check))
    grid = Table.grid(padding=(0, 2))
    for title, text in _rows(check):
        grid.add_row(title, escape(text))
    console.print(grid)
    for verdict in check.verdicts:
        color = "green" if verdict.holds else "bold red"
        console.print(f"[{color}]{escape(verdict.text)}[/]", soft_wrap=True)


def _rows(check: Check) -> Iterator[tuple[str, str]]:
    before, after = check.float_model.n_bytes, check.quantized.n_bytes
    yield "float", str(check.float_model.path)
    yield "quantized", str(check.quantized.path)
    ratio = after / before
    yield "size", f"{before / 1000:,.0f} kB -> {after / 1000:,.0f} kB ({ratio:.0%})"
    if check.comparison is not None:
        yield from _figures(check.comparison, check.n_skipped)
    yield "tensors", check.inspection.text
    for note in check.notes:
        yield "note", note


def _figures(comparison: Comparison, n_skipped: int) -> Iterator[tuple[str, str]]:
    unseen = " that calibration did not see" if n_skipped else ""
    yield "samples", f"{comparison.n_samples}{unseen}"
    for name, db in comparison.sqnr_db.items():
        sqnr = f"{db:.1f} dB" if math.isfinite(db) else "infinite"
        cosine, largest = comparison.cosine[name], comparison.max_error[name]
        yield "output", f"{name}: SQNR {sqnr}, cosine {cosine:.6g}, largest error {largest:.4g}"
    if comparison.agreement is not None:
        yield "agreement", f"{comparison.agreement:.2%}"
    top1, scores = comparison.top1, comparison.scores
    if top1 is not None:
        text = f"float {top1.float_model:.2f} %, quantized {top1.quantized_model:.2f} %"
        yield "top-1", text
    if scores is not None:
        text = f"float {scores.float_model:.6g}, quantized {scores.quantized_model:.6g}"
        yield "metric", f"{scores.name}: {text}"


def _tensors(check: Check) -> Table:
    table = Table("tensor", "made by", "SQNR dB", box=None)
    jump = check.inspection.first
    for tensor in check.inspection.tensors:
        db = f"{tensor.sqnr_db:.1f}" if math.isfinite(tensor.sqnr_db) else str(tensor.sqnr_db)
        mark = " <- stands out" if jump is not None and jump.tensor is tensor else ""
        table.add_row(*map(escape, (tensor.name, tensor.op_type, f"{db}{mark}")))
    return table
