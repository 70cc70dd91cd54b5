"""What is proposed for ``octav.yaml``: it parses, matches what is meant, brings what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_models import copy_digits, enter_room, read_json, save_two_layers, succeed
from conftest import Save, all_bits
from models import MODELS, values
from onnx import TensorProto, helper, numpy_helper
from test_figures import fixture_file, normalised

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.config import Config
from calib.graph import Model, load_model
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.proposals import Proposal, propose
from calib.rules import Reduction, Rules, Selection, TensorRule, Widths
from calib.run import Run
from calib.sensitivity import Damage, Sensitivity
from calib.survey import Candidates, Survey
from calib.surveying import compare_methods

NAMES = (
    "a.b", "a+b", "a|b", "with space", "quote'd", 'double"d', "ünïcode.重み", "/layer/w:0",
    "^start$", "(group)", "[0]", "back\\slash", "{4}", "-dash", "#hash", "a", "b",
)  # fmt: skip


def ranking(names: list[str], layers: list[str], n: int) -> Sensitivity:
    """As if the first ``n`` tensors and layers were enough."""
    curve = tuple((i, 20.0 if i >= n else 5.0) for i in range(len(names) + 1))
    excluding = tuple((i, 20.0 if i >= n else 5.0) for i in range(len(layers) + 1))
    tensors = tuple(Damage(name, "weight", 1.0, 1.0, estimated=False) for name in names)
    return Sensitivity(64, 5.0, 40.0, tensors, curve, excluding, tuple(layers))


def named_layers(path: Path) -> Model:
    """A MatMul for each of `NAMES`, which is what its weight is called."""
    nodes, weights = [], []
    for n, name in enumerate(NAMES):
        nodes.append(helper.make_node("MatMul", [f"x{n}", name], [f"x{n + 1}"], f"node {name} {n}"))
        weights.append(numpy_helper.from_array(values(4, 4, seed=n), name))
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])
        for name in ("x0", f"x{len(NAMES)}")
    )
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return load_model(path)


def proposed(
    model: Model, rules: Rules, tensors: list[str], n: int, layers: list[str] | None = None
) -> tuple[Proposal, ...]:
    """For ``model`` with ``rules``, where the first ``n`` of ``tensors`` are the worst."""
    plan = make_plan(model, rules)
    x = values(16, 4)
    shape = {spec.name: spec.shape for spec in model.inputs}
    feed = {name: x if len(dims or ()) == 2 else values(4, 3, 6, 6) for name, dims in shape.items()}
    table = calibrate(model, observe(model, [Batch(feed)], plan.activations), plan, rules)
    return propose(ranking(tensors, layers or ["none"], n), rules, table, 8)


# --- names and YAML -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(len(NAMES)))
def test_the_rules_match_exactly_the_tensor_that_is_meant(tmp_path: Path, place: int) -> None:
    model = named_layers(tmp_path / "m.onnx")
    rules = all_bits(4)
    order = [NAMES[place], *(name for name in NAMES if name != NAMES[place])]
    (mixed,) = proposed(model, rules, order, 1)
    read = Config.parse(mixed.yaml).to_rules()
    assert read == mixed.rules
    widths = {spec.name: spec.bits for spec in make_plan(model, read).specs}
    assert {name for name, bits in widths.items() if bits == 8} == {NAMES[place]}


def test_the_exclude_list_matches_exactly_the_layers_that_are_meant(tmp_path: Path) -> None:
    model = named_layers(tmp_path / "m.onnx")
    layers = [f"node {name} {n}" for n, name in enumerate(NAMES)]
    tensors = list(NAMES)
    for n in (1, 5, len(NAMES) - 1):
        _, excluding = proposed(model, all_bits(4), tensors, n, layers)
        read = Config.parse(excluding.yaml).to_rules()
        assert read == excluding.rules
        consumers = {c for spec in make_plan(model, read).specs for c in spec.consumers}
        assert consumers == set(layers[n:])
        which = f"{n} layers that hurt" if n > 1 else "layer that hurts"
        assert excluding.what == f"float for the {which} the output most"


def test_a_weight_that_is_called_as_its_layer_is_widened_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_two_layers(path, names=("x", "first", "hidden", "second", "y"))
    model = load_model(path)
    mixed, _ = proposed(model, all_bits(4), ["first", "second", "x", "hidden"], 1, ["a", "b"])
    widths = {spec.name: spec.bits for spec in make_plan(model, mixed.rules).specs}
    assert widths == {"x": 4, "first": 8, "hidden": 4, "second": 4}


def test_nothing_is_proposed_where_everything_would_be_in_it_or_nothing(tmp_path: Path) -> None:
    model = named_layers(tmp_path / "m.onnx")
    tensors, layers = list(NAMES), [f"node {name} {n}" for n, name in enumerate(NAMES)]
    for n in (0, len(NAMES)):
        assert proposed(model, all_bits(4), tensors, n, layers) == ()


def test_a_tensor_that_is_as_wide_already_is_not_among_the_rules(tmp_path: Path) -> None:
    model = named_layers(tmp_path / "m.onnx")
    rules = Rules(widths=Widths(4, 4))  # the edges have 8
    (mixed,) = proposed(model, rules, list(NAMES), 2)
    assert [rule.match for rule in mixed.rules.overrides] == [r"^a\+b$"]
    assert mixed.title == "mixed 4/8 bits"
    assert mixed.what == "8 bits for the tensor that hurts the output most"


# --- what the user has said already -------------------------------------------------------------


def test_rules_of_the_user_stay_and_a_new_one_keeps_what_they_say_of_its_tensor(
    tmp_path: Path,
) -> None:
    model = named_layers(tmp_path / "m.onnx")
    users = (
        TensorRule("quote", method="max", granularity="per-tensor", bits=5),
        TensorRule("space", kind="weight", bits=3),
        TensorRule(r"^\[0\]$", skip=True),
    )
    rules = replace(all_bits(4), overrides=users)
    order = ["quote'd", "a.b", *(n for n in NAMES if n not in ("quote'd", "a.b", "[0]"))]
    (mixed,) = proposed(model, rules, order, 2)
    assert [rule for rule in mixed.rules.overrides if rule in users] == list(users)
    assert Config.parse(mixed.yaml).to_rules() == mixed.rules
    before = {spec.name: spec for spec in make_plan(model, rules).specs}
    after = {spec.name: spec for spec in make_plan(model, mixed.rules).specs}
    assert "[0]" not in after
    for name, spec in before.items():
        wide = replace(spec, bits=8) if name in order[:2] else spec
        assert after[name] == wide


def test_what_a_users_rule_skips_stays_float_where_its_tensor_is_widened(save: Save) -> None:
    model = load_model(save(MODELS["residual"]()))
    rules = replace(all_bits(4), overrides=(TensorRule("left$", skip=True),))
    plan = make_plan(model, rules)
    names = ["shared", *(spec.name for spec in plan.specs if spec.name != "shared")]
    (mixed,) = proposed(model, rules, names, 1)
    specs = {spec.name: spec for spec in make_plan(model, mixed.rules).specs}
    assert specs["shared"].bits == 8
    assert specs["shared"].consumers == ("/Conv/right",)
    assert "kernel1" not in specs


@pytest.mark.parametrize(
    "pattern", ["(?i)SPACE", "space|quote", "^node a ", "(?x) spa ce # comment"]
)
def test_what_the_user_excludes_stays_excluded(tmp_path: Path, pattern: str) -> None:
    model = named_layers(tmp_path / "m.onnx")
    rules = replace(all_bits(4), selection=Selection(exclude=pattern))
    kept = [c for spec in make_plan(model, rules).specs for c in spec.consumers]
    layers = list(dict.fromkeys(kept))
    tensors = [spec.name for spec in make_plan(model, rules).specs]
    mixed, excluding = proposed(model, rules, tensors, 2, layers)
    for proposal in (mixed, excluding):
        assert Config.parse(proposal.yaml).to_rules() == proposal.rules
    left = {c for spec in make_plan(model, excluding.rules).specs for c in spec.consumers}
    assert left == set(layers[2:])
    same = {c for spec in make_plan(model, mixed.rules).specs for c in spec.consumers}
    assert same == set(layers)


@pytest.mark.parametrize(
    "rules",
    [
        Rules(widths=Widths(4, 4, 4), weight_granularity="per-tensor"),
        Rules(widths=Widths(3, 3, 6), method="percentile:99.9"),
        Rules(widths=Widths(4, 4, 4), method="octav:kappa=paper,iterations=10"),
        Rules(widths=Widths(4, 4, 4), selection=Selection(only="node")),
        Rules(widths=Widths(4, 4, 4), selection=Selection(op_types=("MatMul",))),
        Rules(widths=Widths(4, 4, 4), reduction=Reduction("mean", 3)),
        Rules(widths=Widths(4, 4, 4), block_size=2),
    ],
    ids=["granularity", "edges", "parameters", "only", "op-types", "mean", "blocks"],
)
def test_the_yaml_holds_all_rules_whatever_the_command_line_has_said(
    tmp_path: Path, rules: Rules
) -> None:
    model = named_layers(tmp_path / "m.onnx")
    plan = make_plan(model, rules)
    batches = [Batch({"x0": values(8, 4, seed=n)}) for n in range(3)]
    seen = observe(model, batches, plan.activations, Observing(rules.reduction.kept_batches))
    table = calibrate(model, seen, plan, rules)
    layers = list(dict.fromkeys(c for spec in plan.specs for c in spec.consumers))
    inner = [s.name for s in plan.specs if s.kind == "weight"][2:]
    found = propose(ranking(inner, layers, 2), rules, table, 8)
    assert len(found) == 2
    for proposal in found:
        assert Config.parse(proposal.yaml).to_rules() == proposal.rules
        assert proposal.yaml.isascii()
        assert proposal.yaml.startswith("bits: ")


# --- pasted -------------------------------------------------------------------------------------


def assert_pasting_gives_it(
    survey: Survey, capsys: pytest.CaptureFixture[str], *arguments: object, within: float
) -> None:
    """octav-calibrate with each proposal as octav.yaml gives the SQNR that it states."""
    assert survey.proposals
    for measured in survey.proposals:
        Path("octav.yaml").write_text(measured.proposal.yaml, "utf-8")
        options = ("--config", "octav.yaml", "--output", "q.onnx", "--summary", "s.json", "--force")
        succeed(capsys, survey.model.path, *arguments, *options)
        summary = read_json("s.json")
        stated, before = measured.after.sqnr_db, measured.before.sqnr_db
        assert stated is not None
        assert before is not None
        assert summary["output_sqnr_db"] == pytest.approx(stated, abs=within)
        assert stated > before + 1


def test_pasted_rules_give_the_stated_sqnr_on_the_same_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_room(tmp_path, monkeypatch)
    copy_digits(tmp_path)
    rules = Rules(widths=Widths(8, 8, 3))
    candidates = Candidates(bits=(3,), methods=("octav",))
    survey = compare_methods("digits.onnx", "digits.npz", candidates, rules, Run(samples=256))
    assert survey.held_out
    data = ("--data", "digits.npz", "--samples", 256)
    assert_pasting_gives_it(survey, capsys, *data, within=1e-6)


def test_on_resnet20_at_3_bits_the_stated_sqnr_holds_on_unseen_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_room(tmp_path, monkeypatch)
    monkeypatch.setattr("calib.sensitivity.N_SAMPLES", 8)  # to save time
    monkeypatch.setattr("calib.sensitivity._MOST_EXACT", 10)
    model = fixture_file("resnet20_cifar10.onnx")
    calibration, _ = normalised("cifar10_calib.npz")
    images, _ = normalised("cifar10_val.npz")
    for name, half in (("seen.npz", images[:60]), ("unseen.npz", images[1000:1060])):
        np.savez(name, input=np.concatenate([calibration[:64], half]))
    candidates = Candidates(bits=(3,), methods=("octav",))
    survey = compare_methods(model, "seen.npz", candidates, None, Run(samples=64))
    data = ("--data", "unseen.npz", "--samples", 64)
    assert_pasting_gives_it(survey, capsys, *data, within=1.0)
    found = survey.sensitivity
    assert found is not None
    for measured in survey.proposals:
        assert measured.after.sqnr_db == pytest.approx(found.target_db, abs=3)
