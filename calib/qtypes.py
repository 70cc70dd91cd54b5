"""Quantized types: how many bits, which integers, how they are stored in ONNX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calib.errors import OptionError

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def check_width(bits: int, what: str) -> int:
    """Returns ``bits`` if it is one of `WIDTHS`; raises `OptionError` naming ``what`` otherwise."""
    if bits not in WIDTHS:
        raise OptionError(f"{what} must be one of 2 to 8 or 16, got {bits}")
    return bits


@dataclass(frozen=True, slots=True)
class Storage:
    """An ONNX integer type: its name in ``TensorProto.DataType``, width, and first opset."""

    name: str
    bits: int
    signed: bool
    opset: int

    @property
    def qmin(self) -> int:
        """The smallest integer the type holds."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer the type holds."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1


# First opset whose QuantizeLinear and DequantizeLinear take the type with a per-axis scale.
_STORAGES = (
    Storage("INT4", 4, True, 21),
    Storage("UINT4", 4, False, 21),
    Storage("INT8", 8, True, 13),
    Storage("UINT8", 8, False, 13),
    Storage("INT16", 16, True, 21),
    Storage("UINT16", 16, False, 21),
)


@dataclass(frozen=True, slots=True)
class QuantType:
    """A quantization grid: levels ``qmin … qmax``, a step apart, 0 among them. What is stored is a
    level plus the zero point.

    Args:
        bits: one of `WIDTHS`.
        signed: whether it is stored in a signed type; an unsigned grid with zero point 0 is for
            data that is never negative.
        narrow: signed only; leave out the most negative integer, so that the grid is symmetric.
        zero_point: unsigned only; the stored integer of level 0.

    Raises:
        OptionError: if ``bits`` is not one of `WIDTHS`, an unsigned grid is called narrow, or a
            zero point is not among its integers or not 0 on a signed one.
    """

    bits: int
    signed: bool
    narrow: bool = False
    zero_point: int = 0

    def __post_init__(self) -> None:
        check_width(self.bits, "bits")
        if self.narrow and not self.signed:
            raise OptionError("an unsigned grid has no narrow range: narrow needs signed=True")
        most = 0 if self.signed else (1 << self.bits) - 1
        if not 0 <= self.zero_point <= most:
            raise OptionError(
                f"the zero point of {self} must be {f'0 to {most}' if most else 0}, "
                f"got {self.zero_point}"
            )

    @property
    def qmin(self) -> int:
        """The lowest level of the grid."""
        if not self.signed:
            return -self.zero_point
        return -(1 << (self.bits - 1)) + self.narrow

    @property
    def qmax(self) -> int:
        """The highest level of the grid."""
        return (1 << (self.bits - self.signed)) - 1 - self.zero_point

    @property
    def steps(self) -> int:
        """Quantization steps from 0 to the threshold: the ``n`` of method.md, section 1.1.

        Also on the signed full range, where the threshold is the largest value represented and
        the negative side reaches one step further, as the field's int8 scales ``max|x|/127`` do.
        With a zero point, to the larger of the two ends.
        """
        return max(self.qmax, self.zero_point)

    @property
    def rounding_noise(self) -> float:
        """κ: mean squared rounding error of in-range values, as a fraction of threshold².

        ``κ = 1 / (12 n²)``, from a uniform error of one step (OCTAV, equation 4, on this grid).
        """
        return 1.0 / (12.0 * self.steps**2)

    @property
    def storage(self) -> Storage:
        """The narrowest ONNX type that holds the grid; 2 bits go into the 4-bit types.

        onnxruntime 1.31 cannot load a Gemm or MatMul on the native 2-bit types.
        """
        return self._storage(2)

    @property
    def clipped_storage(self) -> Storage:
        """The type for QuantizeLinear behind a Clip: at least 8 bits wide.

        onnxruntime 1.31 refuses to load a Clip before a 4-bit QuantizeLinear at its default
        level: its ClipQuantFusion knows no zero point of 4 bits.
        """
        return self._storage(8)

    def _storage(self, at_least: int) -> Storage:
        bits = max(self.bits, at_least)
        return next(s for s in _STORAGES if s.signed == self.signed and s.bits >= bits)

    def exceeds(self, storage: Storage) -> bool:
        """Whether ``storage`` holds integers beyond the grid, so that a Clip must saturate."""
        highest, lowest = self.qmax + self.zero_point, self.qmin + self.zero_point
        return highest != storage.qmax or lowest != storage.qmin

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


def places(qtypes: Iterable[QuantType]) -> dict[QuantType, list[int]]:
    """Where each grid stands among ``qtypes``."""
    found: dict[QuantType, list[int]] = {}
    for place, qtype in enumerate(qtypes):
        found.setdefault(qtype, []).append(place)
    return found
