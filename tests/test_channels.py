"""Values in the order in which they are read soonest are the same, and nothing is transposed."""

from __future__ import annotations

import platform
from collections import Counter as Tally
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from conftest import Save
from models import Array, parsed

from calib.capture import Runtime, Session, Values
from calib.channels import CHANNELS_LAST, in_blocks, put_channels_last
from calib.graph import Model, load_model
from calib.parts import part_for
from calib.planning import make_plan
from calib.rules import Rules

# Of each value: whether it lies in blocks, and nothing reads it otherwise.
NETWORK = """(float[N,3,8,8] image) => (float[N,16,8,8] sum, float[N,8] rows)
<float[16,3,3,3] a, float[32,16,3,3] b, float[16,32,1,1] c, float[16,16,3,3] d,
 float[24,16,1,1] e, float[16,24,1,1] f, float[16,8,3,3] g, float[16] h> {
  first = Conv<pads=[1,1,1,1]>(image, a)
  hidden = Relu(first)
  wide = Conv<pads=[1,1,1,1]>(hidden, b)
  wider = Relu(wide)
  back = Conv(wider, c)
  pooled = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(back)
  sum = Add(pooled, hidden)
  both = Relu(sum)
  odd = Conv(both, e)
  even = Conv(odd, f)
  grouped = Conv<pads=[1,1,1,1], group=2>(even, g)
  scaled = Conv<pads=[1,1,1,1]>(grouped, d)
  plain = Relu(scaled)
  rows = ReduceMean<axes=[1,2], keepdims=0>(plain)
}"""
IN_BLOCKS = {"first", "hidden", "wide", "wider", "back", "pooled", "sum", "scaled"}
needs_blocks = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="no blocks there"
)


def inner(model: Model) -> list[str]:
    return [str(value.name) for node in model.ir.graph for value in node.outputs]


def read(model: Model, names: list[str], feed: dict[str, Array], scattered: bool) -> Values:
    runtime = Runtime(threads=1, scattered=scattered)
    return Session(model.ir, runtime, values=names).run(feed)


def is_last(array: Array) -> bool:
    return array.ndim == 4 and array.transpose(CHANNELS_LAST).flags.c_contiguous


def image(*shape: int) -> dict[str, Array]:
    return {"image": np.random.default_rng(0).standard_normal(shape, np.float32)}


@needs_blocks
def test_values_in_blocks_come_with_channels_last_and_are_the_same(save: Save) -> None:
    model, feed = load_model(save(parsed(NETWORK))), image(2, 3, 8, 8)
    before = ir.to_proto(model.ir).SerializeToString()
    plain = read(model, inner(model), feed, scattered=False)
    found = read(model, inner(model), feed, scattered=True)
    assert list(found) == list(plain)
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
        assert array.flags.c_contiguous == (name not in IN_BLOCKS), name
        assert is_last(array) == (name in IN_BLOCKS), name
    assert ir.to_proto(model.ir).SerializeToString() == before


def test_elsewhere_nothing_is_known_to_lie_in_blocks(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    model = load_model(save(parsed(NETWORK)))
    assert in_blocks(part_for(model.ir, inner(model))) == []


def test_what_is_asked_for_as_it_is_comes_so(save: Save) -> None:
    model, feed = load_model(save(parsed(NETWORK))), image(2, 3, 8, 8)
    for runtime, optimized in (
        (Runtime(), True),
        (Runtime(scattered=True), False),
        (Runtime(scattered=True, frugal=True), True),
        (Runtime(scattered=True, provider="CPUExecutionProvider"), True),
    ):
        session = Session(model.ir, runtime, values=["hidden"], optimized=optimized)
        assert session.run(feed)["hidden"].flags.c_contiguous
    assert Session(model.ir, Runtime(scattered=True)).run(feed)["sum"].flags.c_contiguous


@needs_blocks
@pytest.mark.parametrize("taken", ["wider", "given", "bias", "inside"])
def test_a_name_that_is_taken_is_not_taken_again(taken: str, save: Save) -> None:
    text = """(float[N,3,8,8] image, float[1] given) => (float[N,16,8,8] last, float[1] other)
    <float[16,3,3,3] a, float[32,16,3,3] b, float[16,32,1,1] c, float[1] bias> {
      hidden = Conv<pads=[1,1,1,1]>(image, a)
      wider = Conv<pads=[1,1,1,1]>(hidden, b)
      last = Conv(wider, c)
      all = Add(given, bias)
      positive = Greater(all, bias)
      other = If(positive) <
        then_branch = yes () => (float[1] result) { inside = Abs(all)
          result = Neg(inside) },
        else_branch = no () => (float[1] same) { same = Identity(all) }
      >
    }"""
    made = parsed(text)
    rename(made.graph, taken, "hidden:channels_last")
    model, feed = load_model(save(made)), image(1, 3, 8, 8)
    feed[model.inputs[1].name] = np.ones(1, np.float32)
    names = ["hidden", "last", "all", "other"]
    found, plain = (read(model, names, feed, scattered=each) for each in (True, False))
    assert is_last(found["hidden"])
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Calls a value otherwise."""
    for value in (*graph.input, *graph.initializer):
        value.name = new if value.name == old else value.name
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                rename(attribute.g, old, new)


def optimized(model: Model, names: Sequence[str], folder: Path) -> Tally[str]:
    """How many nodes of each type onnxruntime runs."""
    part = part_for(model.ir, names)
    proto = ir.to_proto(part)
    assert put_channels_last(proto, in_blocks(part))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    made = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return Tally(node.op_type for node in made.graph.node)


@needs_blocks
def test_nothing_is_transposed_that_onnxruntime_can_move_in_blocks(
    save: Save, tmp_path: Path
) -> None:
    model = load_model(save(parsed(NETWORK)))
    ops = optimized(model, inner(model), tmp_path)
    assert ops["Transpose"] == 0
    assert ops["ReorderOutput"] >= len(IN_BLOCKS)


@needs_blocks
def test_of_a_real_model_nothing_is_transposed_either(fixtures_dir: Path, tmp_path: Path) -> None:
    model = load_model(fixtures_dir / "resnet20_cifar10.onnx")
    assert optimized(model, make_plan(model, Rules()).activations, tmp_path)["Transpose"] == 0
