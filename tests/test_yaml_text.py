"""YAML text: what is dumped is loaded the same, and no word becomes something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import OptionError
from calib.yaml_text import dump, load

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    words,
    st.sampled_from(["", "1e3", "010", "0x1f", "yes", "1:30", "=", "<<", "~", "2001-01-01", "-"]),
)
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(words, v), max_leaves=8)


@given(st.dictionaries(words, values))
def test_whatever_is_dumped_is_loaded_the_same(document: dict[str, object]) -> None:
    text = dump(document)
    assert load(text, "x") == document
    assert text.isascii()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("false", False),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("-12", -12),
        ("+0", 0),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+2", -150.0),
        (".inf", ".inf"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("~", None),
        ("null", None),
        ("''", ""),
        ("'4'", "4"),
        ("!!str 4", "4"),
        ("[]", []),
        ("{}", {}),
        ("", None),
    ],
)
def test_a_word_is_what_yaml_1_2_says(text: str, value: object) -> None:
    found = load(text, "x")
    assert (found, type(found)) == (value, type(value))


@given(st.text() | st.lists(st.sampled_from("[]{}:,-?!&*|>'\"%@# \n\tab1")).map("".join))
def test_any_text_is_loaded_or_refused_in_one_line(text: str) -> None:
    try:
        load(text, "x")
    except OptionError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
