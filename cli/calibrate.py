"""``octav-calibrate``: an ONNX model in, a calibrated QDQ model out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import DataError

from ._main import MISSED, run, set_verbosity
from ._options import GROUPS, MODEL, GroupedCommand
from ._settings import named_settings, read_settings

if TYPE_CHECKING:
    from calib.config import Config
    from calib.rules import Rules

_NAME = "octav-calibrate"
_EPILOG = """\b
Examples:
  octav-calibrate model.onnx --data calib.npz --bits 4 --method octav
  octav-calibrate model.onnx --data calib.npz --weight-bits 4 --activation-bits 8
  octav-calibrate model.onnx --data calib.npz --method percentile:99.9
  octav-calibrate model.onnx --config octav.yaml --bits 6
  octav-calibrate model.onnx --dry-run
"""


@click.command(
    cls=GroupedCommand,
    groups=GROUPS,
    arguments=[MODEL],
    epilog=_EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="octav-calibrate", message="%(prog)s %(version)s")
def command(config: Path | None, print_config: bool, **options: Any) -> int:
    """Calibrate the ONNX model MODEL and write it with QuantizeLinear/DequantizeLinear
    nodes and integer weights, verified in onnxruntime and compared with the float model.

    Options win over what the YAML file of --config says."""
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    if config is None and "model" not in given and not print_config:
        raise click.UsageError("Missing argument 'MODEL'")
    job = read_settings(config, given)
    if print_config:
        click.echo(job.to_yaml(), nl=False)
        return 0
    if job.model is None:
        raise click.UsageError(f"Missing argument 'MODEL', and {config} names no 'model'")
    set_verbosity(job.verbose)
    with named_settings(config, given):
        if not job.dry_run:
            return _calibrate(job, job.model, config)
        _dry_run(job, job.to_rules())
        return 0


def _dry_run(job: Config, rules: Rules) -> None:
    from calib.graph import load_model
    from calib.planning import make_plan

    from ._show import show_plan

    plan = make_plan(load_model(job.model or "", job.feed_back), rules)
    for path in job.read_paths():
        if not path.exists():
            raise DataError(f"{path}: no such file")
    show_plan(plan)


def _calibrate(job: Config, model: Path, config: Path | None) -> int:
    from calib.pipeline import calibrate_model

    from ._show import progress_bar, show_calibration, show_warnings

    protected = () if config is None else (config,)
    settings = replace(job.to_run(), protected=protected, command=click.get_current_context().obj)
    if not job.quiet:
        settings = replace(settings, progress=progress_bar)
    result = calibrate_model(model, job.data, job.to_rules(), job.output, settings)
    show_warnings(result.warnings)
    if not job.quiet and sys.stdout is not None:
        show_calibration(result, job.verbose)
    for verdict in result.verdicts:
        if not verdict.holds:
            print(f"{_NAME}: failed: {verdict.text}", file=sys.stderr)
    if not result.kept:
        print(f"{_NAME}: no model was written; --keep-failed would", file=sys.stderr)
    return 0 if result.passed else MISSED


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(command, _NAME, arguments)
