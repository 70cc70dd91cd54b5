"""Calibrators: from a distribution to thresholds, by name and by entry point.

A calibrator is any callable ``(dist, qtype, /) -> (G,)``. The built-in ones are frozen
dataclasses whose fields are their parameters. Third parties add theirs, never replace one of
ours, by an entry point in the group ``octav_calibrate.calibrators`` that names such a class, or
a plain function where there are no parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from calib.calibrators.entropy import Entropy
from calib.calibrators.max import Max
from calib.calibrators.mse import Mse
from calib.calibrators.octav import Octav
from calib.calibrators.percentile import Percentile
from calib.distribution import Distribution, Floats
from calib.errors import CalibError, CalibratorError, OptionError, one_line
from calib.qtypes import QuantType

ENTRY_POINT_GROUP = "octav_calibrate.calibrators"

_BUILT_IN: dict[str, type] = {
    "octav": Octav,
    "percentile": Percentile,
    "mse": Mse,
    "max": Max,
    "entropy": Entropy,
}


Flags = NDArray[np.bool_]

_MENDED = (
    "all zero: no threshold exists, 1 is used",
    "the calibrator found no threshold: the maximum is used",
    "the calibrator's threshold is above the maximum: the maximum is used",
)


class Calibrator(Protocol):
    """Distribution → thresholds, pure: no files, no state, no tensor values."""

    def __call__(self, dist: Distribution, qtype: QuantType, /) -> Floats:
        """One threshold per group, float64 ``(G,)``, positive and at most ``max|x|``.

        0 says that none can be given: the caller then takes ``max|x|`` and notes it.
        """


@runtime_checkable
class WarmStarting(Protocol):
    """A calibrator that gets there sooner from thresholds that are close."""

    def refine(self, dist: Distribution, qtype: QuantType, start: Floats, /) -> Floats:
        """As calling the calibrator, from ``start`` ``(G,)`` on; a little less exact."""


@runtime_checkable
class TwoSided(Protocol):
    """A calibrator that also gives a lower and an upper threshold, for grids with a zero point."""

    def two_sided(self, dist: Distribution, bits: int, /) -> tuple[Floats, Floats]:
        """The lower and the upper one of each group, float64 ``(G,)`` each; 0 need not lie between
        them, the caller widens what they span to hold it."""


def names() -> tuple[str, ...]:
    """The calibrators that `make` knows, built-in first; plug-ins are not imported for this.

    Raises:
        CalibratorError: if two distributions claim one name, or one claims a built-in's.
    """
    return (*_BUILT_IN, *sorted(_plugins()))


def make(spec: str) -> Calibrator:
    """The calibrator that ``spec`` names: ``name``, ``name:value`` or ``name:field=value,…``.

    A bare value sets the calibrator's first field: ``percentile:99.9``, ``mse:200``,
    ``octav:kappa=paper,iterations=10``.

    Raises:
        CalibratorError: for an unknown name, or a plug-in that cannot be loaded.
        OptionError: for a parameter that the calibrator does not have or does not accept.
    """
    name, _, parameters = spec.partition(":")
    factory = _BUILT_IN.get(name) or _load_plugin(name)
    if not isinstance(factory, type):
        if parameters:
            raise OptionError(f"{name} takes no parameters, got {parameters!r} in {spec!r}")
        return cast(Calibrator, factory)
    values = _parse(factory, spec, parameters)
    try:
        return cast(Calibrator, factory(**values))
    except CalibError:
        raise
    except Exception as error:  # a plug-in may raise anything
        raise CalibratorError(f"calibrator {spec!r} cannot be made: {one_line(error)}") from error


def is_built_in(calibrator: Calibrator) -> bool:
    """Whether it is one of ours: known to keep groups and threads apart."""
    return type(calibrator) in _BUILT_IN.values()


def thresholds(
    calibrator: Calibrator, dist: Distribution, qtype: QuantType
) -> tuple[Floats, tuple[str, ...]]:
    """What ``calibrator`` says, made safe to write: float64 ``(G,)``, all positive, and notes.

    An all-zero group has no scale, and gets 1; a 0 for any other group becomes its maximum;
    a threshold above the maximum becomes the maximum. Each of these is noted.

    Raises:
        CalibratorError: if the calibrator raises, or returns a wrong shape, NaN or a negative.
    """
    answer, mended = mended_thresholds(calibrator, dist, qtype)
    return answer, notes_on(mended)


def mended_thresholds(
    calibrator: Calibrator, dist: Distribution, qtype: QuantType
) -> tuple[Floats, Flags]:
    """As `thresholds`; instead of notes, which groups each of them is about: ``(3, G)``."""
    try:
        answer = np.asarray(calibrator(dist, qtype), np.float64)
    except CalibError:
        raise
    except Exception as error:
        raise CalibratorError(f"{calibrator!r} failed: {one_line(error)}") from error
    largest = dist.max_abs()
    if answer.shape != (dist.groups,):
        raise CalibratorError(
            f"{calibrator!r} returned shape {answer.shape}, it must be ({dist.groups},)"
        )
    if ((answer > 0) & (answer <= largest)).all():
        return answer, np.zeros((3, dist.groups), np.bool_)
    if not (np.isfinite(answer).all() and (answer >= 0).all()):
        raise CalibratorError(f"{calibrator!r} returned NaN, infinity or a negative threshold")
    zero = largest == 0
    missing = (answer == 0) & ~zero
    above = (answer > largest * (1 + 1e-9)) & ~zero
    answer = np.where(missing, largest, np.minimum(answer, largest))
    return np.where(zero, 1.0, answer), np.stack([zero, missing, above])


def notes_on(mended: Flags) -> tuple[str, ...]:
    """What is noted of the groups that `mended_thresholds` tells of."""
    return tuple(
        f"{_how_many(flags)}{text}"
        for flags, text in zip(mended, _MENDED, strict=True)
        if flags.any()
    )


def _how_many(flags: Flags) -> str:
    return "" if flags.size == 1 else f"{int(flags.sum())} of {flags.size} channels: "


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        clash = found.get(entry_point.name)
        if clash is not None and clash.value == entry_point.value:
            continue  # one distribution, seen twice on the path
        if entry_point.name in _BUILT_IN or clash is not None:
            other = "octav-calibrate itself" if clash is None else _distribution(clash)
            raise CalibratorError(
                f"calibrator {entry_point.name!r} is offered by {_distribution(entry_point)} and "
                f"by {other}: rename one, or uninstall it"
            )
        found[entry_point.name] = entry_point
    return found


def _distribution(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else entry_point.value


def _load_plugin(name: str) -> Callable[..., object]:
    entry_point = _plugins().get(name)
    if entry_point is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise CalibratorError(
            f"No calibrator named {name!r}.{hint} Available: {', '.join(names())}"
        )
    try:
        return cast(Callable[..., object], entry_point.load())
    except Exception as error:
        raise CalibratorError(
            f"calibrator {name!r} of {_distribution(entry_point)} cannot be loaded: "
            f"{one_line(error)}"
        ) from error


def _parse(factory: type, spec: str, parameters: str) -> dict[str, object]:
    if not parameters:
        return {}
    fields = _fields(factory, spec)
    if not fields:
        raise OptionError(f"{spec.partition(':')[0]} takes no parameters, got {parameters!r}")
    values: dict[str, object] = {}
    for position, item in enumerate(parameters.split(",")):
        key, equals, text = item.strip().partition("=")
        if not equals:
            key, text = (next(iter(fields), ""), item) if position == 0 else (item, "")
        if key not in fields:
            raise OptionError(f"{spec}: no parameter {key!r}; allowed: {', '.join(fields)}")
        if key in values:
            raise OptionError(f"{spec}: {key} is given twice")
        values[key] = _convert(text.strip(), fields[key], f"{spec}: {key}")
    return values


def _fields(factory: type, spec: str) -> dict[str, object]:
    """Names and types of a calibrator's parameters."""
    if not dataclasses.is_dataclass(factory):
        return {}
    try:
        hints = typing.get_type_hints(factory)
    except Exception as error:  # a plug-in may annotate with what only type checkers know
        raise CalibratorError(f"calibrator {spec!r} cannot be made: {one_line(error)}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(factory)}


def _convert(text: str, hint: object, where: str) -> object:
    """``text`` as one of the types int, float, bool or str that ``hint`` names."""
    kinds = [k for k in (*typing.get_args(hint), hint) if k in (int, float, bool, str)]
    kind = kinds[0] if kinds else str
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise OptionError(f"{where} must be {wanted}, got {text!r}")
