"""Models as users have them: opsets, functions, subgraphs, contrib and custom operators, types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits, needs_onnxruntime
from models import CONV_BIAS, MODELS, Array, Feed, feed_for, parsed, run, values
from onnx import TensorProto, helper

from calib import Calibration, Rules, Run, Widths, calibrate_model, load_model, make_plan
from calib.capture import Runtime, newest_opset
from calib.errors import ModelError, OptionError
from calib.rules import Selection

Feeds = list[Feed]


def calibrated(path: Path, feeds: Feeds, rules: Rules, **settings: object) -> Calibration:
    how = Run(force=True, **settings)  # type: ignore[arg-type]
    return calibrate_model(path, feeds, rules, path.with_name("out.onnx"), how)


def reasons(result: Calibration) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in result.table.skipped}


def sqnr_db(reference: Array, other: Array) -> float:
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-300)))


# --- opsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(7, newest_opset() + 1))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_opset_that_onnxruntime_loads_is_taken_and_raised_no_further_than_needed(
    opset: int, bits: int, save: Save
) -> None:
    model = parsed(CONV_BIAS, opset=opset, ir_version=3 if opset < 9 else 7)
    if opset < 9:
        for tensor in model.graph.initializer:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(info)
    path = save(model)
    result = calibrated(path, [feed_for(model)], all_bits(bits))
    written = onnx.load(result.output)
    needed = {4: 21, 8: 13}[bits]
    assert written.opset_import[0].version == max(opset, needed)
    assert any("opset raised" in note for note in result.notes) == (opset < needed)
    lowest = helper.find_min_ir_version_for(written.opset_import)
    assert written.ir_version <= max(lowest, model.ir_version)


def test_an_opset_above_what_onnxruntime_loads_is_refused_in_one_clear_line(save: Save) -> None:
    model = parsed(CONV_BIAS, opset=newest_opset() + 1, ir_version=10)
    path = save(model)
    with pytest.raises(ModelError) as caught:
        calibrated(path, [feed_for(model)], all_bits(8))
    message = str(caught.value)
    assert f"the model has opset {newest_opset() + 1}, onnxruntime" in message
    assert f"loads up to {newest_opset()}: export it with that opset" in message
    assert "\n" not in message
    with pytest.raises(ModelError, match="the model has opset"):  # before the data is opened
        calibrate_model(path, path.with_name("missing.npz"), all_bits(8))


# --- functions, subgraphs, other domains --------------------------------------------------------


def with_function() -> onnx.ModelProto:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[N,6] x) => (float[N,3] y) <float[6,4] w1, float[4,3] w2> {
      hidden = local.Block(x, w1)
      y = local.Block(hidden, w2)
    }
    <domain: "local", opset_import: ["": 17]>
    Block (a, w) => (b) { product = MatMul(a, w)
      b = Relu(product) }""")
    del model.graph.value_info[:]
    for name, shape in (("w1", (6, 4)), ("w2", (4, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values(*shape), name))
    return model


def test_layers_inside_local_functions_are_quantized_and_it_is_said(save: Save) -> None:
    result = calibrated(save(with_function()), [{"x": values(8, 6)}], all_bits(8))
    kinds = sorted(record.spec.kind for record in result.table.records)
    assert kinds == ["activation", "activation", "weight", "weight"]
    assert any("local functions are inlined" in note for note in result.notes)
    assert not onnx.load(result.output).functions


LOOP_BODY = """(int64 i, bool go, float[N,6] state) => (bool on, float[N,6] next)
<float[6,6] inner> { on = Identity(go)
 product = MatMul(state, inner)
 next = Tanh(product) }"""


def with_loop() -> onnx.ModelProto:
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,6] w1, float[6,3] w2> {
      first = MatMul(x, w1)
      looped = Loop(trips, go, first)
      y = MatMul(looped, w2) }""", {"trips": np.array(3), "go": np.array(True)})  # fmt: skip
    body = parsed(LOOP_BODY).graph
    model.graph.node[1].attribute.append(helper.make_attribute("body", body))
    return model


def with_scan() -> onnx.ModelProto:
    model = parsed("""(float[T,6] x) => (float[T,6] y)
    <float[6,6] w1, float[6,6] w2, float[6] start> {
      first = MatMul(x, w1)
      last, scanned = Scan<num_scan_inputs=1>(start, first)
      y = MatMul(scanned, w2) }""")  # fmt: skip
    body = parsed("""(float[6] state, float[6] row) => (float[6] next, float[6] out)
    <float[6,6] inner> { product = MatMul(row, inner)
      next = Add(state, product)
      out = Tanh(next) }""").graph  # fmt: skip
    model.graph.node[1].attribute.append(helper.make_attribute("body", body))
    return model


@pytest.mark.parametrize("build", [with_loop, with_scan])
def test_what_is_in_the_body_of_a_loop_stays_float_and_the_rest_is_quantized(
    build: object, save: Save
) -> None:
    model = build()  # type: ignore[operator]
    feed = {"x": values(8, 6)}
    path = save(model)
    result = calibrated(path, [feed], all_bits(16))
    assert {r.name for r in result.table.records if r.spec.kind == "weight"} == {"w1", "w2"}
    assert any("inside a subgraph" in reason for reason in reasons(result).values())
    for optimized in (False, True):
        assert (
            sqnr_db(run(path, feed)["y"], run(result.output, feed, optimized=optimized)["y"]) > 60
        )


def test_layers_that_only_dead_code_reads_are_not_quantized(save: Save) -> None:
    model = MODELS["if_subgraph"]()
    model.graph.node[-1].input[0] = "hidden"  # nothing reads the If any more
    result = calibrated(save(model), [feed_for(model)], all_bits(8))
    assert "If" not in {node.op_type for node in onnx.load(result.output).graph.node}


def test_operators_of_other_domains_stay_and_what_is_around_them_is_quantized(save: Save) -> None:
    text = """(float[N,6] x) => (float[N,3] y) <float[6,4] w1, float[4,4] w2, float[4,3] w3> {
      first = MatMul(x, w1)
      gelu = com.microsoft.Gelu(first)
      fused = com.microsoft.FusedMatMul(gelu, w2)
      y = MatMul(fused, w3) }"""
    model = parsed(text)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    feed = {"x": values(8, 6)}
    path = save(model)
    result = calibrated(path, [feed], all_bits(16))
    assert {r.name for r in result.table.records} == {"x", "w1", "fused", "w3"}
    fused = "/FusedMatMul/fused"
    assert reasons(result)[fused] == "com.microsoft.FusedMatMul is not supported"
    assert sqnr_db(run(path, feed)["y"], run(result.output, feed)["y"]) > 60


@pytest.fixture
def with_custom_op(save: Save) -> Path:
    """Between two layers an operator that only a custom-op library has."""
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,4] w1, float[4,3] w2> {
      first = MatMul(x, w1)
      negative, positive = ai.onnx.contrib.NegPos(first)
      y = MatMul(positive, w2) }""")  # fmt: skip
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    return save(model)


