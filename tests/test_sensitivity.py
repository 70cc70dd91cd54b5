"""What each tensor's quantization does to the output: planted culprits, and written models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Save, all_bits
from models import Array, Feed, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.capture import Session
from calib.comparison import Totals, evaluate
from calib.data import Reading, open_data
from calib.graph import Model, load_model
from calib.observing import observe
from calib.planning import make_plan
from calib.rules import Rules, TensorRule
from calib.sensitivity import Sensitivity, sensitivity
from calib.switchable import Switchable
from calib.table import CalibrationTable
from calib.write import write_qdq

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"


def chain(n_layers: int, width: int = 8, bad: int | None = None) -> tuple[str, dict[str, Array]]:
    """``n_layers`` MatMuls of nearly orthogonal weights; one weight has a huge value in a row that
    nothing is ever multiplied with."""
    lines, weights = ["x0 = Mul(x, mask)"], {}
    mask = np.ones(width, np.float32)
    mask[0] = 0
    for n in range(n_layers):
        rng = np.random.default_rng(n)
        weight = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
        weight[:, 0] = 0  # feature 0 stays zero throughout
        if n == bad:
            weight[0, :] = 300
        weights[f"w{n}"] = weight
        lines.append(f"x{n + 1} = MatMul(x{n}, w{n})")
    lines.append(f"y = Identity(x{n_layers})")
    text = f"(float[N,{width}] x) => (float[N,{width}] y) {{\n" + "\n".join(lines) + "\n}"
    return text, weights | {"mask": mask}


def make_chain(save: Save, n_layers: int, bad: int | None = None) -> Model:
    text, weights = chain(n_layers, bad=bad)
    return load_model(save(parsed(text, weights)))


def feeds(n: int = 4, width: int = 8, size: int = 8) -> list[Batch]:
    return [Batch({"x": values(size, width, seed=seed)}) for seed in range(n)]


def tables(
    model: Model, batches: Iterable[Batch], low: Rules, high: Rules
) -> tuple[CalibrationTable, CalibrationTable]:
    observations = observe(model, batches, make_plan(model, low).activations)
    narrow, wide = (
        calibrate(model, observations, make_plan(model, rules), rules) for rules in (low, high)
    )
    return narrow, wide


def sensitivity_of(
    model: Model, narrow: CalibrationTable, wide: CalibrationTable, batches: Iterable[Batch]
) -> Sensitivity:
    return sensitivity(Switchable(model, narrow), narrow, wide, batches)


def measured(model: Model, batches: list[Batch], method: str = "max", bits: int = 4) -> Sensitivity:
    low, high = (replace(all_bits(b), method=method) for b in (bits, 8))
    return sensitivity_of(model, *tables(model, batches, low, high), iter(batches))


def written_db(model: Model, table: CalibrationTable, batches: list[Batch], path: Path) -> float:
    """Output SQNR of the written model."""
    write_qdq(model, table).save(path)
    return evaluate(model, path, iter(batches)).output_sqnr_db


# --- a planted culprit --------------------------------------------------------------------------


def test_a_weight_with_an_outlier_under_max_ranks_first_alone_and_by_all_but_it(
    save: Save,
) -> None:
    model = make_chain(save, 6, bad=3)
    found = measured(model, feeds(), bits=4)
    # Its channels hold nothing but their outlier at 4 bits.
    assert found.tensors[0].name == "w3"
    assert found.tensors[0].kind == "weight"
    assert found.tensors[0].alone_db < 3
    others = [damage.all_but_db for damage in found.tensors[1:]]
    assert all(db is not None for db in others)
    best = found.tensors[0].all_but_db
    assert best is not None
    assert best > max(db for db in others if db is not None) + 5
    assert found.layers[0] == "/MatMul/x4"


def test_each_alone_and_all_but_it_are_what_written_models_give(save: Save, tmp_path: Path) -> None:
    model, batches = make_chain(save, 3), feeds()
    narrow, wide = tables(model, batches, all_bits(3), all_bits(8))
    found = sensitivity_of(model, narrow, wide, iter(batches))
    records = narrow.records
    for damage in found.tensors:
        alone = tuple(r for r in records if r.name == damage.name)
        others = tuple(r for r in records if r.name != damage.name)
        for kept, db in ((alone, damage.alone_db), (others, damage.all_but_db)):
            table = replace(narrow, records=kept)
            session = Session(write_qdq(model, table).ir, optimized=False)
            totals, floats = Totals(), Session(model.path)
            for batch in batches:
                totals.add(batch, floats.run(batch.feed), session.run(batch.feed))
            assert totals.comparison().output_sqnr_db == pytest.approx(db, abs=0.01), damage.name
    assert found.base_db == pytest.approx(
        written_db(model, narrow, batches, tmp_path / "q.onnx"), abs=0.05
    )


def test_tensors_are_ranked_by_the_damage_that_each_does_alone(save: Save) -> None:
    found = measured(make_chain(save, 5), feeds(), "octav", 3)
    alone = [damage.alone_db for damage in found.tensors]
    assert alone == sorted(alone)
    assert not any(damage.estimated for damage in found.tensors)
    assert {d.name for d in found.tensors} == {
        *(f"w{n}" for n in range(5)),
        *(f"x{n}" for n in range(5)),
    }


# --- the curves ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Model, list[Batch], CalibrationTable, CalibrationTable, Sensitivity]:
    model = load_model(DIGITS / "digits.onnx")
    batches = list(open_data(model, DIGITS / "digits.npz", Reading(batch_size=8)).batches(0, 256))
    narrow, wide = tables(model, batches, all_bits(3), all_bits(8))
    return model, batches, narrow, wide, sensitivity_of(model, narrow, wide, iter(batches))


Digits = tuple[Model, list[Batch], CalibrationTable, CalibrationTable, Sensitivity]


def test_the_base_is_the_written_models_sqnr_on_the_same_samples(
    digits: Digits, tmp_path: Path
) -> None:
    model, batches, narrow, wide, found = digits
    assert found.n_samples == 64
    same = batches[:8]
    assert sum(batch.n_samples for batch in same) == 64
    for table, db in ((narrow, found.base_db), (wide, found.wide_db)):
        path = tmp_path / f"{db}.onnx"
        assert written_db(model, table, same, path) == pytest.approx(db, abs=0.01)


def test_the_curve_goes_from_the_base_to_all_wide_and_the_other_to_all_float(
    digits: Digits,
) -> None:
    found = digits[-1]
    counts = [n for n, _ in found.curve]
    assert counts == sorted(set(counts))
    assert found.curve[0] == (0, found.base_db)
    assert found.curve[-1] == (len(found.tensors), found.wide_db)
    assert found.excluding[0] == (0, found.base_db)
    n, db = found.excluding[-1]
    assert n == len(found.layers)
    assert db == math.inf or db > 100


def test_a_point_of_the_curve_is_the_model_with_the_worst_tensors_wide(
    digits: Digits, tmp_path: Path
) -> None:
    model, batches, narrow, wide, found = digits
    for n, db in (found.curve[2], found.curve[len(found.curve) // 2]):
        worst = {damage.name for damage in found.tensors[:n]}
        pairs = zip(narrow.records, wide.records, strict=True)
        records = tuple(w if w.name in worst else low for low, w in pairs)
        table = replace(narrow, records=records)
        path = tmp_path / f"{n}.onnx"
        assert written_db(model, table, batches[:8], path) == pytest.approx(db, abs=0.01)


def test_a_point_of_excluding_is_the_model_without_the_worst_layers(
    digits: Digits, tmp_path: Path
) -> None:
    model, batches, narrow, _, found = digits
    n, db = found.excluding[2]
    gone = set(found.layers[:n])
    records = tuple(
        replace(
            r, spec=replace(r.spec, consumers=tuple(c for c in r.spec.consumers if c not in gone))
        )
        for r in narrow.records
        if not gone.issuperset(r.spec.consumers)
    )
    table = replace(narrow, records=records)
    # A tensor that two layers read is quantized for both or for none of them in a trial.
    shared = any(len(r.spec.consumers) > 1 and gone & set(r.spec.consumers) for r in narrow.records)
    assert not shared
    assert written_db(model, table, batches[:8], tmp_path / "q.onnx") == pytest.approx(db, abs=0.01)


def test_what_is_proposed_is_the_shortest_that_reaches_the_target(digits: Digits) -> None:
    found = digits[-1]
    wide = dict(found.curve)[len(found.widened())]
    assert wide >= found.target_db
    assert all(db < found.target_db for n, db in found.curve if n < len(found.widened()))
    assert dict(found.excluding)[len(found.excluded())] >= found.target_db


@pytest.mark.parametrize(
    ("base", "wide", "target"), [(2, 40, 15), (14, 40, 17), (14, 15, 14), (30, 30, 29)]
)
def test_the_target_is_15_db_or_3_more_but_not_beyond_the_wider_width(
    digits: Digits, base: float, wide: float, target: float
) -> None:
    assert replace(digits[-1], base_db=base, wide_db=wide).target_db == target


# --- many tensors -------------------------------------------------------------------------------


def test_of_many_tensors_most_are_estimated_from_the_first_batch_and_the_worst_measured(
    save: Save,
) -> None:
    # One sample tells little: some that look harmless in it are worse than others in all.
    model, batches = make_chain(save, 40, bad=30), [*feeds(1, size=1), *feeds(3)]
    both = tables(model, batches, replace(all_bits(4), method="max"), all_bits(8))
    found = sensitivity_of(model, *both, iter(batches))
    assert len(found.tensors) == 80
    exact, rest = found.tensors[:64], found.tensors[64:]
    assert not any(damage.estimated for damage in exact)
    assert all(damage.all_but_db is not None for damage in exact)
    assert all(damage.estimated for damage in rest)
    assert all(damage.all_but_db is None for damage in rest)
    assert rest[0].alone_db < exact[-1].alone_db, "those that are measured stand before the others"
    for part in (exact, rest):
        alone = [damage.alone_db for damage in part]
        assert alone == sorted(alone)
    assert found.tensors[0].name == "w30"
    # An estimate is what the first batch alone says.
    first = sensitivity_of(model, *both, iter(batches[:1]))
    by_name = {damage.name: damage.alone_db for damage in first.tensors}
    for damage in rest:
        assert damage.alone_db == pytest.approx(by_name[damage.name], abs=1e-6)
    assert found.curve[-1] == (80, found.wide_db)
    assert len(found.curve) < 50


# --- samples ------------------------------------------------------------------------------------


def test_no_more_samples_are_read_than_needed(save: Save) -> None:
    read = 0

    def counted() -> Iterator[Batch]:
        nonlocal read
        for batch in feeds(100):
            read += 1
            yield batch

    model = make_chain(save, 2)
    narrow, wide = tables(model, feeds(), all_bits(4), all_bits(8))
    found = sensitivity_of(model, narrow, wide, counted())
    assert (found.n_samples, read) == (64, 8)


RUNNING_SUM = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
<float[6,3] w> {
  next = Add(x, state)
  y = MatMul(next, w)
}"""


