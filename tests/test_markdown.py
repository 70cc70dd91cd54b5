"""The Markdown summary of a check: what stands in it, and that no name becomes markup."""

from __future__ import annotations

import re
from typing import Any

import pytest
from check_models import DATA, FLOAT, digits_qdq
from hypothesis import given
from hypothesis import strategies as st
from test_junit import document, failing

from calib.bounds import Bounds
from calib.gate import check_models
from calib.report.markdown import render_markdown
from calib.run import Run


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, as GitHub cuts them: at pipes without a backslash."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if not re.fullmatch(r"[|:\-]+", line)
    ]


def test_a_check_of_real_models_is_told_from_verdict_to_notes() -> None:
    run = Run(samples=256, bounds=Bounds(min_sqnr=90, min_agreement=0.9))
    check = check_models(FLOAT, digits_qdq(), DATA, run)
    text = render_markdown(check.document())
    assert text.startswith("## octav-check: ❌ FAILED\n\n`digits-8.onnx` (")
    assert "against `digits.onnx`, on 540 samples that calibration did not see.\n" in text
    table = rows(text)
    assert table[0] == ["bound", "", "found"]
    assert table[1][:2] == ["`min-sqnr`", "❌ **FAILS**"]
    assert table[1][2].endswith("dB, at least 90 dB asked for")
    assert table[2][:2] == ["`min-agreement`", "✅ holds"]
    assert table[4][0] == "`logits`"
    assert len(table) == 5
    assert "\n\nNo tensor stands out: the error grows evenly, down to" in text
    assert "\n- Note: the first 256 samples, those that calibration saw, are left out\n" in text
    assert text.endswith("\n")


def test_what_passes_says_so_and_every_figure_has_its_place() -> None:
    text = render_markdown(document())
    assert text.startswith("## octav-check: ✅ PASSED\n")
    assert "FAIL" not in text
    assert rows(text)[-1] == ["`y`", "33.0", "–", "0.5"]  # noqa: RUF001 - an empty cell
    assert (
        "Agreement 99.00%; top-1: float 90.00 %, quantized 89.50 %; `m:f`: float 1, quantized 0.5."
        in text
    )


def test_what_was_not_measured_is_left_out() -> None:
    bare: dict[str, Any] = {"verdicts": [], "outputs": [], "agreement": None, "top1": None}
    text = render_markdown(document(**bare, metric=None, first_text=""))
    assert rows(text) == []
    assert len(text.split("\n\n")) == 2


def test_warnings_and_notes_are_a_list() -> None:
    told = document() | {"warnings": ["NO DATA: made up"], "notes": ["one", "two"]}
    assert render_markdown(told).endswith(
        "\n\n- Warning: NO DATA: made up\n- Note: one\n- Note: two\n"
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"`a\|b`"),
        ("a`b", "``a`b``"),
        ("``", "``` `` ```"),
        ("<img src=x>", "`<img src=x>`"),
        ("a\nb", "`a b`"),
        ("", "` `"),
        ("\x1b[31m", "` [31m`"),
    ],
)
def test_a_name_is_code_whatever_it_holds(name: str, shown: str) -> None:
    outputs = [{"name": name, "sqnr_db": 1.0, "cosine": 1.0, "max_error": 1.0}]
    text = render_markdown(document(outputs=outputs))
    assert f"\n| {shown} | 1.0 | 1 | 1 |" in text


@pytest.mark.parametrize("mark", list("\\`*_{}[]<>|#~&$@"))
def test_prose_that_quotes_a_name_is_not_markup(mark: str) -> None:
    told = document(first_text=f"it is {mark}here{mark}", verdicts=[failing(f"x: {mark}{mark}")])
    text = render_markdown(told)
    assert f"It is \\{mark}here\\{mark}." in text
    assert rows(text)[1][2] == f"\\{mark}\\{mark}"


@given(st.text(max_size=20))
def test_no_name_adds_a_row_a_cell_or_a_line(name: str) -> None:
    plain, other = (
        render_markdown(
            document(
                outputs=[{"name": n, "sqnr_db": None, "cosine": 1.0, "max_error": 0.0}],
                first_text=f"it is {n}",
                quantized={"name": n, "sha256": "", "n_bytes": 1},
            )
        )
        for n in ("plain", name)
    )
    assert other.count("\n") == plain.count("\n")
    assert [len(row) for row in rows(other)] == [len(row) for row in rows(plain)]
    other.encode("utf-8")
