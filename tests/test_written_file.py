"""Written models as files: interface, size, versions, metadata and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, Save, all_bits, calibrated, needs_onnxruntime
from models import CONV_BIAS, MODELS, feed_for, if_subgraph, parsed, run, values, weights_are_inputs
from onnx import helper

from calib.errors import ModelError, OutputError
from calib.graph import load_model
from calib.rules import Rules, Selection
from calib.saving import Quantized
from calib.write import METADATA_KEY, write_qdq

Interface = list[tuple[str, int, list[str | int]]]


def written(path: Path, rules: Rules) -> Quantized:
    model = load_model(path)
    return write_qdq(model, calibrated(model, rules)[0])


def saved(quantized: Quantized, folder: Path) -> onnx.ModelProto:
    quantized.save(folder / "written.onnx")
    return onnx.load(folder / "written.onnx")


def interface(model: onnx.ModelProto) -> Interface:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
        if value.name not in constants
    ]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_outputs_keep_names_types_and_dynamic_axes(
    name: str, bits: int, save: Save, tmp_path: Path
) -> None:
    original = MODELS[name]()
    model = saved(written(save(original), all_bits(bits)), tmp_path)
    assert interface(model) == interface(original)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_neither_the_model_in_memory_nor_its_file_is_touched(name: str, save: Save) -> None:
    path = save(MODELS[name]())
    content, model = path.read_bytes(), load_model(path)
    before = ir.to_proto(model.ir)
    table, _ = calibrated(model, all_bits(4))
    write_qdq(model, table)
    assert ir.to_proto(model.ir) == before
    assert path.read_bytes() == content


def test_the_file_shrinks_with_the_width(save: Save, tmp_path: Path) -> None:
    text = """(float[N,256] x) => (float[N,256] y) <float[256,256] w1, float[256,256] w2> {
      hidden = MatMul(x, w1)
      y = MatMul(hidden, w2)
    }"""
    path = save(parsed(text))
    n_weights, sizes = 2 * 256 * 256, {}
    for bits in (2, 3, 4, 5, 8, 16):
        saved(written(path, all_bits(bits)), tmp_path)
        sizes[bits] = (tmp_path / "written.onnx").stat().st_size
    for bits, stored in {2: 4, 3: 4, 4: 4, 5: 8, 8: 8, 16: 16}.items():
        assert 0 < sizes[bits] - n_weights * stored / 8 < 6000  # scales, graph and names
    assert path.stat().st_size > 4 * n_weights


@pytest.mark.parametrize(
    ("before", "bits", "after", "types"),
    [
        (9, 8, 13, "INT8, UINT8"),
        (12, 5, 13, "INT8, UINT8"),
        (13, 8, 13, None),
        (17, 8, 17, None),
        (17, 7, 17, None),
        (17, 4, 21, "INT4, UINT4"),
        (17, 3, 21, "INT4"),
        (17, 16, 21, "INT16, UINT16"),
        (9, 4, 21, "INT4, UINT4"),
        (21, 4, 21, None),
        (23, 16, 23, None),
    ],
)
def test_the_opset_is_raised_as_far_as_the_types_need_and_a_note_says_so(
    before: int, bits: int, after: int, types: str | None, save: Save
) -> None:
    needs_onnxruntime(1, 31)
    original = parsed(CONV_BIAS, opset=before, ir_version=4)
    quantized = written(save(original), all_bits(bits))
    model = ir.to_proto(quantized.ir)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", after)]
    note = f"opset raised from {before} to {after} for {types}"
    assert quantized.notes == ((note,) if types else ())
    feed = feed_for(original)
    assert run(model, feed)["output"].shape == run(original, feed)["output"].shape


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("opset", [9, 13, 17, 21, 23])
def test_the_ir_version_is_one_that_knows_all_that_is_written(
    opset: int, bits: int, save: Save, tmp_path: Path
) -> None:
    """ONNX 1.16 brought opset 21, IR version 10 and the 4-bit types; IR version 4 is the first
    whose initializers need not be inputs."""
    path = save(weights_are_inputs(opset))
    model = saved(written(path, all_bits(bits)), tmp_path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version >= (10 if bits == 4 else 4)
    newer = parsed(CONV_BIAS, opset=opset, ir_version=11)
    assert saved(written(save(newer), all_bits(bits)), tmp_path).ir_version == 11


def test_an_opset_that_cannot_be_raised_is_an_error(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no adapter\nfor Odd")

    table, _ = calibrated(load("conv_bias"), all_bits(4))
    monkeypatch.setattr("calib.storage.version_converter.convert_version", fails)
    with pytest.raises(ModelError) as caught:
        write_qdq(load("conv_bias"), table)
    needs = "opset 17 cannot be raised to 21, which INT4, UINT4 needs: "
    assert str(caught.value) == f"{needs}no adapter for Odd"
    monkeypatch.setattr("calib.storage.version_converter.convert_version", lambda *_, **__: None)
    with pytest.raises(ModelError) as caught:
        write_qdq(load("conv_bias"), table)
    assert str(caught.value) == (
        f"{needs}export the model with opset 21, or use widths of 5 to 8 bits (opset 13)"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_metadata_and_doc_strings_are_kept(bits: int, save: Save, tmp_path: Path) -> None:
    original = parsed(CONV_BIAS, opset=12)
    original.producer_name, original.producer_version = "trainer", "1.2"
    original.domain, original.model_version = "org.example", 7
    original.doc_string, original.graph.doc_string = "about the model", "about the graph"
    original.graph.input[0].doc_string = "an image"
    original.graph.output[0].doc_string = "its classes"
    for node in original.graph.node:
        node.doc_string = f"about {node.name}"
    helper.set_model_props(original, {"classes": "cat,dog"})
    path = save(original)
    model = load_model(path)
    manifest = {"options": {"bits": bits}, "n_samples": 3}
    table = calibrated(model, all_bits(bits))[0].with_manifest(manifest)
    actual = saved(write_qdq(model, table), tmp_path)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(actual, field) == getattr(original, field)
    assert actual.graph.name == original.graph.name
    assert actual.graph.doc_string == "about the graph"
    assert actual.graph.input[0].doc_string == "an image"
    assert actual.graph.output[0].doc_string == "its classes"
    docs = {n.name: n.doc_string for n in actual.graph.node}
    assert {n.name: docs[n.name] for n in original.graph.node} == {
        n.name: n.doc_string for n in original.graph.node
    }
    props = {p.key: p.value for p in actual.metadata_props}
    assert props.pop("classes") == "cat,dog"
    assert list(props) == [METADATA_KEY] == ["octav_calibrate"]
    assert json.loads(props[METADATA_KEY]) == manifest


def all_value_names(graph: onnx.GraphProto) -> list[str]:
    """Names given in a graph and in those inside it; ONNX wants all of them to differ."""
    names = [v.name for v in graph.input] + [t.name for t in graph.initializer]
    for node in graph.node:
        names += node.output
        for attribute in node.attribute:
            names += all_value_names(attribute.g)
    return names


@pytest.mark.parametrize("inner", ["inner_kernel", "image_scale", "kernel1_quantized"])
def test_new_names_differ_from_all_others_those_of_subgraphs_included(
    inner: str, save: Save, tmp_path: Path
) -> None:
    quantized = written(save(if_subgraph(inner)), all_bits(4))
    names = all_value_names(saved(quantized, tmp_path).graph)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_and_values_have_names_that_differ(name: str, save: Save, tmp_path: Path) -> None:
    model = saved(written(save(MODELS[name]()), all_bits(3)), tmp_path)
    for names in ([n.name for n in model.graph.node], all_value_names(model.graph)):
        assert "" not in names
        assert len(set(names)) == len(names)


def test_a_second_quantization_of_the_rest_reads_the_first(save: Save, tmp_path: Path) -> None:
    """Names given by a first run are taken in a second, on the layers it left out."""
    path = save(MODELS["conv_bias"]())
    first = written(path, Rules(selection=Selection(only="/Conv/second")))
    saved(first, tmp_path)
    again = saved(written(tmp_path / "written.onnx", Rules()), tmp_path)
    assert sum(node.op_type == "QuantizeLinear" for node in again.graph.node) == 3
    feed = feed_for(MODELS["conv_bias"]())
    expected, actual = run(path, feed)["output"], run(again, feed)["output"]
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


def test_a_model_with_external_data_is_written_whole_into_another_directory(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    onnx.save(
        MODELS["tied"](), source / "model.onnx", save_as_external_data=True, location="weights",
        size_threshold=0,
    )  # fmt: skip
    quantized = written(source / "model.onnx", all_bits(8))
    quantized.save(target / "written.onnx")
    feed = feed_for(MODELS["tied"]())
    before = run(target / "written.onnx", feed)
    shutil.rmtree(source)
    after = run(target / "written.onnx", feed)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    scaled = values(6, 6) * feed["x"].mean(dtype=np.float32)
    np.testing.assert_allclose(after["scaled"], scaled, rtol=1e-5)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(load: Load, tmp_path: Path) -> None:
    quantized = write_qdq(load("tied"), calibrated(load("tied"), all_bits(4))[0])
    with pytest.raises(OutputError, match="cannot be written: "):
        quantized.save(tmp_path / "missing" / "written.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(OutputError, match="cannot be written: "):
        quantized.save(tmp_path / "folder.onnx")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.onnx"]


@pytest.mark.parametrize("opset", [17, 21, 23])
@pytest.mark.parametrize("order", ["a, b", "b, a"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_signed_data_of_three_axes_with_a_bias_behind_its_matmul_is_loaded(
    opset: int, order: str, bits: int, save: Save, tmp_path: Path
) -> None:
    text = f"""(float[2,5,8] x) => (float[2,5,6] y) <float[8,6] w, float[6] b> {{
      i = Identity(x)
      a = MatMul(i, w)
      y = Add({order}) }}"""
    model = load_model(save(parsed(text, opset=opset, ir_version=10)))
    table, feed = calibrated(model, all_bits(bits), {"x": values(2, 5, 8, seed=1)})
    write_qdq(model, table).save(tmp_path / "q.onnx")
    expected, actual = (run(tmp_path / "q.onnx", feed, optimized=o)["y"] for o in (False, True))
    assert np.allclose(expected, actual, atol=0.02)
