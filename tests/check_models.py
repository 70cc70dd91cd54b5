"""What the tests of checks share: a quantized digits model, and ways to break it."""

from __future__ import annotations

import atexit
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
from cli_models import DIGITS, N_CALIBRATION, load_digits
from numpy.typing import NDArray
from onnx import numpy_helper

from calib import Rules, Run, Widths, calibrate_model
from calib.arrays import Batch

FLOAT = DIGITS / "digits.onnx"
DATA = DIGITS / "digits.npz"
# What the layers of the quantized model make.
LAYERS = (
    "stem.bn.out",
    "block1.first.bn.out",
    "block1.second.bn.out",
    "block2.first.bn.out",
    "block2.second.bn.out",
    "block2.shortcut.bn.out",
    "logits",
)


@cache
def room() -> Path:
    """A folder that goes when the process ends."""
    folder = mkdtemp(prefix="octav-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def batches(size: int = 32, n: int = 64) -> Iterator[Batch]:
    """Test images."""
    images, _labels = load_digits()
    for start in range(N_CALIBRATION, N_CALIBRATION + n, size):
        yield Batch({"image": images[start : start + size]})


@cache
def digits_qdq(bits: int = 8) -> Path:
    """As octav-calibrate writes it."""
    path = room() / f"digits-{bits}.onnx"
    run = Run(samples=N_CALIBRATION, force=True)
    calibrate_model(FLOAT, DATA, Rules(widths=Widths(bits, bits)), path, run)
    return path


@cache
def digits_by_onnxruntime(form: str) -> Path:
    """As onnxruntime's own ``quantize_static`` writes it: ``QDQ`` or ``QOperator``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime import quantization  # type: ignore[import-untyped,unused-ignore]

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.feeds = iter([{"image": load_digits()[0][:N_CALIBRATION]}])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        path = room() / f"{form}.onnx"
        quantization.quantize_static(
            str(FLOAT),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat[form],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    return path


def changed(path: Path, to: Path, name: str, how: Callable[[NDArray[Any]], NDArray[Any]]) -> Path:
    """A copy of the model at ``path`` in which ``how`` was done to the initializer ``name``."""
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(how(array).astype(array.dtype), name))
    onnx.save(model, to)
    return to


def layers(path: Path) -> dict[str, tuple[str, str]]:
    """Of each layer of a QDQ model, by its output: the scales of its activation and its weight."""
    nodes = onnx.load(path).graph.node
    made = {name: node for node in nodes for name in node.output}
    return {
        node.output[0].removesuffix("_without_bias"): (
            made[node.input[0]].input[1],
            made[node.input[1]].input[1],
        )
        for node in nodes
        if node.op_type in ("Conv", "Gemm")
    }


def sqnr_db(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """In NumPy."""
    exact = reference.astype(np.float64)
    noise = np.square(exact - other.astype(np.float64)).sum()
    return float(10 * np.log10(np.square(exact).sum() / noise))
