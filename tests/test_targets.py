"""Which tensors are quantized, how wide and how finely; what is left out, and why."""

from __future__ import annotations

import re

import pytest
from conftest import Load, Save
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, gemm, parsed, values

from calib.errors import CalibratorError, ModelError, OptionError
from calib.granularity import PerChannel, PerTensor
from calib.graph import load_model, quantizable_uses
from calib.planning import Plan, TensorSpec, make_plan
from calib.qtypes import WIDTHS
from calib.rules import Reduction, Rules, Selection, Widths

EDGE_NODES = {"/Conv/first", "/Conv/third"}


def selecting(**settings: object) -> Rules:
    return Rules(selection=Selection(**settings))  # type: ignore[arg-type]


def names(plan: Plan) -> list[str]:
    return [spec.name for spec in plan.specs]


def spec(plan: Plan, name: str) -> TensorSpec:
    return next(s for s in plan.specs if s.name == name)


@pytest.mark.parametrize(
    ("what", "build"),
    [
        ("weight-bits", lambda bits: Widths(weights=bits)),
        ("activation-bits", lambda bits: Widths(activations=bits)),
        ("edge-bits", lambda bits: Widths(edge=bits)),
    ],
)
@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 12, 15, 17, 32])
def test_a_width_that_no_grid_has_is_refused(what: str, build: object, bits: int) -> None:
    with pytest.raises(OptionError) as caught:
        build(bits)  # type: ignore[operator]
    assert str(caught.value) == f"{what} must be one of 2 to 8 or 16, got {bits}"


@given(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS))
def test_edges_have_the_width_asked_for_or_at_least_8_bits(
    weights: int, activations: int, edge: int
) -> None:
    default, chosen = Widths(weights, activations), Widths(weights, activations, edge)
    assert (default.of("weight", False), default.of("activation", False)) == (weights, activations)
    assert default.of("weight", True) == max(8, weights)
    assert default.of("activation", True) == max(8, activations)
    assert {chosen.of("weight", True), chosen.of("activation", True)} == {edge}
    assert chosen.of("weight", False) == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "conv("}, "only: 'conv(' is no regular expression: missing ), unterminated"),
        ({"exclude": "*"}, "exclude: '*' is no regular expression: nothing to repeat"),
        (
            {"op_types": ("Conv", "LSTM")},
            "op-types: 'LSTM' is not supported, only Conv, ConvTranspose, Gemm, MatMul",
        ),
    ],
)
def test_a_selection_that_cannot_be_understood_is_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        selecting(**settings)


def test_a_reduction_that_is_unknown_or_empty_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^reduce must be pool or mean, got 'median'$"):
        Reduction("median")
    with pytest.raises(OptionError, match=r"^mean-batches must be at least 1, got 0$"):
        Reduction("mean", 0)


def test_only_the_mean_needs_counters_of_single_batches() -> None:
    assert (Reduction().kept_batches, Reduction("mean", 7).kept_batches) == (0, 7)


def test_rules_refuse_what_they_do_not_know() -> None:
    message = "^weight-granularity must be per-channel or per-tensor, got 'blocked'$"
    with pytest.raises(OptionError, match=message):
        Rules(weight_granularity="blocked")
    message = "^activations must be symmetric, asymmetric or auto, got 'unsigned'$"
    with pytest.raises(OptionError, match=message):
        Rules(activations="unsigned")
    with pytest.raises(CalibratorError, match=r"^No calibrator named 'octave'"):
        Rules(method="octave")
    with pytest.raises(OptionError, match="percentile must be above 1"):
        Rules(weight_method="percentile:0.9")


def test_weights_have_the_method_of_activations_unless_told_otherwise() -> None:
    assert Rules(method="mse").method_for("weight") == "mse"
    apart = Rules(method="mse", weight_method="max")
    assert (apart.method_for("weight"), apart.method_for("activation")) == ("max", "mse")


