"""Bias correction: the means of corrected layers, where the corrections go, what finds them."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cli_models import succeed
from conftest import Load, Save, all_bits, calibrated
from models import MODELS, Array, Feed, feed_for, parsed, run, values
from onnx import numpy_helper

from calib import Run, calibrate_model, correct_biases, load_model, write_qdq
from calib.arrays import Batch
from calib.biases import Layer, correctable
from calib.errors import ModelError, OptionError, VerificationError
from calib.graph import Model
from calib.rules import Rules, Widths
from calib.table import CalibrationTable
from calib.verification import verify

CHAIN = """(float[N,3,6,6] x) => (float[N,2,6,6] y)
<float[8,3,3,3] k1, float[8] b1, float[8,1,3,3] k2, float[2,8,1,1] k3> {
  a = Conv<pads=[1,1,1,1]>(x, k1, b1)
  r = Relu(a)
  d = Conv<group=8, pads=[1,1,1,1]>(r, k2)
  s = Relu(d)
  y = Conv(s, k3)
}"""
LINEAR = "(float[N,6] x) => (float[N,3] y) <float[6,3] w> { y = MatMul(x, w) }"
WITH_LAYERS = [name for name in MODELS if name not in ("gemm_activation", "matmul_left")]
COARSE = {"float16_conv": 5e-3, "if_subgraph": 1e-4}


def layers(model: Model, table: CalibrationTable) -> tuple[Layer, ...]:
    consumers = {name for record in table.records for name in record.spec.consumers}
    return correctable(model.ir.graph, consumers)


def means(model: ir.Model, feed: Feed, chosen: tuple[Layer, ...]) -> dict[str, Array]:
    """The channel means of layers, by NumPy from onnxruntime's values without optimisation."""
    found = run(ir.to_proto(model), feed, names=dict.fromkeys(c.measured for c in chosen))
    return {c.node: channel_means(found[c.measured], c.rank) for c in chosen}


def channel_means(value: Array, rank: int | None) -> Array:
    axis = value.ndim - 1 if rank is None else 1
    others = tuple(a for a in range(value.ndim) if a != axis)
    return np.asarray(value.astype(np.float64).mean(axis=others))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_the_mean_of_every_channel_is_the_float_models(name: str, bits: int, load: Load) -> None:
    model = load(name)
    table, feed = calibrated(model, all_bits(bits))
    corrected = correct_biases(model, table, lambda: [Batch(feed)])
    chosen = layers(model, table)
    assert list(corrected.bias_corrections) == [layer.node for layer in chosen]
    wanted = means(model.ir, feed, chosen)
    found = means(write_qdq(model, corrected).ir, feed, chosen)
    before = means(write_qdq(model, table).ir, feed, chosen)
    for layer in wanted:
        unit = np.abs(wanted[layer]).max() + np.abs(before[layer] - wanted[layer]).max()
        tolerance = COARSE.get(name, 1e-4) * unit
        np.testing.assert_allclose(found[layer], wanted[layer], rtol=0, atol=tolerance)


def test_corrections_are_those_found_layer_by_layer(save: Save) -> None:
    model = load_model(save(parsed(CHAIN)))
    table, feed = calibrated(model, all_bits(4))
    by_layer: dict[str, Array] = {}
    for layer in layers(model, table):
        quantized = write_qdq(model, table.with_corrections(by_layer)).ir
        float_mean, mean = (means(m, feed, (layer,))[layer.node] for m in (model.ir, quantized))
        by_layer[layer.node] = float_mean - mean
    found = correct_biases(model, table, lambda: [Batch(feed)]).bias_corrections
    assert list(found) == list(by_layer)
    for name, wanted in by_layer.items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)


def test_many_batches_take_out_most_of_the_error(save: Save) -> None:
    model = load_model(save(parsed(CHAIN)))
    table, feed = calibrated(model, all_bits(4), {"x": values(48, 3, 6, 6, scale=1)})
    parts = [Batch({"x": feed["x"][n : n + 6]}) for n in range(0, 48, 6)]
    corrected = correct_biases(model, table, lambda: iter(parts))
    chosen = layers(model, table)
    wanted, before, after = (
        means(m, feed, chosen)
        for m in (model.ir, write_qdq(model, table).ir, write_qdq(model, corrected).ir)
    )
    for layer in wanted:
        left, was = (np.abs(m[layer] - wanted[layer]).max() for m in (after, before))
        assert left < was / 4


def test_batches_of_different_sizes_count_by_their_values(save: Save) -> None:
    """Of one layer, nothing before it is corrected: parts give what the whole gives."""
    model = load_model(save(parsed(LINEAR)))
    table, feed = calibrated(model, all_bits(3))
    whole = correct_biases(model, table, lambda: [Batch(feed)], passes=1)
    parts = [Batch({"x": feed["x"][:1]}), Batch({"x": feed["x"][1:]})]
    split = correct_biases(model, table, lambda: parts)
    (one,), (other,) = whole.bias_corrections.values(), split.bias_corrections.values()
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(one).max() > 1e-3


