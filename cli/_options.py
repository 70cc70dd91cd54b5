"""The options that commands share, grouped as --help shows them.

None of them has a default here: these are `calib.config.Config`'s, and only told in the help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ._completion import any_file, method, one_of

_FILE = click.Path(path_type=Path)


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``INPUT=OUTPUT``, any number of them."""
    pairs: dict[str, str] = {}
    for value in values:
        name, _equals, output = value.partition("=")
        if not (name and output):
            raise click.BadParameter(f"{value!r} is not INPUT=OUTPUT")
        if name in pairs:
            raise click.BadParameter(f"{name!r} is given twice")
        pairs[name] = output
    return pairs


def _option(name: str, text: str, metavar: str = "TEXT", **settings: Any) -> click.Option:
    return click.Option([name], help=text, metavar=metavar, **settings)


def _whole(name: str, text: str) -> click.Option:
    return _option(name, text, "N", type=int)


def _file(name: str, text: str, **settings: Any) -> click.Option:
    return _option(name, text, "FILE", type=_FILE, **settings)


def _number(name: str, text: str, metavar: str = "NUMBER") -> click.Option:
    return _option(name, text, metavar, type=float)


def _flag(name: str, text: str) -> click.Option:
    return click.Option([f"--{name}/--no-{name}"], default=None, help=text)


