"""A check's verdicts as JUnit XML, which GitHub's and GitLab's test reports read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

_SUITE = "octav-check"
# What XML 1.0 cannot hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(document: Mapping[str, Any]) -> str:
    """One test suite with one test case for each bound, and the figures as its properties.

    Where there is no bound, or the models could not be compared, a case named ``outputs`` says so.

    Args:
        document: of a check, see `calib.gate.Check.document`.
    """
    check = document["check"]
    cases = list(_cases(check))
    n_failed = sum(failure is not None for _, failure, _ in cases)
    counts = {"tests": str(len(cases)), "failures": str(n_failed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": _SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _SUITE, **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _figures(document):
        attributes = {"name": _clean(name), "value": _clean(str(value))}
        ElementTree.SubElement(properties, "property", attributes)
    classname = f"{_SUITE}.{check['quantized']['name']}"
    for name, failure, text in cases:
        attributes = {"classname": _clean(classname), "name": name, "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", attributes)
        if failure is not None:
            attributes = {"message": _clean(failure), "type": name}
            detail = ElementTree.SubElement(case, "failure", attributes)
            detail.text = _clean(f"{failure}\n{check['first_text']}")
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(text)
    ElementTree.indent(root)
    return f"{_DECLARATION}\n{ElementTree.tostring(root, encoding='unicode')}\n"


_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>'


def _cases(check: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Name, why it failed, and what there is to say."""
    verdicts = check["verdicts"]
    if check["failure"] is not None or not verdicts:
        yield "outputs", check["failure"], "the models were compared, and no bound was asked for"
    for verdict in verdicts:
        failure = None if verdict["holds"] else verdict["text"]
        yield verdict["bound"], failure, verdict["text"]


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    check = document["check"]
    for which in ("float", "quantized"):
        for key, value in check[which].items():
            yield f"{which}.{key}", value
    yield "n_samples", document["samples"]["evaluation"]
    for output in check["outputs"]:
        for key in ("sqnr_db", "cosine", "max_error"):
            yield f"{key}.{output['name']}", _or_none(output[key])
    yield "agreement", _or_none(check["agreement"])
    for what in ("top1", "metric"):
        for key, value in (check[what] or {}).items():
            yield f"{what}.{key}", value
    yield "first_text", check["first_text"]


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _clean(text: str) -> str:
    return _NOT_XML.sub("", text)