def test_a_model_with_state_is_measured_along_its_steps(save: Save, tmp_path: Path) -> None:
    model = load_model(save(parsed(RUNNING_SUM)), {"state": "next"})
    x = values(20, 1, 6)
    batches = [Batch({"x": step}, restart=n == 0) for n, step in enumerate(x)]
    found = measured(model, batches, "octav", 3)
    low = all_bits(3)
    narrow, _ = tables(model, batches, low, all_bits(8))
    assert found.base_db == pytest.approx(
        written_db(model, narrow, batches, tmp_path / "q.onnx"), abs=0.01
    )


# --- odd outputs --------------------------------------------------------------------------------


def test_an_output_whose_shape_depends_on_values_counts_as_lost_where_it_differs(
    save: Save,
) -> None:
    text = """(float[N,6] x) => (float[M,3] y) <float[6,3] w> {
      all = MatMul(x, w)
      sums = ReduceSum<keepdims=0>(all, axis)
      chosen = Greater(sums, limit)
      y = Compress<axis=0>(all, chosen) }"""
    given = {"limit": np.array(0, np.float32), "axis": np.array([1])}
    model = load_model(save(parsed(text, given)))
    batches = [Batch({"x": values(64, 6, seed=s)}) for s in range(2)]
    found = measured(model, batches, "max", 2)
    assert found.base_db == -math.inf
    assert all(math.isfinite(d.alone_db) or d.alone_db == -math.inf for d in found.tensors)


