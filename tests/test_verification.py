"""A good model passes, and whatever is wrong with a written model is an error that says what."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Load, Save, all_bits, calibrated, needs_onnxruntime
from models import CONV_BIAS, MODELS, Array, Feed, parsed, values
from onnx import helper, numpy_helper

from calib.arrays import Batch
from calib.capture import Runtime, Session
from calib.errors import CalibError, ModelError, VerificationError
from calib.graph import Model, load_model
from calib.rules import Rules, Selection, Widths
from calib.saving import Quantized
from calib.verification import verify
from calib.write import write_qdq

Tamper = Callable[[onnx.ModelProto], None]


def written(model: Model, rules: Rules, feed: Feed | None = None) -> tuple[Quantized, Batch]:
    table, used = calibrated(model, rules, feed)
    return write_qdq(model, table), Batch(used)


def replace(model: onnx.ModelProto, name: str, change: Callable[[Array], object]) -> None:
    """Puts what ``change`` makes of an initializer in its place."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    changed = np.asarray(change(array.copy())).astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


@pytest.fixture
def refusal(load: Load, tmp_path: Path) -> Callable[[Tamper, int], str]:
    """What `verify` says of the model ``conv_bias``, written and then tampered with."""

    def verify_tampered(tamper: Tamper, bits: int) -> str:
        model = load("conv_bias")
        quantized, batch = written(model, all_bits(bits))
        proto = ir.to_proto(quantized.ir)
        tamper(proto)
        onnx.save(proto, tmp_path / "written.onnx")
        with pytest.raises(VerificationError) as caught:
            verify(model, quantized, tmp_path / "written.onnx", batch)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return verify_tampered


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_as_it_is_written_passes(name: str, bits: int, load: Load, tmp_path: Path) -> None:
    quantized, batch = written(load(name), all_bits(bits))
    quantized.save(tmp_path / "written.onnx")
    verify(load(name), quantized, tmp_path / "written.onnx", batch)


def test_a_model_with_quantized_weights_only_passes(load: Load, tmp_path: Path) -> None:
    rules = Rules(Widths(4, 4), selection=Selection(only="kernel"))
    quantized, batch = written(load("conv_bias"), rules)
    quantized.save(tmp_path / "written.onnx")
    verify(load("conv_bias"), quantized, tmp_path / "written.onnx", batch)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_was_tampered_with_is_named(
    bits: int, refusal: Callable[[Tamper, int], str]
) -> None:
    def tamper(model: onnx.ModelProto) -> None:
        def move_one(integers: Array) -> Array:
            integers[2, 1, 0, 0] = -integers[2, 1, 0, 0] or 1
            return integers

        replace(model, "kernel2_quantized", move_one)

    assert refusal(tamper, bits) == "weight 'kernel2': the written integers are wrong"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["kernel2_scale", "kernel2_zero_point"])
def test_the_scale_and_the_zero_point_of_a_weight_are_checked_too(
    name: str, bits: int, refusal: Callable[[Tamper, int], str]
) -> None:
    def change_one_channel(parameter: Array) -> Array:
        parameter[3] = parameter[3] * np.float32(1.01) if "scale" in name else 1
        return parameter

    message = refusal(lambda model: replace(model, name, change_one_channel), bits)
    assert "'kernel2'" in message


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["hidden_scale", "hidden_zero_point"])
def test_an_activation_whose_parameters_were_tampered_with_is_named(
    name: str, bits: int, refusal: Callable[[Tamper, int], str]
) -> None:
    def larger(parameter: Array) -> Array:
        return np.asarray(parameter * 1.5 if "scale" in name else parameter.astype(int) + 3)

    message = refusal(lambda model: replace(model, name, larger), bits)
    assert re.fullmatch(
        r"activation 'hidden': its QDQ pair differs from the NumPy oracle in [1-9]\d* of 2304 "
        r"values, graph optimisation off",
        message,
    )


def test_a_clip_that_was_tampered_with_is_named(refusal: Callable[[Tamper, int], str]) -> None:
    message = refusal(lambda m: replace(m, "hidden_clip_max", lambda bound: bound * 0.7), 5)
    assert message.startswith("activation 'hidden': its QDQ pair differs from the NumPy oracle")


def test_a_bias_that_is_not_the_float_models_is_an_error(
    refusal: Callable[[Tamper, int], str],
) -> None:
    def rounded(bias: Array) -> Array:
        return np.asarray(np.rint(bias * 2) / 2)

    message = refusal(lambda model: replace(model, "bias2_channels", rounded), 8)
    assert message.startswith("apart from its QDQ pairs the written model does not compute")


