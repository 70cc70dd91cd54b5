"""Bugs that the corpus and the graph fuzzer found, each as the smallest model that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits
from models import Feed, feed_for, if_subgraph, parsed, run, values
from onnx import helper

from calib import calibrate_model, load_model, observe, open_data
from calib.arrays import Batch
from calib.comparison import Difference
from calib.errors import ModelError, ObservationsError
from calib.observations import Observations
from calib.rules import Rules, Widths
from calib.run import Run


def written(path: Path, feed: Feed, bits: int = 16) -> Path:
    """The quantized model; its outputs are close to the float model's at 16 bits."""
    output = calibrate_model(path, [feed], all_bits(bits), run=Run(force=True)).output
    if bits == 16:
        for optimized in (False, True):
            found, wanted = run(output, feed, optimized=optimized), run(path, feed)
            for name, reference in wanted.items():
                assert np.allclose(found[name], reference, atol=1e-2, rtol=1e-2), name
    return output


def test_an_if_whose_condition_is_constant_is_not_unfolded(save: Save) -> None:
    model = if_subgraph()
    model.graph.node[4].input[0] = "always"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    output = written(save(model), feed_for(model))
    assert "If" in {node.op_type for node in onnx.load(output).graph.node}


def test_names_that_verification_and_writing_would_choose_may_be_taken(save: Save) -> None:
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,4] w, float[4,3] w_quantized> {
      w_float = MatMul(x, w)
      x_dequantized = Relu(w_float)
      y = Gemm(x_dequantized, w_quantized, x_scale) }""", {"x_scale": values(3)})  # fmt: skip
    model.graph.node[1].name = "/Gemm/y_bias"  # what the Add of the bias would be called
    written(save(model), feed_for(model))


def test_a_layer_that_only_a_dead_if_reads_is_left_out(save: Save) -> None:
    model = if_subgraph()
    model.graph.node[-1].input[0] = "image"
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(values(2, 3, 1, 1), "kernel2"))
    output = written(save(model), feed_for(model))
    assert [node.op_type for node in onnx.load(output).graph.node].count("Conv") == 1


def test_a_node_name_with_a_newline_makes_no_second_line(save: Save) -> None:
    model = parsed("(double[N,6] x) => (double[N,3] y) { y = MatMul(x, w) }",
                   {"w": values(6, 3).astype(np.float64)})  # fmt: skip
    model.graph.node[0].name = "two\nlines"
    with pytest.raises(ModelError) as caught:
        calibrate_model(save(model), [{"x": values(8, 6).astype(np.float64)}])
    assert "\n" not in str(caught.value)


def test_what_an_operator_gives_that_the_opset_converter_replaces_keeps_its_name(
    save: Save,
) -> None:
    model = parsed("""(float[1,3,4,4] x) => (float[1,2,8,8] y) <float[2,3,1,1] kernel> {
      larger = Upsample<mode="nearest">(x, scales)
      y = Conv(larger, kernel) }""",
      {"scales": np.array([1, 1, 2, 2], np.float32)}, opset=9)  # fmt: skip
    written(save(model), feed_for(model))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1e-6, 1e30])
def test_values_of_any_magnitude_are_clipped_to_the_grid_at_both_levels(
    bits: int, magnitude: float, save: Save
) -> None:
    """onnxruntime takes a Clip that cuts off less than 1.2e-7 for one that does nothing."""
    model = parsed("""(float[N,6] x) => (float[N,6] y) <float[6,6] w> {
      scaled = Mul(x, size)
      y = MatMul(scaled, w) }""", {"size": np.array(magnitude, np.float32)})  # fmt: skip
    x = np.vstack([values(32, 6), [[9.0, -9, 0, 0, 0, -0.0]]]).astype(np.float32)
    rules = Rules(widths=Widths(8, bits, edge=bits), method="percentile:90")
    result = calibrate_model(save(model), [{"x": x}], rules)  # verification compares the pairs
    (record,) = (r for r in result.table.records if r.name == "scaled")
    assert record.threshold[0] < 5 * magnitude


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "moved", ["Transpose<perm=[0,2,1]>(h)", "Reshape(h, shape)", "Slice(h, zero, four, one)"]
)
def test_an_output_that_a_layer_reads_moved_is_returned_as_float(
    moved: str, bits: int, save: Save
) -> None:
    """onnxruntime moves a QDQ pair to before the movement, and would return h dequantized."""
    ints = {"shape": [-1, 6, 4], "zero": [0], "four": [2], "one": [1]}
    given = {name: np.array(v, np.int64) for name, v in ints.items()}
    last = 6 if "Slice" in moved else 4
    model = parsed(f"""(float[N,4,6] x) => (float[N,4,6] h, float[a,b,3] y) {{
      h = Relu(x)
      t = {moved}
      y = MatMul(t, w) }}""", {**given, "w": values(last, 3)})  # fmt: skip
    feed = feed_for(model)
    output = written(save(model), feed, bits)
    assert np.array_equal(run(output, feed, optimized=True)["h"], np.maximum(feed["x"], 0))


def test_outputs_that_are_lists_or_no_arrays_are_compared_or_left_out(save: Save) -> None:
    model = parsed("""(float[N,6] x) => (float[N,4] y) <float[6,4] w> {
      y = MatMul(x, w)
      parts = SplitToSequence<axis=1>(y) }""")  # fmt: skip
    kind = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    output = helper.make_value_info("parts", helper.make_sequence_type_proto(kind))
    model.graph.output.append(output)
    result = calibrate_model(save(model), [{"x": values(8, 6)}])
    assert set(result.comparison.sqnr_db) == {"y", *(f"parts[{n}]" for n in range(4))}


# --- damaged files --------------------------------------------------------------------------------


def test_a_function_that_is_called_with_too_few_inputs_is_refused(save: Save) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[N,6] x) => (float[N,3] y) { y = local.Block(x) }
    <domain: "local", opset_import: ["": 17]> Block (a, w) => (b) { b = MatMul(a, w) }""")
    with pytest.raises(ModelError, match=r"MatMul '.*' lacks an input"):
        load_model(save(model))


