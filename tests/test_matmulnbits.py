"""onnxruntime's own operator multiplies with exactly the weights that the oracle makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from block_models import blocks, network, table_of
from models import Array
from onnx import numpy_helper

from calib import Run, calibrate_model, load_model
from calib.arrays import Batch
from calib.capture import Session
from calib.errors import VerificationError
from calib.matmulnbits import DOMAIN, in_format, pack, read_packed, unpack, with_operator
from calib.packed import verify_packed
from calib.quantize import fake_quantize, quantize
from calib.saving import Quantized
from calib.table import TensorRecord
from calib.verification import Check
from calib.write import write_qdq


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(network("MatMul"), tmp_path / "MatMul.onnx")
    return tmp_path / "MatMul.onnx"


def quantized(path: Path, size: int, bits: int) -> Quantized:
    return write_qdq(load_model(path), table_of(path, blocks(size, bits)))


def nodes_of(path: Path) -> list[ir.Node]:
    return [node for node in ir.load(path).graph if node.domain == DOMAIN]


def records(path: Path, size: int, bits: int) -> list[TensorRecord]:
    return list(table_of(path, blocks(size, bits)).records)


@pytest.mark.parametrize("kind", ["MatMul", "GemmT"])
@pytest.mark.parametrize(("size", "bits"), [(16, 4), (32, 3), (64, 2), (32, 8), (16, 5)])
def test_what_is_packed_is_unpacked_to_the_oracles_weight(
    kind: str, size: int, bits: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(kind), path)
    loaded = load_model(path)
    for record in records(path, size, bits):
        weight, granularity = loaded.weight(record.name), record.spec.granularity
        packed = pack(quantize(weight, record.scale, record.qtype, granularity), record)
        wanted = fake_quantize(weight, record.scale, record.qtype, granularity)
        assert np.array_equal(unpack(packed), wanted.T if kind == "GemmT" else wanted)
        n_blocks = -(-packed.inputs // size)
        assert packed.blob.shape == (packed.outputs, n_blocks, size * packed.bits // 8)
        assert packed.scales.shape == (packed.outputs, n_blocks)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(("size", "bits"), [(16, 4), (32, 4), (256, 4), (32, 3), (32, 8)])
def test_the_operator_gives_the_rows_of_the_oracles_weight_bit_for_bit(
    size: int, bits: int, optimized: bool, tmp_path: Path
) -> None:
    """Fed with the unit matrix: the sums hold one number and zeros. Last blocks are ragged."""
    path, out = tmp_path / "one.onnx", tmp_path / "out.onnx"
    onnx.save(network("MatMul", (300, 33)), path)
    in_format(quantized(path, size, bits), "matmulnbits").save(out)
    (record,) = records(path, size, bits)
    bias = load_model(path).weight("b0")
    proto = onnx.load(out)
    tensor = next(t for t in proto.graph.initializer if t.name == "b0")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(bias), "b0"))
    onnx.save(proto, out)
    weight = load_model(path).weight("w0")
    wanted = fake_quantize(weight, record.scale, record.qtype, record.spec.granularity)
    found = Session(out, optimized=optimized).run({"x": np.eye(300, dtype=np.float32)})
    assert np.array_equal(found["y"], wanted)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "GemmT"])
def test_a_model_is_written_with_the_operator_and_computes_what_its_qdq_form_does(
    kind: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(network(kind), path)
    made = calibrate_model(path, None, blocks(32, weight_format="matmulnbits"), out)
    attributes = [{name: a.as_int() for name, a in n.attributes.items()} for n in nodes_of(out)]
    assert [a.pop("accuracy_level") for a in attributes] == [0, 0, 0]
    assert attributes[0] == {"K": 100, "N": 48, "bits": 4, "block_size": 32}
    assert not any("int8" in note for note in made.notes)
    qdq = calibrate_model(path, None, blocks(32), tmp_path / "qdq.onnx")
    feed = {"x": np.random.default_rng(0).standard_normal((9, 100)).astype(np.float32)}
    wanted = Session(qdq.output, optimized=False).run(feed)["y"]
    for optimized in (False, True):
        found = Session(out, optimized=optimized).run(feed)["y"]
        assert np.allclose(found, wanted, rtol=0, atol=1e-5)


def test_rounding_to_int8_is_asked_for_and_told(model: Path, tmp_path: Path) -> None:
    rules = blocks(32, weight_format="matmulnbits-int8")
    made = calibrate_model(model, None, rules, tmp_path / "out.onnx")
    levels = {n.attributes["accuracy_level"].as_int() for n in nodes_of(made.output)}
    assert levels == {4}
    note = next(note for note in made.notes if "int8" in note)
    assert note.startswith("3 layers round their input to int8, as weight-format matmulnbits-int8 ")


def test_weights_too_large_for_the_file_stand_beside_it(model: Path, tmp_path: Path) -> None:
    rules, run = blocks(32, weight_format="matmulnbits"), Run(external_data="always")
    made = calibrate_model(model, None, rules, tmp_path / "out.onnx", run)
    assert len(nodes_of(made.output)) == 3
    assert (tmp_path / "out.onnx.data").exists()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("y = MatMul(w, x)", "a weight that comes first"),
        ("y = Gemm <transA: int = 1> (x, w)", "a transposed input"),
        ("y = Gemm <alpha: float = 2.0> (x, w)", "a factor"),
    ],
)
def test_what_the_operator_cannot_compute_stays_qdq_and_is_counted(
    text: str, left: str, tmp_path: Path
) -> None:
    source = f"""<ir_version: 9, opset_import: ["" : 17]>
    network (float[64,64] x) => (float[64,64] y) {{ {text} }}"""
    proto = onnx.parser.parse_model(source)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    rules = blocks(32, weight_format="matmulnbits")
    made = calibrate_model(tmp_path / "model.onnx", None, rules, tmp_path / "out.onnx")
    assert nodes_of(made.output) == [], left
    assert "layers with blocks that MatMulNBits cannot compute, left as qdq: 1" in made.notes


def test_only_blocks_of_4_or_8_bits_can_be_packed(model: Path) -> None:
    weight = load_model(model).weight("w0")
    for rules in (blocks(None), blocks(32, 16)):
        record = table_of(model, rules).records[0]
        levels = quantize(weight, record.scale, record.qtype, record.spec.granularity)
        with pytest.raises(ValueError, match=r"^w0: (per-channel|blocked)\(.*\) of .* be packed$"):
            pack(levels, record)


# --- verification -----------------------------------------------------------------------------


def verified(model: Path, path: Path, change: str, by: float) -> str:
    """What is said of a model of which an initializer was changed."""
    source = quantized(model, 32, 4)
    packed = with_operator(source, 0)
    packed.save(path)
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == change)
    array: Array = numpy_helper.to_array(tensor).copy()
    array.flat[3] = array.flat[3] + array.dtype.type(by)
    tensor.CopyFrom(numpy_helper.from_array(array, change))
    onnx.save(proto, path)
    feed = {"x": np.random.default_rng(0).standard_normal((9, 100)).astype(np.float32)}
    check = Check(load_model(model), packed, path, Batch(feed), None)
    with pytest.raises(VerificationError) as caught:
        verify_packed(check, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["w1_packed", "w1_packed_scale"])
def test_packed_integers_and_scales_that_were_tampered_with_are_named(
    name: str, model: Path, tmp_path: Path
) -> None:
    message = verified(model, tmp_path / "out.onnx", name, 1)
    assert message == "weight 'w1': the packed integers are wrong"


def test_an_output_that_differs_from_the_qdq_forms_is_an_error(model: Path, tmp_path: Path) -> None:
    message = verified(model, tmp_path / "out.onnx", "b2", 0.5)
    assert message.endswith(
        "MatMulNBits with optimisation off computes otherwise than DequantizeLinear does"
    )


def test_the_checker_sees_the_file_too(model: Path, tmp_path: Path) -> None:
    source = quantized(model, 32, 4)
    packed = with_operator(source, 0)
    packed.save(tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx")
    proto.graph.node[-1].input[0] = "nowhere"
    onnx.save(proto, tmp_path / "out.onnx")
    feed = {"x": np.zeros((1, 100), np.float32)}
    check = Check(load_model(model), packed, tmp_path / "out.onnx", Batch(feed), None)
    with pytest.raises(VerificationError, match=r"^onnx.checker rejects the model: "):
        verify_packed(check, source)


def test_a_node_of_the_file_is_read_back(model: Path, tmp_path: Path) -> None:
    with_operator(quantized(model, 32, 4), 0).save(tmp_path / "out.onnx")
    packed = read_packed(nodes_of(tmp_path / "out.onnx")[0])
    assert (packed.inputs, packed.outputs, packed.bits, packed.block_size) == (100, 48, 4, 32)