def test_a_model_that_the_checker_rejects_is_an_error(
    refusal: Callable[[Tamper, int], str],
) -> None:
    def tamper(model: onnx.ModelProto) -> None:
        model.graph.node[-1].input[0] = "nowhere"

    assert refusal(tamper, 8).startswith("onnx.checker rejects the model: ")


def test_the_check_is_the_full_one_with_types(refusal: Callable[[Tamper, int], str]) -> None:
    def tamper(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 17

    assert "17" in refusal(tamper, 8)


def test_nan_in_an_output_is_an_error(refusal: Callable[[Tamper, int], str]) -> None:
    def tamper(model: onnx.ModelProto) -> None:
        assert model.graph.node[-1].op_type == "Relu"
        model.graph.node[-1].op_type = "Sqrt"

    assert refusal(tamper, 8) == "output 'output' of the quantized model holds NaN"


def test_a_file_that_onnxruntime_cannot_load_is_an_error(load: Load, tmp_path: Path) -> None:
    model, path = load("conv_bias"), tmp_path / "written.onnx"
    quantized, batch = written(model, all_bits(8))
    proto = ir.to_proto(quantized.ir)
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    proto.graph.node[-1].domain = "org.example"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"^onnxruntime cannot load the model: "):
        verify(model, quantized, path, batch)


# --- the levels ---------------------------------------------------------------------------------


@pytest.fixture
def biased(save: Save, tmp_path: Path) -> tuple[Model, Quantized, Path, Batch]:
    """A model whose first layer quantizes without error, written with its bias inside the Conv:
    onnxruntime's default level rounds it to int32, at scale 1, where there is a Q behind."""
    rng = np.random.default_rng(0)
    kernel, image = (
        rng.integers(-7, 8, s).astype(np.float32) for s in ((4, 3, 3, 3), (8, 3, 6, 6))
    )
    kernel[:, 0, 0, 0] = image[0, 0, 0, 0] = 7
    model = load_model(save(parsed(CONV_BIAS, {"kernel1": kernel})))
    selection = Selection(exclude="/Conv/third")
    quantized, batch = written(
        model, Rules(Widths(16, 16, 4), "max", selection=selection), {"image": image}
    )
    proto = ir.to_proto(quantized.ir)
    conv = next(n for n in proto.graph.node if n.name == "/Conv/first")
    add = next(n for n in proto.graph.node if n.name == "/Conv/first_bias")
    bias = model.weight("bias1")
    assert np.abs(bias - np.rint(bias)).max() > 0.1
    proto.graph.initializer.append(numpy_helper.from_array(bias, "bias1"))
    conv.input.append("bias1")
    conv.output[0] = add.output[0]
    proto.graph.node.remove(add)
    onnx.save(proto, tmp_path / "written.onnx")
    return model, quantized, tmp_path / "written.onnx", batch


def test_levels_that_differ_are_an_error_that_names_the_first_tensor(
    biased: tuple[Model, Quantized, Path, Batch],
) -> None:
    needs_onnxruntime(1, 31)
    with pytest.raises(VerificationError) as caught:
        verify(*biased)
    assert re.fullmatch(
        r"onnxruntime's default level changes output 'output': SQNR [0-9.]+ dB against "
        r"optimisation off, at least 100\.0 needed; the first tensor that differs is 'hidden'",
        str(caught.value),
    )
    model, quantized, path, batch = biased
    quantized.save(path)
    verify(model, quantized, path, batch)


