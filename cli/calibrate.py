"""``octav-calibrate``: an ONNX model in, a calibrated QDQ model out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._main import run, set_verbosity

if TYPE_CHECKING:
    from calib.run import Run
    from calib.targets import Rules

_NAME = "octav-calibrate"
_FILE = click.Path(path_type=Path)
_EPILOG = """\b
Examples:
  octav-calibrate model.onnx --data calib.npz --bits 4 --method octav
  octav-calibrate model.onnx --data calib.npz --weight-bits 4 --activation-bits 8
  octav-calibrate model.onnx --data calib.npz --method percentile:99.9
  octav-calibrate model.onnx --dry-run
"""


@click.command(
    epilog=_EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.argument("model", type=_FILE)
@click.option(
    "--data",
    type=_FILE,
    help="Calibration data: an .npz with arrays named after the model's inputs, first axis = "
    "samples, and optionally 'labels'; or an .npy for a single input. Without it: made-up inputs.",
)
@click.option(
    "--bits", type=int, default=8, show_default=True, help="Weights and activations: 2 to 8 or 16."
)
@click.option("--weight-bits", type=int, help="Weights alone.")
@click.option("--activation-bits", type=int, help="Activations alone.")
@click.option(
    "--edge-bits", type=int, help="First and last weighted layers.  [default: max(8, bits)]"
)
@click.option(
    "--method",
    default="octav",
    show_default=True,
    help="octav, percentile, mse, max, entropy or a plug-in; with a parameter: percentile:99.9.",
)
@click.option("--weight-method", help="Another method for weights.")
@click.option("--percentile", type=float, help="Of --method percentile.  [default: 99.99]")
@click.option(
    "--weight-granularity",
    default="per-channel",
    show_default=True,
    help="per-channel or per-tensor.",
)
@click.option(
    "--reduce",
    "reduction",
    default="pool",
    show_default=True,
    help="pool: one threshold from all samples; mean: the mean of one for each first batch.",
)
@click.option(
    "--mean-batches", type=int, default=5, show_default=True, help="Batches of --reduce mean."
)
@click.option("--exclude", help="Regular expression: nodes and tensors to keep float.")
@click.option("--only", help="Regular expression: quantize only these nodes and tensors.")
@click.option("--op-types", help="Comma-separated: quantize inputs of these only.")
@click.option("--samples", type=int, help="Calibrate on the first N, compare on the rest.")
@click.option(
    "--batch-size",
    type=int,
    default=32,
    show_default=True,
    help="Samples a feed, where the model leaves that free.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of made-up inputs.")
@click.option(
    "--save-observations", type=_FILE, help="Keep what was observed, for other methods and widths."
)
@click.option("--observations", type=_FILE, help="Read it back instead of observing.")
@click.option("--output", type=_FILE, help="[default: <stem>-w4a4.onnx beside the model]")
@click.option("--summary", type=_FILE, help="Write all numbers to this JSON file.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--dry-run", is_flag=True, help="List what would be quantized, and write nothing.")
@click.option("--provider", help="onnxruntime execution provider.  [default: CPU]")
@click.option("--threads", type=int, default=0, help="Of onnxruntime.  [default: its choice]")
@click.option("--quiet", is_flag=True, help="Print warnings and errors only.")
@click.option("--verbose", is_flag=True, help="Print every tensor, and log messages.")
@click.version_option(package_name="octav-calibrate", message="%(prog)s %(version)s")
def command(model: Path, quiet: bool, verbose: bool, dry_run: bool, **options: Any) -> None:
    """Calibrate the float32 ONNX model MODEL and write it with QuantizeLinear/DequantizeLinear
    nodes and integer weights, verified in onnxruntime and compared with the float model."""
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose contradict each other")
    set_verbosity(verbose)
    rules, settings = _rules(options), _run(options, quiet)
    if dry_run:
        _dry_run(model, rules)
        return
    from calib.pipeline import calibrate_model

    from ._show import show_calibration, show_warnings

    result = calibrate_model(model, options["data"], rules, options["output"], settings)
    show_warnings(result.warnings)
    if not quiet and sys.stdout is not None:
        show_calibration(result, verbose)


def _dry_run(model: Path, rules: Rules) -> None:
    from calib.graph import load_model
    from calib.targets import make_plan

    from ._show import show_plan

    show_plan(make_plan(load_model(model), rules), rules)


def _rules(options: dict[str, Any]) -> Rules:
    from calib.prepare import QUANTIZABLE_OPS
    from calib.qtypes import check_width
    from calib.targets import Reduction, Rules, Selection, Widths

    bits = check_width(options["bits"], "bits")
    op_types = options["op_types"]
    return Rules(
        widths=Widths(
            weights=_or(options["weight_bits"], bits),
            activations=_or(options["activation_bits"], bits),
            edge=options["edge_bits"],
        ),
        method=_with_percentile(options["method"], options) or "",
        weight_method=_with_percentile(options["weight_method"], options),
        weight_granularity=options["weight_granularity"],
        reduction=Reduction(options["reduction"], options["mean_batches"]),
        selection=Selection(
            only=options["only"],
            exclude=options["exclude"],
            op_types=QUANTIZABLE_OPS
            if op_types is None
            else tuple(name.strip() for name in op_types.split(",")),
        ),
    )


def _with_percentile(method: str | None, options: dict[str, Any]) -> str | None:
    """``method`` with the value of --percentile, if it is the one that takes it."""
    percentile = options["percentile"]
    methods = options["method"], options["weight_method"]
    if percentile is not None and "percentile" not in methods:
        raise click.UsageError(
            f"--percentile belongs to --method percentile, the method is {options['method']!r}"
        )
    if percentile is None or method != "percentile":
        return method
    return f"percentile:{percentile}"


def _run(options: dict[str, Any], quiet: bool) -> Run:
    from calib.capture import Runtime
    from calib.run import Run

    settings = Run(
        samples=options["samples"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        runtime=Runtime(options["provider"], options["threads"]),
        observations=options["observations"],
        save_observations=options["save_observations"],
        summary=options["summary"],
        force=options["force"],
    )
    if quiet:
        return settings
    from dataclasses import replace

    from ._show import progress_bar

    return replace(settings, progress=progress_bar)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(command, _NAME, arguments)
