"""Models written for a target: verified, within its rules, in the kernels that it is about."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, Save, calibrated
from models import MODELS, feed_for, parsed, run, values

from calib.arrays import Batch
from calib.biasscales import integer_biases
from calib.correcting import correct_biases
from calib.errors import OptionError, VerificationError
from calib.graph import Model, load_model
from calib.kernels import has_vnni, integer_kernels
from calib.pipeline import calibrate_model
from calib.planning import make_plan
from calib.rules import Rules, Selection, TensorRule, Widths
from calib.saving import Quantized
from calib.targetrules import broken_rules
from calib.targets import TARGETS
from calib.verification import verify
from calib.write import write_qdq

ORT = Rules(target="onnxruntime")
INTEGER_TARGETS = ("onnxruntime", "openvino", "tensorrt")
# Nothing in them is left for integer kernels.
WITHOUT_KERNELS = {"openvino": {"tied", "tied_transposed"}}

NET = """(float[N,3,8,8] image) => (float[N,5] logits)
<float[8,3,3,3] k1, float[8] b1, float[8,8,1,1] k2, float[8] b2, float[4,8,1,1] k3, float[4] b3,
 float[5,16] head, float[5] b4> {
  first = Conv<pads=[1,1,1,1]>(image, k1, b1)
  hidden = Relu(first)
  inner = Conv(hidden, k2, b2)
  total = Sum(inner, hidden)
  joined = Relu(total)
  pooled = MaxPool<kernel_shape=[2,2], strides=[2,2]>(joined)
  left = Conv(pooled, k3, b3)
  right = Conv(pooled, k3)
  lefts = Sigmoid(left)
  rights = Relu(right)
  both = Concat<axis=1>(lefts, rights)
  mean = GlobalAveragePool(both)
  flat = Flatten(mean)
  row = Concat<axis=1>(flat, flat)
  logits = Gemm<transB=1>(row, head, b4)
}"""
UPWARDS = """(float[N,3,4,4] image) => (float[N,2,8,8] y)
<float[4,3,1,1] k1, float[4,4,2,2] k2, float[4] b, float[2,4,1,1] k3> {
  first = Conv(image, k1, b)
  hidden = Relu(first)
  larger = ConvTranspose<strides=[2,2]>(hidden, k2, b)
  inner = Relu(larger)
  y = Conv(inner, k3)
}"""
CONV_END = """(float[N,3,4,4] x) => (float[N,4,4,4] y, float[N,4,4,4] z)
<float[4,3,1,1] kernel, float[4] bias> {
  y = Conv(x, kernel, bias)
  z = Relu(y)
}"""


def written(model: Model, rules: Rules, path: Path) -> tuple[Quantized, Batch]:
    table, feed = calibrated(model, rules)
    quantized = write_qdq(model, table).write(path)
    return quantized, Batch(feed)


def net(save: Save) -> Model:
    return load_model(save(parsed(NET)))


@pytest.mark.parametrize("target", INTEGER_TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_written_within_the_rules_of_its_target_and_verified(
    name: str, target: str, load: Load, tmp_path: Path
) -> None:
    model, rules = load(name), Rules(target=target)
    if name in WITHOUT_KERNELS.get(target, ()):
        with pytest.raises(OptionError, match="nothing left to quantize"):
            make_plan(model, rules)
        return
    quantized, batch = written(model, rules, tmp_path / "written.onnx")
    assert list(broken_rules(quantized.ir, target)) == []
    verify(model, quantized, tmp_path / "written.onnx", batch)


@pytest.mark.parametrize("target", INTEGER_TARGETS)
@pytest.mark.parametrize("name", ["", *MODELS])
def test_biases_are_corrected_where_the_target_keeps_them(
    name: str, target: str, load: Load, save: Save, tmp_path: Path
) -> None:
    if name in WITHOUT_KERNELS.get(target, ()):
        return
    model, path = load(name) if name else net(save), tmp_path / "written.onnx"
    table, feed = calibrated(model, Rules(target=target))
    batch = Batch(feed)
    table = correct_biases(model, table, lambda: [batch])
    quantized = write_qdq(model, table).write(path)
    assert list(broken_rules(quantized.ir, target)) == []
    verify(model, quantized, path, batch)
    plain = write_qdq(model, table.with_corrections({}))
    if not name:
        readers = {name for record in table.records for name in record.spec.consumers}
        layers = {n.name for n in model.ir.graph if n.op_type in ("Conv", "Gemm")}
        assert set(table.bias_corrections) == layers & readers
        kinds = [[n.op_type for n in m.ir.graph] for m in (plain, quantized)]
        stored = sum(kind == "DequantizeLinear" for kind in kinds[1])
        # The layer that had no bias has one, in integers where biases are.
        assert stored - sum(k == "DequantizeLinear" for k in kinds[0]) == (target == "onnxruntime")
        assert [k for k in kinds[0] if k != "DequantizeLinear"] == [
            k for k in kinds[1] if k != "DequantizeLinear"
        ]


@pytest.mark.parametrize("target", INTEGER_TARGETS)
def test_a_correction_that_the_table_does_not_state_is_found(
    target: str, save: Save, tmp_path: Path
) -> None:
    model, path = net(save), tmp_path / "written.onnx"
    table, feed = calibrated(model, Rules(target=target))
    name = next(str(n.name) for n in model.ir.graph if n.op_type == "Conv")
    stated = table.with_corrections({name: np.full(8, 0.5)})
    quantized = write_qdq(model, stated).write(path)
    verify(model, quantized, path, Batch(feed))
    silent = replace(quantized, table=table, corrected={})
    with pytest.raises(VerificationError):
        verify(model, silent, path, Batch(feed))


def test_a_network_ends_in_integer_kernels_from_its_input_to_its_logits(
    save: Save, tmp_path: Path
) -> None:
    model, path = net(save), tmp_path / "written.onnx"
    quantized, batch = written(model, ORT, path)
    verify(model, quantized, path, batch)
    kernels = integer_kernels(quantized, path, TARGETS["onnxruntime"])
    assert kernels.floating == ()
    assert kernels.integer == {
        "QLinearConv": 4,
        "QLinearAdd": 1,
        "QLinearSigmoid": 1,
        "QLinearConcat": 2,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }
    assert str(kernels).startswith("10 of 10 (")
    assert any("Sum nodes of two inputs are Add now" in note for note in quantized.notes)


def test_an_excluded_layer_is_listed_in_float_with_the_reason(save: Save, tmp_path: Path) -> None:
    model, path = net(save), tmp_path / "written.onnx"
    rules = Rules(target="onnxruntime", selection=Selection(exclude="/Conv/inner"))
    quantized, _ = written(model, rules, path)
    kernels = integer_kernels(quantized, path, TARGETS["onnxruntime"])
    (floating,) = [s for s in kernels.floating if s.name == "/Conv/inner"]
    assert floating.reason == "matched by --exclude '/Conv/inner'"
    assert kernels.to_json()["integer"]["QLinearConv"] == 3


def test_all_inputs_of_a_concat_and_both_sides_of_a_movement_share_one_grid(save: Save) -> None:
    table, _ = calibrated(net(save), ORT)
    records = {record.name: record for record in table.records}
    assert records["lefts"].spec.shares == ("both", "lefts", "rights")
    for names in (("lefts", "rights", "both"), ("joined", "pooled"), ("mean", "flat", "row")):
        grids = {(records[n].qtype, records[n].scale.tobytes()) for n in names}
        assert len(grids) == 1, names
    assert "one grid with 2 others" in records["both"].notes


def test_no_value_between_the_ends_of_a_grid_with_a_zero_point_is_clipped(save: Save) -> None:
    rules = Rules(target="onnxruntime", method="max")
    model = net(save)
    table, feed = calibrated(model, rules)
    names = [r.name for r in table.records if r.spec.kind == "activation"]
    seen = {**run(ir.to_proto(model.ir), feed, names=names), **feed}
    for record in table.records:
        if record.spec.kind == "activation":
            scale = float(record.scale[0])
            low, high = seen[record.name].min(), seen[record.name].max()
            assert record.qtype.qmin * scale <= low * (1 - 1e-6) or low >= 0
            assert high * (1 - 1e-6) <= record.qtype.qmax * scale


def test_an_output_made_in_integers_keeps_its_name_and_is_what_others_read(
    save: Save, tmp_path: Path
) -> None:
    model, path = load_model(save(parsed(CONV_END))), tmp_path / "written.onnx"
    quantized, batch = written(model, ORT, path)
    verify(model, quantized, path, batch)
    assert quantized.sources["y"] == "y_float"
    (record,) = [r for r in quantized.table.records if r.name == "y"]
    levels = run(path, batch.feed)["y"] / record.scale[0]
    assert np.abs(levels - np.rint(levels)).max() < 1e-3
    kernels = integer_kernels(quantized, path, TARGETS["onnxruntime"])
    assert kernels.integer == {"QLinearConv": 1}


def test_a_bias_is_int32_at_exactly_the_product_of_the_scales(save: Save, tmp_path: Path) -> None:
    model = net(save)
    quantized, _ = written(model, ORT, tmp_path / "written.onnx")
    found = list(integer_biases(model.ir.graph, quantized.table))
    assert len(found) == 4
    initializers = quantized.ir.graph.initializers
    for bias in found:
        stored = initializers[f"{bias.name}_quantized"].const_value
        scale = initializers[f"{bias.name}_scale"].const_value
        assert stored is not None
        assert scale is not None
        assert stored.dtype is ir.DataType.INT32
        assert np.array_equal(scale.numpy(), bias.data.scale * bias.weight.scale)
        restored = stored.numpy() * scale.numpy().astype(np.float64)
        assert np.abs(restored - model.weight(bias.name)).max() <= scale.numpy().max()


def test_scales_are_raised_where_a_bias_would_overflow_int32(save: Save, tmp_path: Path) -> None:
    given = {"k1": values(8, 3, 3, 3), "b1": values(8)}
    given["k1"][2] = 1e-9
    given["b1"][2] = 50.0
    model, path = load_model(save(parsed(NET, given))), tmp_path / "written.onnx"
    quantized, batch = written(model, ORT, path)
    (record,) = [r for r in quantized.table.records if r.name == "k1"]
    assert "1 of 8 scales raised, for the bias to fit into int32" in record.notes
    (bias,) = [b for b in integer_biases(model.ir.graph, quantized.table) if b.name == "b1"]
    restored = bias.integers(given["b1"]) * bias.scale.astype(np.float64)
    assert np.allclose(restored, given["b1"], rtol=1e-6, atol=bias.scale.max())
    verify(model, quantized, path, batch)


def test_tensorrt_gets_a_pair_at_the_shortcut_of_a_residual_add_alone(
    save: Save, tmp_path: Path
) -> None:
    model = net(save)
    quantized, _ = written(model, Rules(target="tensorrt"), tmp_path / "written.onnx")
    (add,) = [node for node in quantized.ir.graph if node.name == "/Sum/total"]
    makers = [v.producer().op_type for v in add.inputs]  # type: ignore[union-attr]
    assert makers == ["Conv", "DequantizeLinear"]
    signs = {str(record.qtype) for record in quantized.table.records}
    assert signs == {"int8"}


def test_rules_may_name_what_only_a_target_quantizes(save: Save) -> None:
    model = net(save)
    rules = Rules(target="onnxruntime", overrides=(TensorRule("^lefts$", method="max"),))
    methods = {spec.name: spec.method for spec in make_plan(model, rules).specs}
    assert (methods["lefts"], methods["hidden"]) == ("max", "octav")
    skipping = Rules(target="onnxruntime", selection=Selection(exclude="^mean$"))
    assert "mean" not in {spec.name for spec in make_plan(model, skipping).specs}


def test_reduced_range_keeps_weights_within_7_bits_stored_in_int8(
    save: Save, tmp_path: Path
) -> None:
    path = tmp_path / "written.onnx"
    rules = Rules(target="onnxruntime", reduce_range=True)
    quantized, _ = written(net(save), rules, path)
    for record in quantized.table.records:
        if record.spec.kind == "weight":
            tensor = quantized.ir.graph.initializers[quantized.stored[record.name]].const_value
            assert tensor is not None
            assert tensor.dtype is ir.DataType.INT8
            assert 60 <= np.abs(tensor.numpy().astype(int)).max() <= 63
    assert integer_kernels(quantized, path, TARGETS["onnxruntime"]).floating == ()


@pytest.mark.parametrize(
    ("target", "widths", "message"),
    [
        (
            "onnxruntime",
            Widths(4, 8),
            "weight 'k2' of 4 bits: onnxruntime's CPU computes with 5 to 8",
        ),
        ("openvino", Widths(8, 16), "activation 'image' of 16 bits: OpenVINO computes with 8"),
        ("tensorrt", Widths(6, 8), "weight 'k2' of 6 bits: TensorRT computes with 8"),
    ],
)
def test_a_width_that_a_target_lacks_is_refused_with_what_it_has(
    target: str, widths: Widths, message: str, save: Save
) -> None:
    with pytest.raises(OptionError) as caught:
        make_plan(net(save), Rules(widths=widths, target=target))
    kind = message.partition(" ")[0]
    told = f"target {target}: {message}: use {kind}-bits 8, or target generic"
    assert str(caught.value) == told


def test_an_unknown_target_is_refused() -> None:
    message = "target must be one of generic, onnxruntime, openvino, tensorrt, got 'tpu'"
    with pytest.raises(OptionError) as caught:
        Rules(target="tpu")
    assert str(caught.value) == message


def test_an_operator_without_integer_kernels_is_named_and_its_neighbours_have_theirs(
    save: Save, tmp_path: Path
) -> None:
    model, path = load_model(save(parsed(UPWARDS))), tmp_path / "written.onnx"
    quantized, batch = written(model, ORT, path)
    verify(model, quantized, path, batch)
    kernels = integer_kernels(quantized, path, TARGETS["onnxruntime"])
    assert kernels.integer == {"QLinearConv": 2}
    reason = "onnxruntime's CPU has no integer kernel for ConvTranspose"
    assert [(s.name, s.reason) for s in kernels.floating] == [("/ConvTranspose/larger", reason)]


def test_a_pair_that_only_layers_in_float_would_read_is_left_out(
    save: Save, tmp_path: Path
) -> None:
    model, path = load_model(save(parsed(UPWARDS))), tmp_path / "written.onnx"
    rules = Rules(target="onnxruntime", selection=Selection(exclude="larger$"))
    quantized, batch = written(model, rules, path)
    assert "hidden" not in quantized.dequantized
    verify(model, quantized, path, batch)


def test_every_layer_of_which_openvino_mixes_up_the_weight_is_refused(load: Load) -> None:
    with pytest.raises(OptionError) as caught:
        make_plan(load("tied"), Rules(target="openvino"))
    assert str(caught.value) == (
        "target openvino: nothing left to quantize: OpenVINO mixes up layers that share 'weight': "
        "use target generic"
    )


def test_a_float16_layer_stays_float_with_the_reason(load: Load) -> None:
    skipped = {s.name: s.reason for s in make_plan(load("float16_conv"), ORT).skipped}
    reason = "'half' is float16, the integer kernels of onnxruntime's CPU give float32"
    assert skipped["half of /Conv/conv"] == reason


@pytest.mark.parametrize(
    ("flags", "answer"),
    [("fpu avx2", False), ("fpu avx512_vnni", True), ("avx_vnni", True), (None, None)],
)
def test_vnni_is_read_from_the_flags_of_an_x86_cpu(
    flags: str | None, answer: bool | None, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor : 0\nflags\t\t: {flags}\n", "utf-8")
    assert has_vnni(path) is answer
    path.write_text("processor : 0\nFeatures : asimd\n", "utf-8")
    assert has_vnni(path) is None


def test_feeds_of_the_net_fit_the_model(save: Save) -> None:
    proto = parsed(NET)
    onnx.checker.check_model(proto, full_check=True)
    assert run(save(proto), feed_for(proto))["logits"].shape == (8, 5)


MATMULS = """(float[N,64] x) => (float[N,10] y) <float[64,96] w1, float[96,10] w2> {
  up = MatMul(x, w1)
  act = Relu(up)
  y = MatMul(act, w2)
}"""


def matmuls(save: Save) -> Path:
    return save(parsed(MATMULS))


def test_onnxruntime_gets_blocks_as_its_own_operator_unless_told_otherwise(save: Save) -> None:
    path, four = matmuls(save), Widths(4, None, 4)
    rules = Rules(four, block_size=32, target="onnxruntime")
    for chosen, expected in ((rules, 2), (replace(rules, weight_format="qdq"), 0)):
        out = path.with_name(f"{expected}.onnx")
        made = calibrate_model(path, None, chosen, out)
        assert sum(n.op_type == "MatMulNBits" for n in onnx.load(out).graph.node) == expected
        assert (made.kernels is None) == (expected == 2)
        if made.kernels is not None:
            assert set(made.kernels.integer) == {"MatMulNBits"}
    assert Rules(four, block_size=24, target="onnxruntime").weight_format == "qdq"
    assert Rules(four, block_size=32).weight_format == "qdq"


def test_tensorrt_takes_4_bit_weights_alone(save: Save) -> None:
    path = matmuls(save)
    rules = Rules(Widths(4, None, 4), block_size=32, target="tensorrt")
    out = path.with_name("four.onnx")
    calibrate_model(path, None, rules, out)
    stored = {t.data_type for t in onnx.load(out).graph.initializer}
    assert onnx.TensorProto.INT4 in stored


TOLD = [
    (
        {"target": "tensorrt", "widths": Widths(4, None), "block_size": 32},
        "TensorRT computes with 4 beside floats: use weight-bits 4 and edge-bits the same",
    ),
    (
        {"target": "onnxruntime", "block_size": 32},
        "target onnxruntime: block-size 32: beside quantized activations it takes a scale",
    ),
    (
        {
            "target": "openvino",
            "widths": Widths(8, None),
            "block_size": 32,
            "weight_format": "matmulnbits",
        },
        "target openvino: weight-format matmulnbits is onnxruntime's own: use qdq",
    ),
    (
        {"target": "tensorrt", "activations": "auto"},
        "target tensorrt: activations auto: it has signed grids alone: leave activations out",
    ),
]


@pytest.mark.parametrize(("settings", "message"), TOLD)
def test_settings_that_a_target_does_not_take_are_refused(
    save: Save, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        make_plan(load_model(matmuls(save)), Rules(**settings))
