"""``octav-compare``: every method at every width, in one table and on one page."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import OptionError

from ._completion import methods
from ._main import run, set_verbosity
from ._options import GROUPS, MODEL, GroupedCommand
from ._settings import named_settings, read_settings

if TYPE_CHECKING:
    from calib.config import Config
    from calib.survey import Candidates

_NAME = "octav-compare"
_FILE = click.Path(path_type=Path)
_EPILOG = """\b
Examples:
  octav-compare model.onnx --data calib.npz
  octav-compare model.onnx --data calib.npz --samples 256 --bits 4,6,8 --report report.html
  octav-compare model.onnx --data calib.npz --methods octav,mse,max --with-onnxruntime
  octav-compare model.onnx --observations seen.npz --data calib.npz --bits 4 --json all.json
  octav-compare --config octav.yaml --bits 3,4

\b
Exit codes: 0 done, 2 bad usage or bad input.
"""


def _shared(title: str, *names: str) -> list[click.Option]:
    """Options of a group, all or those named."""
    return [option for option in GROUPS[title] if not names or option.name in names]


_GROUPS = {
    "Data": _shared("Data"),
    "Rows of the table": [
        click.Option(["--bits"], metavar="LIST", help="Widths: 2 to 8 or 16.  [default: 4,6,8]"),
        click.Option(
            ["--methods"],
            metavar="LIST",
            help="Methods, each as octav-calibrate's --method.  [default: "
            "octav,mse,percentile:99.9,percentile:99.99,max]",
            shell_complete=methods,
        ),
        click.Option(
            ["--with-onnxruntime"],
            is_flag=True,
            help="onnxruntime's own calibrators, too: slow, and they keep all activations of the "
            "calibration samples in memory.",
        ),
        *_shared(
            "Widths and methods",
            "edge_bits",
            "weight_granularity",
            "block_size",
            "activations",
            "reduce",
            "mean_batches",
            "bias_correction",
            "equalize",
        ),
        *_shared("The gate", "metric"),
    ],
    "Which tensors": _shared("Which tensors"),
    "What hurts": [
        click.Option(
            ["--sensitivity/--no-sensitivity"],
            default=True,
            help="Quantize each tensor alone, and all but it, at the lowest width by the first "
            "method, and propose rules.  [default: do]",
        ),
    ],
    "Files": [
        *_shared("Files", "report"),
        click.Option(
            ["--json"], metavar="FILE", type=_FILE, help="Write all numbers to this file."
        ),
        *_shared("Files", "save_observations", "observations", "force"),
    ],
    "Large sets": _shared("Large sets"),
    "onnxruntime": _shared("onnxruntime"),
    "The command": _shared("The command", "config", "quiet", "verbose"),
}


@click.command(
    cls=GroupedCommand,
    groups=_GROUPS,
    arguments=[MODEL],
    epilog=_EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="octav-calibrate", message="%(prog)s %(version)s")
def command(config: Path | None, **options: Any) -> None:
    """Compare calibration methods and widths on the ONNX model MODEL, from one pass over the data;
    find the tensors that hurt, and rules that mend them.

    With --config, the YAML file of octav-calibrate; its width, method, bounds and output are not
    used, its rules hold in every row. Options win over it."""
    own = {name: options.pop(name) for name in ("bits", "methods", "with_onnxruntime", "json")}
    wanted = options.pop("sensitivity")
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    job = read_settings(config, given)
    if job.model is None:
        behind = "" if config is None else f", and {config} names no 'model'"
        raise click.UsageError(f"Missing argument 'MODEL'{behind}")
    set_verbosity(job.verbose)
    with named_settings(config, given):
        from calib.survey import Candidates

        usual = Candidates()
        candidates = Candidates(
            bits=usual.bits if own["bits"] is None else _bits(own["bits"]),
            methods=usual.methods if own["methods"] is None else _methods(own["methods"]),
            onnxruntime=own["with_onnxruntime"],
            sensitivity=wanted,
        )
        _compare(job, candidates, own["json"], config)


def _bits(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise OptionError(f"--bits must be whole numbers with commas, as 4,6,8, got {text!r}")
    return tuple(map(int, parts))


def _methods(text: str) -> tuple[str, ...]:
    """A part without a method's name belongs to the one before: ``octav:kappa=paper,iterations=9``
    is one method."""
    methods: list[str] = []
    for part in text.split(","):
        if methods and ":" in methods[-1] and "=" in part and ":" not in part:
            methods[-1] += f",{part.strip()}"
        else:
            methods.append(part.strip())
    return tuple(methods)


def _compare(job: Config, candidates: Candidates, json: Path | None, config: Path | None) -> None:
    from calib.report.surveyed import save_survey
    from calib.surveying import compare_methods

    from ._show import progress_bar, show_warnings
    from ._show_compare import show_survey

    settings = replace(
        job.to_run(),
        summary=json,
        protected=() if config is None else (config,),
        command=click.get_current_context().obj,
    )
    if not job.quiet:
        settings = replace(settings, progress=progress_bar)
    survey = compare_methods(job.model or "", job.data, candidates, job.to_rules(), settings)
    files = save_survey(survey)
    show_warnings(survey.warnings)
    if not job.quiet and sys.stdout is not None:
        show_survey(survey, files, job.verbose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(command, _NAME, arguments)
