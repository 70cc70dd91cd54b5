"""onnxruntime through one door: any value of a model, with optimisation on and off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from conftest import Load, Save
from models import CONV_BIAS, MODELS, feed_for, parsed, run, values

from calib.capture import Runtime, Session, version
from calib.errors import ModelError, OptionError
from calib.graph import load_model


def activations_of(model: ir.Model) -> list[str]:
    """Names of all float32 values that nodes of the graph make, and of its inputs."""
    made = [v for node in model.graph for v in node.outputs]
    return [
        str(v.name) for v in [*model.graph.inputs, *made] if v.dtype in (ir.DataType.FLOAT, None)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_any_values_can_be_read_in_any_order(name: str, load: Load) -> None:
    model, feed = load(name), feed_for(MODELS[name]())
    names = activations_of(model.ir)[::-1]
    inner = [n for n in names if n not in feed]
    expected = run(ir.to_proto(model.ir), feed, names=inner)
    captured = Session(model.ir, optimized=False, values=names).run(feed)
    assert set(captured) == set(names)
    for value in inner:
        np.testing.assert_array_equal(captured[value], expected[value])
    for value in set(names) - set(inner):
        np.testing.assert_array_equal(captured[value], feed[value])


@pytest.mark.parametrize("optimized", [False, True])
def test_without_values_the_outputs_are_read(optimized: bool, save: Save) -> None:
    for name in ("two_inputs", "conv_bn_relu"):
        model, feed = MODELS[name](), feed_for(MODELS[name]())
        path = save(model)
        expected = run(model, feed, optimized=optimized)
        for source in (path, ir.load(path)):
            actual = Session(source, Runtime(threads=1), optimized=optimized).run(feed)
            assert list(actual) == list(expected)
            for output, array in expected.items():
                np.testing.assert_array_equal(actual[output], array)


def test_values_of_a_file_can_be_read_too(save: Save) -> None:
    path, feed = save(MODELS["conv_bias"]()), feed_for(MODELS["conv_bias"]())
    captured = Session(path, optimized=False, values=["hidden"]).run(feed)
    np.testing.assert_array_equal(captured["hidden"], run(path, feed, names=["hidden"])["hidden"])


def test_inputs_alone_can_be_read(load: Load) -> None:
    feed = feed_for(MODELS["conv_output"]())
    captured = Session(load("conv_output").ir, values=["image"]).run(feed)
    assert list(captured) == ["image"]
    np.testing.assert_array_equal(captured["image"], feed["image"])


def test_a_model_with_external_data_runs_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        MODELS["conv_bias"](), path, save_as_external_data=True, location="weights",
        size_threshold=0,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path.parent)
    model, feed = load_model(path), feed_for(MODELS["conv_bias"]())
    expected = run(MODELS["conv_bias"](), feed, names=["hidden"])
    for source in (model.ir, path):
        captured = Session(source, optimized=False, values=["hidden"]).run(feed)
        np.testing.assert_array_equal(captured["hidden"], expected["hidden"])


@pytest.mark.parametrize("name", ["conv_bias", "if_subgraph"])
def test_reading_values_leaves_the_model_as_it_is(name: str, load: Load) -> None:
    model = load(name).ir
    before = ir.to_proto(model)
    Session(model, values=activations_of(model))
    assert ir.to_proto(model) == before


def test_the_levels_are_really_off_and_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = ort.InferenceSession

    def spy(source: object, options: ort.SessionOptions, providers: list[str]) -> object:
        seen.append((options.graph_optimization_level, options.intra_op_num_threads, providers))
        return original(source, options, providers=providers)

    monkeypatch.setattr("onnxruntime.InferenceSession", spy)
    Session(load("conv_bias").ir, Runtime(threads=2), optimized=False)
    Session(load("conv_bias").ir)
    levels = ort.GraphOptimizationLevel
    assert seen == [
        (levels.ORT_DISABLE_ALL, 2, ["CPUExecutionProvider"]),
        (levels.ORT_ENABLE_ALL, 0, ["CPUExecutionProvider"]),
    ]


@pytest.mark.parametrize("threads", [-1, 1025, 10**9])
def test_threads_below_zero_and_beyond_reason_are_refused(threads: int) -> None:
    with pytest.raises(OptionError, match=rf"^threads must be 0 to 1024, got {threads}$"):
        Runtime(threads=threads)


def test_a_provider_that_is_not_there_is_refused_and_the_others_named(load: Load) -> None:
    available = ", ".join(ort.get_available_providers())
    with pytest.raises(OptionError) as caught:
        Session(load("conv_bias").ir, Runtime(provider="MadeUpExecutionProvider"))
    assert str(caught.value) == (
        f"provider 'MadeUpExecutionProvider' is not available in this onnxruntime; "
        f"available: {available}"
    )
    Session(load("conv_bias").ir, Runtime(provider="CPUExecutionProvider"))


def test_a_model_that_onnxruntime_cannot_load_is_refused(save: Save) -> None:
    path = save(parsed(CONV_BIAS.replace("Conv(inner", "other.Conv(inner")))
    with pytest.raises(
        ModelError, match=r"^onnxruntime cannot load the model: .*opset import"
    ) as caught:
        Session(path)
    assert "\n" not in str(caught.value)


def test_a_feed_that_onnxruntime_cannot_run_is_named_by_its_shapes(load: Load) -> None:
    session = Session(load("conv_bias").ir)
    with pytest.raises(ModelError) as caught:
        session.run({"image": values(2, 5, 6, 6)})
    assert str(caught.value).startswith("onnxruntime cannot run the model on 'image' [2, 5")
    assert "\n" not in str(caught.value)


def test_the_version_is_onnxruntimes() -> None:
    assert list(version()) == [int(part) for part in ort.__version__.split(".")[:2]]


def test_a_weight_that_nothing_reads_is_no_obstacle() -> None:
    model = ir.from_proto(parsed(CONV_BIAS))
    unused = ir.val("unused", const_value=ir.tensor(np.ones((300, 2), np.float32), name="unused"))
    model.graph.register_initializer(unused)
    feed = feed_for(ir.to_proto(model))
    for optimized in (True, False):
        assert Session(model, optimized=optimized).run(feed)