def test_a_custom_operator_library_makes_its_operators_run(with_custom_op: Path) -> None:
    extensions = pytest.importorskip("onnxruntime_extensions")
    library = Path(extensions.get_library_path())
    feeds = [{"x": values(8, 6)}]
    result = calibrated(with_custom_op, feeds, all_bits(8), runtime=Runtime(custom_ops=(library,)))
    assert {r.name for r in result.table.records} == {"x", "w1", "positive", "w2"}
    assert result.comparison.output_sqnr_db > 20


def test_without_its_library_a_custom_operator_is_refused_in_one_line(with_custom_op: Path) -> None:
    with pytest.raises(ModelError) as caught:
        calibrated(with_custom_op, [{"x": values(8, 6)}], all_bits(8))
    assert "NegPos" in str(caught.value)
    assert "--custom-ops" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_none_is_refused(with_custom_op: Path, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    runtime = Runtime(custom_ops=(tmp_path / "lib.so",))
    with pytest.raises(OptionError, match=r"lib\.so: cannot be loaded as a custom operator lib"):
        calibrated(with_custom_op, [{"x": values(8, 6)}], all_bits(8), runtime=runtime)


def test_einsum_and_recurrent_layers_are_listed_as_they_are(save: Save) -> None:
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,4] w1, float[4,3] w2> {
      first = Einsum<equation="ni,ij->nj">(x, w1)
      y = MatMul(first, w2) }""")  # fmt: skip
    result = calibrated(save(model), [{"x": values(8, 6)}], all_bits(8))
    assert reasons(result) == {"/Einsum/first": "Einsum is not supported"}


# --- float16 and bfloat16 -----------------------------------------------------------------------


def float16(text: str, shapes: dict[str, tuple[int, ...]], opset: int = 17) -> onnx.ModelProto:
    weights = {name: values(*shape).astype(np.float16) for name, shape in shapes.items()}
    return parsed(text.replace("float[", "float16["), weights, opset=opset)


HALF = """(float[N,3,6,6] image) => (float[N,5] logits) {
  conv = Conv<pads=[1,1,1,1]>(image, kernel, bias)
  hidden = Relu(conv)
  pooled = GlobalAveragePool(hidden)
  flat = Flatten(pooled)
  logits = Gemm<transB=1, beta=0.5>(flat, head, head_bias)
}"""
HALF_SHAPES = {"kernel": (4, 3, 3, 3), "bias": (4,), "head": (5, 4), "head_bias": (5,)}


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("opset", [17, 21])
def test_float16_models_stay_float16_and_every_pair_equals_the_oracle(
    bits: int, opset: int, save: Save
) -> None:
    needs_onnxruntime(1, 31)
    model = float16(HALF, HALF_SHAPES, opset)
    feed = feed_for(model)
    path = save(model)
    result = calibrated(path, [feed], all_bits(bits))  # verification compares the pairs
    written = onnx.load(result.output)
    assert written.opset_import[0].version == max(opset, 19 if bits in (6, 8) else 21)
    types = {t.name: t.data_type for t in written.graph.initializer if t.name.endswith("_scale")}
    assert set(types.values()) == {TensorProto.FLOAT16}
    for record in result.table.records:
        scale = record.scale
        assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale), record.name
    if bits == 16:  # float16 itself is good to 5e-3 in onnxruntime
        for optimized in (False, True):
            found = run(result.output, feed, optimized=optimized)["logits"]
            assert sqnr_db(run(path, feed)["logits"], found) > 46


@pytest.mark.parametrize("magnitude", [65504.0, 1e-4, 1e-6])
def test_float16_values_at_the_ends_of_their_range_are_calibrated(
    magnitude: float, save: Save
) -> None:
    weight = np.eye(6, dtype=np.float16) / np.float16(2 if magnitude > 1 else 1)
    given = {"size": np.array(magnitude, np.float16), "w": weight}
    model = parsed("""(float16[N,6] x) => (float16[N,6] y) {
      scaled = Mul(x, size)
      y = MatMul(scaled, w) }""", given)  # fmt: skip
    x = np.linspace(-1, 1, 48).reshape(8, 6).astype(np.float16)
    result = calibrated(save(model), [{"x": x}], Rules(widths=Widths(8, 8), method="max"))
    (record,) = (r for r in result.table.records if r.name == "scaled")
    assert record.max_abs == pytest.approx(magnitude, rel=0.2)
    assert result.comparison.output_sqnr_db > (30 if magnitude > 1e-5 else 3)


def test_bfloat16_layers_are_refused_in_one_line(save: Save) -> None:
    model = parsed("(float[N,6] x) => (float[N,3] y) { b = Cast<to=16>(x)\n"
                   " p = MatMul(b, w)\n y = Cast<to=1>(p) }", {})  # fmt: skip
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [6, 3], values(6, 3).ravel())
    model.graph.initializer.append(weight)
    with pytest.raises(ModelError) as caught:
        calibrated(save(model), [{"x": values(8, 6)}], all_bits(8))
    assert "'b' is bfloat16, for which onnxruntime has no CPU kernels" in str(caught.value)


# --- quantized already --------------------------------------------------------------------------


def test_a_model_that_this_tool_has_quantized_is_not_quantized_again(save: Save) -> None:
    model = MODELS["conv_bias"]()
    first = calibrated(save(model), [feed_for(model)], all_bits(8)).output
    again = first.rename(first.with_name("first.onnx"))
    with pytest.raises(ModelError, match=r"nothing to quantize.* is quantized already"):
        calibrated(again, [feed_for(model)], all_bits(8))


def test_the_rest_of_a_model_that_is_quantized_in_part_is_quantized_and_it_is_said(
    save: Save,
) -> None:
    model = MODELS["conv_bias"]()
    path = save(model)
    part = Rules(selection=Selection(only="/Conv/first"))
    half = calibrated(path, [feed_for(model)], part).output.rename(path.with_name("half.onnx"))
    result = calibrated(half, [feed_for(model)], all_bits(8))
    assert {r.name for r in result.table.records} & {"kernel2", "kernel3"} == {"kernel2", "kernel3"}
    assert any("were there before: left alone" in note for note in result.notes)


def test_a_quantized_value_that_is_moved_is_still_quantized(save: Save) -> None:
    given = {"s": np.array(0.1, np.float32), "w": values(4, 3)}
    model = parsed("""(float[4,8] x) => (float[8,3] y) {
      q = QuantizeLinear(x, s)
      dq = DequantizeLinear(q, s)
      turned = Transpose<perm=[1,0]>(dq)
      y = MatMul(turned, w) }""", given)  # fmt: skip
    loaded = load_model(save(model))
    plan = make_plan(loaded, Rules())
    assert [spec.name for spec in plan.specs] == ["w"]
    assert "'turned' is quantized already" in {s.reason for s in plan.skipped}
