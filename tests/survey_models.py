"""What the tests of surveys share: small models, their data, ways to look at what is found."""

from __future__ import annotations

from typing import Any

import pytest
from cli_models import DIGITS
from models import Array, values

from calib.errors import CalibError
from calib.run import Run
from calib.survey import Candidates, Row, Survey
from calib.surveying import compare_methods
from calib.table import CalibrationTable

MODEL, DATA = DIGITS / "digits.onnx", DIGITS / "digits.npz"
SPLIT = Run(samples=256)
BARE = Candidates(bits=(3, 8), methods=("octav", "max"), sensitivity=False)

LINEAR = """(float[N,6] x) => (float[N,4] y) <float[6,5] first, float[5,4] second> {
  a = MatMul(x, first)
  hidden = Relu(a)
  y = MatMul(hidden, second) }"""
RUNNING_SUM = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
<float[6,3] w> {
  next = Add(x, state)
  y = MatMul(next, w)
}"""


def arrays(n: int = 5, size: int = 8) -> list[dict[str, Array]]:
    return [{"x": values(size, 6, seed=seed)} for seed in range(n)]


def row_of(survey: Survey, method: str, bits: int) -> Row:
    return next(row for row in survey.rows if (row.method, row.bits) == (method, bits))


def thresholds(table: CalibrationTable) -> dict[str, list[float]]:
    return {record.name: record.threshold.tolist() for record in table.records}


def refused(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(CalibError) as caught:
        compare_methods(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
