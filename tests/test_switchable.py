"""The model with a switch at each tensor: what it computes is what a written model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Load, Save, all_bits, calibrated
from models import MODELS, Feed, feed_for, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.capture import Session, Values
from calib.comparison import Difference
from calib.data import open_data
from calib.graph import Model, load_model
from calib.observing import observe
from calib.planning import make_plan
from calib.rules import Rules, Selection, Widths
from calib.switchable import Switchable
from calib.table import CalibrationTable, TensorRecord
from calib.write import write_qdq

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"
SAME_DB = 80.0

FLOAT16_BOTH = """(float16[N,6] x) => (float16[N,3] y) {
  hidden = Relu(x)
  y = MatMul(hidden, weight)
}"""
# Every operand in float16: the graph input, the weight, what stands between.
HALVES = {"weight": values(6, 3).astype("f2")}


def worst_db(expected: Values | Feed, actual: Values | Feed) -> float:
    """The lowest SQNR of all outputs."""
    found = []
    for name, reference in expected.items():
        difference = Difference()
        difference.add(reference, actual[name])
        found.append(difference.sqnr_db)
    return min(found)


def by_name(table: CalibrationTable) -> dict[str, TensorRecord]:
    return {record.name: record for record in table.records}


def only(table: CalibrationTable, names: Iterable[str]) -> CalibrationTable:
    kept = set(names)
    return replace(table, records=tuple(r for r in table.records if r.name in kept))


def written(model: Model, table: CalibrationTable, feed: Feed) -> Values:
    """What the QDQ model of ``table`` gives, as ONNX defines it: of weights of 4 bits alone
    onnxruntime makes a MatMulNBits, which computes otherwise."""
    return Session(write_qdq(model, table).ir, optimized=False).run(feed)


def assert_like_written(model: Model, rules: Rules) -> None:
    table, feed = calibrated(model, rules)
    switchable = Switchable(model, table)
    batch = Batch(feed)
    floats = Session(model.path).run(feed)
    narrowest = min(array.dtype.itemsize for array in floats.values())
    half = narrowest == 2 or any(r.spec.dtype == "float16" for r in table.records)
    # A graph with more nodes in it is fused otherwise, and in float16 that is heard.
    assert worst_db(floats, switchable.run(batch, {})) > (55 if half else 110)
    found = switchable.run(batch, by_name(table))
    assert worst_db(written(model, table, feed), found) > SAME_DB


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [3, 8])
def test_with_everything_switched_on_it_is_the_written_model(
    load: Load, name: str, bits: int
) -> None:
    assert_like_written(load(name), all_bits(bits))


@pytest.mark.parametrize("name", ["conv_bias", "attention", "tied_transposed", "float16_conv"])
@pytest.mark.parametrize(
    "rules",
    [
        all_bits(16),
        all_bits(4, 8),
        Rules(widths=Widths(8, 8, 8), weight_granularity="per-tensor"),
        Rules(widths=Widths(8, 4, 8), activations="asymmetric"),
    ],
    ids=["16", "4-8", "per-tensor", "asymmetric"],
)
def test_it_is_the_written_model_at_other_widths_too(load: Load, name: str, rules: Rules) -> None:
    assert_like_written(load(name), rules)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_float16_model_is_quantized_as_it_is_written(save: Save, bits: int) -> None:
    assert_like_written(load_model(save(parsed(FLOAT16_BOTH, HALVES))), all_bits(bits))


def test_an_old_opset_is_raised_as_far_as_the_switches_need(save: Save) -> None:
    path = save(MODELS["weights_are_inputs"]())
    assert onnx.load(path).opset_import[0].version == 9
    assert_like_written(load_model(path), Rules(weight_granularity="per-tensor"))


def test_the_digits_model_is_the_written_one() -> None:
    model = load_model(DIGITS / "digits.onnx")
    batches = list(open_data(model, DIGITS / "digits.npz").batches(0, 64))
    plan = make_plan(model, all_bits(4))
    observations = observe(model, batches, plan.activations)
    table = calibrate(model, observations, plan, all_bits(4))
    switchable = Switchable(model, table)
    for batch in batches:
        floats = Session(model.path).run(batch.feed)
        assert worst_db(floats, switchable.run(batch, {})) > 110
        expected = written(model, table, dict(batch.feed))
        assert worst_db(expected, switchable.run(batch, by_name(table))) > SAME_DB


@pytest.mark.parametrize("name", ["residual", "attention", "tied", "gemm_scaled", "two_inputs"])
def test_every_subset_is_the_model_in_which_that_alone_is_quantized(load: Load, name: str) -> None:
    model = load(name)
    table, feed = calibrated(model, all_bits(4))
    switchable, records = Switchable(model, table), by_name(table)
    names = list(records)
    subsets = [*([n] for n in names), *([m for m in names if m != n] for n in names), names[::2]]
    for subset in subsets:
        expected = written(model, only(table, subset), feed)
        found = switchable.run(Batch(feed), {n: records[n] for n in subset})
        assert worst_db(expected, found) > SAME_DB, subset
    floats = Session(model.path).run(feed)
    assert worst_db(floats, switchable.run(Batch(feed), {})) > 110, "it is float again"


def test_a_consumer_that_is_excluded_reads_the_float_activation(load: Load) -> None:
    model = load("residual")
    rules = replace(all_bits(2), selection=Selection(exclude="left$"))
    table, feed = calibrated(model, rules)
    shared = by_name(table)["shared"]
    assert shared.spec.consumers == ("/Conv/right",)
    found = Switchable(model, table).run(Batch(feed), {"shared": shared})
    assert worst_db(written(model, only(table, ["shared"]), feed), found) > SAME_DB
    everywhere, _ = calibrated(model, all_bits(2), feed)
    assert len(by_name(everywhere)["shared"].spec.consumers) == 2
    more = written(model, only(everywhere, ["shared"]), feed)
    assert worst_db(more, found) < 40, "the other consumer's reading makes a difference"


def test_tensors_may_be_run_at_another_width_than_they_were_made_for(load: Load) -> None:
    model = load("conv_bias")
    narrow, feed = calibrated(model, all_bits(3))
    wide, _ = calibrated(model, all_bits(8), feed)
    switchable = Switchable(model, narrow)
    for mixed in (by_name(wide), by_name(narrow) | {"kernel2": by_name(wide)["kernel2"]}):
        table = replace(narrow, records=tuple(mixed[r.name] for r in narrow.records))
        expected = written(model, table, feed)
        assert worst_db(expected, switchable.run(Batch(feed), mixed)) > SAME_DB


def test_a_signed_and_an_unsigned_activation_are_clipped_to_their_grids(load: Load) -> None:
    model = load("conv_bias")
    table, feed = calibrated(model, all_bits(3))
    assert {r.qtype.signed for r in table.records if r.spec.kind == "activation"} == {True, False}
    far = {name: 50 * array for name, array in feed.items()}
    found = Switchable(model, table).run(Batch(far), by_name(table))
    assert worst_db(written(model, table, far), found) > SAME_DB


RUNNING_SUM = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
<float[6,3] w> {
  next = Add(x, state)
  y = MatMul(next, w)
}"""


