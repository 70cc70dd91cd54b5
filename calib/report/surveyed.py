"""A survey of methods and widths as the document that a report shows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from calib.files import whole_file, write_texts, writing
from calib.report.document import blank, figures, float_facts, model_facts, number, plain
from calib.report.page import render_page
from calib.report.tensors import tensor_entries
from calib.resuming import appearing
from calib.sensitivity import Sensitivity
from calib.survey import Measured, Row, Survey
from calib.table import dumps


def save_survey(survey: Survey) -> tuple[Path, ...]:
    """Writes the files that ``survey.run`` names, all or none: page, JSON, observations. Returns
    their paths.

    Raises:
        OutputError: if one cannot be written.
        OptionError: if a page is asked for and Plotly is not installed.
    """
    run, document = survey.run, survey_document(survey)
    texts = {}
    if run.report is not None:
        texts[run.report] = render_page(document)
    if run.summary is not None:
        texts[run.summary] = dumps(document, indent=1) + "\n"
    with appearing(run) as files:
        write_texts(texts, files)
        if run.save_observations is not None:
            with writing(run.save_observations):
                survey.observations.write(files.enter_context(whole_file(run.save_observations)))
    return (*texts, *([run.save_observations] if run.save_observations else ()))


def survey_document(survey: Survey) -> dict[str, Any]:
    """Everything, as plain values."""
    model = survey.model
    tables = {(row.method, row.bits): row.table for row in survey.rows}
    sure = survey.confidence
    n_samples = [row.comparison.n_samples for row in survey.rows if row.comparison]
    head = dict(zip(("method", "bits"), survey.detailed, strict=True))
    return {
        **blank("compare", model_facts(model.path, model.sha256, model.n_bytes)),
        "command": survey.run.command,
        "options": {
            "candidates": plain(asdict(survey.candidates)),
            "rules": plain(asdict(survey.rules)),
            "reading": plain(asdict(survey.run.reading)),
            "runtime": plain(asdict(survey.run.runtime)),
        },
        "samples": {
            "calibration": survey.observations.n_samples,
            "evaluation": max(n_samples, default=None),
            "held_out": survey.held_out,
            "made_up": survey.made_up,
        },
        "float": float_facts(next((r.comparison for r in survey.rows if r.comparison), None)),
        "metric_name": next((r.comparison.scores.name for r in survey.rows
                             if r.comparison and r.comparison.scores), None),
        "methods": list(dict.fromkeys(row.method for row in survey.rows)),
        "bits": list(survey.candidates.bits),
        "rows": [_row(row) for row in survey.rows],
        "tensors": tensor_entries(survey.profiles, tables),
        "sensitivity": survey.sensitivity and {
            **head, "wide_bits": survey.wide_bits,
            **_sensitivity(survey.sensitivity),
            "proposals": [_proposal(measured) for measured in survey.proposals],
        },
        "confidence": sure and {**head, **sure.to_json()},
        "warnings": list(survey.warnings),
        "notes": list(survey.notes),
        "skipped": [{"name": s.name, "reason": s.reason} for s in survey.rows[0].table.skipped],
        "seconds": survey.seconds,
    }  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "bits": row.bits,
        **_effect(row),
        "gain_db": number(row.gain_db),
        "seconds": row.seconds,
        "notes": list(row.notes),
    }


def _effect(row: Row) -> dict[str, float | None]:
    return {**figures(row.comparison), "size_ratio": row.size_ratio}


def _sensitivity(found: Sensitivity) -> dict[str, Any]:
    return {
        "n_samples": found.n_samples,
        "base_db": number(found.base_db),
        "wide_db": number(found.wide_db),
        "target_db": number(found.target_db),
        "tensors": [
            {
                "name": damage.name,
                "kind": damage.kind,
                "alone_db": number(damage.alone_db),
                "all_but_db": number(damage.all_but_db),
                "estimated": damage.estimated,
            }
            for damage in found.tensors
        ],
        "curve": [{"n": n, "sqnr_db": number(db)} for n, db in found.curve],
        "excluding": [{"n": n, "sqnr_db": number(db)} for n, db in found.excluding],
        "layers": list(found.layers),
    }


def _proposal(measured: Measured) -> dict[str, Any]:
    proposal = measured.proposal
    return {
        "title": proposal.title,
        "what": proposal.what,
        "yaml": proposal.yaml,
        "before_db": number(measured.before.sqnr_db),
        "after_db": number(measured.after.sqnr_db),
        "n_samples": measured.after.comparison and measured.after.comparison.n_samples,
        "saves": measured.saves,
        "wide_size_ratio": measured.wide_size_ratio,
        "before": _effect(measured.before),
        "after": _effect(measured.after),
    }
