"""What a review found, each with the test that would have caught it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits
from models import fixed_batch, parsed, run, values
from onnx import TensorProto, helper

from calib import Config, Rules, Run, calibrate_model, load_model, make_plan, observe, open_data
from calib.arrays import Batch
from calib.errors import DataError, ModelError, ObservationsError, OptionError, OutputError
from calib.observing import Observing
from cli.calibrate import main

LAYER = "(float[N,6] x) => (float[N,3] y) <float[6,3] w> { y = MatMul(x, w) }"


def test_samples_of_an_iterable_for_a_fixed_batch_are_rounded_down_and_not_used_twice(
    save: Save,
) -> None:
    feeds = [{"x": values(4, 6, seed=seed)} for seed in range(4)]
    result = calibrate_model(save(fixed_batch(4)), feeds, run=Run(samples=5))
    assert result.table.n_samples == 4
    assert (result.held_out, result.comparison.n_samples) == (True, 12)
    assert "5 samples were asked for, 4 are used" in result.notes


def test_fewer_samples_than_asked_for_are_noted(save: Save) -> None:
    result = calibrate_model(save(parsed(LAYER)), [{"x": values(10, 6)}], run=Run(samples=50))
    assert "50 samples were asked for, there are 10" in result.notes


def test_what_is_read_is_never_an_output(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(parsed(LAYER))
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "0.npz", x=values(8, 6))
    with pytest.raises(OutputError, match=r"0\.npz: is an input, which is never overwritten"):
        calibrate_model(path, folder, run=Run(force=True, save_observations=folder / "0.npz"))
    (folder / "notes.json").write_text("{}")
    calibrate_model(path, folder, run=Run(force=True, summary=folder / "notes.json"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.yaml").write_text(f"model: {path.name}\nsummary: o.yaml\nforce: true\n")
    before = (tmp_path / "o.yaml").read_bytes()
    assert main(["--config", "o.yaml"]) == 2
    assert "o.yaml: is an input" in capsys.readouterr().err
    assert (tmp_path / "o.yaml").read_bytes() == before


def test_a_library_is_found_in_the_current_directory(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(parsed(LAYER))
    monkeypatch.chdir(tmp_path)
    Path("lib.so").write_bytes(b"no library")
    assert main([str(path), "--custom-ops", "lib.so"]) == 2
    told = capsys.readouterr().err
    assert "lib.so: cannot be loaded" in told
    assert "cannot open shared object file" not in told
    assert main([str(path), "--custom-ops", "absent.so"]) == 2
    assert "absent.so: no such file" in capsys.readouterr().err


def test_linked_folders_of_data_are_read_and_circles_end(save: Save, tmp_path: Path) -> None:
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / f"{folder}.npz", x=values(8, 6))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert open_data(load_model(save(parsed(LAYER))), tmp_path / "data").n_samples == 16


ATTENTION = """(float[N,T,8] x, int64[N,T] mask) => (float[N,T,8] y)
<float[8,8] wq, float[8,8] wo> {
  q = MatMul(x, wq)
  split = Reshape(q, heads)
  turned = Transpose<perm=[0,2,1,3]>(split)
  keys = Transpose<perm=[0,1,3,2]>(turned)
  scores = MatMul(turned, keys)
  shares = Softmax(scores)
  mixed = MatMul(shares, turned)
  back = Transpose<perm=[0,2,1,3]>(mixed)
  joined = Reshape(back, whole)
  y = MatMul(joined, wo)
}"""


def test_as_many_heads_as_tokens_are_not_taken_for_padding(save: Save) -> None:
    shapes = {"heads": np.array([0, 0, 4, 2]), "whole": np.array([0, 0, 8])}
    model = load_model(save(parsed(ATTENTION, shapes)))
    feed = {"x": values(3, 4, 8), "mask": np.array([[1, 1, 0, 0]] * 3)}
    names = make_plan(model, Rules()).activations
    seen = observe(model, [Batch(feed)], names, Observing(padding_mask="mask"))
    assert seen.counters["x"].n_finite == 3 * 2 * 8
    assert seen.counters["joined"].n_finite == 3 * 2 * 8
    assert seen.counters["turned"].n_finite == 3 * 4 * 4 * 2
    assert seen.counters["shares"].n_finite == 3 * 4 * 4 * 4
    assert {"turned", "shares"} <= set(seen.unmasked)


def test_a_mask_that_a_batch_lacks_is_refused(save: Save) -> None:
    text = LAYER.replace("{ y = MatMul(x", "{ z = Mul(x, mask)\n y = MatMul(z")
    model = parsed(text, {"mask": np.array(1, np.float32)})
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, []))
    with pytest.raises(DataError, match="padding-mask: the batch from sample 0 holds no 'mask'"):
        calibrate_model(save(model), [{"x": values(8, 6)}], run=Run(padding_mask="mask"))


@pytest.mark.parametrize("kind", ["dictionary", "folder"])
def test_inputs_of_one_row_beside_others_that_are_free_are_fed_whole(
    kind: str, save: Save, tmp_path: Path
) -> None:
    """Time-major: x is (steps, 1, 6), and a first state of one row goes with it."""
    model = parsed("""(float[T,1,6] x, float[1,1,6] h0) => (float[T,1,3] y) <float[6,3] w> {
      z = Add(x, h0)
      y = MatMul(z, w) }""")  # fmt: skip
    feed = {"x": values(5, 1, 6), "h0": values(1, 1, 6)}
    source: object = [feed]
    if kind == "folder":
        (tmp_path / "data").mkdir()
        np.savez(tmp_path / "data" / "0.npz", **feed)  # type: ignore[arg-type]
        source = tmp_path / "data"
    (batch,) = open_data(load_model(save(model)), source).batches()
    assert {name: array.shape for name, array in batch.feed.items()} == {
        "x": (5, 1, 6), "h0": (1, 1, 6),
    }  # fmt: skip


def test_an_optional_input_beside_weights_that_are_inputs_stays_one(save: Save) -> None:
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,3] w> {
      louder = Mul(x, gain)
      y = MatMul(louder, w) }""", {"gain": np.array([2], np.float32)})  # fmt: skip
    for tensor in model.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    feed = {"x": values(8, 6), "gain": np.array([0.5], np.float32)}
    result = calibrate_model(save(model), [feed], all_bits(16))
    assert [v.name for v in onnx.load(result.output).graph.input] == ["x", "gain"]
    wanted = feed["x"] * 0.5 @ onnx.numpy_helper.to_array(model.graph.initializer[-1])
    assert np.allclose(run(result.output, feed)["y"], wanted, atol=1e-2)