def steps(n: int) -> list[Batch]:
    return [Batch({"x": x}, restart=i == 0) for i, x in enumerate(values(n, 1, 6))]


def test_state_goes_from_step_to_step_and_is_forgotten_at_a_restart(save: Save) -> None:
    model = load_model(save(parsed(RUNNING_SUM)), {"state": "next"})
    plan = make_plan(model, all_bits(4))
    table = calibrate(model, observe(model, steps(8), plan.activations), plan, all_bits(4))
    switchable = Switchable(model, table)
    trials: list[Mapping[str, TensorRecord]] = [{}, by_name(table), {}]
    for records in trials:
        source = write_qdq(model, table).ir if records else model.path
        session = Session(source, feedback=model.feedback)
        for batch in steps(8):
            expected = session.run(batch.feed, batch.restart)
            assert worst_db(expected, switchable.run(batch, records)) > SAME_DB


def test_names_that_the_switches_would_take_are_left_to_the_model(save: Save) -> None:
    text = """(float[N,6] x, float[N,6] x_scale) => (float[N,5] y)
    <float[6,5] w, float[6,5] w_fed> {
      sum = Add(x, x_scale)
      left = MatMul(x, w)
      right = MatMul(sum, w_fed)
      y = Add(left, right) }"""
    assert_like_written(load_model(save(parsed(text))), all_bits(4))


def test_an_activation_that_is_an_output_of_the_model_is_given_as_float(save: Save) -> None:
    text = """(float[N,6] x) => (float[N,6] hidden, float[N,5] y) <float[6,5] w> {
      hidden = Relu(x)
      y = MatMul(hidden, w) }"""
    model = load_model(save(parsed(text)))
    table, feed = calibrated(model, all_bits(3))
    found = Switchable(model, table).run(Batch(feed), by_name(table))
    assert np.array_equal(found["hidden"], np.maximum(feed["x"], 0))
    assert_like_written(model, all_bits(3))


def test_the_model_itself_stays_as_it_is(load: Load) -> None:
    model = load("conv_bn_relu")
    before = [(node.op_type, [v and v.name for v in node.inputs]) for node in model.ir.graph]
    table, feed = calibrated(model, all_bits(4))
    Switchable(model, table).run(Batch(feed), by_name(table))
    after = [(node.op_type, [v and v.name for v in node.inputs]) for node in model.ir.graph]
    assert before == after
    assert set(feed) == set(feed_for(MODELS["conv_bn_relu"]())), "the feed is not changed"
