"""The plain values that a report page shows and ``--json`` holds, with every key there is."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = 1

_DISTRIBUTIONS = ("octav-calibrate", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")


def blank(kind: str, model: dict[str, Any]) -> dict[str, Any]:
    """A document of that kind (``compare``, ``calibrate`` or ``check``) in which nothing was
    measured yet.

    Args:
        model: what `model_facts` says of the float model.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "title": model["name"],
        "model": model,
        "command": "",
        "options": {},
        "versions": versions(),
        "samples": {"calibration": None, "evaluation": None, "held_out": False},
        "float": {"top1": None, "metric": None},
        "metric_name": None,
        "methods": [],
        "bits": [],
        "rows": [],
        "tensors": [],
        "sensitivity": None,
        "confidence": None,
        "check": None,
        "warnings": [],
        "notes": [],
        "skipped": [],
    }


def model_facts(path: Path, sha256: str, n_bytes: int) -> dict[str, Any]:
    """Name, digest and size of a model file."""
    return {"name": path.name, "sha256": sha256, "n_bytes": n_bytes}


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide what is computed."""
    found = {name: version(name) for name in _DISTRIBUTIONS}
    return {"python": platform.python_version(), **found}


def number(value: float | None) -> float | None:
    """``value`` as JSON can hold it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None
