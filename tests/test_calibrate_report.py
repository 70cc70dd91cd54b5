"""octav-calibrate --report: the page has the numbers of the summary."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_models import copy_digits, enter_room, read_json, refuse, succeed

pytestmark = pytest.mark.skipif(find_spec("plotly") is None, reason="the extra report is absent")

JOB = ("digits.onnx", "--data", "digits.npz", "--samples", 256, "--output", "q.onnx")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the digits sample."""
    copy_digits(tmp_path)
    return enter_room(tmp_path, monkeypatch)


def shown(path: str) -> dict[str, Any]:
    """The document in a page."""
    text = Path(path).read_text("utf-8")
    found = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert found is not None
    document: dict[str, Any] = json.loads(found[1])
    return document


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    "widths", [("--bits", 4), ("--weight-bits", 4, "--activation-bits", 8), ("--edge-bits", 3)]
)
def test_the_page_has_the_numbers_of_the_summary(
    capsys: pytest.CaptureFixture[str], widths: tuple[object, ...]
) -> None:
    succeed(capsys, *JOB, *widths, "--report", "r.html", "--summary", "s.json")
    document, summary = shown("r.html"), read_json("s.json")
    assert document["kind"] == "calibrate"
    assert document["command"].startswith("octav-calibrate")
    (row,) = document["rows"]
    assert row["sqnr_db"] == pytest.approx(summary["output_sqnr_db"], rel=1e-6)
    assert row["top1"] == pytest.approx(summary["top1"]["quantized"], rel=1e-6)
    assert document["float"]["top1"] == pytest.approx(summary["top1"]["float"], rel=1e-6)
    for name in ("cosine", "max_error", "agreement"):
        assert row[name] == pytest.approx(summary[name], rel=1e-6)
    assert document["samples"] == {
        "calibration": 256,
        "evaluation": 540,
        "held_out": True,
        "made_up": False,
    }
    assert document["notes"] == summary["notes"]
    assert document["model"]["sha256"] == summary["digests"]["model_sha256"]
    assert [(s["name"], s["reason"]) for s in document["skipped"]] == [
        (s["name"], s["reason"]) for s in summary["skipped"]
    ]


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("bits", [3, 8])
def test_every_tensor_is_shown_with_its_threshold_and_the_curve_of_its_own_width(
    capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    succeed(capsys, *JOB, "--bits", bits, "--report", "r.html", "--summary", "s.json")
    document = shown("r.html")
    tensors = {tensor["name"]: tensor for tensor in read_json("s.json")["tensors"]}
    assert {tensor["name"] for tensor in document["tensors"]} == set(tensors)
    assert bits in document["bits"]
    for tensor in document["tensors"]:
        record = tensors[tensor["name"]]
        (result,) = tensor["results"]
        assert result["actual_bits"] == record["bits"]
        assert result["sqnr_db"] == pytest.approx(record["sqnr_db"], abs=2e-3)
        (curve,) = tensor["curves"]
        assert (curve["bits"], curve["actual_bits"]) == (result["bits"], record["bits"])
        if tensor["kind"] == "activation":
            assert result["threshold"] == pytest.approx(record["threshold"], rel=1e-4)
            # The measured error at the threshold is the record's SQNR, as far as points are close.
            at = float(np.interp(result["threshold"], tensor["s"], curve["measured"]))
            assert at > 0
            assert min(curve["measured"]) <= at * 1.05
        else:
            assert tensor["groups"] == len(record["threshold"])
            assert 0 < result["low"] <= result["threshold"] <= result["high"] <= 1 + 1e-4
        assert tensor["count"] == record["count"]
        assert sum(tensor["histogram"]["counts"]) == record["count"]


@pytest.mark.usefixtures("room")
def test_the_page_says_how_sure_the_thresholds_are(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, *JOB, "--report", "r.html", "--summary", "s.json")
    confidence = shown("r.html")["confidence"]
    assert confidence["n_samples"] == [128, 128]
    thresholds = {t["name"]: t["threshold"] for t in read_json("s.json")["tensors"]}
    for tensor in confidence["tensors"]:
        assert tensor["all"] == pytest.approx(thresholds[tensor["name"]], rel=1e-6)


@pytest.mark.usefixtures("room")
def test_bounds_and_whether_they_hold_stand_on_the_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bounds = ("--min-sqnr", 1, "--min-agreement", 0.5)
    succeed(capsys, *JOB, *bounds, "--report", "r.html", "--summary", "s.json")
    document, summary = shown("r.html"), read_json("s.json")
    assert [verdict["holds"] for verdict in document["verdicts"]] == [True, True]
    assert [v["text"] for v in document["verdicts"]] == [v["text"] for v in summary["verdicts"]]


@pytest.mark.usefixtures("room")
def test_a_page_is_not_overwritten_and_comes_whole_or_not_at_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("r.html").write_text("mine", "utf-8")
    message = refuse(capsys, *JOB, "--report", "r.html")
    assert message == "r.html: exists; choose another name, or overwrite it with --force"
    succeed(capsys, *JOB, "--report", "r.html", "--force")
    page = Path("r.html").read_text("utf-8")
    assert page.rstrip().endswith("</html>")
