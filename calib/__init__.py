"""Calibrate ONNX models for quantization: OCTAV and friends, written back as QDQ models.

    from calib import Rules, Widths, calibrate_model

    result = calibrate_model("model.onnx", "calib.npz", Rules(widths=Widths(4, 4)))
    print(result.output, result.comparison.output_sqnr_db)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib.bounds import Bounds as Bounds
    from calib.calibration import calibrate as calibrate
    from calib.calibration import calibrate_each as calibrate_each
    from calib.calibrators import Calibrator as Calibrator
    from calib.comparison import Comparison as Comparison
    from calib.comparison import evaluate as evaluate
    from calib.config import Config as Config
    from calib.correcting import correct_biases as correct_biases
    from calib.data import Reading as Reading
    from calib.data import open_data as open_data
    from calib.equalizing import equalize as equalize
    from calib.errors import CalibError as CalibError
    from calib.gate import Check as Check
    from calib.gate import CheckFiles as CheckFiles
    from calib.gate import check_models as check_models
    from calib.graph import Model as Model
    from calib.graph import load_model as load_model
    from calib.histogram import Histogram as Histogram
    from calib.images import Preprocessing as Preprocessing
    from calib.observations import Observations as Observations
    from calib.observing import observe as observe
    from calib.pipeline import Calibration as Calibration
    from calib.pipeline import calibrate_model as calibrate_model
    from calib.planning import make_plan as make_plan
    from calib.protocol import Distribution as Distribution
    from calib.qtypes import QuantType as QuantType
    from calib.rules import Reduction as Reduction
    from calib.rules import Rules as Rules
    from calib.rules import Selection as Selection
    from calib.rules import TensorRule as TensorRule
    from calib.rules import Widths as Widths
    from calib.run import Run as Run
    from calib.samples import Samples as Samples
    from calib.survey import Candidates as Candidates
    from calib.survey import Survey as Survey
    from calib.surveying import compare_methods as compare_methods
    from calib.table import CalibrationTable as CalibrationTable
    from calib.verification import verify as verify
    from calib.write import write_qdq as write_qdq

_HOME = {
    "Bounds": "bounds",
    "Candidates": "survey",
    "Check": "gate",
    "CheckFiles": "gate",
    "Survey": "survey",
    "check_models": "gate",
    "compare_methods": "surveying",
    "calibrate": "calibration",
    "calibrate_each": "calibration",
    "Calibrator": "calibrators",
    "Config": "config",
    "correct_biases": "correcting",
    "equalize": "equalizing",
    "Reading": "data",
    "open_data": "data",
    "Distribution": "protocol",
    "Histogram": "histogram",
    "Samples": "samples",
    "CalibError": "errors",
    "Comparison": "comparison",
    "evaluate": "comparison",
    "Model": "graph",
    "load_model": "graph",
    "Preprocessing": "images",
    "Observations": "observations",
    "observe": "observing",
    "Calibration": "pipeline",
    "Run": "run",
    "calibrate_model": "pipeline",
    "QuantType": "qtypes",
    "CalibrationTable": "table",
    "Reduction": "rules",
    "Rules": "rules",
    "Selection": "rules",
    "TensorRule": "rules",
    "Widths": "rules",
    "make_plan": "planning",
    "verify": "verification",
    "write_qdq": "write",
}

__all__ = [*_HOME]  # noqa: PLE0604 - the keys are strings, which ruff cannot see


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("octav-calibrate")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
