"""Thresholds from halves of the samples: equal halves agree, a planted outlier is found first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import all_bits
from models import Array, Feed, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.calibrators import make
from calib.confidence import ENOUGH_PERCENT, Certainty, Confidence, confidence
from calib.data import open_data
from calib.distribution import Samples
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.qtypes import QuantType
from calib.rules import Reduction, Rules

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"
APART = """(float[N,6] x, float[N,5] z) => (float[N,2] y, float[N,2] u)
<float[6,2] weight_x, float[5,2] weight_z> {
  y = MatMul(x, weight_x)
  u = MatMul(z, weight_z)
}"""
# Entropy smooths with a constant count, so that twice the same samples are not the same to it.
METHODS = ("octav", "percentile:99", "mse", "max")


@pytest.fixture(scope="module")
def model() -> Model:
    """Two layers with nothing in common."""
    return Model(Path("m"), "", 0, ir.from_proto(parsed(APART)), ())


def sure(model: Model, feeds: Sequence[Feed], rules: Rules) -> Confidence:
    """After observing ``feeds`` one by one."""
    plan = make_plan(model, rules)
    how = Observing(rules.reduction.kept_batches, halves=True)
    seen = observe(model, map(Batch, feeds), plan.activations, how)
    found = confidence(model, seen, plan, rules)
    assert found is not None
    return found


def feed(seed: int, n: int = 200) -> Feed:
    return {"x": values(n, 6, seed=seed), "z": values(n, 5, seed=seed + 100)}


@pytest.mark.parametrize("method", METHODS)
def test_equal_halves_agree_with_all(method: str, model: Model) -> None:
    rules = dataclasses.replace(all_bits(4), method=method)
    found = sure(model, [feed(1), feed(1)], rules)
    assert {tensor.name for tensor in found.tensors} == set(make_plan(model, rules).activations)
    for tensor in found.tensors:
        assert tensor.first == tensor.second == pytest.approx(tensor.all, rel=1e-9)
        assert tensor.percent == pytest.approx(0, abs=1e-6)
    assert found.n_samples == (200, 200)
    assert found.unsure == ()
    assert found.text == (
        "thresholds of the two halves of the samples (200 and 200) differ from those of all by at "
        "most 0.0 % (median 0.0 %): more samples would change little"
    )


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("method", ["max", "mse", "octav"])
def test_an_outlier_in_one_half_ranks_its_tensor_first(
    method: str, half: int, model: Model
) -> None:
    feeds = [feed(1), feed(1), feed(1), feed(1)]
    feeds[half]["z"][7, 3] = 1000
    found = sure(model, feeds, dataclasses.replace(all_bits(8), method=method))
    first = found.tensors[0]
    assert first.name == "z"
    assert first.percent > 20
    assert [t.percent for t in found.tensors] == sorted(
        (t.percent for t in found.tensors), reverse=True
    )
    assert first in found.unsure
    assert "z" in {t.name for t in found.unsure}
    n, of = len(found.unsure), len(found.tensors)
    cost = f"'z' at the cost of {first.excess_db:.1f} dB"
    assert found.text.endswith(f", {n} of {of} by more than 5 %, {cost}: more samples are needed")
    if method == "max":
        low, high = (first.first, first.second)[:: 1 if half else -1]
        assert (high, first.all) == (1000, 1000)
        assert low < 10


def test_thresholds_are_those_of_a_table_from_each_half_alone(model: Model) -> None:
    rules = all_bits(4)
    plan = make_plan(model, rules)
    feeds = [feed(n) for n in range(5)]
    found = sure(model, feeds, rules)
    parts = (feeds, feeds[::2], feeds[1::2])
    tables = [
        calibrate(model, observe(model, map(Batch, part), plan.activations), plan, rules)
        for part in parts
    ]
    for tensor in found.tensors:
        expected = [
            r.threshold[0] for table in tables for r in table.records if r.name == tensor.name
        ]
        assert [tensor.all, tensor.first, tensor.second] == expected
        differences = [abs(part - expected[0]) for part in expected[1:]]
        assert tensor.percent == pytest.approx(100 * max(differences) / expected[0])


def test_a_half_without_negative_values_is_asked_for_the_grid_of_all(model: Model) -> None:
    """On the unsigned grid, the same values would have another threshold."""
    positive = {"x": np.abs(values(400, 6, seed=3)), "z": values(400, 5)}
    mixed = {**positive, "x": positive["x"] * np.float32(1)}
    mixed["x"][0, 0] *= -1
    found = sure(model, [positive, mixed], all_bits(4))
    tensor = next(t for t in found.tensors if t.name == "x")
    assert tensor.first == pytest.approx(tensor.second, rel=1e-3)


def test_a_tensor_that_is_zero_in_a_half_differs_wholly_and_one_that_always_is_does_not(
    model: Model,
) -> None:
    zero, x = np.zeros((50, 5), np.float32), values(50, 6)
    found = sure(model, [{"x": x, "z": zero}, {"x": x, "z": values(50, 5)}], all_bits(4))
    assert (found.tensors[0].name, found.tensors[0].first) == ("z", 0)
    assert found.tensors[0].percent == pytest.approx(100)
    found = sure(model, [{"x": x, "z": zero}, {"x": x, "z": zero}], all_bits(4))
    assert found.tensors[-1].percent == 0


def test_what_one_half_has_not_seen_is_named(model: Model) -> None:
    rules = all_bits(4)
    plan = make_plan(model, rules)
    whole = observe(model, map(Batch, [feed(1), feed(1)]), plan.activations, Observing(halves=True))
    second = {name: type(c)() if name == "z" else c for name, c in whole.halves[1].items()}
    seen = dataclasses.replace(whole, halves=(whole.halves[0], second))
    found = confidence(model, seen, plan, rules)
    assert found is not None
    assert found.unseen == ("z",)
    assert "z" not in {tensor.name for tensor in found.tensors}
    assert found.text.endswith(
        "; 1 activations, the first 'z', were seen in one half only: more samples are needed"
    )


def test_without_halves_and_for_the_mean_of_first_batches_nothing_can_be_said(model: Model) -> None:
    feeds = [feed(1), feed(2)]
    for rules, how in (
        (all_bits(4), Observing()),
        (dataclasses.replace(all_bits(4), reduction=Reduction("mean")), Observing(5, halves=True)),
    ):
        plan = make_plan(model, rules)
        seen = observe(model, map(Batch, feeds), plan.activations, how)
        assert confidence(model, seen, plan, rules) is None
    plan = make_plan(model, all_bits(4))
    single = observe(model, [Batch(feed(1))], plan.activations, Observing(halves=True))
    assert confidence(model, single, plan, all_bits(4)) is None


def test_more_samples_make_thresholds_surer() -> None:
    model, rules = load_model(DIGITS / "digits.onnx"), all_bits(4)
    plan, data = make_plan(model, rules), open_data(model, DIGITS / "digits.npz")

    def seen(n: int) -> Observations:
        return observe(model, data.batches(0, n), plan.activations, Observing(halves=True))

    few, many = (confidence(model, seen(n), plan, rules) for n in (64, 1024))
    assert few is not None
    assert many is not None
    assert few.tensors[0].percent > 2 * many.tensors[0].percent
    assert "more samples would change little" in many.text
    assert json.loads(json.dumps(many.to_json()))["tensors"][0]["percent"] == pytest.approx(
        many.tensors[0].percent
    )


def heavy_tailed(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "gauss": rng.normal(size=(1, 1_000_000)),
        "rectified": np.maximum(rng.normal(size=(1, 1_000_000)), 0),
        "laplace": rng.laplace(size=(1, 1_000_000)),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["gauss", "rectified", "laplace"])
def test_a_threshold_within_the_boundary_costs_little(kind: str, bits: int) -> None:
    dist = Samples(heavy_tailed(1)[kind].astype(np.float32))
    qtype = QuantType(bits, signed=dist.has_negative)
    threshold = make("octav")(dist, qtype)
    best = dist.mse(threshold, qtype)[0]

    def cost_db(percent: float) -> float:
        moved = dist.mse(threshold * (1 + percent / 100), qtype)[0]
        return float(10 * np.log10(moved / best))

    assert max(cost_db(ENOUGH_PERCENT), cost_db(-ENOUGH_PERCENT)) < 0.3
    assert max(cost_db(4 * ENOUGH_PERCENT), cost_db(-4 * ENOUGH_PERCENT)) > 0.5


def test_percent_is_of_the_half_that_differs_more() -> None:
    assert Certainty("x", 2.0, 1.9, 2.4, 0.0).percent == pytest.approx(20)
    assert Certainty("x", 2.0, 1.5, 2.1, 0.0).percent == pytest.approx(25)


def test_thresholds_that_differ_where_the_error_is_flat_are_sure_enough() -> None:
    costly, free = (Certainty("x", 2.0, 1.0, 2.0, db) for db in (1.0, 0.05))
    assert Confidence((1, 1), (costly,)).unsure == (costly,)
    found = Confidence((1, 1), (free,))
    assert found.unsure == ()
    assert found.text.endswith("more samples would change little")
