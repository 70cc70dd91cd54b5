"""What a comparison of methods and widths is about, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from calib.calibrators import make
from calib.comparison import Comparison
from calib.confidence import Confidence
from calib.curves import Profile, profiles
from calib.errors import OptionError
from calib.graph import Model
from calib.observations import Observations
from calib.proposals import Proposal
from calib.qtypes import check_width
from calib.rules import Rules, Widths
from calib.run import Run
from calib.sensitivity import Sensitivity
from calib.table import CalibrationTable

_WIDE_BITS = 8
_WIDEST_BITS = 16
_SMALLER = 0.95


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is compared.

    Args:
        bits: widths of weights and activations alike.
        methods: calibrators, as `calib.calibrators.make` reads them.
        onnxruntime: its own calibrators, too.
        sensitivity: find out which tensors hurt the output, at the lowest width by the first
            method.

    Raises:
        OptionError, CalibratorError: for a width or a method that is unknown, none, or given twice.
    """

    bits: tuple[int, ...] = (4, 6, 8)
    methods: tuple[str, ...] = ("octav", "mse", "percentile:99.9", "percentile:99.99", "max")
    onnxruntime: bool = False
    sensitivity: bool = True

    def __post_init__(self) -> None:
        for what, values in (("bits", self.bits), ("methods", self.methods)):
            twice = [str(value) for n, value in enumerate(values) if value in values[:n]]
            if twice:
                raise OptionError(f"{what}: {twice[0]} is given twice")
            if not values:
                raise OptionError(f"{what} must not be empty")
        for bits in self.bits:
            check_width(bits, "bits")
        for method in self.methods:
            make(method)


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one width.

    Attributes:
        method, bits: which.
        table: the thresholds.
        comparison: None where onnxruntime cannot run the model, see ``notes``.
        seconds: that the thresholds took.
        gain_db: output SQNR above that of ``max`` at the same width; None without it.
        notes: what went wrong.
        size_ratio: size of the weights over that of the float model's.
    """

    method: str
    bits: int
    table: CalibrationTable
    comparison: Comparison | None
    seconds: float
    gain_db: float | None = None
    notes: tuple[str, ...] = ()
    size_ratio: float | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Of the worst output; None where nothing was measured, or no output is floating-point."""
        if self.comparison is None or not self.comparison.sqnr_db:
            return None
        return self.comparison.output_sqnr_db


@dataclass(frozen=True, slots=True)
class Measured:
    """A proposal, and what it changes: ``before`` and ``after``, on the same samples; and
    ``wide_size_ratio``, the size of the weights with all tensors at the wider width."""

    proposal: Proposal
    before: Row
    after: Row
    wide_size_ratio: float

    @property
    def saves(self) -> bool:
        """Whether the weights are smaller than with all tensors at the wider width."""
        return (self.after.size_ratio or 0.0) < _SMALLER * self.wide_size_ratio


@dataclass(frozen=True, slots=True)
class Survey:
    """What `compare_methods` found.

    Attributes:
        model: the float model.
        candidates: what was compared.
        rows: by width, methods in the order given.
        profiles: of every tensor.
        sensitivity: None where it was not asked for, or the model is too large.
        proposals: what to do about the worst tensors, measured.
        confidence: None for a single batch.
        held_out: whether the comparison is on samples that calibration did not see.
        made_up: whether it is on made-up inputs.
        observations: what was counted.
        notes: what was changed or left out.
        warnings: what makes the result doubtful.
        seconds: by stage.
        rules, run: how it was carried out.
    """

    model: Model
    candidates: Candidates
    rows: tuple[Row, ...]
    profiles: tuple[Profile, ...]
    sensitivity: Sensitivity | None
    proposals: tuple[Measured, ...]
    confidence: Confidence | None
    held_out: bool
    made_up: bool
    observations: Observations
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    run: Run = field(default_factory=Run)

    @property
    def detailed(self) -> tuple[str, int]:
        """Method and width that confidence, sensitivity and proposals are about."""
        return detailed(self.candidates, self.rows)

    @property
    def wide_bits(self) -> int:
        """The width that proposals give the worst tensors."""
        return wide_bits(self.detailed[1])


def detailed(candidates: Candidates, rows: Iterable[Row]) -> tuple[str, int]:
    """The first of our methods that has worked at the lowest width, and that."""
    ours = (row for row in rows if row.method in candidates.methods)
    row = min(ours, key=lambda row: row.bits)
    return row.method, row.bits


def wide_bits(bits: int) -> int:
    """The width for tensors that do not bear ``bits``: 8, above that 16."""
    return _WIDE_BITS if bits < _WIDE_BITS else _WIDEST_BITS


def comparable(rules: Rules) -> Rules:
    """``rules``; raises `OptionError` where they leave methods nothing but weights to differ on, or
    are for a target whose widths the rows would leave."""
    if rules.weights_only:
        raise OptionError(
            "activation-bits none: methods are compared on weights and activations together; "
            "leave it out here, or compare runs of octav-calibrate with it"
        )
    if rules.target != "generic":
        raise OptionError(
            f"target {rules.target}: methods are compared on the placement of target generic; "
            f"leave it out here, or compare runs of octav-calibrate with it"
        )
    return rules


def widened(rules: Rules, bits: int) -> Rules:
    """The rules with every tensor at ``bits`` at least."""
    edge = None if rules.widths.edge is None else max(bits, rules.widths.edge)
    overrides = (replace(rule, bits=rule.bits and max(bits, rule.bits)) for rule in rules.overrides)
    return replace(rules, widths=Widths(bits, bits, edge), overrides=tuple(overrides))


def with_gains(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows, each with its gain over max at the same width."""
    most = {row.bits: row.sqnr_db for row in rows if row.method == "max"}
    return tuple(replace(row, gain_db=gain(row.sqnr_db, most.get(row.bits))) for row in rows)


def gain(sqnr_db: float | None, base_db: float | None) -> float | None:
    """How far an SQNR lies above another; None where either is unknown."""
    if sqnr_db is None or base_db is None:
        return None
    return sqnr_db - base_db if sqnr_db != base_db else 0.0  # both may be infinite


def profiled(model: Model, observations: Observations, rows: tuple[Row, ...]) -> Iterator[Profile]:
    """Every tensor at the widths that it has in any row: first and last layers have their own."""
    widths: dict[str, set[int]] = {}
    for row in rows:
        for record in row.table.records:
            widths.setdefault(record.name, set()).add(record.qtype.bits)
    for record in rows[0].table.records:
        yield from profiles(model, observations, [record.spec], sorted(widths[record.name]))