def test_a_layer_that_ends_a_residual_block_is_measured_in_the_sum(load: Load) -> None:
    model = load("residual")
    nodes = {layer.output: layer for layer in correctable(model.ir.graph, _names(model))}
    assert {name: layer.measured for name, layer in nodes.items()} == {
        "stem": "stem",
        "left": "left",  # of the two in one sum, the last decides it
        "right": "joined",
        "output": "output",
    }


def _names(model: Model) -> list[str]:
    return [str(node.name) for node in model.ir.graph]


@pytest.mark.parametrize(
    ("text", "n_adds"),
    [
        ("float[3] b> { h = MatMul(x, w) y = Add(h, b) }", 1),
        ("float[1,3] b> { h = MatMul(x, w) y = Add(b, h) }", 1),
        ("float[1] b> { h = MatMul(x, w) y = Add(h, b) }", 2),  # it has no value for each channel
        ("float[3] b> { y = Gemm(x, w, b) }", 1),
        ("float[3] b> { y = Gemm<beta=0.5>(x, w, b) }", 1),
        ("float[1] b> { y = Gemm(x, w, b) }", 2),
        ("float[3] b> { y = MatMul(x, w) }", 1),
    ],
)
def test_a_correction_goes_into_the_bias_that_there_is(text: str, n_adds: int, save: Save) -> None:
    model = load_model(save(parsed(f"(float[N,6] x) => (float[N,3] y) <float[6,3] w, {text}")))
    table, feed = calibrated(model, all_bits(4))
    corrected = correct_biases(model, table, lambda: [Batch(feed)])
    written = write_qdq(model, corrected)
    assert [node.op_type for node in written.ir.graph].count("Add") == n_adds
    written_both = (write_qdq(model, t) for t in (table, corrected))
    plain, changed = (run(ir.to_proto(w.ir), feed)["y"] for w in written_both)
    (added,) = corrected.bias_corrections.values()
    np.testing.assert_allclose(changed, plain + added, atol=1e-5)


def test_a_bias_that_two_layers_share_is_corrected_for_each(save: Save) -> None:
    model = load_model(
        save(
            parsed("""(float[N,6] x) => (float[N,6] y) <float[6,6] v, float[6,6] w, float[6] b> {
              h = Gemm(x, v, b)
              y = Gemm(h, w, b) }""")
        )
    )
    table, feed = calibrated(model, all_bits(4))
    written = write_qdq(model, correct_biases(model, table, lambda: [Batch(feed)]))
    names = list(written.corrected.values())
    assert len(set(names)) == 2
    constants = [written.ir.graph.initializers[name].const_value for name in names]
    assert all(tensor is not None for tensor in constants)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_a_corrected_model_passes_its_verification(
    name: str, bits: int, load: Load, tmp_path: Path
) -> None:
    model = load(name)
    table, feed = calibrated(model, all_bits(bits))
    quantized = write_qdq(model, correct_biases(model, table, lambda: [Batch(feed)]))
    quantized.save(tmp_path / "written.onnx")
    verify(model, quantized, tmp_path / "written.onnx", Batch(feed))


def test_a_correction_that_the_table_does_not_state_is_found(load: Load, tmp_path: Path) -> None:
    model = load("conv_bias")
    table, feed = calibrated(model, all_bits(8))
    quantized = write_qdq(model, correct_biases(model, table, lambda: [Batch(feed)]))
    proto = ir.to_proto(quantized.ir)
    for tensor in proto.graph.initializer:
        if tensor.name in quantized.corrected.values():
            array = numpy_helper.to_array(tensor) + np.float32(0.1)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "written.onnx")
    with pytest.raises(VerificationError, match=r"^apart from its QDQ pairs and bias corrections"):
        verify(model, quantized, tmp_path / "written.onnx", Batch(feed))


