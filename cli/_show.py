"""Results on the terminal: short tables, a progress bar, warnings that stand out."""

from __future__ import annotations

import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from calib.comparison import Comparison
    from calib.graph import Skipped
    from calib.pipeline import Calibration
    from calib.planning import Plan

_PIPE_WIDTH = 100_000
_FEW = 5


class _Trimmed(io.TextIOBase):
    """Standard output without the blanks at the end of each line, with which tables are padded."""

    def write(self, text: str) -> int:
        sys.stdout.write(re.sub(" +\n", "\n", text))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output has gone: what was done stands, and so does its exit code."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until exit


def stdout_console() -> Console:
    """A console as wide as the terminal; in a pipe, nothing is folded, cut off or padded."""
    if sys.stdout.isatty():
        return _Console(highlight=False, emoji=False)
    return _Console(file=cast(IO[str], _Trimmed()), highlight=False, emoji=False, width=_PIPE_WIDTH)


def samples(n: int) -> str:
    """``n`` samples, in words."""
    return f"{n} sample" if n == 1 else f"{n} samples"


def show_calibration(result: Calibration, verbose: bool) -> None:
    """What was done, how large it is, how good it is."""
    console = stdout_console()
    if verbose:
        console.print(_records_table(result))
    comparison, (before, after) = result.comparison, result.n_bytes
    n_samples = comparison.n_samples
    unseen = f"{samples(n_samples)} that calibration did not see"
    seen = unseen if result.held_out else f"{n_samples} of the calibration samples"
    if result.made_up:
        seen = f"{n_samples} made-up inputs"
    rows = [
        ("model", str(result.output) if result.kept else "not written: a bound fails"),
        ("quantized", _census(result)),
        ("kept float", _skipped_text(result.table.skipped)),
        ("size", f"{_kilobytes(before)} -> {_kilobytes(after)} ({after / before:.0%})"),
        ("output SQNR", f"{_sqnr(comparison)} on {seen}"),
    ]
    if comparison.top1 is not None:
        top1 = comparison.top1
        rows.append(
            ("top-1", f"float {top1.float_model:.2f} %, quantized {top1.quantized_model:.2f} %")
        )
    if comparison.scores is not None:
        scores = comparison.scores
        text = f"float {scores.float_model:.6g}, quantized {scores.quantized_model:.6g}"
        rows.append(("metric", text))
    if result.kernels is not None:
        rows.append(("integer kernels", str(result.kernels)))
        rows.extend(("in float", f"{s.name}: {s.reason}") for s in result.kernels.floating)
    rows.extend(("bound", verdict.text) for verdict in result.verdicts)
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in result.seconds.items())
    rows.append(("seconds", stages))
    rows.extend(("note", note) for note in result.notes)
    console.print(_pairs(rows))


def _sqnr(comparison: Comparison) -> str:
    return f"{comparison.output_sqnr_db:.1f} dB" if comparison.sqnr_db else "none: no float output"


def show_plan(plan: Plan) -> None:
    """What would be quantized, how, and what not."""
    table = Table("tensor", "kind", "bits", "granularity", "method", "read by", box=None)
    for spec in plan.specs:
        cells = [spec.name, spec.kind, str(spec.bits), str(spec.granularity), spec.method]
        table.add_row(*map(escape, [*cells, ", ".join(spec.consumers)]))
    console = stdout_console()
    console.print(table)
    for skipped in plan.skipped:
        console.print(f"kept float: {escape(skipped.name)}: {escape(skipped.reason)}")


def show_warnings(warnings: Iterable[str]) -> None:
    """On stderr, whatever else is quiet."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    for warning in warnings:
        console.print(f"[bold red]WARNING:[/] {escape(warning)}")


@contextmanager
def progress_bar(stage: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with an ETA on a terminal's stderr; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda _n: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda n: progress.advance(task, n)


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, text in rows:
        table.add_row(f"[bold]{label}[/]", escape(text))
    return table


def _census(result: Calibration) -> str:
    parts = []
    for kind in ("weight", "activation"):
        records = [r for r in result.table.records if r.spec.kind == kind]
        widths = Counter(r.qtype.bits for r in records)
        detail = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(widths.items()))
        plural = kind if len(records) == 1 else f"{kind}s"
        parts.append(f"{len(records)} {plural}" + (f" ({detail})" if records else ""))
    return ", ".join(parts)


def _skipped_text(skipped: tuple[Skipped, ...]) -> str:
    if not skipped:
        return "nothing"
    lines = [f"{s.name}: {s.reason}" for s in skipped[:_FEW]]
    if len(skipped) > _FEW:
        lines.append(f"and {len(skipped) - _FEW} more, see --summary")
    return "\n".join(lines)


def _records_table(result: Calibration) -> Table:
    columns = ("tensor", "type", "granularity", "method", "threshold", "SQNR dB", "notes")
    table = Table(*columns, box=None)
    for record in result.table.records:
        low, high = record.threshold.min(), record.threshold.max()
        span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        sqnr = "" if record.sqnr_db is None else f"{record.sqnr_db:.1f}"
        spec = record.spec
        cells = [record.name, str(record.qtype), str(spec.granularity), spec.method, span, sqnr]
        table.add_row(*map(escape, [*cells, "; ".join(record.notes)]))
    return table


def _kilobytes(n: int) -> str:
    return f"{n / 1000:,.0f} kB"
