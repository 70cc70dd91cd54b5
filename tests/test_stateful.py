"""Inputs that an output is fed back into, inputs with a value of their own, and padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits
from models import Array, Feed, parsed, run, values
from onnx import TensorProto, helper

from calib import Run, calibrate_model, load_model, make_plan, observe
from calib.arrays import Batch
from calib.capture import Session
from calib.errors import OptionError
from calib.observing import Observing
from calib.rules import Rules

RUNNING_SUM = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
<float[6,3] w> {
  next = Add(x, state)
  y = MatMul(next, w)
}"""
FEEDBACK = {"state": "next"}


@pytest.fixture
def running_sum(save: Save) -> Path:
    return save(parsed(RUNNING_SUM))


def steps(n: int = 10, seed: int = 0) -> Array:
    return values(n, 1, 6, seed=seed)


# --- feedback -----------------------------------------------------------------------------------


def test_an_output_is_fed_back_into_the_input_that_is_named(running_sum: Path) -> None:
    session = Session(running_sum, feedback=FEEDBACK)
    x = steps()
    found = [session.run({"x": step})["next"] for step in x]
    assert np.allclose(found, np.cumsum(x, axis=0), atol=1e-6)


def test_a_restart_forgets_and_a_feed_that_holds_the_state_sets_it(running_sum: Path) -> None:
    session = Session(running_sum, feedback=FEEDBACK)
    first, second = steps(2)
    session.run({"x": first})
    assert np.array_equal(session.run({"x": second}, restart=True)["next"], second)
    given = session.run({"x": first, "state": second})["next"]
    assert np.allclose(given, first + second)
    assert np.allclose(session.run({"x": first})["next"], given + first)


def test_what_a_state_is_at_first_has_the_lengths_of_the_feed_and_free_axes_are_empty(
    save: Save,
) -> None:
    text = """(float[N,1,4] token, float[N,P,4] past) => (float[N,Q,4] present) {
      present = Concat<axis=1>(past, token) }"""
    session = Session(save(parsed(text)), feedback={"past": "present"})
    lengths = [session.run({"token": values(3, 1, 4)})["present"].shape for _ in range(3)]
    assert lengths == [(3, 1, 4), (3, 2, 4), (3, 3, 4)]


