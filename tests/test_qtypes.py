"""Grids: their integers, their noise, and the ONNX types they are stored in."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from calib.errors import OptionError
from calib.qtypes import WIDTHS, QuantType, Storage, check_width

GRIDS = [
    QuantType(bits, signed, narrow)
    for bits in WIDTHS
    for signed, narrow in ((True, False), (True, True), (False, False))
]


def name_of(grid: QuantType) -> str:
    return f"{grid}{'-narrow' if grid.narrow else ''}"


every_grid = pytest.mark.parametrize("grid", GRIDS, ids=name_of)


def integers(holder: QuantType | Storage) -> range:
    return range(holder.qmin, holder.qmax + 1)


def first_opset(type_name: str) -> int:
    """The first opset whose QuantizeLinear writes, and DequantizeLinear reads, along an axis."""
    for opset in range(10, onnx.defs.onnx_opset_version() + 1):
        quantize = onnx.defs.get_schema("QuantizeLinear", opset)
        dequantize = onnx.defs.get_schema("DequantizeLinear", opset)
        both = (quantize.outputs[0].types, dequantize.inputs[0].types)
        if "axis" in quantize.attributes and all(type_name in types for types in both):
            return opset
    raise AssertionError(f"no opset of onnx {onnx.__version__} has {type_name}")


def test_the_widths_are_two_to_eight_and_sixteen() -> None:
    assert set(WIDTHS) == {*range(2, 9), 16}


@every_grid
def test_a_grid_has_two_to_the_bits_integers_and_a_narrow_one_is_symmetric(
    grid: QuantType,
) -> None:
    levels = integers(grid)
    if grid.narrow:
        assert len(levels) == 2**grid.bits - 1
        assert list(levels) == [-level for level in reversed(levels)]
    else:
        assert len(levels) == 2**grid.bits
        assert grid.qmin == (-(2 ** (grid.bits - 1)) if grid.signed else 0)
    assert 0 in levels


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_full_ranges_are_those_of_numpy(bits: int, signed: bool) -> None:
    info = np.iinfo(f"{'' if signed else 'u'}int{bits}")
    grid = QuantType(bits, signed)
    assert (grid.qmin, grid.qmax) == (info.min, info.max)


@every_grid
def test_steps_lead_from_zero_to_the_largest_integer(grid: QuantType) -> None:
    assert grid.steps == len([level for level in integers(grid) if level > 0])


def test_steps_are_those_of_the_method_notes() -> None:
    signed = {bits: QuantType(bits, signed=True).steps for bits in WIDTHS}
    unsigned = {bits: QuantType(bits, signed=False).steps for bits in WIDTHS}
    assert signed == {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127, 16: 32767}
    assert unsigned == {2: 3, 3: 7, 4: 15, 5: 31, 6: 63, 7: 127, 8: 255, 16: 65535}


@every_grid
def test_rounding_noise_is_the_measured_error_of_evenly_spread_values(grid: QuantType) -> None:
    threshold = 1.7
    levels_above_zero = len([level for level in integers(grid) if level > 0])
    step = threshold / levels_above_zero
    values = np.linspace(0, threshold, 64 * levels_above_zero + 1)
    measured = np.mean((np.rint(values / step) * step - values) ** 2)
    assert grid.rounding_noise * threshold**2 == pytest.approx(measured, rel=0.02)


@every_grid
def test_storage_holds_the_grid_and_no_narrower_type_does(grid: QuantType) -> None:
    assert set(integers(grid)) <= set(integers(grid.storage))
    assert grid.storage.signed == grid.signed
    narrower = [bits for bits in (4, 8, 16) if bits < grid.storage.bits]
    assert all(bits < grid.bits for bits in narrower)


@every_grid
def test_clipped_storage_holds_the_grid_in_at_least_a_byte(grid: QuantType) -> None:
    storage = grid.clipped_storage
    assert set(integers(grid)) <= set(integers(storage))
    assert storage.bits == (8 if grid.bits <= 8 else 16)
    assert storage.signed == grid.signed


@every_grid
@pytest.mark.parametrize("which", ["storage", "clipped_storage"])
def test_a_storage_is_an_onnx_type_and_knows_its_range_and_first_opset(
    grid: QuantType, which: str
) -> None:
    storage: Storage = getattr(grid, which)
    sign = "" if storage.signed else "U"
    assert storage.name == f"{sign}INT{storage.bits}"
    element = onnx.TensorProto.DataType.Value(storage.name)
    info = onnx.helper.tensor_dtype_to_np_dtype(element)
    for integer in (storage.qmin, storage.qmax):
        assert int(np.array(integer).astype(info)) == integer
    assert storage.qmax - storage.qmin + 1 == 2**storage.bits
    assert storage.opset == first_opset(f"tensor({storage.name.lower()})")


@every_grid
@pytest.mark.parametrize("which", ["storage", "clipped_storage"])
def test_a_grid_exceeds_a_storage_that_holds_integers_it_lacks(grid: QuantType, which: str) -> None:
    storage: Storage = getattr(grid, which)
    assert grid.exceeds(storage) == (set(integers(storage)) != set(integers(grid)))


def test_two_and_four_bits_share_the_four_bit_types() -> None:
    stored = {
        str(grid): grid.storage.name
        for grid in (QuantType(bits, signed) for bits in WIDTHS for signed in (True, False))
    }
    four = {"int2", "int3", "int4"}
    eight = {f"int{bits}" for bits in range(5, 9)}
    expected = {
        **dict.fromkeys(four, "INT4"),
        **dict.fromkeys(eight, "INT8"),
        "int16": "INT16",
    }
    assert stored == expected | {f"u{grid}": f"U{name}" for grid, name in expected.items()}


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 12, 15, 17, 32])
@pytest.mark.parametrize("signed", [True, False])
def test_other_widths_are_refused_with_what_is_allowed(bits: int, signed: bool) -> None:
    with pytest.raises(OptionError) as caught:
        QuantType(bits, signed)
    assert str(caught.value) == f"bits must be one of 2 to 8 or 16, got {bits}"


@pytest.mark.parametrize("bits", [1, 9, 17])
def test_a_refused_width_is_reported_under_the_name_of_its_setting(bits: int) -> None:
    with pytest.raises(OptionError) as caught:
        check_width(bits, "--weight-bits")
    assert str(caught.value) == f"--weight-bits must be one of 2 to 8 or 16, got {bits}"


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_allowed_width_is_given_back(bits: int) -> None:
    assert check_width(bits, "bits") == bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_unsigned_grid_cannot_be_narrow(bits: int) -> None:
    with pytest.raises(OptionError) as caught:
        QuantType(bits, signed=False, narrow=True)
    expected = "an unsigned grid has no narrow range: narrow needs signed=True"
    assert str(caught.value) == expected


def test_a_grid_is_a_value() -> None:
    grid = QuantType(4, signed=True)
    assert grid == QuantType(4, signed=True, narrow=False)
    assert len({grid, QuantType(4, signed=True), QuantType(4, signed=True, narrow=True)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.bits = 8  # type: ignore[misc]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_zero_point_shifts_the_levels_and_not_what_is_stored(bits: int) -> None:
    largest = 2**bits - 1
    for zero_point in {0, 1, largest // 3, largest // 2, largest}:
        grid = QuantType(bits, signed=False, zero_point=zero_point)
        assert [level + zero_point for level in integers(grid)] == list(range(largest + 1))
        assert grid.steps == max(abs(level) for level in integers(grid))
        assert grid.exceeds(grid.storage) == QuantType(bits, signed=False).exceeds(grid.storage)


@pytest.mark.parametrize("zero_point", [-1, 16])
def test_a_zero_point_must_be_among_the_integers(zero_point: int) -> None:
    expected = f"the zero point of uint4 must be 0 to 15, got {zero_point}"
    with pytest.raises(OptionError) as caught:
        QuantType(4, signed=False, zero_point=zero_point)
    assert str(caught.value) == expected


def test_a_signed_grid_has_zero_point_0() -> None:
    with pytest.raises(OptionError) as caught:
        QuantType(4, signed=True, zero_point=1)
    assert str(caught.value) == "the zero point of int4 must be 0, got 1"
