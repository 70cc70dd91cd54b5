"""Reading models: what is refused, what identifies a file, and which tensors could be quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Load, Save
from models import CONV_BIAS, MODELS, Array, Feed, gemm, if_subgraph, norm, parsed, run, values
from onnx import TensorProto, helper

from calib.errors import ModelError
from calib.granularity import PerChannel, PerTensor
from calib.graph import load_model, quantizable_uses

# tensor → who reads it; "edge" marks weighted layers that are first or last.
USES = {
    "conv_bn_relu": [
        "image > /Conv/conv edge", "kernel > /Conv/conv edge axis 0",
        "flat > /Gemm/logits edge", "head > /Gemm/logits edge axis 0",
    ],
    "conv_bias": [
        "image > /Conv/first edge", "kernel1 > /Conv/first edge axis 0",
        "hidden > /Conv/second", "kernel2 > /Conv/second axis 0",
        "inner > /Conv/third edge", "kernel3 > /Conv/third edge axis 0",
    ],
    "conv_transpose": [
        "code > /ConvTranspose/up edge", "kernel > /ConvTranspose/up edge axis 1",
        "hidden > /ConvTranspose/image edge", "last > /ConvTranspose/image edge axis 1",
    ],
    "matmul_left": ["weight > /MatMul/y edge axis 0", "hidden > /MatMul/y edge"],
    "matmul_batched": ["hidden > /MatMul/y edge", "weight > /MatMul/y edge"],
    "attention": [
        "tokens > /MatMul/query edge", "weight_q > /MatMul/query edge axis 1",
        "tokens > /MatMul/key edge", "weight_k > /MatMul/key edge axis 1",
        "query > /MatMul/scores", "keys > /MatMul/scores",
        "tokens > /MatMul/value edge", "weight_v > /MatMul/value edge axis 1",
        "shares > /MatMul/mixed", "value > /MatMul/mixed",
    ],
    "tied_transposed": [
        "x > /Gemm/hidden edge", "weight > /Gemm/hidden edge axis 1",
        "positive > /Gemm/y edge", "weight > /Gemm/y edge axis 0",
    ],
    "residual": [
        "image > /Conv/stem edge", "kernel0 > /Conv/stem edge axis 0",
        "shared > /Conv/left", "kernel1 > /Conv/left axis 0",
        "shared > /Conv/right", "kernel2 > /Conv/right axis 0",
        "hidden > /Conv/output edge", "kernel3 > /Conv/output edge axis 0",
    ],
    "if_subgraph": [
        "image > /Conv/first edge", "kernel1 > /Conv/first edge axis 0",
        "chosen > /Conv/output edge", "kernel2 > /Conv/output edge axis 0",
    ],
    "two_inputs": [
        "x > /MatMul/a edge", "weight_x > /MatMul/a edge axis 1",
        "z > /MatMul/b edge", "weight_z > /MatMul/b edge axis 1",
        "hidden > /Gemm/y edge", "head1 > /Gemm/y edge axis 1",
        "hidden > /Gemm/second edge", "head2 > /Gemm/second edge axis 1",
    ],
    "float16_conv": [
        "half > /Conv/conv edge",
        "kernel > /Conv/conv edge axis 0",
        "full > /MatMul/output edge", "weight > /MatMul/output edge axis 1"],
    "already_quantized": ["hidden > /MatMul/y edge", "weight > /MatMul/y edge axis 1"],
    "embedding": ["vectors > /MatMul/y edge", "weight > /MatMul/y edge axis 1"],
}  # fmt: skip

# A layer with a weight: its text, the weight's shape, the output's axis that its channels make.
LAYERS = {
    "Conv": ("Conv(x, weight)", (2, 4, 5), (3, 4, 2), 1),
    "Conv, grouped": ("Conv<group=2>(x, weight)", (2, 4, 5), (6, 2, 2), 1),
    "ConvTranspose": ("ConvTranspose(x, weight)", (2, 4, 5), (4, 3, 2), 1),
    "ConvTranspose, grouped": ("ConvTranspose<group=2>(x, weight)", (2, 4, 5), (4, 3, 2), 1),
    "Gemm": ("Gemm(x, weight)", (4, 5), (5, 3), 1),
    "Gemm, transB": ("Gemm<transB=1>(x, weight)", (4, 5), (3, 5), 1),
    "Gemm, weight first": ("Gemm(weight, x)", (4, 5), (3, 4), 0),
    "Gemm, weight first, transA": ("Gemm<transA=1>(weight, x)", (4, 5), (4, 3), 0),
    "MatMul": ("MatMul(x, weight)", (2, 4, 5), (5, 3), 2),
    "MatMul, weight first": ("MatMul(weight, x)", (2, 4, 5), (3, 4), 1),
}


def message_of(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def external(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    path, data = folder / "big.onnx", folder / "big.data"
    onnx.save(
        model, path, save_as_external_data=True, location=data.name, size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    return path, data


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    assert message_of(path) == f"{path}: no such file"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path) == f"{tmp_path}: is a directory, not a file"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n", b"weights: 3\n" * 50, bytes(2000)])
def test_what_is_not_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert message_of(path).startswith(f"{path}: not a valid ONNX model: ")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    assert message_of(path) == f"{path}: is empty, not an ONNX model"


def test_a_truncated_model_is_refused(save: Save) -> None:
    path = save(MODELS["conv_bias"]())
    path.write_bytes(path.read_bytes()[:-200])
    assert message_of(path).startswith(f"{path}: not a valid ONNX model: ")


def test_a_model_that_the_checker_rejects_is_refused(save: Save) -> None:
    path = save(parsed("(float[N,4] x) => (float[N,4] y) { y = Relux(x) }"))
    assert message_of(path).startswith(
        f"{path}: not a valid ONNX model: No Op registered for Relux"
    )


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    path, data = external(MODELS["conv_bias"](), tmp_path)
    data.unlink()
    assert message_of(path).startswith(f"{path}: ")


def test_an_input_that_is_no_tensor_of_numbers_is_refused(save: Save) -> None:
    text = """(string[N] words, float[N,6] x) => (float[N,3] y, string[N] same)
    <float[6,3] weight> { y = MatMul(x, weight)
      same = Identity(words) }"""
    model = load_model(save(parsed(text)))
    with pytest.raises(ModelError, match="'words': only tensors of numbers can be fed, got"):
        _ = model.inputs


def test_loading_leaves_the_file_as_it_is(save: Save) -> None:
    path = save(MODELS["conv_bn_relu"]())
    before = path.read_bytes()
    load_model(path)
    assert path.read_bytes() == before


def test_the_digest_and_the_size_are_those_of_the_file(save: Save) -> None:
    path = save(MODELS["conv_bias"]())
    model, content = load_model(path), path.read_bytes()
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert model.n_bytes == len(content)


def test_digest_and_size_cover_external_data(tmp_path: Path) -> None:
    path, data = external(MODELS["conv_bias"](), tmp_path)
    before, content = load_model(path), bytearray(data.read_bytes())
    assert before.n_bytes == path.stat().st_size + len(content)
    content[5] ^= 1
    data.write_bytes(content)
    assert load_model(path).sha256 != before.sha256


def test_the_digest_covers_external_data_of_subgraphs(tmp_path: Path) -> None:
    model = if_subgraph()
    inner = next(a for a in model.graph.node[4].attribute if a.name == "then_branch")
    array = onnx.numpy_helper.to_array(inner.g.initializer[0])
    onnx.external_data_helper.set_external_data(inner.g.initializer[0], "inner.data", length=64)
    inner.g.initializer[0].ClearField("raw_data")
    path, data = tmp_path / "model.onnx", tmp_path / "inner.data"
    path.write_bytes(model.SerializeToString())
    data.write_bytes(array.tobytes())
    before = load_model(path).sha256
    data.write_bytes((2 * array).tobytes())
    assert load_model(path).sha256 != before


def test_inputs_and_outputs_are_described_as_declared(save: Save) -> None:
    text = """(float[N,3,?] image, int64[2] size, bool flag) => (float[N,4,M] y)
    <float[4,3,1] kernel> { y = Conv(image, kernel) }"""
    model = load_model(save(parsed(text)))
    described = [(i.name, i.dtype.name, i.shape) for i in model.inputs]
    assert described[:2] == [("image", "float32", ("N", 3, None)), ("size", "int64", (2,))]
    assert described[2][:2] == ("flag", "bool")
    assert [(o.name, o.shape) for o in model.outputs] == [("y", ("N", 4, "M"))]


@pytest.mark.parametrize("name", USES)
def test_every_operand_of_a_layer_is_a_use_and_nothing_else_is(name: str, load: Load) -> None:
    uses, _ = quantizable_uses(load(name))
    described = [
        f"{use.tensor} > {use.node}{' edge' if use.edge else ''}"
        + (f" axis {use.granularity.axis}" if isinstance(use.granularity, PerChannel) else "")
        for use in uses
    ]
    assert described == USES[name]
    constants = {tensor.name for tensor in MODELS[name]().graph.initializer}
    assert {u.tensor for u in uses if u.kind == "weight"} == {u.tensor for u in uses} & constants


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_has_one_group_for_each_output_channel(name: str, save: Save) -> None:
    """Scaling the groups of the weight scales the channels of the output, and nothing else."""
    layer, x_shape, shape, output_axis = LAYERS[name]
    declared = ",".join(map(str, x_shape))
    text = f"(float[{declared}] x) => (float[{'a,' * (len(x_shape) - 1)}b] y) {{ y = {layer} }}"
    model = parsed(text, {"weight": values(*shape)})
    uses, skipped = quantizable_uses(load_model(save(model)))
    granularity = next(use.granularity for use in uses if use.kind == "weight")
    assert isinstance(granularity, PerChannel)
    factors = np.arange(1, shape[granularity.axis] + 1, dtype=np.float32)
    scaled = parsed(text, {"weight": along(factors, granularity.axis, values(*shape))})
    feed: Feed = {"x": values(*x_shape, seed=1)}
    plain, actual = run(model, feed)["y"], run(scaled, feed)["y"]
    repeats = plain.shape[output_axis] // len(factors)
    assert repeats == (2 if name == "ConvTranspose, grouped" else 1)
    expected = along(np.tile(factors, repeats), output_axis, plain)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert skipped == ()


def along(factors: Array, axis: int, array: Array) -> Array:
    shape = [1] * array.ndim
    shape[axis] = -1
    return np.asarray(array * factors.reshape(shape))


def test_a_weight_without_one_axis_for_its_channels_is_one_group(save: Save) -> None:
    texts = {
        "(float[2,4,5] x) => (float[2,4,3] y) <float[2,5,3] weight> { y = MatMul(x, weight) }",
        "(float[2,4,5] x) => (float[2,3,5] y) <float[2,3,4] weight> { y = MatMul(weight, x) }",
        "(float[N,3] x) => (float[N] y) <float[3] weight> { y = MatMul(x, weight) }",
        "(float[4,3,2] x) => (float[2,4,8] y) <float[2,3,9] weight> { y = Conv(weight, x) }",
    }
    for text in texts:
        uses, _ = quantizable_uses(load_model(save(parsed(text))))
        assert [u.granularity for u in uses if u.kind == "weight"] == [PerTensor()]


def skipped_of(model: onnx.ModelProto, save: Save) -> list[tuple[str, str]]:
    _, skipped = quantizable_uses(load_model(save(model)))
    return [(s.name, s.reason) for s in skipped]


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (11, "'half' is double, not float32 or float16"),
        (16, "'half' is bfloat16, for which onnxruntime has no CPU kernels"),
    ],
)
def test_what_is_of_another_type_stays_and_the_reason_is_given(
    to: int, reason: str, save: Save
) -> None:
    model = MODELS["float16_conv"]()
    model.graph.node[0].attribute[0].i = model.graph.initializer[0].data_type = to
    model.graph.initializer[0].raw_data *= {11: 4, 16: 1}[to]
    (entry, _) = skipped_of(model, save)
    assert entry == ("/Conv/conv[0]", reason)


def test_what_is_quantized_already_stays(save: Save) -> None:
    assert skipped_of(MODELS["already_quantized"](), save) == [
        ("/MatMul/linear[0]", "'dq' is quantized already"),
        ("/MatMul/linear[1]", "'wdq' is quantized already"),
    ]


def test_layers_inside_subgraphs_stay(save: Save) -> None:
    assert skipped_of(if_subgraph(), save) == [("inner", "inside a subgraph of '/If/chosen'")]


def test_an_empty_weight_stays(save: Save) -> None:
    model = gemm(weight=np.zeros((6, 0), np.float32))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0
    assert ("/Gemm/linear[1]", "'weight' is empty") in skipped_of(model, save)


def test_operators_that_multiply_but_are_not_supported_are_named(save: Save) -> None:
    text = """(float[N,6] x, float[T,N,6] series) => (float[N,3] y, float[N,2] z, float[T,D,N,H] h)
    <float[6,3] weight, float[6,2] second, float[1,12,6] gates, float[1,12,4] recurrent> {
      y = Einsum<equation="ni,ij->nj">(x, weight)
      z = custom.MatMul(x, second)
      same = custom.Trick(x)
      h = GRU<hidden_size=4>(series, gates, recurrent)
    }"""
    model = parsed(text)
    model.opset_import.append(helper.make_opsetid("custom", 1))
    assert skipped_of(model, save) == [
        ("/Einsum/y", "Einsum is not supported"),
        ("/MatMul/z", "custom.MatMul is not supported"),
        ("/GRU/h", "GRU is not supported"),
    ]


def test_a_layer_before_an_if_is_followed_by_those_that_read_it_inside(save: Save) -> None:
    """The last Conv is behind the If, so the first one is not last, and neither is alone."""
    text = CONV_BIAS.replace("second = Conv<pads=[1,1,1,1], group=2>(hidden, ", "second = Conv(g, ")
    model = parsed(text.replace("float[6,2,3,3]", "float[6,4,1,1]").replace("[N,5,", "[N,Z,"))
    model.graph.node.insert(2, if_subgraph().graph.node[4])
    model.graph.node[2].input[0], model.graph.node[2].output[0] = "flag", "g"
    info = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    model.graph.input.append(info)
    uses, _ = quantizable_uses(load_model(save(model)))
    assert {u.node: u.edge for u in uses} == {
        "/Conv/first": True, "/Conv/second": False, "/Conv/third": True,
    }  # fmt: skip


def test_folded_batchnorm_shows_in_the_weights(save: Save) -> None:
    model = load_model(save(MODELS["conv_bn_relu"]()))
    uses, _ = quantizable_uses(model)
    folded = model.weight(next(u.tensor for u in uses if u.kind == "weight"))
    statistics = norm(4)
    factor = statistics["scale"] / np.sqrt(statistics["var"] + 1e-5)
    np.testing.assert_allclose(folded, along(factor, 0, values(4, 3, 3, 3)), rtol=1e-5)


@pytest.mark.parametrize("change", [lambda raw: raw + bytes(3), lambda raw: raw + bytes(4)])
def test_data_that_is_longer_than_its_shape_is_refused(
    change: Callable[[bytes], bytes], save: Save
) -> None:
    model = MODELS["conv_bias"]()
    model.graph.initializer[0].raw_data = change(model.graph.initializer[0].raw_data)
    with pytest.raises(ModelError, match=r"tensor 'kernel1' holds 4\d\d bytes, .* need 432$"):
        load_model(save(model))
