"""The settings that say how wide, how fine and by which calibrator each tensor is quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from calib.blocks import FUSED_SIZES, OPERATOR_BITS, check_blocks, check_operator
from calib.calibrators import make
from calib.errors import OptionError
from calib.graph import Kind, Use
from calib.prepare import QUANTIZABLE_OPS
from calib.qtypes import check_width

KINDS = ("weight", "activation")
WEIGHT_GRANULARITIES = ("per-channel", "per-tensor")
GRIDS = ("symmetric", "asymmetric", "auto")
REDUCTIONS = ("pool", "mean")
TARGETS = ("generic", "onnxruntime", "openvino", "tensorrt")
REDUCED_BITS = 7


@dataclass(frozen=True, slots=True)
class Selection:
    """Which uses of tensors are quantized.

    Args:
        only: regular expression; only uses whose node or tensor name it is found in.
        exclude: regular expression; no use whose node or tensor name it is found in.
        op_types: only inputs of nodes of these types.

    Raises:
        OptionError: for an invalid regular expression or an operator that is not supported.
    """

    only: str | None = None
    exclude: str | None = None
    op_types: tuple[str, ...] = QUANTIZABLE_OPS

    def __post_init__(self) -> None:
        _check_pattern("only", self.only or "")
        _check_pattern("exclude", self.exclude or "")
        for op_type in self.op_types:
            if op_type not in QUANTIZABLE_OPS:
                raise OptionError(
                    f"op-types: {op_type!r} is not supported, only {', '.join(QUANTIZABLE_OPS)}"
                )


@dataclass(frozen=True, slots=True)
class Widths:
    """Bits of weights, of activations, and of both in the first and last weighted layers.

    ``edge`` None: 8, or the width of the rest where that is more. ``activations`` None: these stay
    float, only weights are quantized.

    Raises:
        OptionError: if one is not 2 to 8 or 16.
    """

    weights: int = 8
    activations: int | None = 8
    edge: int | None = None

    def __post_init__(self) -> None:
        check_width(self.weights, "weight-bits")
        if self.activations is not None:
            check_width(self.activations, "activation-bits")
        if self.edge is not None:
            check_width(self.edge, "edge-bits")

    @property
    def widest(self) -> int:
        """That of the kind of tensors that has more bits."""
        return max(self.weights, self.activations or 0)

    def of(self, kind: Kind, edge: bool) -> int:
        """The bits of a tensor of that kind, used by an edge layer or not.

        Raises:
            ValueError: for an activation that stays float.
        """
        bits = self.weights if kind == "weight" else self.activations
        if bits is None:
            raise ValueError("activations have no width: they stay float")
        if not edge:
            return bits
        return max(8, bits) if self.edge is None else self.edge


@dataclass(frozen=True, slots=True)
class Reduction:
    """How activations of many batches become one threshold.

    ``pool``: from the counts of all samples together. ``mean``: one threshold for each of the
    first ``batches`` batches, averaged (OCTAV, section 5, static calibration: 5).

    Raises:
        OptionError: for another name, or fewer than one batch.
    """

    name: str = "pool"
    batches: int = 5

    def __post_init__(self) -> None:
        if self.name not in REDUCTIONS:
            raise OptionError(f"reduce must be pool or mean, got {self.name!r}")
        if self.batches < 1:
            raise OptionError(f"mean-batches must be at least 1, got {self.batches}")

    @property
    def kept_batches(self) -> int:
        """How many batches need counters of their own."""
        return self.batches if self.name == "mean" else 0


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What holds for some tensors instead of the general settings; None leaves those in force.

    Args:
        match: regular expression, searched in the names of a tensor and of the nodes that read it.
        kind: weights or activations alone.
        bits: their width, in first and last layers too.
        method: their calibrator.
        granularity: of weights.
        skip: keep them float, for the nodes that match.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown, out of bounds, or pointless.
    """

    match: str
    kind: Kind | None = None
    bits: int | None = None
    method: str | None = None
    granularity: str | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        _check_pattern("match", self.match)
        if self.kind is not None and self.kind not in KINDS:
            raise OptionError(f"kind must be {' or '.join(KINDS)}, got {self.kind!r}")
        if self.bits is not None:
            check_width(self.bits, "bits")
        if self.method is not None:
            make(self.method)
        if self.granularity is not None:
            _check_granularity("granularity", self.granularity)
            if (self.kind, self.granularity) == ("activation", "per-channel"):
                raise OptionError("granularity must be per-tensor: activations are per-tensor")
        if self.skip:
            for what in ("bits", "method", "granularity"):
                if getattr(self, what) is not None:
                    raise OptionError(f"skip keeps tensors float, {what} has no meaning then")

    def matches(self, use: Use) -> bool:
        """Whether it is about this reading of a tensor by a node."""
        return self.kind in (None, use.kind) and found(self.match, use)