@pytest.mark.parametrize("name", MODELS)
def test_every_use_is_planned_once_in_graph_order_at_its_width(name: str, load: Load) -> None:
    uses, skipped = quantizable_uses(load(name))
    plan = make_plan(load(name), Rules(widths=Widths(3, 5)))
    assert names(plan) == list(dict.fromkeys(use.tensor for use in uses))
    assert plan.skipped == skipped
    assert plan.activations == tuple(s.name for s in plan.specs if s.kind == "activation")
    for planned in plan.specs:
        readers = [use for use in uses if use.tensor == planned.name]
        assert planned.consumers == tuple(dict.fromkeys(use.node for use in readers))
        narrow = 3 if planned.kind == "weight" else 5
        assert planned.bits == (8 if any(use.edge for use in readers) else narrow)


@pytest.mark.parametrize(("edge", "shared"), [(None, 8), (8, 8), (2, 4), (16, 16)])
def test_a_tensor_that_serves_an_edge_and_an_inner_layer_gets_the_wider(
    edge: int | None, shared: int, save: Save
) -> None:
    text = """(float[N,6] x) => (float[N,6] y, float[N,2] head)
    <float[6,6] first, float[6,6] second, float[6,6] last, float[6,2] side> {
      hidden = MatMul(x, first)
      inner = MatMul(hidden, second)
      y = MatMul(inner, last)
      head = MatMul(hidden, side)
    }"""
    plan = make_plan(load_model(save(parsed(text))), Rules(widths=Widths(4, 4, edge)))
    assert spec(plan, "hidden").consumers == ("/MatMul/inner", "/MatMul/head")
    bits = [spec(plan, name).bits for name in ("hidden", "second", "side")]
    assert bits == [shared, 4, edge or 8]


def test_all_heads_are_edges(load: Load) -> None:
    plan = make_plan(load("two_inputs"), Rules(widths=Widths(4, 4)))
    assert {s.name: s.bits for s in plan.specs} == dict.fromkeys(names(plan), 8)


def test_a_shared_weight_has_one_set_of_parameters(load: Load) -> None:
    tied = spec(make_plan(load("tied"), Rules()), "weight")
    assert tied.consumers == ("/MatMul/hidden", "/MatMul/y")
    assert (tied.granularity, tied.notes) == (PerChannel(1), ())


def test_a_shared_weight_is_per_tensor_where_its_readers_disagree_and_says_so(load: Load) -> None:
    tied = spec(make_plan(load("tied_transposed"), Rules()), "weight")
    assert tied.granularity == PerTensor()
    assert tied.notes == ("per-tensor: its consumers want channels along different axes",)


def test_weights_are_per_channel_unless_told_otherwise_and_activations_never(load: Load) -> None:
    model = load("conv_bias")
    fine, coarse = (
        make_plan(model, Rules(weight_granularity=g)) for g in ("per-channel", "per-tensor")
    )
    for planned in fine.specs:
        expected = PerChannel(0) if planned.kind == "weight" else PerTensor()
        assert planned.granularity == expected
    assert {s.granularity for s in coarse.specs} == {PerTensor()}


def test_only_searches_the_names_of_nodes_and_of_tensors(load: Load) -> None:
    model = load("conv_bias")
    by_node = make_plan(model, selecting(only="Conv/sec"))
    assert names(by_node) == ["hidden", "kernel2"]
    by_tensor = make_plan(model, selecting(only="ernel[12]$"))
    assert names(by_tensor) == ["kernel1", "kernel2"]
    assert {s.reason for s in by_tensor.skipped} == {"not matched by --only 'ernel[12]$'"}
    assert "image of /Conv/first" in {s.name for s in by_tensor.skipped}


def test_exclude_searches_the_names_of_nodes_and_of_tensors(load: Load) -> None:
    model = load("conv_bias")
    without_node = make_plan(model, selecting(exclude="/second"))
    assert names(without_node) == ["image", "kernel1", "inner", "kernel3"]
    without_tensor = make_plan(model, selecting(exclude="^hidden$"))
    assert names(without_tensor) == ["image", "kernel1", "kernel2", "inner", "kernel3"]
    assert [(s.name, s.reason) for s in without_tensor.skipped] == [
        ("hidden of /Conv/second", "matched by --exclude '^hidden$'")
    ]