def test_contrib_operators_that_multiply_activations_are_listed(save: Save) -> None:
    model = parsed("""(float[N,6,6] x) => (float[N,6,6] y) <float[6,6] w> {
      z = MatMul(x, w)
      y = com.microsoft.FusedMatMul(z, z) }""")  # fmt: skip
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    result = calibrate_model(save(model), [{"x": values(8, 6, 6)}])
    reasons = {skipped.name: skipped.reason for skipped in result.table.skipped}
    assert reasons == {"/FusedMatMul/y": "com.microsoft.FusedMatMul is not supported"}


def test_the_command_line_may_read_what_the_file_would_save() -> None:
    config = Config.parse("save-observations: so.npz").over({"observations": "so.npz"})
    assert (config.observations, config.save_observations) == (Path("so.npz"), None)
    config = Config.parse("observations: so.npz").over({"save_observations": "so.npz"})
    assert (config.observations, config.save_observations) == (None, Path("so.npz"))


def test_the_percentile_reaches_the_methods_of_rules() -> None:
    config = Config.parse("percentile: 90\nrules: [{match: x, method: percentile}]")
    assert config.to_rules().overrides[0].method == "percentile:90.0"
    assert Config.parse(config.to_yaml()) == config


def test_the_shapes_of_what_is_fed_back_must_match_and_something_must_be_fed(save: Save) -> None:
    path = save(parsed("(float[N,6] x, float[N,6] s) => (float[N,3] y, float[N,6] t) <float[6,3] w>"
                       " { y = MatMul(x, w)\n t = Add(x, s) }"))  # fmt: skip
    load_model(path, {"s": "t"})
    with pytest.raises(OptionError, match=r"'s' is \('N', 6\), output 'y' is \('N', 3\): their"):
        load_model(path, {"s": "y"})
    with pytest.raises(OptionError, match="every input is fed back, none is left for data"):
        load_model(path, {"s": "t", "x": "t"})


