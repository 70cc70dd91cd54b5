"""A calibration as the document that a report shows: a survey of one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calib.comparison import Comparison
from calib.confidence import confidence
from calib.curves import profiles
from calib.graph import Model
from calib.observations import Observations
from calib.planning import Plan
from calib.report.document import blank, figures, float_facts, model_facts
from calib.report.tensors import tensor_entries
from calib.rules import Rules
from calib.table import CalibrationTable


def calibration_document(
    model: Model,
    observations: Observations,
    table: CalibrationTable,
    comparison: Comparison,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything, as plain values.

    Args:
        facts: ``rules``, and what the document has besides: ``command``, ``seconds``, ``verdicts``,
            ``warnings``, ``notes``, ``held_out``, ``made_up``.
    """
    rules: Rules = facts["rules"]
    bits = rules.widths.widest
    head = {"method": rules.method, "bits": bits}
    specs = tuple(record.spec for record in table.records)
    sure = confidence(model, observations, Plan(specs, ()), rules)
    shapes = profiles(model, observations, specs)
    return {
        **blank("calibrate", model_facts(model.path, model.sha256, model.n_bytes)),
        "options": table.manifest["options"],
        "samples": {
            "calibration": observations.n_samples,
            "evaluation": comparison.n_samples,
            "held_out": facts["held_out"],
            "made_up": facts["made_up"],
        },
        "float": float_facts(comparison),
        "metric_name": comparison.scores and comparison.scores.name,
        "methods": [rules.method],
        "bits": [bits],
        "rows": [{**head, **figures(comparison), **_thresholds(facts)}],
        "tensors": tensor_entries(shapes, {(rules.method, bits): table}),
        "confidence": sure and {**head, **sure.to_json()},
        "skipped": [{"name": s.name, "reason": s.reason} for s in table.skipped],
        **{name: facts[name] for name in ("command", "verdicts", "warnings", "notes", "seconds")},
    }


def _thresholds(facts: Mapping[str, Any]) -> dict[str, Any]:
    texts = [verdict["text"] for verdict in facts["verdicts"]]
    return {"gain_db": None, "seconds": facts["seconds"]["calibrate"], "notes": texts}