def test_an_input_without_a_type_is_refused(save: Save) -> None:
    model = parsed("(float[N,6] x, float[N,6] z) => (float[N,3] y) <float[6,3] w> {"
                   " y = MatMul(x, w) }")  # fmt: skip
    model.graph.input[1].type.tensor_type.elem_type = 0
    path = save(model)
    with pytest.raises(ModelError):
        calibrate_model(path, [{"x": values(8, 6)}])


def test_an_axis_of_length_minus_one_is_free(save: Save) -> None:
    model = parsed("(float[N,6] x) => (float[N,3] y) <float[6,3] w> { y = MatMul(x, w) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    loaded = load_model(save(model))
    assert loaded.inputs[0].shape == (None, 6)
    (batch, *_) = open_data(loaded, None).batches()
    assert batch.feed["x"].shape == (32, 6)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("0.0.exact", [np.inf, -np.inf, 0, 0, 0]),
        ("0.0.exact", [-1.0, 1.0, np.inf, 0, 0]),
        ("0.0.exact", [1.0]),
        ("0.0.counts", [-5]),
        ("0.0.codes", [0]),
    ],
)
def test_observations_with_nonsense_in_them_are_refused(
    key: str, change: list[float], save: Save, tmp_path: Path
) -> None:
    model = load_model(save(parsed("(float[N,6] x) => (float[N,3] y) <float[6,3] w> {"
                                   " y = MatMul(x, w) }")))  # fmt: skip
    observe(model, [Batch({"x": values(8, 6)})], ["x"]).save(tmp_path / "seen.npz")
    with np.load(tmp_path / "seen.npz") as arrays:
        content = dict(arrays)
    changed = np.array(change, np.float64)
    if "exact" not in key:
        changed = np.full_like(content[key][: len(content[key]) // 2], change[0], content[key].dtype
                               if "counts" in key else np.uint16)  # fmt: skip
    np.savez(tmp_path / "seen.npz", **content | {key: changed})
    with pytest.raises(ObservationsError, match=r"not a file that --save-observations wrote"):
        Observations.load(tmp_path / "seen.npz", model)


def test_an_output_that_only_quantization_makes_infinite_has_no_sqnr() -> None:
    difference = Difference()
    difference.add(np.array([1e38, 2.0]), np.array([np.inf, 2.0]))
    assert difference.sqnr_db == -np.inf