def test_state_that_is_fed_back_starts_anew_in_each_pass(save: Save) -> None:
    text = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
    <float[6,6] v, float[6,3] w> {
      h = MatMul(state, v)
      next = Add(x, h)
      y = MatMul(next, w) }"""
    model = load_model(save(parsed(text)), {"state": "next"})
    feed = {"x": values(1, 6), "state": np.zeros((1, 6), np.float32)}
    table, _ = calibrated(model, all_bits(4), feed)
    batches = [Batch({"x": values(1, 6, seed=n)}) for n in range(5)]
    once = correct_biases(model, table, lambda: batches, passes=1)
    again = correct_biases(model, table, lambda: batches, passes=1)
    for name, added in once.bias_corrections.items():
        np.testing.assert_array_equal(added, again.bias_corrections[name])
    twice = correct_biases(model, table, lambda: batches * 2, passes=1)
    restarted = [*batches, Batch(batches[0].feed, restart=True), *batches[1:]]
    wanted = correct_biases(model, table, lambda: restarted, passes=1).bias_corrections
    two = correct_biases(model, table, lambda: batches, passes=2).bias_corrections
    for name, added in wanted.items():
        np.testing.assert_array_equal(two[name], added)
    assert any(not np.array_equal(twice.bias_corrections[n], wanted[n]) for n in wanted)


def test_batches_are_gone_through_one_at_a_time_in_both_models(save: Save) -> None:
    """Memory does not grow with them: of those behind, none is held."""
    model = load_model(save(parsed(CHAIN)))
    table, feed = calibrated(model, all_bits(4))
    held: list[weakref.ref[Array]] = []

    def batches() -> Iterator[Batch]:
        for n in range(3):
            array = feed["x"][n : n + 1].copy()
            held.append(weakref.ref(array))
            yield Batch({"x": array})
            del array
            gc.collect()
            assert sum(ref() is not None for ref in held) <= 1

    assert correct_biases(model, table, batches).bias_corrections
    assert len(held) == 6


def test_a_mean_that_is_not_finite_is_an_error(save: Save) -> None:
    model = load_model(save(parsed(LINEAR)))
    table, feed = calibrated(model, all_bits(4))
    huge = {"x": np.full_like(feed["x"], 3e38)}
    with pytest.raises(ModelError, match=r"the mean output of '.*' is not finite"):
        correct_biases(model, table, lambda: [Batch(huge)])


def test_a_model_without_layers_to_correct_stays_as_it_is(load: Load) -> None:
    model = load("matmul_left")
    table, feed = calibrated(model, all_bits(4))
    assert correct_biases(model, table, lambda: [Batch(feed)]).bias_corrections == {}


# --- the whole flow -----------------------------------------------------------------------------


@pytest.fixture
def chain(save: Save) -> Path:
    return save(parsed(CHAIN))


RULES = Rules(widths=all_bits(4).widths, bias_correction=True)


def test_the_summary_states_every_correction(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", x=values(16, 3, 6, 6, scale=1))
    options = ("--data", tmp_path / "data.npz", "--bits", 4, "--bias-correction")
    succeed(capsys, chain, *options, "--summary", tmp_path / "s.json")
    summary = json.loads((tmp_path / "s.json").read_text())
    assert [(c["name"], len(c["added"])) for c in summary["bias_corrections"]] == [
        ("/Conv/a", 8),
        ("/Conv/d", 8),
        ("/Conv/y", 2),
    ]
    assert summary["options"]["bias_correction"] is True
    assert summary["seconds"]["correct"] > 0


def test_correction_brings_the_output_closer(chain: Path, tmp_path: Path) -> None:
    data = [{"x": values(16, 3, 6, 6, seed=n, scale=1)} for n in range(4)]
    plain, corrected = (
        calibrate_model(chain, data, rules, tmp_path / f"{n}.onnx", Run(samples=32))
        for n, rules in enumerate((replace(RULES, bias_correction=False), RULES))
    )
    assert corrected.held_out
    assert corrected.comparison.output_sqnr_db > plain.comparison.output_sqnr_db
    assert not plain.table.bias_corrections


def test_data_that_comes_only_once_is_an_error(chain: Path) -> None:
    batches = iter([{"x": values(4, 3, 6, 6)}])
    with pytest.raises(OptionError, match=r"^bias-correction needs data that can be gone through"):
        calibrate_model(chain, batches, RULES)


def test_a_padding_mask_is_an_error(save: Save) -> None:
    model = save(
        parsed("""(float[N,4,6] x, float[N,4] mask) => (float[N,4,3] y, float[N,4] m)
        <float[6,3] w> { y = MatMul(x, w) m = Identity(mask) }""")
    )
    data = [feed_for(onnx.load(model))]
    with pytest.raises(OptionError, match=r"^bias-correction counts padding"):
        calibrate_model(model, data, RULES, run=Run(padding_mask="mask"))


def test_weights_alone_without_data_are_an_error(chain: Path) -> None:
    rules = Rules(widths=Widths(4, None, 4), bias_correction=True)
    with pytest.raises(OptionError, match=r"^bias-correction needs the samples themselves"):
        calibrate_model(chain, None, rules)


def test_observations_without_the_data_are_an_error(chain: Path, tmp_path: Path) -> None:
    data, seen = [{"x": values(16, 3, 6, 6)}], tmp_path / "seen.npz"
    calibrate_model(chain, data, run=Run(save_observations=seen), output=tmp_path / "a.onnx")
    run_from = Run(observations=seen)
    with pytest.raises(OptionError, match=r"^bias-correction needs the samples themselves"):
        calibrate_model(chain, None, RULES, tmp_path / "b.onnx", run_from)
    made = calibrate_model(chain, data, RULES, tmp_path / "b.onnx", run_from)
    assert made.table.bias_corrections