def test_observing_and_comparing_go_through_the_steps_in_order(running_sum: Path) -> None:
    x = steps(12)
    model = load_model(running_sum, FEEDBACK)
    assert [spec.optional for spec in model.inputs] == [False, True]
    batches = [Batch({"x": step}, restart=number == 0) for number, step in enumerate(x)]
    seen = observe(model, batches, ["next"])
    reached = np.cumsum(x, axis=0)
    counter = seen.counters["next"]
    assert (counter.min, counter.max) == pytest.approx((reached.min(), reached.max()), rel=1e-5)

    result = calibrate_model(
        running_sum, [{"x": step} for step in x], all_bits(8), run=Run(feedback=FEEDBACK)
    )
    record = next(r for r in result.table.records if r.name == "next")
    assert record.max_abs == pytest.approx(np.abs(reached).max(), rel=1e-5)
    assert result.comparison.n_samples == len(x)
    assert result.comparison.output_sqnr_db > 25
    # The quantized model is fed its own state.
    fed = [v.name for v in onnx.load(result.output).graph.input]
    assert fed == ["x", "state"]


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"estate": "next"}, "feed-back: 'estate' is no input of the model; it has 'x', 'state'"),
        ({"state": "z"}, "feed-back: 'z' is no output of the model; it has 'y', 'next'"),
    ],
)
def test_a_feedback_between_what_is_not_there_is_refused(
    feedback: dict[str, str], message: str, running_sum: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        load_model(running_sum, feedback)
    assert str(caught.value) == message


def test_a_feedback_between_types_that_differ_is_refused(save: Save) -> None:
    text = "(float[N] x, int64[N] n) => (float[N] y) { y = Relu(x) }"
    with pytest.raises(OptionError, match=r"input 'n' is INT64, output 'y' is FLOAT: they must be"):
        load_model(save(parsed(text)), {"n": "y"})


# --- inputs with a value of their own -----------------------------------------------------------


@pytest.fixture
def with_default(save: Save) -> Path:
    """``gain`` is 2 where none is fed."""
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,3] w> {
      louder = Mul(x, gain)
      y = MatMul(louder, w) }""", {"gain": np.array(2, np.float32)})  # fmt: skip
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
    return save(model)


def largest(path: Path, feed: Feed) -> float:
    """The largest magnitude that was seen of ``louder``."""
    result = calibrate_model(path, [feed], all_bits(8), run=Run(force=True))
    assert [v.name for v in onnx.load(result.output).graph.input] == ["x", "gain"]
    for optimized in (False, True):
        found = run(result.output, feed, optimized=optimized)["y"]
        assert np.allclose(found, run(path, feed)["y"], atol=0.1)
    return next(r.max_abs for r in result.table.records if r.name == "louder")


def test_an_optional_input_may_be_left_out_or_fed(with_default: Path) -> None:
    x = values(8, 6)
    peak = np.abs(x).max()
    assert largest(with_default, {"x": x}) == pytest.approx(2 * peak)
    assert largest(with_default, {"x": x, "gain": np.array(0.5, np.float32)}) == pytest.approx(
        0.5 * peak
    )


# --- padding ------------------------------------------------------------------------------------

PADDED = """(int64[N,L] ids, int64[N,L] mask) => (float[N,L,4] y) <float[9,6] table, float[6,4] w> {
  vectors = Gather(table, ids)
  y = MatMul(vectors, w)
}"""


def padded_feed() -> tuple[Feed, Array]:
    """Tokens 1 to 7, token 8 where padding stands, which has huge values; and the mask."""
    rng = np.random.default_rng(0)
    mask = (np.arange(10) < rng.integers(3, 10, (6, 1))).astype(np.int64)
    return {"ids": np.where(mask, rng.integers(1, 8, (6, 10)), 8), "mask": mask}, mask


@pytest.fixture
def padded(save: Save) -> Path:
    table = values(9, 6)
    table[8] = 1000
    model = parsed(PADDED, {"table": table})
    return save(model)


def test_what_stands_at_padding_is_not_counted_where_the_mask_says_so(padded: Path) -> None:
    feed, mask = padded_feed()
    model = load_model(padded)
    names = make_plan(model, Rules()).activations
    whole = observe(model, [Batch(feed)], names).counters["vectors"]
    masked = observe(model, [Batch(feed)], names, Observing(padding_mask="mask"))
    assert whole.max == 1000
    assert masked.counters["vectors"].max < 10
    assert masked.counters["vectors"].n_finite == 6 * mask.sum()
    assert masked.unmasked == ()


def test_activations_that_the_mask_does_not_fit_are_counted_whole_and_named(save: Save) -> None:
    text = PADDED.replace("float[N,L,4] y", "float[6,4] y").replace(
        "y = MatMul(vectors, w)",
        "pooled = ReduceMax<axes=[1], keepdims=0>(vectors)\n y = MatMul(pooled, w)",
    )
    feed, _ = padded_feed()
    feed["ids"] = np.minimum(feed["ids"], 7)
    result = calibrate_model(save(parsed(text)), [feed], run=Run(padding_mask="mask"))
    assert any("counted whole, the first 'pooled'" in note for note in result.notes)


def test_a_padding_mask_that_is_no_input_is_refused(padded: Path) -> None:
    feed, _ = padded_feed()
    with pytest.raises(OptionError) as caught:
        calibrate_model(padded, [feed], run=Run(padding_mask="msk"))
    assert str(caught.value) == ("padding-mask: the model has no input 'msk', only 'ids', 'mask'")
