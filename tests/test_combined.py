"""Settings together: targets, blocks, corrections, observations and proposals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Save, calibrated
from models import parsed

from calib.config import Config
from calib.errors import CalibError, OptionError, VerificationError
from calib.graph import load_model
from calib.pipeline import calibrate_model
from calib.planning import make_plan
from calib.proposals import _yaml
from calib.rules import Rules, TensorRule, Widths
from calib.run import Run
from calib.surveying import compare_methods
from calib.unpaired import without_pairs
from calib.write import write_qdq

TARGETS = ("generic", "onnxruntime", "openvino", "tensorrt")
all_targets = pytest.mark.parametrize("target", TARGETS)

ONE_OUTPUT = """(float[N,64] x) => (float[N,1] y) <float[16,64] w1, float[16] b1, float[1,16] w2,
 float[1] b2> {
  hidden = Gemm<transB=1>(x, w1, b1)
  act = Relu(hidden)
  y = Gemm<transB=1>(act, w2, b2)
}"""
RESIDUAL = """(float[N,8,8,8] x) => (float[N,8,8,8] y)
<float[8,8,3,3] k1, float[8] b1, float[8,8,3,3] k2> {
  first = Conv<pads=[1,1,1,1]>(x, k1, b1)
  act = Relu(first)
  second = Conv<pads=[1,1,1,1]>(act, k2)
  total = Add(second, x)
  y = Relu(total)
}"""
COMPUTED_BIAS = """(float[N,3,8,8] x, float[4] given) => (float[N,4,6,6] y)
<float[4,3,3,3] k, float[4] half> {
  bias = Mul(given, half)
  y = Conv(x, k, bias)
}"""
DEFAULT = """(float[N,16] x, float[8] scale) => (float[N,4] y)
<float[16,8] w1, float[8] b1, float[8,4] w2, float[8] scale> {
  hidden = Gemm(x, w1, b1)
  scaled = Mul(hidden, scale)
  y = MatMul(scaled, w2)
}"""
MATMULS = """(float[N,64] x) => (float[N,10] y) <float[64,96] w1, float[96,10] w2> {
  up = MatMul(x, w1)
  act = Relu(up)
  y = MatMul(act, w2)
}"""


def data(path: Path, n: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    model = load_model(path)
    given = [spec for spec in model.inputs if not spec.optional]
    return {
        spec.name: rng.standard_normal(
            [d if isinstance(d, int) else n for d in spec.shape or ()]
        ).astype(np.float32)
        for spec in given
    }


def saved(path: Path) -> Path:
    arrays: dict[str, Any] = data(path)
    np.savez(path.with_name("data.npz"), **arrays)
    return path.with_name("data.npz")


@all_targets
@pytest.mark.parametrize("corrected", [False, True])
def test_a_layer_of_one_output_channel_is_written(save: Save, target: str, corrected: bool) -> None:
    path = save(parsed(ONE_OUTPUT))
    rules = Rules(target=target, bias_correction=corrected)
    made = calibrate_model(path, [data(path)], rules, path.with_name("out.onnx"))
    assert made.kept
    assert len(made.table.bias_corrections) == (2 if corrected else 0)


@all_targets
def test_saved_observations_serve_the_target_that_they_were_saved_for(
    save: Save, target: str
) -> None:
    path, seen = save(parsed(RESIDUAL)), save(parsed(RESIDUAL)).with_name("seen.npz")
    source, out, rules = saved(path), path.with_name("out.onnx"), Rules(target=target)
    first = calibrate_model(path, source, rules, out, Run(save_observations=seen))
    again = calibrate_model(path, source, rules, out, Run(observations=seen, force=True))
    for one, other in zip(first.table.records, again.table.records, strict=True):
        assert (one.name, one.qtype) == (other.name, other.qtype)
        assert np.array_equal(one.scale, other.scale)


def test_observations_for_another_target_are_refused_by_its_name(save: Save) -> None:
    path = save(parsed(RESIDUAL))
    seen, source = path.with_name("seen.npz"), saved(path)
    calibrate_model(path, source, Rules(), path.with_name("a.onnx"), Run(save_observations=seen))
    with pytest.raises(CalibError, match="observe again with the present --target, --only"):
        calibrate_model(
            path,
            source,
            Rules(target="onnxruntime"),
            path.with_name("b.onnx"),
            Run(observations=seen),
        )


@all_targets
def test_a_bias_that_is_computed_can_be_corrected(save: Save, target: str) -> None:
    path = save(parsed(COMPUTED_BIAS))
    feed = data(path)
    rules = Rules(target=target, bias_correction=True)
    made = calibrate_model(path, [feed], rules, path.with_name("out.onnx"))
    # Only an Add behind the layer can hold it.
    assert len(made.table.bias_corrections) == (target == "generic")


@all_targets
def test_an_input_with_a_default_stays_float(save: Save, target: str) -> None:
    path = save(parsed(DEFAULT))
    made = calibrate_model(path, [data(path)], Rules(target=target), path.with_name("out.onnx"))
    assert "scale" not in {record.name for record in made.table.records}


def test_blocks_that_onnxruntime_cannot_run_beside_activations_are_refused_in_our_words(
    save: Save,
) -> None:
    path = save(parsed(MATMULS))
    message = "onnxruntime cannot run weights in blocks beside these quantized activations: make"
    with pytest.raises(VerificationError, match=message):
        calibrate_model(path, [data(path)], Rules(block_size=32), path.with_name("out.onnx"))
    assert not path.with_name("out.onnx").exists()
    wide = Rules(Widths(4, 16, 16), block_size=32)
    assert calibrate_model(path, [data(path)], wide, path.with_name("out.onnx")).kept


def test_weights_alone_say_nothing_of_samples_that_are_missing(save: Save) -> None:
    path = save(parsed(MATMULS))
    rules, source = Rules(Widths(4, None)), saved(path)
    made = calibrate_model(path, source, rules, path.with_name("out.onnx"), Run(samples=32))
    assert not any("samples were asked for" in note for note in made.notes)


def test_methods_are_not_compared_for_a_target(save: Save) -> None:
    with pytest.raises(OptionError, match="target onnxruntime: methods are compared on the"):
        compare_methods(save(parsed(MATMULS)), rules=Rules(target="onnxruntime"))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(bias_correction=True, equalize=True, activations="auto"),
        Rules(Widths(4, 4), weight_granularity="per-tensor", reduce_range=True),
        Rules(Widths(4, 4, 4), block_size=32, overrides=(TensorRule("w1", bits=8),)),
    ],
)
def test_what_a_proposal_says_to_paste_holds_all_its_settings(rules: Rules) -> None:
    read = Config.parse(_yaml(rules)).to_rules()
    assert asdict(read) == asdict(replace(rules, widths=read.widths))
    assert read.widths.weights == rules.widths.weights


def test_reduced_range_is_not_for_a_runtime_that_takes_8_bits_alone(save: Save) -> None:
    model = load_model(save(parsed(MATMULS)))
    with pytest.raises(OptionError, match="reduce-range is for CPUs without VNNI, TensorRT"):
        make_plan(model, Rules(target="tensorrt", reduce_range=True))


def test_a_rule_that_reduced_range_overrules_is_noted(save: Save) -> None:
    model = load_model(save(parsed(MATMULS)))
    rules = Rules(reduce_range=True, overrides=(TensorRule("w1", kind="weight", bits=8),))
    (spec,) = [spec for spec in make_plan(model, rules).specs if spec.name == "w1"]
    assert spec.bits == 7
    assert spec.notes == ("7 bits instead of 8, for reduce-range",)


def test_the_summary_states_zero_points_and_corrections(save: Save) -> None:
    path = save(parsed(RESIDUAL))
    feed, summary = data(path), path.with_name("summary.json")
    rules = Rules(target="onnxruntime", bias_correction=True)
    out = path.with_name("out.onnx")
    made = calibrate_model(path, [feed], rules, out, Run(summary=summary))
    told = json.loads(summary.read_text())
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    for tensor, record in zip(told["tensors"], made.table.records, strict=True):
        zero_point = stored[f"{record.name}_zero_point"]
        assert (zero_point == tensor["zero_point"]).all()
        assert np.allclose(stored[f"{record.name}_scale"].ravel(), np.ravel(tensor["scale"]))
    corrected = {entry["name"]: entry["added"] for entry in told["bias_corrections"]}
    assert corrected == {n: c.tolist() for n, c in made.table.bias_corrections.items()}


@all_targets
def test_verification_takes_stated_corrections_out_to_the_bit(save: Save, target: str) -> None:
    """A residue would be all that an output holds which is exactly 0 in float."""
    model = load_model(save(parsed(RESIDUAL)))
    rng = np.random.default_rng(0)
    table, _ = calibrated(model, Rules(target=target))
    layers = [str(n.name) for n in model.ir.graph if n.op_type == "Conv"]
    table = table.with_corrections({n: rng.standard_normal(8) / 3 for n in layers})
    path = model.path.with_name("corrected.onnx")
    quantized = write_qdq(model, table).write(path)
    without = without_pairs(model, quantized, path).graph.initializers
    b1 = model.weight("b1").ravel()
    for layer, name in quantized.corrected.items():
        tensor = without[name].const_value
        assert tensor is not None
        expected = b1 if layer == layers[0] else np.zeros(8, np.float32)
        assert np.array_equal(tensor.numpy().ravel(), expected)
    assert len(quantized.corrected) == (0 if target == "onnxruntime" else 2)