MODEL = click.Argument(["model"], type=_FILE, required=False)
GROUPS: dict[str, list[click.Option]] = {
    "Data": [
        _option(
            "--data",
            "Calibration data: an .npz with arrays named after the model's inputs, first axis = "
            "samples, and optionally 'labels'; an .npy for a single input; a folder of images, of "
            "such files, or of ONNX test data; or "
            "package.module:function, which gives batches. Without it: made-up inputs.",
            shell_complete=any_file,
        ),
        _file("--labels", "CSV file with the class of each image."),
        _option("--resize", "Images: the shorter side, 256, or height x width, 240x320.", "SIZE"),
        _option("--crop", "From the centre: 224 or 240x320; or 87.5%, before resizing.", "SIZE"),
        _option(
            "--color",
            "rgb, bgr or gray.  [default: what the model's channels say]",
            shell_complete=one_of("rgb", "bgr", "gray"),
        ),
        _option(
            "--pixel-scale",
            "Pixels of 0 to 255 are multiplied by it.  [default: 1/255; 1 for integer inputs]",
            "NUMBER",
        ),
        _option("--mean", "Then subtracted: one number, or one a channel: 0.5,0.4,0.4", "NUMBERS"),
        _option("--std", "Then divided by, likewise.", "NUMBERS"),
        _option(
            "--layout",
            "nchw or nhwc.  [default: what the model's input shape says]",
            shell_complete=one_of("nchw", "nhwc"),
        ),
        _whole("--samples", "Calibrate on the first N, compare on the rest."),
        _whole("--batch-size", "Samples a feed, where the model leaves that free.  [default: 32]"),
        _whole("--seed", "Of made-up inputs.  [default: 0]"),
        _option(
            "--feed-back",
            "Feed this output of one feed into this input of the next; repeatable.",
            "INPUT=OUTPUT",
            multiple=True,
            callback=_pairs,
        ),
        _option("--padding-mask", "The input that is 0 where padding stands.", "NAME"),
    ],
    "The target": [
        _option(
            "--target",
            "Where the model will run: generic, onnxruntime, openvino or tensorrt.  "
            "[default: generic]",
            shell_complete=one_of("generic", "onnxruntime", "openvino", "tensorrt"),
        ),
        _flag("reduce-range", "Weights of 7 bits, for CPUs without VNNI."),
    ],
    "Widths and methods": [
        _whole("--bits", "Weights and activations: 2 to 8 or 16.  [default: 8]"),
        _whole("--weight-bits", "Weights alone."),
        _option("--activation-bits", "Activations alone; none keeps them float.", "N"),
        _whole("--edge-bits", "First and last weighted layers.  [default: max(8, bits)]"),
        _option(
            "--method",
            "octav, percentile, mse, max, entropy or a plug-in; with a parameter: "
            "percentile:99.9.  [default: octav]",
            shell_complete=method,
        ),
        _option("--weight-method", "Another method for weights.", shell_complete=method),
        _option("--percentile", "Of --method percentile.  [default: 99.99]", "P", type=float),
        _option(
            "--weight-granularity",
            "per-channel or per-tensor.  [default: per-channel]",
            shell_complete=one_of("per-channel", "per-tensor"),
        ),
        _whole(
            "--block-size",
            "Weights of MatMul and Gemm: a scale for every N values along the input axis, instead "
            "of one a channel; 16, 32, 64, 128 and 256 are fast.",
        ),
        _option(
            "--weight-format",
            "Of blocks: qdq, or onnxruntime's own operator, computing in float32 or in int8: "
            "matmulnbits or matmulnbits-int8.  [default: qdq, for target onnxruntime matmulnbits]",
            shell_complete=one_of("qdq", "matmulnbits", "matmulnbits-int8"),
        ),
        _option(
            "--activations",
            "Grids of activations: symmetric; asymmetric, with a zero point; auto, with one where "
            "it lowers the error.  [default: symmetric]",
            shell_complete=one_of("symmetric", "asymmetric", "auto"),
        ),
        _option(
            "--reduce",
            "pool: one threshold from all samples; mean: the mean of one for each first batch.  "
            "[default: pool]",
            shell_complete=one_of("pool", "mean"),
        ),
        _whole("--mean-batches", "Batches of --reduce mean.  [default: 5]"),
        _flag(
            "bias-correction",
            "Put the mean error of each output channel into the bias: two more passes.",
        ),
        _flag("equalize", "Balance the weights of layers that follow each other first."),
    ],
    "Which tensors": [
        _option("--exclude", "Regular expression: nodes and tensors to keep float.", "REGEX"),
        _option("--only", "Regular expression: quantize only these nodes and tensors.", "REGEX"),
        _option("--op-types", "Comma-separated: quantize inputs of these only."),
    ],
    "The gate": [
        _number("--min-sqnr", "Of every float output, in dB.", "DB"),
        _number("--min-cosine", "Of every float output, -1 to 1."),
        _number("--max-error", "Largest difference of any float output."),
        _number("--min-agreement", "Share of samples with the same largest output: 0.98."),
        _number("--max-top1-drop", "Points of top-1 below the float model; needs labels."),
        _number("--max-metric-drop", "How far --metric may lie below the float model's."),
        _number("--max-size-ratio", "Size over that of the float model: 0.3."),
        _option(
            "--metric",
            "A function of yours that judges a model's outputs, larger is better: "
            "package.module:function.",
        ),
        _flag("keep-failed", "Write a model that misses a bound all the same."),
    ],
    "Files": [
        _file("--output", "[default: <stem>-w4a4.onnx beside the model]"),
        _file("--summary", "Write all numbers to this JSON file."),
        _file("--report", "Write a page on all of it to this HTML file (extra: report)."),
        _file("--save-observations", "Keep what was observed, for other methods and widths."),
        _file("--observations", "Read it back instead of observing."),
        _option(
            "--external-data",
            "Weights in a file beside the model: auto (where the float model has them there, or "
            "beyond 1 GB), always or never.  [default: auto]",
            shell_complete=one_of("auto", "always", "never"),
        ),
        _flag("force", "Overwrite files that exist."),
    ],
    "Large sets": [
        _option(
            "--max-memory",
            "What the process may take while it observes, or each worker: 3GB, 512MB, 1.5GiB.  "
            "[default: what it needs]",
            "SIZE",
        ),
        _whole("--workers", "Observe in N processes, of one thread each (extra: distributed)."),
        _option(
            "--scheduler",
            "Observe on the workers of this Dask scheduler: tcp://host:8786. Observations are "
            "then not saved on the way, nor with --workers.",
            "ADDRESS",
        ),
    ],
    "onnxruntime": [
        _option("--provider", "Execution provider.  [default: CPU]"),
        _whole("--threads", "Threads within an operator.  [default: its choice]"),
        _file("--custom-ops", "Library of custom operators; repeatable.", multiple=True),
    ],
    "The command": [
        _file("--config", "YAML file with these options, and rules for single tensors."),
        click.Option(
            ["--print-config"], is_flag=True, help="Print the settings as YAML, and do nothing."
        ),
        _flag("dry-run", "List what would be quantized, and write nothing."),
        _flag("quiet", "Print warnings and errors only."),
        _flag("verbose", "Print every tensor, and log messages."),
    ],
}


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups; --version and --help are the last of the
    last one."""

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, Sequence[click.Option]],
        arguments: Sequence[click.Argument],
        **settings: Any,
    ):
        self._groups = groups
        known = [option for options in groups.values() for option in options]
        settings["params"] = [*arguments, *known, *settings.get("params", ())]
        super().__init__(*args, **settings)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes them."""
        grouped = {title: list(options) for title, options in self._groups.items()}
        known = [option for options in grouped.values() for option in options]
        rest = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p not in known]
        list(grouped.values())[-1].extend(rest)
        for title, options in grouped.items():
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])
