"""What quantization-aware training is told, and which layers it is about."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from calib.calibrators import make
from calib.errors import OptionError
from calib.graph import Kind
from calib.qat.estimators import ESTIMATORS, LEARNED
from calib.qtypes import check_width
from calib.rules import KINDS, Reduction, Widths

MODES = ("dynamic", "static")
GRADIENTS = (*ESTIMATORS, "mph", *LEARNED)


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What holds for some layers instead of the general settings; None leaves those in force.

    Args:
        match: regular expression, searched in the names of layers, as ``model.named_modules()``
            gives them.
        kind: weights or activations alone.
        bits: their width, in first and last layers too.
        calibrator: theirs.
        mode: dynamic or static.
        gradient: their estimator.
        skip: keep the layers, or their tensors of that kind, float.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown, out of bounds, or pointless.
    """

    match: str
    kind: Kind | None = None
    bits: int | None = None
    calibrator: str | None = None
    mode: str | None = None
    gradient: str | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except (re.error, OverflowError, RecursionError) as error:
            raise OptionError(f"match: {self.match!r} is no regular expression: {error}") from None
        if self.kind is not None:
            _check_choice("kind", self.kind, KINDS)
        if self.bits is not None:
            check_width(self.bits, "bits")
        if self.calibrator is not None:
            make(self.calibrator)
        if self.mode is not None:
            _check_choice("mode", self.mode, MODES)
        if self.gradient is not None:
            _check_choice("gradient", self.gradient, GRADIENTS)
        given = [n for n in ("bits", "calibrator", "mode", "gradient") if self._has(n)]
        if self.skip and given:
            raise OptionError(f"skip keeps tensors float, {given[0]} has no meaning then")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def matches(self, layer: str, kind: Kind) -> bool:
        """Whether it is about the tensors of that kind of ``layer``."""
        return self.kind in (None, kind) and re.search(self.match, layer) is not None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized in training; `calib.qat.prepare` says what the settings mean.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown or out of bounds.
    """

    widths: Widths = field(default_factory=lambda: Widths(4, 4))
    calibrator: str = "octav"
    mode: str = "dynamic"
    gradient: str = "mph"
    rules: tuple[LayerRule, ...] = ()
    reduction: Reduction = field(default_factory=lambda: Reduction("mean"))

    def __post_init__(self) -> None:
        if not isinstance(self.calibrator, str):
            raise OptionError(f"calibrator must be a name such as 'octav', got {self.calibrator!r}")
        make(self.calibrator)
        _check_choice("mode", self.mode, MODES)
        _check_choice("gradient", self.gradient, GRADIENTS)
        if not isinstance(self.reduction, Reduction):
            raise OptionError(f"reduction must be a calib.Reduction, got {self.reduction!r}")
        for rule in self.rules:
            if not isinstance(rule, LayerRule):
                raise OptionError(f"rules must be a list of calib.qat.LayerRule, got {rule!r}")

    def rule_for(self, layer: str, kind: Kind) -> LayerRule:
        """The first rule that is about it, or one that says nothing."""
        return next((r for r in self.rules if r.matches(layer, kind)), LayerRule(""))

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raises `OptionError` if a rule matches none of ``layers``."""
        names = list(layers)
        for number, rule in enumerate(self.rules):
            if not any(re.search(rule.match, name) for name in names):
                known = ", ".join(repr(name) for name in names[:5])
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise OptionError(
                    f"rules[{number}].match: {rule.match!r} matches no layer; there are {known}"
                    f"{more}"
                )


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(
        f"{what} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}{hint}"
    )