def test_exclude_wins_over_only(load: Load) -> None:
    plan = make_plan(load("conv_bias"), selecting(only="Conv/(first|second)", exclude="kernel"))
    assert names(plan) == ["image", "hidden"]


def test_a_tensor_may_be_quantized_for_one_reader_and_float_for_another(load: Load) -> None:
    plan = make_plan(load("residual"), selecting(exclude="/Conv/right"))
    assert spec(plan, "shared").consumers == ("/Conv/left",)
    assert {s.name for s in plan.skipped} == {"shared of /Conv/right", "kernel2 of /Conv/right"}


def test_op_types_limit_the_layers(load: Load) -> None:
    model = load("conv_bn_relu")
    plan = make_plan(model, selecting(op_types=("Gemm",)))
    assert names(plan) == ["flat", "head"]
    assert {s.reason for s in plan.skipped} == {"Conv is not among --op-types"}


@given(pattern=st.sampled_from(["Conv", "kernel", "hid", "first|inner", "3", "e", "^/Conv/t"]))
def test_only_and_exclude_of_one_pattern_share_out_all_uses(load: Load, pattern: str) -> None:
    model = load("conv_bias")
    everything = {f"{u.tensor} of {u.node}" for u in quantizable_uses(model)[0]}
    plans = []
    for settings in ({"only": pattern}, {"exclude": pattern}):
        try:
            plans.append(make_plan(model, selecting(**settings)))
        except OptionError as error:
            assert "nothing left to quantize" in str(error)  # noqa: PT017
            plans.append(Plan((), ()))
    kept = [{f"{s.name} of {c}" for s in p.specs for c in s.consumers} for p in plans]
    assert kept[0] | kept[1] == everything
    assert not kept[0] & kept[1]
    for plan, chosen in zip(plans, kept, strict=True):
        if plan.specs:
            assert {s.name for s in plan.skipped} == everything - chosen


@pytest.mark.parametrize("what", ["only", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(what: str, load: Load) -> None:
    message = f"--{what} 'fc[0-9]' matches no node and no tensor; --dry-run lists their names"
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        make_plan(load("conv_bias"), selecting(**{what: "fc[0-9]"}))


@pytest.mark.parametrize("settings", [{"exclude": "."}, {"op_types": ("ConvTranspose",)}])
def test_a_selection_that_leaves_nothing_is_refused(
    settings: dict[str, object], load: Load
) -> None:
    message = "^nothing left to quantize: --only, --exclude and --op-types leave none$"
    with pytest.raises(OptionError, match=message):
        make_plan(load("conv_bias"), selecting(**settings))


def test_a_model_without_layers_has_nothing_to_quantize(save: Save) -> None:
    model = load_model(save(parsed("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")))
    with pytest.raises(ModelError) as caught:
        make_plan(model, Rules())
    layers = "Conv, ConvTranspose, Gemm, MatMul"
    expected = f"{model.path}: nothing to quantize: no {layers} with float32 or float16 inputs"
    assert str(caught.value) == expected


def test_a_model_with_layers_of_other_types_says_why_it_has_nothing(save: Save) -> None:
    text = "(double[N,4] x) => (double[N,4] y) { y = MatMul(x, x) }"
    model = load_model(save(parsed(text)))
    with pytest.raises(ModelError, match=r"/MatMul/y\[0\]: 'x' is double, not float32 or float16$"):
        make_plan(model, Rules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_where_it_would_be_quantized(
    bad: float, save: Save
) -> None:
    weight = values(6, 5)
    weight[1, 2] = bad
    model = load_model(save(gemm(weight=weight)))
    with pytest.raises(ModelError) as caught:
        make_plan(model, Rules())
    assert str(caught.value) == f"{model.path}: weight 'weight' holds NaN or infinity"
    assert names(make_plan(model, selecting(exclude="weight"))) == ["hidden"]
