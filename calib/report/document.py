"""The plain values that a report page shows and ``--json`` holds, with every key there is."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calib.bounds import Verdict
from calib.comparison import Comparison

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
        "samples": {"calibration": None, "evaluation": None, "held_out": False, "made_up": False},
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


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them; files by their names."""
    values: dict[str, Any] = json.loads(json.dumps(settings, default=lambda path: path.name))
    return values


def number(value: float | None) -> float | None:
    """``value`` as JSON can hold it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """What one bound demands, and whether it is met."""
    return {
        "bound": verdict.bound,
        "limit": verdict.limit,
        "found": number(verdict.found),
        "holds": verdict.holds,
        "text": verdict.text,
    }


def figures(comparison: Comparison | None) -> dict[str, float | None]:
    """What one comparison says of the quantized model, each of its worst output."""
    if comparison is None:
        names = ("sqnr_db", "cosine", "max_error", "agreement", "top1", "metric")
        return dict.fromkeys(names)
    c = comparison
    return {
        "sqnr_db": number(c.output_sqnr_db) if c.sqnr_db else None,
        "cosine": min(c.cosine.values(), default=None),
        "max_error": number(max(c.max_error.values(), default=None)),
        "agreement": c.agreement,
        "top1": c.top1.quantized_model if c.top1 else None,
        "metric": c.scores.quantized_model if c.scores else None,
    }


def float_facts(comparison: Comparison | None) -> dict[str, float | None]:
    """What one comparison says of the float model."""
    top1, scores = comparison and comparison.top1, comparison and comparison.scores
    return {
        "top1": top1.float_model if top1 else None,
        "metric": scores.float_model if scores else None,
    }
