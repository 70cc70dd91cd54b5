"""What is said to be computed for each sample by itself is, in onnxruntime."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from conftest import Load, Save
from models import MODELS, feed_for, parsed

from calib.arrays import Array, Batch
from calib.capture import Runtime, Session, Values
from calib.errors import ModelError
from calib.graph import Model, load_model
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.rules import Rules
from calib.samplewise import can_be_cut, part_size, sample_bytes, samples_apart

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))
import fuzz_graphs

ONE_THREAD = Runtime(threads=1)


def apart(model: Model, batch: Batch) -> list[str]:
    """Inner values that are said to be apart."""
    names = [str(value.name) for node in model.ir.graph for value in node.outputs]
    return [name for name in names if samples_apart(model, [name], batch)]


def assert_apart(model: Model, names: list[str], batch: Batch) -> None:
    """The values of parts are the parts of the values, but for how onnxruntime rounds."""
    session = Session(model.ir, ONE_THREAD, optimized=False, values=names)
    whole = session.run(batch.feed)
    for size in (1, 3):
        parts = [session.run(part.feed) for part in batch.parts(size)]
        for name in names:
            joined = np.concatenate([part[name] for part in parts])
            assert joined.shape == whole[name].shape, name
            if joined.dtype.kind == "f":
                tolerance = 1e-2 if joined.dtype == np.float16 else 1e-4
                np.testing.assert_allclose(
                    joined, whole[name], rtol=tolerance, atol=tolerance, err_msg=name
                )
            else:
                np.testing.assert_array_equal(joined, whole[name])


@pytest.mark.parametrize("name", list(MODELS))
def test_values_said_to_be_apart_are_the_same_in_parts(name: str, load: Load) -> None:
    model = load(name)
    batch = Batch(feed_for(MODELS[name](), n=7))
    if can_be_cut(model, batch):
        assert_apart(model, apart(model, batch), batch)


KNOWN = """(float[N,4,6,6] x, int64[N,5] token) => (float[N,3] y) <float[4,4,1,1] kernel,
    float[9,4] table, float[4,4] square, float[1,4,1,1] shift, float[4] bias, float[6,5] left> {
  conv = Conv(x, kernel)
  norm = InstanceNormalization(conv, bias, bias)
  part = Slice(norm, one, three, one)
  pad = Pad(part, pads)
  wide = Resize(pad, , scales)
  pool = MaxPool<kernel_shape=[2,2]>(wide)
  shifted = Add(conv, shift)
  both = Concat<axis=1>(shifted, norm)
  mean = ReduceMean<axes=[2,-1], keepdims=0>(both)
  turned = Transpose<perm=[0,2,1,3]>(conv)
  turned_back = Transpose<perm=[0,1,3,2]>(conv)
  product = MatMul(conv, turned_back)
  row = Reshape(conv, copied)
  length = Shape(conv)
  first = Gather(length, zero)
  row_of = Unsqueeze(first, none)
  target = Concat<axis=0>(row_of, rest)
  again = Reshape(conv, target)
  behind = Shape<start=1>(conv)
  behind_too = ConstantOfShape(behind)
  last_of = Shape<start=-1>(conv)
  wide_of = Gather(length, two)
  others_of = Slice(length, none, two_of)
  slices = Concat<axis=0>(others_of, two_of)
  mask = ConstantOfShape<value = float[1] {1}>(slices)
  slices_of = Concat<axis=0>(row_of, rest_of)
  grown = Expand(bias, slices_of)
  inferred = Reshape(conv, minus)
  flat = Flatten(conv)
  embedded = Gather(table, token)
  scored = MatMul(embedded, square)
  from_left = MatMul(left, embedded)
  soft = Softmax(scored)
  normal = LayerNormalization(scored, bias)
  parts, others = Split<axis=-1>(scored, halves)
  most = ArgMax<axis=1, keepdims=0>(scored)
  larger = Greater(scored, bias)
  chosen = Where(larger, scored, bias)
  unsqueezed = Unsqueeze(scored, one)
  squeezed = Squeeze(unsqueezed, one)
  rounded = QuantizeLinear(scored, half)
  back = DequantizeLinear(rounded, half)
  y = Gemm(mean, weight)
}"""
GIVEN: dict[str, Array] = {
    "zero": np.array(0, np.int64),
    "none": np.array([0], np.int64),
    "one": np.array([1], np.int64),
    "three": np.array([3], np.int64),
    "pads": np.array([0, 0, 1, 0, 0, 1, 0, 0], np.int64),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "copied": np.array([0, -1], np.int64),
    "two": np.array(2, np.int64),
    "two_of": np.array([2], np.int64),
    "rest_of": np.array([5, 4], np.int64),
    "rest": np.array([12, 12], np.int64),
    "minus": np.array([-1, 144], np.int64),
    "halves": np.array([1, 3], np.int64),
    "half": np.array(0.5, np.float32),
    "weight": np.ones((8, 3), np.float32),
}


MIXED = {
    "ReduceMean<axes=[0,2], keepdims=1>(x)",
    "ReduceMean<axes=[-4], keepdims=1>(x)",
    "ReduceSum(x)",
    "Softmax<axis=0>(x)",
    "Softmax<axis=-4>(x)",
    "Transpose<perm=[1,0,2,3]>(x)",
    "Transpose(x)",
    "Reshape(x, [-1, 6])",
    "Flatten<axis=2>(x)",
    "CumSum(x, [0])",
    "Concat<axis=0>(x, x)",
    "Gather<axis=0>(x, [0])",
    "Slice(x, [0], [1], [0])",
    "Slice(x, [0], [1])",
    "Pad(x, [1, 0, 0, 0, 0, 0, 0, 0])",
    "Unsqueeze(x, [0])",
    "Unsqueeze(x, [-5])",
    "Squeeze(x)",
    "Add(x, shifts)",
    "MatMul(x, matrices)",
    "Resize(x, , [2.0, 1.0, 1.0, 1.0])",
    "Dropout(x, [0.5], [true])",
    "RandomNormalLike(x)",
    "Split<axis=0>(x)",
    "ArgMax<axis=0, keepdims=0>(x)",
    "Expand(x, [7, 4, 6, 6])",
    "Tile(x, [2, 1, 1, 1])",
    "Shape(x)",
    'Einsum<equation="nchw->n">(x)',
}


def with_one(expression: str) -> onnx.ModelProto:
    """``expression`` in ONNX's syntax, with constants in it, behind a Conv."""
    constants: dict[str, Array] = {}

    def constant(found: re.Match[str]) -> str:
        numbers = [{"true": True}.get(word, word) for word in found[1].split(",")]
        name = f"c{len(constants)}"
        kind = np.bool_ if True in numbers else np.float32 if "." in found[1] else np.int64
        constants[name] = np.array([kind(n) for n in numbers]).reshape(
            () if kind is np.bool_ or expression.startswith(("Dropout", "CumSum")) else -1
        )
        return name

    attributes, arguments = re.fullmatch(r"(\w+(?:<.*>)?)\((.*)\)", expression).groups()  # type: ignore[union-attr]
    arguments = re.sub(r"\[([^]]*)\]", constant, arguments)
    text = f"""(float[N,4,6,6] image) => (float[N] y) <float[4,4,1,1] kernel, float[7,1,1,1] shifts,
        float[7,4,6,6] matrices> {{
      x = Conv(image, kernel)
      y = {attributes}({arguments})
    }}"""
    model = parsed(text, constants)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def with_all_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """So that loading removes nothing."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    del model.graph.output[:]
    model.graph.output.extend([*inferred.value_info, *inferred.output])
    return model


@pytest.mark.parametrize("expression", sorted(MIXED))
def test_what_mixes_samples_or_has_none_is_not_said_to_be_apart(
    expression: str, save: Save
) -> None:
    model = load_model(save(with_one(expression)))
    batch = Batch({"image": np.zeros((7, 4, 6, 6), np.float32)})
    assert samples_apart(model, ["x"], batch)
    assert not samples_apart(model, ["y"], batch)
    assert part_size(model, ["x", "y"], batch) is None


def test_the_usual_operators_are_said_to_be_apart_and_are(save: Save) -> None:
    model = load_model(save(with_all_outputs(parsed(KNOWN, GIVEN))))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((7, 4, 6, 6)).astype(np.float32)
    batch = Batch({"x": image, "token": rng.integers(0, 9, (7, 5))})
    named = {str(value.name) for node in model.ir.graph for value in node.outputs}
    found = apart(model, batch)
    assert named - {*found} == {
        *("length", "first", "row_of", "target", "wide_of", "others_of", "slices", "slices_of"),
        *("behind", "behind_too", "last_of"),
    }
    assert_apart(model, found, batch)


@pytest.mark.parametrize("seed", range(60))
def test_of_random_graphs_what_is_said_to_be_apart_is(seed: int, tmp_path: Path) -> None:
    proto, feeds = fuzz_graphs.build(seed)
    onnx.save(proto, path := tmp_path / "fuzzed.onnx")
    try:
        model = load_model(path)
        batch = Batch(feeds[0])
        if can_be_cut(model, batch):
            assert_apart(model, apart(model, batch), batch)
    except ModelError as error:
        pytest.skip(f"not a valid graph: {error}")


def test_most_values_of_random_graphs_are_said_to_be_apart(tmp_path: Path) -> None:
    n_apart = n_values = 0
    for seed in range(30):
        proto, feeds = fuzz_graphs.build(seed)
        onnx.save(proto, path := tmp_path / "fuzzed.onnx")
        with suppress(ModelError):
            model = load_model(path)
            if can_be_cut(model, Batch(feeds[0])):
                n_apart += len(apart(model, Batch(feeds[0])))
                n_values += sum(len(node.outputs) for node in model.ir.graph)
    assert n_apart > n_values / 2 > 0


# Shapes that do not begin with the number of samples though they were made of it, what is fixed but
# not the same for all samples, and a declared output that is not what it says.
NOT_APART = {
    "no length": "s = Shape<start=0, end=0>(h) t = Concat<axis=0>(s, two) y = Reshape(h, t)",
    "none kept": "s = Shape(h) c = Slice(s, o, o) t = Concat<axis=0>(c, two) y = Reshape(h, t)",
    "whether any": "s = Shape(h) c = Gather(s, o) b = Cast<to=9>(c) n = Cast<to=7>(b)"
    "t = Concat<axis=0>(n, rest) y = Reshape(h, t)",
    "scaled": "y = LayerNormalization(h, scales)",
    "shifted": "y = LayerNormalization(h, scale, scales)",
    "blocks": "q = QuantizeLinear<axis=1, block_size=2>(h, halves)"
    "y = DequantizeLinear<axis=1, block_size=2>(q, halves)",
    "padded": "y = Pad(h, pads, , axes)",
    "declared": "y = Reshape(h, two)",
}


@pytest.mark.parametrize("case", list(NOT_APART))
def test_shapes_that_are_not_what_they_seem_are_not_said_to_be_of_samples(
    case: str, save: Save
) -> None:
    numbers: dict[str, Array] = {
        "o": np.array([0], np.int64),
        "two": np.array([2, -1], np.int64),
        "rest": np.array([-1], np.int64),
        "pads": np.array([0, 1, 0, 1], np.int64),
        "scale": np.ones(4, np.float32),
        "scales": np.arange(1, 25, dtype=np.float32).reshape(6, 4),
        "halves": np.arange(1, 13, dtype=np.float32).reshape(6, 2),
    }
    text = f"""(float[N,4] x, int64[2] axes) => (float[N,M] y, float[N,K] z) <float[4,4] kernel> {{
      h = MatMul(x, kernel) {NOT_APART[case]} z = Softmax(y)
    }}"""
    proto = parsed(text, {name: a for name, a in numbers.items() if name in NOT_APART[case]})
    proto.opset_import[0].version = 21
    model = load_model(save(proto))
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    batch = Batch({"x": x, "axes": np.array([1, 0])}, whole=frozenset({"axes"}))
    Session(model.ir, ONE_THREAD, values=["z"]).run(batch.feed)  # it is valid
    assert samples_apart(model, ["h"], batch)
    assert not samples_apart(model, ["y"], batch)
    assert not samples_apart(model, ["z"], batch)


# --- sizes ----------------------------------------------------------------------------------------

SMALL = """(float[N,4,S,S] image) => (float[N,4,S,S] y) <float[4,4,1,1] kernel> {
  y = Conv(image, kernel)
}"""
HEAVY = """(float[N,4096] x) => (float[N,1024] y) <float[4096,1024] weight> {
  hidden = Relu(x)
  y = MatMul(hidden, weight)
}"""


def images(n: int, size: int) -> Batch:
    return Batch({"image": np.zeros((n, 4, size, size), np.float32)})


def test_parts_are_as_long_as_each_other_and_fit_what_a_cache_holds(save: Save) -> None:
    model = load_model(save(parsed(SMALL)))
    for n, size in itertools.product((2, 3, 7, 32, 33), (8, 100, 300, 1000)):
        batch = images(n, size)
        of_one = 16 * size * size
        assert sample_bytes(model, ["y"], batch) == of_one
        found = part_size(model, ["y"], batch)
        if found is None:
            assert n <= 2 or n * of_one <= 8_000_000
            continue
        assert 2 <= found < n
        assert found == 2 or found * of_one <= 8_000_000
        even = range(2, n + 2, 2)  # numbers of parts: two are under way at a time
        assert found in {-(-n // n_parts) for n_parts in even}


def test_a_model_with_heavy_weights_is_run_on_more_samples_at_a_time(save: Save) -> None:
    model = load_model(save(parsed(HEAVY)))
    for n, expected in ((1000, None), (1024, None), (4096, 1024)):
        batch = Batch({"x": np.zeros((n, 4096), np.float32)})
        assert part_size(model, ["hidden"], batch) == expected


def test_what_cannot_be_cut_is_not(save: Save) -> None:
    batch = images(8, 500)
    model = load_model(save(parsed(SMALL)))
    assert part_size(model, ["y"], batch) == 2
    assert part_size(model, ["y"], replace(batch, whole=frozenset({"image"}))) is None
    fixed = load_model(save(parsed(SMALL.replace("N,4,S,S] image", "8,4,S,S] image"))))
    assert part_size(fixed, ["y"], batch) is None


# --- observing ------------------------------------------------------------------------------------


def resnet20(fixtures_dir: Path) -> tuple[Model, tuple[str, ...], Array]:
    model = load_model(fixtures_dir / "resnet20_cifar10.onnx")
    names = make_plan(model, Rules()).activations
    return model, names, np.random.default_rng(0).standard_normal((70, 3, 32, 32), np.float32)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_batches_run_in_parts_are_counted_as_whole_ones(
    threads: int, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names, x = resnet20(fixtures_dir)
    batches = [Batch({"input": part}) for part in (x[:32], x[32:64], x[64:])]
    assert part_size(model, names, batches[0]) == 8
    how = Observing(2, halves=True, runtime=Runtime(threads=threads))
    seen = observe(model, batches, names, how)
    monkeypatch.setattr("calib.samplewise._ROOM", 10**12)
    assert part_size(model, names, batches[0]) is None
    whole = observe(model, batches, names, replace(how, runtime=ONE_THREAD))
    assert (seen.n_samples, seen.n_batches, seen.half_samples) == (70, 3, (38, 32))
    assert len(seen.batches) == 2
    groups = (seen.counters, *seen.batches), (whole.counters, *whole.batches)
    for found, expected in zip(*groups, strict=True):
        for name in names:
            np.testing.assert_array_equal(found[name].counts, expected[name].counts)


def test_a_value_that_overflows_in_one_part_is_told_with_the_batch_it_is_in(
    fixtures_dir: Path,
) -> None:
    model, names, x = resnet20(fixtures_dir)
    x[50] = 1e38
    batches = [Batch({"input": part}) for part in (x[:32], x[32:64], x[64:])]
    for threads in (1, 2, 4):
        with pytest.raises(ModelError, match="in the batch that starts at sample 32"):
            observe(model, batches, names, Observing(runtime=Runtime(threads=threads)))


class _Noting(Session):
    """Notes how many samples it is fed."""

    fed: ClassVar[list[int]] = []

    def run(self, feed: Mapping[str, Array], restart: bool = False) -> Values:
        self.fed.append(max(map(len, feed.values())))
        return super().run(feed, restart)


def fed(model: Model, batches: list[Batch], names: Sequence[str]) -> list[int]:
    """How many samples were run at a time."""
    _Noting.fed.clear()
    observe(model, batches, names, Observing(runtime=ONE_THREAD), partial(_Noting, model.ir))
    return _Noting.fed.copy()


def test_a_batch_is_cut_alike_wherever_a_run_begins(fixtures_dir: Path) -> None:
    model, names, x = resnet20(fixtures_dir)
    for n in (9, 12, 17, 31):
        batches = [Batch({"input": x[:32]}), Batch({"input": x[32 : 32 + n]})]
        one, other = (fed(model, [batch], names) for batch in batches)
        assert fed(model, batches, names) == one + other
        assert sum(other) == n


def test_a_batch_that_cannot_be_cut_as_the_first_is_not(save: Save) -> None:
    text = SMALL.replace("] image)", "] image, float[M,4,1,1] shift)")
    model = load_model(
        save(parsed(text.replace("y = Conv(image", "x = Add(image, shift) y = Conv(x")))
    )
    first = Batch({**images(6, 300).feed, "shift": np.zeros((6, 4, 1, 1), np.float32)})
    second = Batch({**first.feed, "shift": np.ones((1, 4, 1, 1), np.float32)})
    assert fed(model, [first, second], ["x"]) == [3, 3, 6]