@dataclass(frozen=True, slots=True)
class Rules:
    """Tensor → width, granularity and calibrator.

    Args:
        widths: bits.
        method: calibrator, as `calib.calibrators.make` reads it.
        weight_method: another one for weights; None for the same.
        weight_granularity: ``per-channel`` or ``per-tensor``.
        block_size: so many weights of a MatMul or Gemm, along its input axis, share a threshold;
            None for whole channels.
        weight_format: how blocks are written: ``qdq``, or as onnxruntime's own operator
            ``matmulnbits`` or ``matmulnbits-int8``, see `calib.matmulnbits`. None for the operator
            where the target is onnxruntime and it can hold them, else for qdq.
        reduction: of activations over batches.
        selection: which uses of tensors are quantized at all.
        overrides: for single tensors; of those that match, the first decides.
        target: the runtime that the model is for; see `calib.targets`.
        reduce_range: weights of 7 bits at most, for CPUs whose sums of U8S8 products saturate.
        activations: their grids: ``symmetric``, ``asymmetric``, or ``auto``: with a zero point
            where that lowers the error.
        bias_correction: whether the mean error of each output channel goes into the bias.
        equalize: whether weights of layers that follow each other are balanced first.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown or out of bounds.
    """

    widths: Widths = field(default_factory=Widths)
    method: str = "octav"
    weight_method: str | None = None
    weight_granularity: str = "per-channel"
    block_size: int | None = None
    weight_format: str | None = None
    reduction: Reduction = field(default_factory=Reduction)
    selection: Selection = field(default_factory=Selection)
    overrides: tuple[TensorRule, ...] = ()
    target: str = "generic"
    reduce_range: bool = False
    activations: str = "symmetric"
    bias_correction: bool = False
    equalize: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise OptionError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.activations not in GRIDS:
            raise OptionError(f"activations must be {_or(GRIDS)}, got {self.activations!r}")
        _check_granularity("weight-granularity", self.weight_granularity)
        if self.weight_format is None:
            own = self.target == "onnxruntime" and self.weights_only
            own = own and self.block_size in FUSED_SIZES and self.widths.weights <= OPERATOR_BITS
            object.__setattr__(self, "weight_format", "matmulnbits" if own else "qdq")
        check_blocks(self.block_size, self.weight_format, self.weight_granularity)
        check_operator(self.weight_format, self.widths.weights, self.widths.activations)
        if self.weights_only:
            self._check_weights_only()
        make(self.method)
        make(self.method_for("weight"))

    @property
    def weights_only(self) -> bool:
        """Whether activations stay float."""
        return self.widths.activations is None

    def _check_weights_only(self) -> None:
        """Raises `OptionError` for a setting that is about activations."""
        what = "is about activations, which activation-bits none keeps float: leave one of them out"
        if self.reduction.name != "pool":
            raise OptionError(f"reduce {self.reduction.name} {what}")
        if self.activations != "symmetric":
            raise OptionError(f"activations {self.activations} {what}")
        for number, rule in enumerate(self.overrides):
            if rule.kind == "activation":
                raise OptionError(f"rules[{number}] {what}")

    def method_for(self, kind: Kind) -> str:
        """The calibrator of tensors of that kind."""
        return self.weight_method or self.method if kind == "weight" else self.method


def found(pattern: str, use: Use) -> bool:
    """Whether ``pattern`` is found in the name of the node or of the tensor."""
    return bool(re.search(pattern, use.node) or re.search(pattern, use.tensor))


def _check_pattern(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"{what}: {pattern!r} is no regular expression: {error}") from None


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _check_granularity(what: str, granularity: str) -> None:
    if granularity not in WEIGHT_GRANULARITIES:
        raise OptionError(
            f"{what} must be {' or '.join(WEIGHT_GRANULARITIES)}, got {granularity!r}"
        )
