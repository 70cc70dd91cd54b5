"""Rules for single tensors: which they reach, what they change, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import Load, Save
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, feed_for, parsed

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.errors import CalibError, CalibratorError, OptionError
from calib.granularity import PerChannel, PerTensor
from calib.graph import Model, load_model, quantizable_uses
from calib.observing import Observing, observe
from calib.planning import Plan, TensorSpec, make_plan
from calib.rules import Reduction, Rules, Selection, TensorRule, Widths
from calib.table import TensorRecord

TWO_READERS = """(float[N,6] x) => (float[N,6] y, float[N,2] head)
<float[6,6] first, float[6,6] second, float[6,6] last, float[6,2] side> {
  hidden = MatMul(x, first)
  inner = MatMul(hidden, second)
  y = MatMul(inner, last)
  head = MatMul(hidden, side)
}"""


def rules(*overrides: TensorRule) -> Rules:
    return Rules(widths=Widths(4, 4), overrides=overrides)


def planned(model: Model, *overrides: TensorRule) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in make_plan(model, rules(*overrides)).specs}


# --- what a rule may say ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "conv("}, "match: 'conv(' is no regular expression: missing ), unterminated"),
        ({"match": "x{9999999999999999}"}, "match: 'x{9999999999999999}' is no regular expression"),
        ({"kind": "bias"}, "kind must be weight or activation, got 'bias'"),
        ({"bits": 9}, "bits must be one of 2 to 8 or 16, got 9"),
        ({"granularity": "blocked"}, "granularity must be per-channel or per-tensor, got"),
        (
            {"kind": "activation", "granularity": "per-channel"},
            "granularity must be per-tensor: activations are per-tensor",
        ),
        ({"skip": True, "bits": 4}, "skip keeps tensors float, bits has no meaning then"),
        ({"skip": True, "method": "max"}, "skip keeps tensors float, method has no meaning"),
        ({"skip": True, "granularity": "per-tensor"}, "skip keeps tensors float, granularity has"),
        ({"method": "percentile:0.5"}, "percentile must be above 1 and at most 100, got 0.5"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
        TensorRule(**{"match": "head", **settings})  # type: ignore[arg-type]


def test_a_rule_with_an_unknown_method_is_refused() -> None:
    with pytest.raises(CalibratorError, match=r"^No calibrator named 'octave'"):
        TensorRule("head", method="octave")


def test_an_activation_may_be_said_to_be_per_tensor() -> None:
    assert TensorRule("x", "activation", granularity="per-tensor").granularity == "per-tensor"


# --- what a rule changes ----------------------------------------------------------------------


def test_each_field_of_a_rule_takes_the_place_of_the_general_setting(load: Load) -> None:
    model = load("conv_bias")
    before = planned(model)
    rule = TensorRule("^kernel2$", bits=7, method="max", granularity="per-tensor")
    after = planned(model, rule)
    changed = after.pop("kernel2")
    assert after == {name: spec for name, spec in before.items() if name != "kernel2"}
    assert before["kernel2"].granularity == PerChannel(0)
    assert (changed.bits, changed.method, changed.granularity) == (7, "max", PerTensor())
    assert changed.consumers == before["kernel2"].consumers


def test_what_a_rule_leaves_open_is_as_in_general(load: Load) -> None:
    model = load("conv_bias")
    before = planned(model)
    assert planned(model, TensorRule(".")) == before
    (bits,) = {planned(model, TensorRule("kernel2", method="max"))["kernel2"].bits}
    assert bits == before["kernel2"].bits == 4


def test_the_bits_of_a_rule_win_over_those_of_the_edges(load: Load) -> None:
    model = load("conv_bias")
    assert planned(model)["kernel1"].bits == 8
    assert planned(model, TensorRule("kernel1", bits=3))["kernel1"].bits == 3
    assert planned(model, TensorRule("kernel1", method="max"))["kernel1"].bits == 8


def test_a_rule_may_ask_for_channels_where_the_others_have_none(load: Load) -> None:
    coarse = Rules(
        weight_granularity="per-tensor", overrides=(TensorRule(".", granularity="per-channel"),)
    )
    plan = make_plan(load("conv_bias"), coarse)
    for spec in plan.specs:
        assert spec.granularity == (PerChannel(0) if spec.kind == "weight" else PerTensor())


def test_a_weight_that_cannot_have_channels_says_so_under_a_rule_too(load: Load) -> None:
    rule = TensorRule("weight", granularity="per-channel")
    plan = make_plan(
        load("tied_transposed"), Rules(weight_granularity="per-tensor", overrides=(rule,))
    )
    (tied,) = (spec for spec in plan.specs if spec.name == "weight")
    assert tied.granularity == PerTensor()
    assert tied.notes == ("per-tensor: its consumers want channels along different axes",)


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_a_rule_of_a_kind_leaves_the_other_kind_alone(kind: str, load: Load) -> None:
    model = load("conv_bias")
    before = planned(model)
    rule = TensorRule("/Conv/second", kind, bits=6)  # type: ignore[arg-type]
    changed = {n for n, spec in planned(model, rule).items() if spec != before[n]}
    assert changed == {"kernel2" if kind == "weight" else "hidden"}


def test_the_first_rule_that_matches_decides_and_the_rest_say_nothing(load: Load) -> None:
    model = load("conv_bias")
    first, second = TensorRule("kernel2", bits=7), TensorRule("kernel", bits=3, method="max")
    plan = planned(model, first, second)
    assert (plan["kernel2"].bits, plan["kernel2"].method) == (7, "octav")
    assert (plan["kernel1"].bits, plan["kernel1"].method) == (3, "max")
    reverse = planned(model, second, first)
    assert (reverse["kernel2"].bits, reverse["kernel2"].method) == (3, "max")


def test_a_tensor_whose_readers_match_different_rules_follows_the_first_of_the_list(
    save: Save,
) -> None:
    model = load_model(save(parsed(TWO_READERS)))
    inner, head = TensorRule("MatMul/inner", bits=3), TensorRule("MatMul/head", bits=7)
    assert planned(model, inner, head)["hidden"].bits == 3
    assert planned(model, head, inner)["hidden"].bits == 7


# --- skip -------------------------------------------------------------------------------------


def test_skip_keeps_what_matches_float_and_says_by_which_rule(load: Load) -> None:
    model = load("conv_bias")
    plan = make_plan(model, rules(TensorRule("/Conv/second", skip=True)))
    assert [spec.name for spec in plan.specs] == ["image", "kernel1", "inner", "kernel3"]
    assert {(s.name, s.reason) for s in plan.skipped} == {
        ("hidden of /Conv/second", "matched by rule '/Conv/second'"),
        ("kernel2 of /Conv/second", "matched by rule '/Conv/second'"),
    }


def test_skip_for_one_reader_leaves_the_tensor_quantized_for_the_other(save: Save) -> None:
    model = load_model(save(parsed(TWO_READERS)))
    skip, bits = TensorRule("MatMul/head", skip=True), TensorRule("hidden", bits=5)
    for order in ((skip, bits), (TensorRule("MatMul/inner", bits=5), skip)):
        hidden = planned(model, *order)["hidden"]
        assert (hidden.consumers, hidden.bits) == (("/MatMul/inner",), 5)


# Each differs from the general rules in a field or two.
_OTHER_RULES = (
    Rules(),
    Rules(widths=Widths(4, 6)),
    Rules(widths=Widths(6, None)),
    Rules(widths=Widths(4, 4, edge=5)),
    Rules(method="max"),
    Rules(weight_method="mse"),
    Rules(weight_granularity="per-tensor"),
    Rules(widths=Widths(4, None), block_size=2),
    Rules(selection=Selection(only="inner")),
    Rules(selection=Selection(exclude="first")),
    Rules(overrides=(TensorRule("hidden", bits=3, method="max"),)),
    Rules(overrides=(TensorRule("side", skip=True),)),
    Rules(target="onnxruntime"),
    Rules(target="tensorrt"),
    Rules(reduce_range=True),
    Rules(activations="asymmetric"),
)


def test_a_plan_does_not_depend_on_those_made_before_for_the_model(save: Save) -> None:
    path = save(parsed(TWO_READERS))
    alone = [make_plan(load_model(path), one) for one in _OTHER_RULES]
    model = load_model(path)
    for earlier in _OTHER_RULES:
        for one, expected in zip(_OTHER_RULES, alone, strict=True):
            make_plan(model, earlier)
            assert make_plan(model, one) == expected


def test_an_exception_before_a_skip_stays_quantized(load: Load) -> None:
    plan = planned(load("conv_bias"), TensorRule("kernel2"), TensorRule("kernel", skip=True))
    assert {name for name, spec in plan.items() if spec.kind == "weight"} == {"kernel2"}


def test_rules_that_skip_everything_leave_nothing_to_quantize(load: Load) -> None:
    message = "nothing left to quantize: --only, --exclude, --op-types and rules leave none"
    with pytest.raises(OptionError, match=f"^{message}$"):
        make_plan(load("conv_bias"), rules(TensorRule(".", skip=True)))


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (TensorRule("fc[0-9]"), "'fc[0-9]'"),
        (TensorRule("hidden", "weight"), "'hidden' of kind weight"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_by_its_number(
    rule: TensorRule, what: str, load: Load
) -> None:
    message = f"rules[1].match: {what} matches no node and no tensor; --dry-run lists their names"
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        make_plan(load("conv_bias"), rules(TensorRule("kernel"), rule))


def test_a_rule_for_what_is_excluded_anyway_is_no_error(load: Load) -> None:
    selection = Selection(exclude="kernel2")
    overrides = (TensorRule("kernel2", bits=3),)
    plan = make_plan(load("conv_bias"), Rules(selection=selection, overrides=overrides))
    assert "matched by --exclude 'kernel2'" in {s.reason for s in plan.skipped}


# --- against an oracle ------------------------------------------------------------------------

PATTERNS = ("Conv", "kernel", "hidden", "first|third", "[23]", "", "e", "^image$", "/Conv/second$")
a_rule = st.builds(
    TensorRule,
    st.sampled_from(PATTERNS),
    st.sampled_from([None, "weight", "activation"]),
    bits=st.sampled_from([None, 2, 5, 16]),
    method=st.sampled_from([None, "max", "mse:10"]),
) | st.builds(TensorRule, st.sampled_from(PATTERNS), skip=st.just(True))


@given(overrides=st.lists(a_rule, max_size=5))
def test_every_reading_follows_the_first_rule_that_matches_it(
    load: Load, overrides: Sequence[TensorRule]
) -> None:
    # No tensor of this model has two readers, so that a reading is a tensor.
    model = load("conv_bias")
    uses, _ = quantizable_uses(model)
    before = planned(model)
    expected: dict[str, tuple[int, str]] = {}
    for use in uses:
        texts = use.node, use.tensor
        matching = [
            rule
            for rule in overrides
            if rule.kind in (None, use.kind) and any(re.search(rule.match, t) for t in texts)
        ]
        first = matching[0] if matching else TensorRule("")
        if not first.skip:
            general = before[use.tensor]
            expected[use.tensor] = (first.bits or general.bits, first.method or general.method)
    try:
        plan = make_plan(model, rules(*overrides))
    except CalibError as error:
        assert "matches no node" in str(error) or not expected  # noqa: PT017
        return
    assert {s.name: (s.bits, s.method) for s in plan.specs} == expected
    assert len(plan.skipped) == len(uses) - len(expected)


# --- all the way through ----------------------------------------------------------------------


def records(model: Model, name: str, chosen: Rules) -> dict[str, TensorRecord]:
    """What calibration makes of the model on one batch."""
    plan: Plan = make_plan(model, chosen)
    batches = [Batch(feed_for(MODELS[name](), 16))]
    observations = observe(
        model, batches, plan.activations, Observing(chosen.reduction.kept_batches)
    )
    return {r.name: r for r in calibrate(model, observations, plan, chosen).records}


@pytest.mark.parametrize("reduction", [Reduction(), Reduction("mean", 1)], ids=["pool", "mean"])
def test_a_rule_changes_exactly_the_records_of_the_tensors_that_it_matches(
    load: Load, reduction: Reduction
) -> None:
    model = load("conv_bias")
    general = Rules(widths=Widths(4, 4, 4), method="mse", reduction=reduction)
    rule = TensorRule("kernel2|^hidden$", method="max")
    ruled = Rules(widths=Widths(4, 4, 4), method="mse", reduction=reduction, overrides=(rule,))
    largest = Rules(widths=Widths(4, 4, 4), method="max", reduction=reduction)
    before, after = records(model, "conv_bias", general), records(model, "conv_bias", ruled)
    wanted = records(model, "conv_bias", largest)
    assert list(before) == list(after)
    for name, record in after.items():
        matched = name in ("kernel2", "hidden")
        source = wanted if matched else before
        np.testing.assert_array_equal(record.threshold, source[name].threshold)
        assert record.spec == source[name].spec
        if matched:
            assert not np.array_equal(record.threshold, before[name].threshold)