def test_a_bug_of_older_onnxruntimes_is_hinted_at_where_it_could_be_the_cause(
    biased: tuple[Model, Quantized, Path, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.verification.version", lambda: (1, 30))
    with pytest.raises(VerificationError, match=r"; the first .*'\. onnxruntime before 1\.31 can"):
        verify(*biased)
    monkeypatch.setattr("calib.verification.version", lambda: (1, 31))
    with pytest.raises(VerificationError, match=r"'hidden'$"):
        verify(*biased)


def test_what_the_default_level_makes_of_a_matmul_with_a_quantized_weight_alone_is_a_note(
    load: Load, tmp_path: Path
) -> None:
    """At 8 bits onnxruntime 1.31 runs it as MatMulNBits, on activations that it rounds itself."""
    needs_onnxruntime(1, 31)
    model, path = load("two_inputs"), tmp_path / "written.onnx"
    quantized, batch = written(model, Rules(selection=Selection(only="^weight_x$")))
    quantized.save(path)
    (note,) = verify(model, quantized, path, batch)
    wanted, plain, rounded = (
        Session(file, optimized=optimized).run(batch.feed)
        for file, optimized in ((model.path, True), (path, False), (path, True))
    )
    name = min(plain, key=lambda n: sqnr(plain[n], rounded[n]))
    lies = f"{sqnr(wanted[name], rounded[name]):.1f} dB from the float model"
    assert note == (
        f"1 layers, the first '/MatMul/a', have a quantized weight and a float input, which "
        f"onnxruntime's default level rounds to int8: output {name!r} lies {lies}, computed in "
        f"float32 {sqnr(wanted[name], plain[name]):.1f} dB; session option "
        f"session.qdq_matmulnbits_accuracy_level = 0 keeps float32"
    )
    exact = Session(path, Runtime(exact=True)).run(batch.feed)
    assert sqnr(plain[name], exact[name]) > 100 > sqnr(plain[name], rounded[name])


def sqnr(reference: Array, other: Array) -> float:
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-300)))


def test_a_weight_alone_is_still_refused_where_float32_makes_something_else_of_it(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an onnxruntime would that does not know the session option."""
    needs_onnxruntime(1, 31)
    model, path = load("two_inputs"), tmp_path / "written.onnx"
    quantized, batch = written(model, Rules(selection=Selection(only="^weight_x$")))
    quantized.save(path)
    monkeypatch.setattr("calib.capture.EXACT", "session.unknown")
    with pytest.raises(VerificationError, match=r"; no quantized .* Of '/MatMul/a' only the wei"):
        verify(model, quantized, path, batch)


# --- the float model ----------------------------------------------------------------------------


def test_a_preparation_that_changes_the_outputs_is_an_error(load: Load, tmp_path: Path) -> None:
    original = load("conv_bias")
    altered = original.ir.clone()
    bias = altered.graph.initializers["bias3"]
    bias.const_value = ir.tensor(original.weight("bias3") + np.float32(0.1), name="bias3")
    model = dataclasses.replace(original, ir=altered)
    quantized, batch = written(model, all_bits(8))
    quantized.save(tmp_path / "written.onnx")
    with pytest.raises(VerificationError) as caught:
        verify(model, quantized, tmp_path / "written.onnx", batch)
    assert re.fullmatch(
        r"apart from its QDQ pairs the written model does not compute what the original does: SQNR "
        r"[0-9.]+ dB in output 'output', at least 60 needed; please report the model",
        str(caught.value),
    )


TAIL = """(float[N,6] x) => (float[N,5] y) <float[6,5] weight> {{
  hidden = Relu(x)
  linear = MatMul(hidden, weight)
  y = {}
}}"""


def test_a_float_model_whose_own_output_is_nan_is_not_blamed_on_folding(
    save: Save, tmp_path: Path
) -> None:
    model = load_model(save(parsed(TAIL.format("Sqrt(linear)"))))
    quantized, batch = written(model, all_bits(8))
    quantized.save(tmp_path / "written.onnx")
    with pytest.raises(CalibError) as caught:
        verify(model, quantized, tmp_path / "written.onnx", batch)
    assert "'y'" in str(caught.value)
    assert "folding" not in str(caught.value)


def test_outputs_that_are_minus_infinity_by_design_pass(save: Save, tmp_path: Path) -> None:
    """A mask, as before a softmax."""
    text = TAIL.format("Where(mask, linear, minus)")
    constants = {"mask": np.arange(5) != 2, "minus": np.array(-np.inf, np.float32)}
    model = load_model(save(parsed(text, constants)))
    quantized, batch = written(model, all_bits(8), {"x": values(8, 6)})
    quantized.save(tmp_path / "written.onnx")
    verify(model, quantized, tmp_path / "written.onnx", batch)


def test_integer_outputs_may_differ_between_float_and_quantized(save: Save, tmp_path: Path) -> None:
    text = TAIL.replace("float[N,5] y", "int64[N] y").format("ArgMax<axis=1, keepdims=0>(linear)")
    model = load_model(save(parsed(text)))
    quantized, batch = written(model, all_bits(2), {"x": values(200, 6)})
    quantized.save(tmp_path / "written.onnx")
    verify(model, quantized, tmp_path / "written.onnx", batch)
