"""Settings of weights that are cut into blocks, and of those that alone are quantized."""

from __future__ import annotations

from calib.errors import OptionError

WEIGHT_FORMATS = ("qdq", "matmulnbits", "matmulnbits-int8")
# What onnxruntime's MatMulNBits computes with: MLAS takes these lengths and no other.
FUSED_SIZES = (16, 32, 64, 128, 256)
OPERATOR_BITS = 8
_SMALLEST = 2  # of one value, each would be its own scale


def check_blocks(
    block_size: int | None, weight_format: str | None, weight_granularity: str
) -> None:
    """Raises `OptionError` where settings of blocks are out of bounds, or contradict others."""
    if weight_format not in WEIGHT_FORMATS:
        raise OptionError(
            f"weight-format must be {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}"
        )
    fused = ", ".join(map(str, FUSED_SIZES))
    if weight_format != "qdq" and block_size not in FUSED_SIZES:
        found = "there is none" if block_size is None else f"it is {block_size}"
        raise OptionError(
            f"weight-format {weight_format} needs a block-size of {fused}, {found}; qdq takes any"
        )
    if block_size is None:
        return
    if block_size < _SMALLEST:
        raise OptionError(
            f"block-size must be at least {_SMALLEST}, got {block_size}; onnxruntime is fast with "
            f"{fused}"
        )
    if weight_granularity == "per-tensor":
        raise OptionError(
            "block-size and weight-granularity per-tensor contradict each other: leave one out"
        )


def check_operator(weight_format: str | None, weights: int, activations: int | None) -> None:
    """Raises `OptionError` where onnxruntime's operator cannot hold tensors of these widths."""
    if weight_format == "qdq":
        return
    if activations is not None:
        raise OptionError(
            f"weight-format {weight_format} takes activations as they are, activation-bits is "
            f"{activations}: make it none, or use qdq"
        )
    if weights > OPERATOR_BITS:
        raise OptionError(
            f"weight-format {weight_format} holds weights of 2 to {OPERATOR_BITS} bits, "
            f"weight-bits is {weights}: choose fewer, or use qdq"
        )
