"""Quantization-aware training in PyTorch that exports to the same QDQ format.

from calib.qat import prepare, export

prepare(model, bits=4, calibrator="octav", mode="dynamic", gradient="mph")
...                                        # train as before
export(model, example_inputs, "model-w4a4.onnx")
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError(
        "calib.qat needs PyTorch: pip install 'octav-calibrate[torch]'", name="torch"
    )

from calib.qat.exporting import Exported, export
from calib.qat.modules import MatMul, ScaledDotProductAttention
from calib.qat.preparing import calibrate, prepare, quantizers, remove
from calib.qat.settings import LayerRule

__all__ = [
    "Exported",
    "LayerRule",
    "MatMul",
    "ScaledDotProductAttention",
    "calibrate",
    "export",
    "prepare",
    "quantizers",
    "remove",
]
