"""The NumPy oracle, held bit for bit against onnx.reference and onnxruntime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from calib.granularity import (
    Granularity,
    PerChannel,
    PerTensor,
    along_tensor,
    onnx_axis,
    to_groups,
)
from calib.qtypes import WIDTHS, QuantType
from calib.quantize import dequantize, fake_quantize, quantize, scale_from_threshold

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

NATIVE = [QuantType(bits, signed) for bits in (4, 8, 16) for signed in (True, False)]
GRIDS = [*(QuantType(b, s) for b in WIDTHS for s in (True, False))] + [
    QuantType(bits, signed=True, narrow=True) for bits in WIDTHS
]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1)]
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)

by_property = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
natives = pytest.mark.parametrize("qtype", NATIVE, ids=str)
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
grids = pytest.mark.parametrize("qtype", GRIDS, ids=repr)


@cache
def qdq_model(type_name: str, axis: int | None) -> onnx.ModelProto:
    """x and scale in; the integers of QuantizeLinear, and what DequantizeLinear makes of them."""
    along: dict[str, Any] = {} if axis is None else {"axis": axis}
    stored = TensorProto.DataType.Value(type_name)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=stored, **along),
        helper.make_node("Cast", ["q"], ["integers"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["back"], **along),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "qdq",
        [
            value("x", TensorProto.FLOAT, ["a", "b"]),
            value("scale", TensorProto.FLOAT, [] if axis is None else ["g"]),
        ],
        [
            value("integers", TensorProto.INT32, ["a", "b"]),
            value("back", TensorProto.FLOAT, ["a", "b"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@cache
def runner(engine: str, type_name: str, axis: int | None) -> Any:
    model = qdq_model(type_name, axis)
    if engine == "onnx.reference":
        return ReferenceEvaluator(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_qdq(
    engine: str, x: Floats, scale: Floats, qtype: QuantType, granularity: Granularity
) -> tuple[Integers, Floats]:
    axis = onnx_axis(granularity)
    feed = {"x": x, "scale": scale if axis is not None else scale.reshape(())}
    integers, back = runner(engine, qtype.storage.name, axis).run(None, feed)
    return integers, back


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    assert actual.dtype == expected.dtype == np.float32
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


def assert_equals_engine(
    engine: str, x: Floats, scale: Floats, qtype: QuantType, granularity: Granularity
) -> None:
    integers, back = run_qdq(engine, x, scale, qtype, granularity)
    mine = quantize(x, scale, qtype, granularity)
    assert mine.dtype == np.int32
    assert np.array_equal(mine, integers)
    assert_same_bits(dequantize(mine, scale, granularity), back)
    assert_same_bits(fake_quantize(x, scale, qtype, granularity), back)


def hard_values(qtype: QuantType, scale: Floats, granularity: Granularity) -> Floats:
    """Inside, outside, on the levels, half way between them, and one ulp off that."""
    rng = np.random.default_rng(5)
    levels = rng.integers(2 * qtype.qmin - 4, 2 * qtype.qmax + 5, (6, 200)).astype(np.float32)
    halves = levels + np.float32(0.5)
    parts = [
        rng.standard_normal((6, 200)).astype(np.float32) * (qtype.qmax / 2),
        levels,
        halves,
        np.nextafter(halves, np.float32(np.inf)),
        np.nextafter(halves, np.float32(-np.inf)),
        np.array([[0.0, -0.0, 0.5, -0.5, 1.5, -1.5]] * 6, np.float32),
    ]
    return np.concatenate(parts, axis=1) * along_tensor(scale, parts[0].shape, granularity)


def scales(granularity: Granularity, width: int) -> Floats:
    groups = {PerTensor(): 1, PerChannel(0): 6, PerChannel(1): width}[granularity]
    drawn = np.random.default_rng(3).lognormal(0, 3, groups).astype(np.float32)
    drawn[::3] = 0.125  # a power of two, so that ties are exact
    return drawn


@natives
@granularities
@pytest.mark.parametrize("engine", ["onnx.reference", "onnxruntime"])
def test_quantize_and_dequantize_equal_the_engine_bit_for_bit(
    engine: str, qtype: QuantType, granularity: Granularity
) -> None:
    scale = scales(granularity, 1006)
    x = hard_values(qtype, scale, granularity)
    assert x.shape == (6, 1006)
    assert_equals_engine(engine, x, scale, qtype, granularity)


@by_property
@given(
    values=hnp.arrays(np.float32, (3, 4), elements=FINITE),
    exponent=st.integers(-100, 100),
    mantissa=st.floats(1, 2, width=32),
    qtype=st.sampled_from(NATIVE),
    granularity=st.sampled_from([PerTensor(), PerChannel(0)]),
)
def test_any_finite_values_equal_onnxruntime(
    values: Floats, exponent: int, mantissa: float, qtype: QuantType, granularity: Granularity
) -> None:
    groups = 3 if isinstance(granularity, PerChannel) else 1
    scale = np.full(groups, np.ldexp(np.float32(mantissa), exponent), np.float32)
    # A quotient that overflows makes onnxruntime 1.31 answer the wrong end of int4.
    assume(float(np.abs(values).max()) / float(scale[0]) < LARGEST)
    assert_equals_engine("onnxruntime", values, scale, qtype, granularity)


@grids
def test_a_grid_between_the_onnx_types_is_its_storage_narrowed(qtype: QuantType) -> None:
    scale = np.array([0.25], np.float32)
    x = hard_values(qtype, scale, PerTensor())
    stored, _ = run_qdq("onnxruntime", x, scale, qtype, PerTensor())
    expected = np.clip(stored, qtype.qmin, qtype.qmax)
    assert np.array_equal(quantize(x, scale, qtype, PerTensor()), expected)
    assert {int(expected.min()), int(expected.max())} == {qtype.qmin, qtype.qmax}


@grids
def test_ties_round_to_the_even_level(qtype: QuantType) -> None:
    scale = np.array([2.0**-4], np.float32)
    below = np.arange(max(qtype.qmin, -500), min(qtype.qmax, 500))
    ties = ((below + 0.5) * scale).astype(np.float32)
    expected = np.where(below % 2 == 0, below, below + 1)
    assert np.array_equal(quantize(ties, scale, qtype, PerTensor()), expected)


@grids
@pytest.mark.parametrize("scale", [TINY, 1e-30, 1.0, 1e30])
def test_huge_values_saturate_without_a_warning(qtype: QuantType, scale: float) -> None:
    x = np.array([LARGEST, -LARGEST], np.float32)
    integers = quantize(x, np.array([scale], np.float32), qtype, PerTensor())
    assert integers.tolist() == [qtype.qmax, qtype.qmin]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@grids
def test_the_largest_values_come_back_finite_and_without_a_warning(
    qtype: QuantType, dtype: str
) -> None:
    """On the full signed range the negative end reaches a step further, and must not overflow."""
    largest = float(np.finfo(dtype).max)
    x = np.array([largest, 0.0, -largest], dtype)
    scale = scale_from_threshold(np.array([largest]), qtype, dtype)
    back = fake_quantize(x, scale, qtype, PerTensor())
    assert back.dtype == dtype
    reach = max(qtype.qmax, -qtype.qmin)
    low, high = qtype.qmin / reach, qtype.qmax / reach
    assert (back / x.dtype.type(largest)).tolist() == pytest.approx([high, 0, low], rel=2e-3)


@pytest.mark.parametrize("qtype", [QuantType(4, signed=True), QuantType(8, signed=False)])
def test_a_float16_scale_is_the_next_that_float16_holds_and_clips_nothing(qtype: QuantType) -> None:
    thresholds = np.array([1e-9, 1e-5, 0.3, 1.0, 127.0, 65504.0])
    scale = scale_from_threshold(thresholds, qtype, "float16")
    assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert scale[0] == 2.0**-24
    excess = scale[2:5] * qtype.steps / thresholds[2:5] - 1
    assert ((excess > -1e-7) & (excess < 1e-3)).all()


@grids
def test_a_scale_is_the_threshold_over_the_steps_in_float32(qtype: QuantType) -> None:
    thresholds = np.array([1e-30, 0.3, 1.0, 127.0, 1e30])
    scale = scale_from_threshold(thresholds, qtype)
    assert scale.dtype == np.float32
    assert scale.tolist() == [float(np.float32(t / qtype.steps)) for t in thresholds.tolist()]


@grids
def test_a_scale_is_never_zero_nor_subnormal(qtype: QuantType) -> None:
    thresholds = np.array([0.0, 5e-324, 1e-45, 1e-40, TINY])
    scale = scale_from_threshold(thresholds, qtype)
    assert scale.shape == thresholds.shape
    assert (scale >= TINY).all()
    x = np.array([1e-40, -1e-40, 0.0], np.float32)
    assert not fake_quantize(x, scale[:1], qtype, PerTensor()).any()


@by_property
@given(
    x=hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**40), 2.0**40, width=32)),
    threshold=hnp.arrays(np.float64, 3, elements=st.floats(2.0**-20, 2.0**41)),
    qtype=st.sampled_from(GRIDS),
)
def test_quantizing_again_changes_nothing(
    x: Floats, threshold: NDArray[np.float64], qtype: QuantType
) -> None:
    scale = scale_from_threshold(threshold, qtype)
    once = fake_quantize(x, scale, qtype, PerChannel(0))
    assert_same_bits(fake_quantize(once, scale, qtype, PerChannel(0)), once)


@by_property
@given(
    x=hnp.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)),
    threshold=hnp.arrays(np.float64, 3, elements=st.floats(0.01, 100)),
    qtype=st.sampled_from(GRIDS),
)
def test_inside_the_range_no_value_moves_by_more_than_half_a_step(
    x: Floats, threshold: NDArray[np.float64], qtype: QuantType
) -> None:
    scale = scale_from_threshold(threshold, qtype)
    low = np.maximum(x, (scale * qtype.qmin)[:, None])
    inside = np.minimum(low, (scale * qtype.qmax)[:, None])
    moved = np.abs(fake_quantize(x, scale, qtype, PerChannel(0)) - inside)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(inside)
    assert (moved <= scale[:, None] / 2 + rounding).all()


@grids
def test_the_threshold_itself_is_the_largest_level(qtype: QuantType) -> None:
    thresholds = np.random.default_rng(2).lognormal(0, 4, 50)
    scale = scale_from_threshold(thresholds, qtype)
    x = thresholds.astype(np.float32)[:, None]
    assert (quantize(x, scale, qtype, PerChannel(0)) == qtype.qmax).all()
    back = fake_quantize(x, scale, qtype, PerChannel(0))
    assert np.allclose(back, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_channel_is_quantized_with_its_own_scale(axis: int) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    qtype = QuantType(4, signed=True, narrow=True)
    scale = rng.uniform(0.05, 0.3, (x.shape[axis],)).astype(np.float32)
    together = to_groups(quantize(x, scale, qtype, PerChannel(axis)), PerChannel(axis))
    for channel, row in enumerate(to_groups(x, PerChannel(axis))):
        alone = quantize(row, scale[channel : channel + 1], qtype, PerTensor())
        assert np.array_equal(together[channel], alone)


def test_the_tensor_and_the_scale_are_left_alone() -> None:
    x, scale = np.array([0.3, -9.0], np.float32), np.array([0.1], np.float32)
    for array in (x, scale):
        array.setflags(write=False)
    before = x.copy(), scale.copy()
    fake_quantize(x, scale, QuantType(4, signed=True), PerTensor())
    assert np.array_equal(x, before[0])
    assert np.array_equal(scale, before[1])
