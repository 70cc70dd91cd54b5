"""``octav-calibrate``: an ONNX model in, a calibrated QDQ model out."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import DataError, OptionError

from ._main import run, set_verbosity
from ._options import GROUPS, MODEL, GroupedCommand

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
def command(config: Path | None, print_config: bool, **options: Any) -> None:
    """Calibrate the ONNX model MODEL and write it with QuantizeLinear/DequantizeLinear
    nodes and integer weights, verified in onnxruntime and compared with the float model.

    Options win over what the YAML file of --config says."""
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    if config is None and "model" not in given and not print_config:
        raise click.UsageError("Missing argument 'MODEL'")
    job = _read(config, given)
    if print_config:
        click.echo(job.to_yaml(), nl=False)
        return
    if job.model is None:
        raise click.UsageError(f"Missing argument 'MODEL', and {config} names no 'model'")
    set_verbosity(job.verbose)
    with _named(config, given):
        if job.dry_run:
            _dry_run(job, job.to_rules())
        else:
            _calibrate(job, job.model, config)


def _read(config: Path | None, given: Mapping[str, object]) -> Config:
    with warnings.catch_warnings():  # of what is imported; whether --verbose is not known yet
        warnings.simplefilter("ignore")
        from calib.config import Config

        return (Config() if config is None else Config.read(config)).over(given)


@contextmanager
def _named(config: Path | None, given: Mapping[str, object]) -> Iterator[None]:
    """An error that begins with a setting of the file, and not of the command line, names the
    file."""
    try:
        yield
    except OptionError as error:
        setting = re.match(r"-*([a-z-]+)", str(error))
        name = setting.group(1).replace("-", "_") if setting else ""
        if config is None or name in given or not _is_set(config, name):
            raise
        raise OptionError(f"{config}: {str(error).lstrip('-')}") from error


def _is_set(config: Path, name: str) -> bool:
    from calib.config import Config

    return getattr(Config.read(config), name, None) != getattr(Config(), name, None)


def _dry_run(job: Config, rules: Rules) -> None:
    from calib.graph import load_model
    from calib.targets import make_plan

    from ._show import show_plan

    plan = make_plan(load_model(job.model or "", job.feed_back), rules)
    for path in job.read_paths():
        if not path.exists():
            raise DataError(f"{path}: no such file")
    show_plan(plan)


def _calibrate(job: Config, model: Path, config: Path | None) -> None:
    from calib.pipeline import calibrate_model

    from ._show import progress_bar, show_calibration, show_warnings

    settings = replace(job.to_run(), protected=() if config is None else (config,))
    if not job.quiet:
        settings = replace(settings, progress=progress_bar)
    result = calibrate_model(model, job.data, job.to_rules(), job.output, settings)
    show_warnings(result.warnings)
    if not job.quiet and sys.stdout is not None:
        show_calibration(result, job.verbose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(command, _NAME, arguments)