def test_a_nan_in_the_output_is_the_worst_damage_there_is(save: Save) -> None:
    text = """(float[N,6] x) => (float[N,4] y) <float[6,4] w> {
      a = MatMul(x, w)
      b = Sub(a, shift)
      y = Sqrt(b) }"""
    x = np.abs(values(32, 6))
    w = np.abs(values(6, 4)) + np.float32(0.01)
    shift = np.full(4, (x @ w).min() * 0.999, np.float32)
    model = load_model(save(parsed(text, {"w": w, "shift": shift})))
    found = measured(model, [Batch({"x": x})], "octav", 2)
    assert found.base_db == -math.inf
    alone = [damage.alone_db for damage in found.tensors]
    assert alone == sorted(alone)
    assert not any(math.isnan(db) for db in alone)


def test_where_all_outputs_are_integers_nothing_is_damaged(save: Save) -> None:
    text = """(float[N,6] x) => (int64[N] y) <float[6,4] w> {
      a = MatMul(x, w)
      y = ArgMax<axis=1, keepdims=0>(a) }"""
    found = measured(load_model(save(parsed(text))), [Batch({"x": values(16, 6)})], "max", 2)
    assert found.base_db == math.inf
    assert found.widened() == ()
    assert found.excluded() == ()


def test_the_worst_of_several_outputs_counts(save: Save, tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,3] y, float[N,3] z) <float[6,3] v> {
      y = MatMul(x, v)
      z = MatMul(x, w) }"""
    w = values(6, 3, seed=3)
    w[0] = 1000
    model = load_model(save(parsed(text, {"w": w})))
    x = values(16, 6)
    x[:, 0] = 0
    batches = [Batch({"x": x})]
    low = replace(
        all_bits(4), method="max", overrides=(TensorRule("^x$", kind="activation", bits=16),)
    )
    narrow, wide = tables(model, batches, low, all_bits(8))
    found = sensitivity_of(model, narrow, wide, iter(batches))
    assert found.tensors[0].name == "w"
    write_qdq(model, narrow).save(tmp_path / "q.onnx")
    comparison = evaluate(model, tmp_path / "q.onnx", iter(batches))
    assert comparison.sqnr_db["z"] < comparison.sqnr_db["y"]
    assert found.base_db == pytest.approx(comparison.sqnr_db["z"], abs=0.3)


def test_the_feed_of_a_batch_is_left_as_it_is(save: Save) -> None:
    batches = feeds(1)
    before: Feed = {name: array.copy() for name, array in batches[0].feed.items()}
    measured(make_chain(save, 2), batches)
    assert set(batches[0].feed) == set(before)
    assert np.array_equal(batches[0].feed["x"], before["x"])
