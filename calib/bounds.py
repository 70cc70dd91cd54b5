"""The gate: bounds that a quantized model must keep, and what a comparison says of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from calib.comparison import Comparison
from calib.errors import OptionError


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one bound holds.

    Attributes:
        bound: its name, as the command line has it: ``min-sqnr``.
        limit: what was asked for.
        found: what was measured, in the same unit; infinite where nothing differs.
    """

    bound: str
    limit: float
    found: float

    @property
    def holds(self) -> bool:
        """Whether what was found is within the limit; the limit itself is, also where a difference
        of percentages misses it by a rounding error. What is not a number never is."""
        if math.isclose(self.found, self.limit, rel_tol=_ROUNDING):
            return True
        if self.bound.startswith("min-"):
            return self.found > self.limit
        return self.found < self.limit

    @property
    def text(self) -> str:
        """One line: the name, the limit and what was found, with their unit."""
        label, unit = _LABELS[self.bound]
        side = "at least" if self.bound.startswith("min-") else "at most"
        word = "holds" if self.holds else "FAILS"
        limit = f"{self.limit:.12g}{unit}"
        return f"{self.bound} {word}: {label} {self._found_text(unit)}, {side} {limit} asked for"

    def _found_text(self, unit: str) -> str:
        """With as many digits as show on which side of the limit it is."""
        if math.isnan(self.found):
            return "is not a number"
        if math.isinf(self.found):
            return "infinite" if self.found > 0 else "minus infinite"
        texts = [f"{self.found:.{digits}g}" for digits in (4, 6, 9, 12, 17)]
        told = (t for t in texts if Verdict(self.bound, self.limit, float(t)).holds == self.holds)
        return f"{next(told, texts[-1])}{unit}"


_ROUNDING = 1e-9
_LABELS = {
    "min-sqnr": ("output SQNR", " dB"),
    "min-cosine": ("cosine", ""),
    "max-error": ("largest error", ""),
    "min-agreement": ("agreement", ""),
    "max-top1-drop": ("top-1 drop", " points"),
    "max-metric-drop": ("metric drop", ""),
    "max-size-ratio": ("size ratio", ""),
}
# Lowest and highest limit that make sense.
_ALLOWED = {
    "min_cosine": (-1.0, 1.0),
    "max_error": (0.0, math.inf),
    "min_agreement": (0.0, 1.0),
    "max_top1_drop": (-100.0, 100.0),
    "max_size_ratio": (0.0, math.inf),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a quantized model must keep; None where nothing is asked for.

    Args:
        min_sqnr: of every floating-point output, dB.
        min_cosine: of every floating-point output, -1 to 1.
        max_error: largest difference of any floating-point output, in its unit.
        min_agreement: share of samples with the same largest output, 0 to 1.
        max_top1_drop: points of top-1 below the float model; needs labels.
        max_metric_drop: how far the user's metric may lie below the float model's.
        max_size_ratio: size of the quantized model's files over the float model's.

    Raises:
        OptionError: if a limit makes no sense; the message begins with its name.
    """

    min_sqnr: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None
    min_agreement: float | None = None
    max_top1_drop: float | None = None
    max_metric_drop: float | None = None
    max_size_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            limit = getattr(self, name)
            if limit is not None and math.isnan(limit):
                raise OptionError(f"{_key(name)} must be a number, got nan")
        for name, (low, high) in _ALLOWED.items():
            limit = getattr(self, name)
            if limit is not None and not low <= limit <= high:
                span = f"{low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
                hint = ": 0.98 is 98 %" if name == "min_agreement" else ""
                raise OptionError(f"{_key(name)} must be {span}, got {limit:g}{hint}")

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the bounds that are set."""
        return tuple(_key(f.name) for f in fields(self) if getattr(self, f.name) is not None)

    def check_metric(self, metric: str | None) -> None:
        """Raises `OptionError` if the metric has a bound, and there is none."""
        if metric is None and self.max_metric_drop is not None:
            raise OptionError(f"max-metric-drop cannot be measured: {_NEEDS['max-metric-drop']}")

    def judge(self, comparison: Comparison, n_bytes: tuple[int, int]) -> tuple[Verdict, ...]:
        """What holds, in the order of the fields.

        Args:
            n_bytes: sizes of the float and of the quantized model.

        Raises:
            OptionError: if a bound is set that cannot be measured, on data without labels, say.
        """
        verdicts = []
        for name in self.asked:
            if name == "max-size-ratio":
                found: float | None = n_bytes[1] / n_bytes[0]
            else:
                found = _MEASURES[name](comparison)
            if found is None:
                raise OptionError(f"{name} cannot be measured: {_NEEDS[name]}")
            verdicts.append(Verdict(name, getattr(self, name.replace("-", "_")), found))
        return tuple(verdicts)


def _key(name: str) -> str:
    return name.replace("_", "-")


_MEASURES: dict[str, Callable[[Comparison], float | None]] = {
    "min-sqnr": lambda c: c.output_sqnr_db if c.sqnr_db else None,
    "min-cosine": lambda c: min(c.cosine.values(), default=None),
    "max-error": lambda c: max(c.max_error.values(), default=None),
    "min-agreement": lambda c: c.agreement,
    "max-top1-drop": lambda c: c.top1.drop if c.top1 else None,
    "max-metric-drop": lambda c: c.scores.drop if c.scores else None,
}
_NO_FLOAT = "the models have no floating-point output"
_NEEDS = {
    "min-sqnr": _NO_FLOAT,
    "min-cosine": _NO_FLOAT,
    "max-error": _NO_FLOAT,
    "min-agreement": "no output of shape (samples, classes), and no integer output",
    "max-top1-drop": "it needs labels in the data, and an output of shape (samples, classes)",
    "max-metric-drop": "it needs --metric package.module:function",
}
