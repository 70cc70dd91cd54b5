"""Settings as YAML and back: nothing gets lost, and no text does anything else."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.config import Config
from calib.errors import CalibError
from calib.qtypes import WIDTHS
from calib.rules import TensorRule

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
patterns = words.map(re.escape)
paths = st.from_regex(r"\A[\w .'#:-]{1,12}\Z").filter(lambda t: t.strip(".")).map(Path)
numbers = st.floats(-1e6, 1e6).map(float)
widths = st.sampled_from(WIDTHS)
methods = st.sampled_from(["octav", "mse:10", "max", "percentile:99.9"])
tensor_rules = st.builds(
    TensorRule,
    patterns,
    st.sampled_from([None, "weight", "activation"]),
    bits=st.none() | widths,
    method=st.none() | methods,
    granularity=st.sampled_from([None, "per-tensor"]),
) | st.builds(TensorRule, patterns, skip=st.just(True))
settings = st.fixed_dictionaries(
    {},
    optional={
        "model": paths,
        "data": paths.map(str),
        "labels": paths,
        "pixel_scale": st.floats(1e-9, 1e9),
        "samples": st.integers(1, 10**30),
        "batch_size": st.integers(1, 10**9),
        "seed": st.integers(0, 2**64),
        "feed_back": st.dictionaries(words, words, max_size=3),
        "padding_mask": words,
        "bits": widths,
        "weight_bits": widths,
        "activation_bits": widths,
        "edge_bits": widths,
        "method": methods,
        "weight_method": methods,
        "weight_granularity": st.sampled_from(["per-channel", "per-tensor"]),
        "activations": st.sampled_from(["symmetric", "asymmetric", "auto"]),
        "reduce": st.sampled_from(["pool", "mean"]),
        "only": patterns,
        "exclude": patterns,
        "op_types": st.sampled_from([("Conv",), ("Gemm", "MatMul")]),
        "observations": paths,
        "output": paths,
        "summary": paths,
        "external_data": st.sampled_from(["auto", "always", "never"]),
        "force": st.booleans(),
        "dry_run": st.booleans(),
        "provider": words,
        "threads": st.integers(0, 64),
        "custom_ops": st.lists(paths, max_size=3).map(tuple),
        "verbose": st.booleans(),
        "rules": st.lists(tensor_rules, max_size=3).map(tuple),
    },
)


@given(settings)
def test_what_is_written_reads_back_the_same(given: dict[str, Any]) -> None:
    config = Config(**given)
    text = config.to_yaml()
    assert text.isascii()
    assert Config.parse(text) == config
    assert Config.parse(text).to_yaml() == text


def test_what_is_written_holds_the_defaults_and_leaves_out_what_is_not_set() -> None:
    text = Config.parse("bits: 4\nreduce: mean\npixel-scale: 1/4\nrules: [{match: a}]").to_yaml()
    for line in (
        "bits: 4",
        "method: octav",
        "mean-batches: 5",
        "pixel-scale: 0.25",
        "force: false",
    ):
        assert line in text.splitlines()
    assert "null" not in text
    assert "- {match: a}" in text
    assert "edge-bits" not in text


pieces = st.lists(
    st.sampled_from([f.name.replace("_", "-") for f in fields(Config)])
    | st.sampled_from([": ", "\n", "- ", "[", "]", "{", "}", ", ", "'", "4", "x", "match", "  "])
)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of regular expressions
@given(st.text() | pieces.map("".join))
def test_no_text_ends_in_anything_but_settings_or_an_error_of_ours(text: str) -> None:
    try:
        Config.parse(text, "x")
    except CalibError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
