"""Batches from iterables and functions of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from calib.arrays import (
    LABELS,
    Array,
    Batch,
    Takes,
    check_input,
    check_labels,
    check_whole,
    listed,
    stacked,
)
from calib.errors import CalibError, DataError
from calib.folders import reason


@dataclass(frozen=True, slots=True)
class Batches:
    """Data from an iterable of batches: dictionaries, single arrays, or tuples in the order of
    the model's required inputs, with the labels behind them; or an onnxruntime
    CalibrationDataReader.

    Arrays that all have one axis less than the inputs are one sample. What holds more samples than
    the model's fixed batch is fed in parts. A dictionary with an input that is fed back starts a
    sequence. What can be iterated once only (a generator, a reader) can be calibrated on;
    comparing the models then uses its first batch.
    """

    source: Any
    takes: Takes
    identity: ClassVar[None] = None
    n_samples: ClassVar[None] = None
    said: list[str] = field(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a pass has shown."""
        return tuple(self.said)

    @property
    def multiple(self) -> int:
        """The batch size that the model fixes; otherwise 1."""
        return self.takes.fixed or 1

    @property
    def once_only(self) -> bool:
        """Whether a second pass would find nothing."""
        return hasattr(self.source, "get_next") or isinstance(self.source, Iterator)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches that reach beyond ``start`` or ``stop`` are cut there; where the model fixes
        their size or keeps a state, a batch belongs to where it begins."""
        seen = 0
        uncut = bool(self.takes.first_axes or self.takes.fed_back)
        for batch in self._feeds():
            if stop is not None and seen >= stop:
                return
            first, last = max(start - seen, 0), batch.n_samples
            if stop is not None:
                last = min(last, stop - seen)
            seen += batch.n_samples
            if uncut and first == 0:
                yield batch
            elif not uncut and first < last:
                yield batch.part(first, last)

    def _feeds(self) -> Iterator[Batch]:
        fixed, fed_back = self.takes.fixed, self.takes.fed_back
        if fixed is not None and not fed_back:
            yield from self._stacked_feeds(fixed)
            return
        for number, item in enumerate(_iterate(self.source)):
            batch = _as_batch(item, self.takes, f"{self._where} {number}")
            if fixed is None or batch.n_samples == fixed:
                yield replace(batch, restart=True) if fed_back and number == 0 else batch
                continue
            for first in range(0, batch.n_samples, fixed):
                part = batch.part(first, first + fixed)
                later = {n: a for n, a in part.feed.items() if n not in fed_back}
                restart = first == 0 and (number == 0 or batch.restart) and bool(fed_back)
                yield replace(part, feed=later if first else part.feed, restart=restart)

    def _stacked_feeds(self, fixed: int) -> Iterator[Batch]:
        """Feeds of the size that the model fixes, whatever the size of what comes."""
        items = enumerate(_iterate(self.source))
        batches = (_as_batch(item, self.takes, f"{self._where} {n}") for n, item in items)
        pieces = (
            batch.part(first, first + fixed)
            for batch in batches
            for first in range(0, batch.n_samples, fixed)
        )
        for batch in stacked(pieces, fixed):
            if batch.n_samples == fixed:
                yield batch
                continue
            note = f"{batch.n_samples} samples fill no batch of {fixed}: not used"
            if note not in self.said:
                self.said.append(note)

    @property
    def _where(self) -> str:
        return f"{self.source.source}: batch" if isinstance(self.source, Function) else "batch"


@dataclass(frozen=True, slots=True)
class Function:
    """The batches of ``package.module:function``, which is called anew for each pass."""

    source: str
    function: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        try:
            with _importing():
                batches = self.function()
                check_batches(batches, f"{self.source}: it must return")
                yield from _iterate(batches)
        except CalibError:
            raise
        except Exception as error:
            raise DataError(f"{self.source}: {reason(error)}") from error


def check_batches(source: object, what: str) -> None:
    """Raises `DataError` that begins with ``what`` if ``source`` cannot be iterated over."""
    if not isinstance(source, Iterable) and not hasattr(source, "get_next"):
        raise DataError(f"{what} an iterable of batches, got {source!r}")
    if isinstance(source, Mapping):
        raise DataError(f"{what} an iterable of batches, got one mapping: wrap it in a list")


def import_function(source: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names, also in the current directory."""
    module, _, name = source.partition(":")
    try:
        with _importing():
            found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise DataError(f"{source}: cannot be imported: {reason(error)}") from error
    if not callable(found):
        raise DataError(f"{source}: must be a function, is of type {type(found).__name__}")
    return found


@contextmanager
def _importing() -> Iterator[None]:
    """Modules in the current directory can be imported, as with ``python -m``."""
    here = os.getcwd()  # noqa: PTH109 - a string, as sys.path wants it
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have removed it
            sys.path.remove(here)


def _iterate(source: Any) -> Iterator[Any]:
    if hasattr(source, "get_next"):
        return iter(source.get_next, None)
    return iter(source)


def _as_batch(item: Any, takes: Takes, where: str) -> Batch:
    feed, labels = _named(item, takes, where)
    missing = [spec.name for spec in takes.required if spec.name not in feed]
    if missing:
        raise DataError(f"{where}: no array for input {listed(missing)}; got {listed(feed)}")
    specs = [spec for spec in takes.inputs if spec.name in feed]
    rows = [spec for spec in specs if spec.name not in takes.whole]
    if rows and all(feed[s.name].ndim + 1 == len(s.shape or ()) for s in rows):
        feed |= {spec.name: feed[spec.name][None] for spec in rows}
        labels = labels[None] if labels is not None and labels.ndim == 0 else labels
    for spec in specs:
        array = feed[spec.name]
        check = check_whole if spec.name in takes.whole else check_input
        check(where, array.shape, array.dtype, spec)
    if labels is not None:
        check_labels(where, labels.dtype, labels.shape)
    ordered = {spec.name: feed[spec.name] for spec in specs}
    batch = Batch(ordered, labels, bool(takes.fed_back & feed.keys()), takes.whole)
    if takes.fed_back and takes.fixed is not None and batch.n_samples % takes.fixed:
        raise DataError(
            f"{where}: {batch.n_samples} samples, the model takes {takes.fixed} at a time"
        )
    return batch


def _named(item: Any, takes: Takes, where: str) -> tuple[dict[str, Array], Array | None]:
    """Arrays by input, and labels."""
    if isinstance(item, Mapping):
        feed = {str(name): _as_array(value) for name, value in item.items()}
        named = LABELS in {spec.name for spec in takes.inputs}
        return feed, None if named else feed.pop(LABELS, None)
    arrays = [_as_array(v) for v in (item if isinstance(item, tuple | list) else [item])]
    names = [spec.name for spec in takes.required]
    labels = arrays.pop() if len(arrays) == len(names) + 1 else None
    if len(arrays) != len(names):
        raise DataError(
            f"{where}: {len(arrays)} arrays, the model has {len(names)} inputs: {listed(names)}"
        )
    return dict(zip(names, arrays, strict=True)), labels


def _as_array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.array(value)  # a copy: the next batch may come in the same memory
