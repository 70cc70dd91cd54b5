"""Bounds and verdicts, held against exact fractions; every message."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.bounds import Bounds, Verdict
from calib.comparison import Comparison, Scores, Top1
from calib.errors import OptionError

FULL = Comparison(
    10,
    {"a": 33.0, "b": 21.5},
    Top1(90.0, 89.5),
    cosine={"a": 0.99, "b": 0.995},
    max_error={"a": 0.25, "b": 0.125},
    agreement=0.9,
    scores=Scores("m:f", 0.75, 0.5),
)
ALL = Bounds(
    min_sqnr=20,
    min_cosine=0.98,
    max_error=0.3,
    min_agreement=0.9,
    max_top1_drop=1,
    max_metric_drop=0.3,
    max_size_ratio=0.3,
)


def judged(limits: dict[str, float], comparison: Comparison = FULL) -> Verdict:
    (verdict,) = Bounds(**limits).judge(comparison, (100, 25))
    return verdict


# --- what is found ----------------------------------------------------------------------------


def test_each_bound_is_held_against_the_worst_that_was_found() -> None:
    verdicts = ALL.judge(FULL, (100, 25))
    assert {verdict.bound: verdict.found for verdict in verdicts} == {
        "min-sqnr": 21.5,
        "min-cosine": 0.99,
        "max-error": 0.25,
        "min-agreement": 0.9,
        "max-top1-drop": 0.5,
        "max-metric-drop": 0.25,
        "max-size-ratio": 0.25,
    }
    assert all(verdict.holds for verdict in verdicts)


def test_only_what_was_asked_for_is_judged_in_the_order_of_the_fields() -> None:
    assert Bounds().judge(FULL, (1, 1)) == ()
    bounds = Bounds(max_size_ratio=1, min_sqnr=1)
    assert [v.bound for v in bounds.judge(FULL, (1, 1))] == ["min-sqnr", "max-size-ratio"]
    assert ALL.asked == tuple(f.name.replace("_", "-") for f in fields(Bounds))


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"min_sqnr": 21.5}, True),
        ({"min_sqnr": 21.6}, False),
        ({"min_cosine": 0.9901}, False),
        ({"max_error": 0.25}, True),
        ({"max_error": 0.2}, False),
        ({"min_agreement": 0.9}, True),
        ({"min_agreement": 1}, False),
        ({"max_top1_drop": 0.5}, True),
        ({"max_top1_drop": 0}, False),
        ({"max_metric_drop": 0.2}, False),
        ({"max_size_ratio": 0.24}, False),
    ],
)
def test_a_limit_itself_holds_and_what_lies_beyond_fails(
    limits: dict[str, float], holds: bool
) -> None:
    verdict = judged(limits)
    assert verdict.holds is holds
    assert ("holds" in verdict.text) is holds
    assert ("FAILS" in verdict.text) is not holds


@given(st.integers(1, 5000), st.data())
def test_a_drop_of_top1_is_judged_as_by_exact_fractions(n: int, data: st.DataObject) -> None:
    """100·a/n - 100·b/n misses 1.0 by a rounding error for some n."""
    right, wrong = (data.draw(st.integers(0, n)) for _ in range(2))
    points = Fraction(data.draw(st.integers(-200, 200)), 100)
    top1 = Top1(100 * right / n, 100 * wrong / n)
    verdict = judged({"max_top1_drop": float(points)}, Comparison(n, {}, top1))
    assert verdict.holds == (Fraction(100 * (right - wrong), n) <= points)


@given(st.floats(-200, 200), st.floats(-200, 200))
def test_the_text_shows_on_which_side_of_the_limit_a_figure_is(found: float, limit: float) -> None:
    for bound in ("min-sqnr", "max-metric-drop"):
        verdict = Verdict(bound, limit, found)
        shown = float(verdict.text.split(",")[0].removesuffix(" dB").rsplit(" ", 1)[1])
        assert Verdict(bound, limit, shown).holds == verdict.holds


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (
            Verdict("min-sqnr", 20, 19.99996),
            "min-sqnr FAILS: output SQNR 19.99996 dB, at least 20 dB asked for",
        ),
        (
            Verdict("min-sqnr", 20, math.inf),
            "min-sqnr holds: output SQNR infinite, at least 20 dB asked for",
        ),
        (
            Verdict("min-sqnr", 20, -math.inf),
            "min-sqnr FAILS: output SQNR minus infinite, at least 20 dB asked for",
        ),
        (
            Verdict("min-agreement", 0.98, math.nan),
            "min-agreement FAILS: agreement is not a number, at least 0.98 asked for",
        ),
        (
            Verdict("max-error", 0.1, math.nan),
            "max-error FAILS: largest error is not a number, at most 0.1 asked for",
        ),
        (
            Verdict("max-top1-drop", 1, -0.25),
            "max-top1-drop holds: top-1 drop -0.25 points, at most 1 points asked for",
        ),
        (
            Verdict("min-cosine", 0.999999999, 0.99),
            "min-cosine FAILS: cosine 0.99, at least 0.999999999 asked for",
        ),
    ],
)
def test_each_kind_of_figure_has_its_words(verdict: Verdict, text: str) -> None:
    assert verdict.text == text


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_cosine": 1.1}, "min-cosine must be -1 to 1, got 1.1"),
        ({"max_error": -1}, "max-error must be at least 0, got -1"),
        ({"min_agreement": 98}, "min-agreement must be 0 to 1, got 98: 0.98 is 98 %"),
        ({"max_top1_drop": 101}, "max-top1-drop must be -100 to 100, got 101"),
        ({"max_size_ratio": -0.1}, "max-size-ratio must be at least 0, got -0.1"),
        *(
            ({f.name: math.nan}, f"{f.name.replace('_', '-')} must be a number, got nan")
            for f in fields(Bounds)
        ),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Bounds(**limits)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_sqnr": 20}, "the models have no floating-point output"),
        ({"min_cosine": 0.9}, "the models have no floating-point output"),
        ({"max_error": 1}, "the models have no floating-point output"),
        ({"min_agreement": 0.9}, "no output of shape (samples, classes), and no integer output"),
        (
            {"max_top1_drop": 1},
            "it needs labels in the data, and an output of shape (samples, classes)",
        ),
        ({"max_metric_drop": 1}, "it needs --metric package.module:function"),
    ],
)
def test_a_bound_that_cannot_be_measured_is_an_error(limits: dict[str, float], reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        judged(limits, Comparison(1, {}, None))
    (name,) = Bounds(**limits).asked
    assert str(caught.value) == f"{name} cannot be measured: {reason}"


def test_a_bound_on_a_metric_that_is_not_named_is_told_before_anything_runs() -> None:
    bounds = Bounds(max_metric_drop=1)
    bounds.check_metric("m:f")
    Bounds().check_metric(None)
    with pytest.raises(OptionError, match=r"^max-metric-drop cannot be measured: it needs --met"):
        bounds.check_metric(None)
