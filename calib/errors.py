"""Every error this library raises on purpose.

    CalibError
    ├── OptionError        a setting that is out of bounds, or two that contradict each other
    ├── ModelError         an ONNX file that cannot be read, checked, run or quantized
    ├── DataError          calibration data that does not fit the model, or is not finite
    ├── ObservationsError  saved observations that cannot be used here
    ├── CalibratorError    an unknown, clashing or misbehaving calibrator
    ├── OutputError        a file that cannot be written
    ├── VerificationError  a written model that does not compute what it should
    ├── ClusterError       workers that cannot be reached, are not like this machine, or die
    └── TrainingError      a PyTorch model that cannot be prepared, trained or exported

Messages are one line: where, what was found, what is allowed, what to do.
"""

from __future__ import annotations


class CalibError(Exception):
    """Base of all errors below: catch this to catch them all."""


class OptionError(CalibError):
    """A setting is out of bounds, or contradicts another one."""


class ModelError(CalibError):
    """The ONNX model cannot be read, checked, run or quantized."""


class DataError(CalibError):
    """The calibration data does not fit the model, or holds NaN or infinity."""


class ObservationsError(CalibError):
    """Saved observations are unreadable, or belong to another model."""


class CalibratorError(CalibError):
    """A calibrator is unknown, clashes with another, or returned nonsense."""


class OutputError(CalibError):
    """A result cannot be written where it was asked for."""


class VerificationError(CalibError):
    """The written model does not compute what the calibration table says."""


class ClusterError(CalibError):
    """Workers cannot be reached, see other files or versions than this machine, or keep dying."""


class TrainingError(CalibError):
    """A PyTorch model cannot be prepared for quantization-aware training, trained or exported."""


def one_line(error: object) -> str:
    """The message of ``error`` folded to a single line, for messages that quote another library."""
    return " ".join(str(error).split())