def test_outputs_of_integers_are_compared_by_equality(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    model = parsed("""(float[N,6] x) => (int64[N] best) <float[6,3] w> {
      y = MatMul(x, w)
      best = ArgMax<axis=1, keepdims=0>(y) }""")  # fmt: skip
    path = save(model)
    np.save(path.with_name("x.npy"), values(200, 6))
    assert main([str(path), "--data", str(path.with_name("x.npy"))]) == 0
    told = capsys.readouterr().out
    assert "none: no float output" in told
    assert "output 'best', no float: " in told


@pytest.mark.parametrize(
    ("op", "attribute"),
    [("ConvTranspose", "group"), ("DepthToSpace", "blocksize"), ("GatherND", "batch_dims")],
)
def test_attributes_that_crash_libraries_are_refused(op: str, attribute: str, save: Save) -> None:
    inputs = "(x, w)" if op != "DepthToSpace" else "(x)"
    default = "<blocksize=2>" if op == "DepthToSpace" else ""
    other = values(4, 4, 1, 1) if op != "GatherND" else np.zeros((1, 1), np.int64)
    text = f"(float[1,4,6,6] x) => (float[a,b,c,d] y) {{ y = {op}{default}{inputs} }}"
    model = parsed(text, {"w": other})
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(helper.make_attribute(attribute, -(2**40)))
    with pytest.raises(ModelError, match=f"{op} .*: {attribute} must be "):
        load_model(save(model))


def test_a_model_without_shapes_of_inputs_and_outputs_is_taken(save: Save) -> None:
    model = parsed(LAYER)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    path = save(model)
    feed = {"x": values(8, 6)}
    output = calibrate_model(path, [feed], all_bits(16)).output
    assert np.allclose(run(output, feed)["y"], run(path, feed)["y"], atol=1e-3)


def test_large_float_weights_that_stay_are_not_copied_to_be_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parsed("""(int64[N,4] ids) => (float[N,4,32] y) <float[99,32] table, float[32,32] w> {
      vectors = Gather(table, ids)
      y = MatMul(vectors, w) }""")  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    monkeypatch.setattr("tempfile.TemporaryDirectory", pytest.fail)
    feed = {"ids": np.random.default_rng(0).integers(0, 99, (8, 4))}
    result = calibrate_model(path, [feed], run=Run(summary=tmp_path / "model-w8a8.onnx.data"))
    data = {e.value for t in onnx.load(result.output, load_external_data=False).graph.initializer
            for e in t.external_data if e.key == "location"}  # fmt: skip
    assert data == {"model-w8a8.onnx.2.data"}, "the summary has the usual name"
    assert json.loads((tmp_path / "model-w8a8.onnx.data").read_text("utf-8"))


def test_batches_of_any_size_fill_those_that_the_model_fixes(save: Save) -> None:
    feeds = [{"x": values(n, 6, seed=n)} for n in (1, 2, 3, 5, 3)]
    result = calibrate_model(save(fixed_batch(4)), feeds)
    assert result.table.n_samples == 12
    assert "2 samples fill no batch of 4: not used" in result.notes


def test_labels_that_are_no_class_of_the_model_are_refused(save: Save) -> None:
    feed = {"x": values(8, 6), "labels": np.array([0, 1, 2, 0, 3, 1, 2, 0])}
    with pytest.raises(DataError, match=r"label 3: the model's 'y' has 3 classes, 0 to 2"):
        calibrate_model(save(parsed(LAYER)), [feed])


def test_observations_with_another_mask_or_feedback_are_refused(save: Save, tmp_path: Path) -> None:
    path = save(parsed("(float[N,6] x, int64[N] mask, float[N,6] s) => (float[N,3] y, float[N,6] t)"
                       "<float[6,3] w> { y = MatMul(x, w)\n t = Add(x, s) }"))  # fmt: skip
    feed = {"x": values(8, 6), "mask": np.arange(8) % 2, "s": values(8, 6)}
    seen = tmp_path / "seen.npz"
    settings = {"force": True, "observations": seen}
    calibrate_model(path, [feed], run=Run(save_observations=seen, padding_mask="mask"))
    assert calibrate_model(path, [feed], run=Run(**settings)).table.records[0].count == 24  # type: ignore[arg-type]
    calibrate_model(path, [feed], run=Run(padding_mask="mask", **settings))  # type: ignore[arg-type]
    with pytest.raises(ObservationsError, match="observed with padding-mask mask, not s: observe"):
        calibrate_model(path, [feed], run=Run(padding_mask="s", **settings))  # type: ignore[arg-type]
    with pytest.raises(
        ObservationsError, match=r"observed with feed-back {}, now it is {'s': 't'}"
    ):
        calibrate_model(path, [feed], run=Run(feedback={"s": "t"}, **settings))  # type: ignore[arg-type]


def test_a_file_that_is_no_checkpoint_is_not_overwritten(save: Save, tmp_path: Path) -> None:
    path, precious = save(parsed(LAYER)), tmp_path / "seen.npz.partial"
    precious.write_text("precious")
    with pytest.raises(OutputError, match=r"seen\.npz\.partial: exists and is no checkpoint"):
        calibrate_model(
            path, [{"x": values(8, 6)}], run=Run(save_observations=tmp_path / "seen.npz")
        )
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("only: nosuch", "o.yaml: only 'nosuch' matches no node and no tensor"),
        ("feed-back: {nosuch: y}", "o.yaml: feed-back: 'nosuch' is no input of the model"),
        ("padding-mask: nosuch", "o.yaml: padding-mask: the model has no input 'nosuch'"),
        ("rules: [{match: nosuch}]", "o.yaml: rules[0].match: 'nosuch' matches no node"),
    ],
)
def test_settings_of_a_file_that_do_not_fit_the_model_name_the_file(
    line: str, message: str, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(parsed(LAYER))
    config = path.with_name("o.yaml")
    config.write_text(f"model: {path.name}\n{line}\n")
    assert main(["--config", str(config)]) == 2
    assert f"{path.parent}/{message}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("scale", [2.0, 1.6])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_resizing_of_old_opsets_stays_what_it_was(
    op: str, opset: int, scale: float, mode: str, save: Save
) -> None:
    scales = {"scales": np.array([1, 1, scale, scale], np.float32)}
    model = parsed(f"""(float[1,3,5,5] x) => (float[1,2,a,b] y) <float[2,3,1,1] kernel> {{
      conv = Conv(x, kernel)
      y = {op}<mode="{mode}">(conv, scales) }}""", scales, opset=opset)  # fmt: skip
    path = save(model)
    feed = {"x": values(1, 3, 5, 5)}
    output = calibrate_model(path, [feed], all_bits(16)).output
    assert np.allclose(run(output, feed)["y"], run(path, feed)["y"], atol=1e-3)


def test_the_data_of_an_input_that_is_named_through_a_link_is_never_removed(tmp_path: Path) -> None:
    model = parsed("(float[N,32] x) => (float[N,32] y) <float[32,32] w> { y = MatMul(x, w) }")
    folder = tmp_path / "real"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="out.onnx.data")
    (folder / "out.onnx").write_bytes((folder / "model.onnx").read_bytes())
    (tmp_path / "link").symlink_to(folder)
    before = (folder / "out.onnx.data").read_bytes()
    calibrate_model(tmp_path / "link" / "model.onnx", [{"x": values(8, 32)}],
                    output=folder / "out.onnx", run=Run(force=True))  # fmt: skip
    assert (folder / "out.onnx.data").read_bytes() == before


def test_a_model_that_is_bfloat16_in_part_is_refused_with_the_reason(save: Save) -> None:
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[6,6] w1, float[6,3] w2> {
      h = MatMul(x, w1)
      b = Cast<to=16>(h)
      t = Sigmoid(b)
      f = Cast<to=1>(t)
      y = MatMul(f, w2) }""")  # fmt: skip
    with pytest.raises(ModelError, match="it has no CPU kernels for bfloat16, which the model"):
        calibrate_model(save(model), [{"x": values(8, 6)}])
