"""JUnit XML of a check: well-formed whatever names hold, and right in its counts."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from check_models import DATA, FLOAT, digits_qdq
from hypothesis import given
from hypothesis import strategies as st

from calib.bounds import Bounds
from calib.gate import check_models
from calib.report.junit import render_junit
from calib.run import Run


def document(**changes: Any) -> dict[str, Any]:
    """A check of one bound, with ``changes`` to its part."""
    file = {"name": "m.onnx", "sha256": "0" * 64, "n_bytes": 1000}
    verdict = {"bound": "min-sqnr", "limit": 20.0, "found": 33.0, "holds": True, "text": "fine"}
    part = {
        "passed": True,
        "failure": None,
        "float": file,
        "quantized": file,
        "verdicts": [verdict],
        "outputs": [{"name": "y", "sqnr_db": 33.0, "cosine": None, "max_error": 0.5}],
        "agreement": 0.99,
        "top1": {"float": 90.0, "quantized": 89.5},
        "metric": {"name": "m:f", "float": 1.0, "quantized": 0.5},
        "tensors": [],
        "first": None,
        "first_text": "nothing stands out",
    }
    samples = {"calibration": 4, "evaluation": 12, "held_out": True}
    return {"samples": samples, "check": part | changes, "warnings": [], "notes": []}


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.encode("utf-8"))  # noqa: S314 - our own


def failing(text: str, bound: str = "max-error") -> dict[str, Any]:
    return {"bound": bound, "limit": 1.0, "found": None, "holds": False, "text": text}


def test_a_check_of_real_models_has_a_case_for_each_bound() -> None:
    bounds = Bounds(min_sqnr=90, min_agreement=0.9, max_size_ratio=0.5)
    check = check_models(FLOAT, digits_qdq(), DATA, Run(samples=256, bounds=bounds))
    root = parsed(render_junit(check.document()))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    cases = {case.attrib["name"]: case for case in suite.iter("testcase")}
    assert list(cases) == ["min-sqnr", "min-agreement", "max-size-ratio"]
    assert all(c.attrib["classname"] == "octav-check.digits-8.onnx" for c in cases.values())
    failure = cases["min-sqnr"].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == check.verdicts[0].text
    assert failure.text == f"{check.verdicts[0].text}\n{check.inspection.text}"
    assert cases["min-agreement"].find("failure") is None
    assert cases["min-agreement"].findtext("system-out") == check.verdicts[1].text
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert properties["n_samples"] == "540"
    assert float(properties["sqnr_db.logits"]) == pytest.approx(check.verdicts[0].found, rel=1e-5)
    assert properties["quantized.sha256"] == check.quantized.sha256


@pytest.mark.parametrize("n_failing", [0, 1, 3])
def test_the_counts_are_those_of_the_cases(n_failing: int) -> None:
    verdicts = [document()["check"]["verdicts"][0], *[failing("no")] * n_failing]
    root = parsed(render_junit(document(verdicts=verdicts)))
    for element in (root, root[0]):
        assert int(element.attrib["tests"]) == len(list(root.iter("testcase"))) == n_failing + 1
        assert int(element.attrib["failures"]) == len(list(root.iter("failure"))) == n_failing
        assert (element.attrib["errors"], element.attrib["skipped"]) == ("0", "0")


def test_models_that_could_not_be_compared_are_a_failed_case_of_their_own() -> None:
    root = parsed(render_junit(document(failure="output 'y' holds NaN", top1=None, metric=None)))
    cases = {c.attrib["name"]: c.find("failure") is None for c in root.iter("testcase")}
    assert cases == {"outputs": False, "min-sqnr": True}


def test_without_bounds_there_is_one_case_that_passes() -> None:
    root = parsed(render_junit(document(verdicts=[])))
    (case,) = root.iter("testcase")
    assert case.attrib["name"] == "outputs"
    assert case.find("failure") is None


@given(st.text(st.characters(codec=None), max_size=30))
def test_whatever_a_name_holds_the_xml_is_read_back(name: str) -> None:
    """Control characters and surrogates are left out, everything else stays."""
    outputs = [{"name": name, "sqnr_db": None, "cosine": 1.0, "max_error": 0.0}]
    file = {"name": name, "sha256": "", "n_bytes": 1}
    text = render_junit(
        document(
            outputs=outputs, quantized=file, first_text=name, verdicts=[failing(name)], passed=False
        )
    )
    root = parsed(text)
    kept = "".join(
        c
        for c in name
        if c in "\t\n\r" or (c >= " " and not "\ud800" <= c <= "\udfff" and c not in "\ufffe\uffff")
    )
    (case,) = root.iter("testcase")
    assert case.attrib["classname"] == f"octav-check.{kept}"
    failure = case.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == kept


def test_a_figure_that_is_missing_says_none() -> None:
    root = parsed(render_junit(document(agreement=None)))
    properties = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert properties["agreement"] == properties["cosine.y"] == "none"
    assert properties["metric.quantized"] == "0.5"
