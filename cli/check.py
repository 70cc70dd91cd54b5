"""``octav-check``: two ONNX models with the same interface in, a verdict out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._main import MISSED, run, set_verbosity
from ._options import GROUPS, GroupedCommand
from ._settings import named_settings, read_settings

if TYPE_CHECKING:
    from calib.config import Config
    from calib.gate import Check, CheckFiles

_NAME = "octav-check"
_FILE = click.Path(path_type=Path)
_EPILOG = """\b
Examples:
  octav-check model.onnx model-w8a8.onnx --data test.npz --min-sqnr 20
  octav-check model.onnx other.onnx --data images --labels classes.csv --max-top1-drop 1
  octav-check model.onnx model-w4a4.onnx --data d.npz --min-agreement 0.98 --junit check.xml
  octav-check --config octav.yaml --report check.html --markdown check.md

\b
Exit codes: 0 every bound holds, 1 one does not, 2 bad usage or bad input.
"""
# What these do here is not what they do in octav-calibrate, or nothing.
_LEFT_OUT = {"seed", "samples", "padding_mask", "keep_failed", "print_config", "dry_run", "verbose"}


def _group(title: str) -> list[click.Option]:
    return [option for option in GROUPS[title] if option.name not in _LEFT_OUT]


def _file(name: str, text: str) -> click.Option:
    return click.Option([name], help=text, metavar="FILE", type=_FILE)


_SAMPLES = click.Option(
    ["--samples"],
    help="Calibration saw the first N: compare on the rest.  [default: compare on all]",
    metavar="N",
    type=int,
)
_FORCE = [option for option in GROUPS["Files"] if option.name == "force"]
_SEED = [option for option in GROUPS["Data"] if option.name == "seed"]
_VERBOSE = click.Option(
    ["--verbose/--no-verbose"], default=None, help="Print every inner tensor, and log messages."
)
_GROUPS = {
    "Data": [*_group("Data"), _SAMPLES, *_SEED],
    "The gate": _group("The gate"),
    "Files": [
        _file("--report", "Write a page on all of it to this HTML file (extra: report)."),
        _file("--junit", "Write JUnit XML to this file: a test case for each bound."),
        _file("--markdown", "Write a summary for a job or a merge request to this file."),
        _file("--json", "Write every number to this JSON file."),
        *_FORCE,
    ],
    "onnxruntime": _group("onnxruntime"),
    "The command": [*_group("The command"), _VERBOSE],
}
_ARGUMENTS = [
    click.Argument(["model"], metavar="[FLOAT]", type=_FILE, required=False),
    click.Argument(["output"], metavar="[QUANTIZED]", type=_FILE, required=False),
]


@click.command(
    cls=GroupedCommand,
    groups=_GROUPS,
    arguments=_ARGUMENTS,
    epilog=_EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="octav-calibrate", message="%(prog)s %(version)s")
def command(config: Path | None, **options: Any) -> int:
    """Compare the ONNX model QUANTIZED with FLOAT, which has the same inputs and outputs, in
    onnxruntime, name the first tensor whose error stands out, and say which bounds hold.

    With --config, the YAML file of octav-calibrate: its model is FLOAT, its output QUANTIZED, its
    samples are left out, its bounds hold. Options win over it; the files to write are named on the
    command line only."""
    files = {name: options.pop(name) for name in ("report", "junit", "markdown", "json")}
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    job = read_settings(config, given)
    if config is not None and "data" in given and "samples" not in given:
        job = replace(job, samples=None)  # the file's are those of the file's data
    for name, argument in (("model", "FLOAT"), ("output", "QUANTIZED")):
        if getattr(job, name) is None:
            behind = "" if config is None else f", and {config} names no {name!r}"
            raise click.UsageError(f"Missing argument {argument!r}{behind}")
    set_verbosity(job.verbose)
    with named_settings(config, given):
        from calib.gate import CheckFiles

        return _check(job, CheckFiles(**files), config)


def _check(job: Config, files: CheckFiles, config: Path | None) -> int:
    from calib.gate import check_models

    from ._show import progress_bar, show_warnings
    from ._show_check import show_check

    settings = replace(
        job.to_run(),
        observations=None,
        save_observations=None,
        summary=None,
        report=None,
        protected=() if config is None else (config,),
    )
    if not job.quiet:
        settings = replace(settings, progress=progress_bar)
    check = check_models(job.model or "", job.output or "", job.data, settings, files)
    show_warnings(check.warnings)
    if not job.quiet and sys.stdout is not None:
        show_check(check, job.verbose)
    return _told(check)


def _told(check: Check) -> int:
    """Says on stderr what failed; the exit code."""
    for line in check.failures:
        print(f"{_NAME}: failed: {line}", file=sys.stderr)
    return 0 if check.passed else MISSED


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(command, _NAME, arguments)
