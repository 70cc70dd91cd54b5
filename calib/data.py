"""Calibration data: batches from files, from iterables, or made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from calib.arrays import (
    LABELS,
    Array,
    Arrays,
    Batch,
    check_labels,
    check_shape,
    listed,
    open_file,
)
from calib.errors import DataError
from calib.graph import Model, ValueSpec

_FREE_AXIS = 32
_N_SYNTHETIC = 64


class Data(Protocol):
    """Calibration data: an iterable of batches with a few facts about it."""

    @property
    def n_samples(self) -> int | None:
        """How many samples there are; None where only a pass can tell."""

    @property
    def multiple(self) -> int:
        """The batch size that the model fixes: samples come in multiples of it. Otherwise 1."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about it."""

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the samples from ``start`` to before ``stop``."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Data from an iterable of batches: dictionaries, single arrays, or tuples in the order of
    the model's inputs, with the labels behind them; or an onnxruntime CalibrationDataReader.

    What can be iterated once only (a generator, a reader) can be calibrated on; comparing the
    models then uses its first batch.
    """

    source: Any
    inputs: tuple[ValueSpec, ...]
    n_samples: ClassVar[None] = None
    multiple: ClassVar[int] = 1
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def once_only(self) -> bool:
        """Whether a second pass would find nothing."""
        return hasattr(self.source, "get_next") or isinstance(self.source, Iterator)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches that reach beyond ``start`` or ``stop`` are cut there, unless the model fixes
        their size."""
        seen = 0
        whole = bool(_fixed_first_axes(self.inputs))
        for number, item in enumerate(_iterate(self.source)):
            if stop is not None and seen >= stop:
                return
            batch = _as_batch(item, self.inputs, f"batch {number}")
            first, last = max(start - seen, 0), batch.n_samples
            if stop is not None:
                last = min(last, stop - seen)
            seen += batch.n_samples
            if first < last:
                yield batch if whole else batch.part(first, last)


def open_data(model: Model, source: object, batch_size: int = 32, seed: int = 0) -> Data:
    """Data that fits ``model``'s inputs.

    Args:
        model: names, types and shapes of the inputs are taken from it.
        source: path of an ``.npz`` (arrays named after the inputs, and ``labels``) or of an
            ``.npy`` (models with one input); an iterable of batches, see `Batches`; or None for
            seeded synthetic values.
        batch_size: samples a feed, where the model leaves that free.
        seed: of the synthetic values.

    Raises:
        DataError: if the file is missing or unreadable, an array is missing, misnamed, of the
            wrong type, or of a shape the model does not take, or there are no samples.
    """
    if batch_size < 1:
        raise DataError(f"batch-size must be at least 1, got {batch_size}")
    if source is None:
        return _synthetic(model.inputs, batch_size, seed)
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable) and not hasattr(source, "get_next"):
            raise DataError(f"data must be a path or an iterable of batches, got {source!r}")
        if isinstance(source, Mapping):
            raise DataError(
                "data must be an iterable of batches, got one mapping: wrap it in a list"
            )
        return Batches(source, model.inputs)
    fixed = _fixed_first_axes(model.inputs)
    if len(fixed) > 1:
        raise DataError(
            f"{source}: the model's inputs have different fixed first axes {sorted(fixed)}: which "
            f"of them counts samples cannot be told; feed dictionaries from Python instead"
        )
    only = next(iter(fixed), None)
    return open_file(Path(source), model.inputs, only or batch_size, only)


def _fixed_first_axes(inputs: Sequence[ValueSpec]) -> set[int]:
    """The batch size that the model fixes; several where its inputs disagree, so that the first
    axis is no batch at all; empty where it is free."""
    first = (spec.shape[0] for spec in inputs if spec.shape)
    return {length for length in first if isinstance(length, int)}


def _synthetic(inputs: Sequence[ValueSpec], batch_size: int, seed: int) -> Arrays:
    fixed = _fixed_first_axes(inputs)
    feeds_are_samples = len(fixed) > 1
    size = 1 if feeds_are_samples else next(iter(fixed), batch_size)

    def reader(number: int, spec: ValueSpec) -> Callable[[int, int, int], Iterator[Array]]:
        declared = spec.shape or ()
        shape = [d if isinstance(d, int) else _FREE_AXIS for d in declared]

        def read(start: int, stop: int, size: int) -> Iterator[Array]:
            for first in range(start, stop, size):
                rng = np.random.default_rng((seed, number, first))
                rows = (
                    [min(size, stop - first)] if declared and not feeds_are_samples else shape[:1]
                )
                yield _random(rng, (*rows, *shape[1:]), spec.dtype)

        return read

    n_samples = -(-_N_SYNTHETIC // size) * size
    columns = {spec.name: reader(number, spec) for number, spec in enumerate(inputs)}
    return Arrays(n_samples, size, columns, multiple=size if fixed else 1)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    # Indices, lengths and masks: 0 and 1 are valid almost everywhere.
    return rng.integers(0, 2, shape).astype(dtype)


def _iterate(source: Any) -> Iterator[Any]:
    if hasattr(source, "get_next"):
        return iter(source.get_next, None)
    return iter(source)


def _as_batch(item: Any, inputs: tuple[ValueSpec, ...], where: str) -> Batch:
    labels = None
    if isinstance(item, Mapping):
        feed = {str(name): _as_array(value) for name, value in item.items()}
        labels = feed.pop(LABELS, None) if LABELS not in {i.name for i in inputs} else None
    else:
        arrays = [_as_array(v) for v in (item if isinstance(item, tuple | list) else [item])]
        if len(arrays) == len(inputs) + 1:
            labels = arrays.pop()
        if len(arrays) != len(inputs):
            raise DataError(
                f"{where}: {len(arrays)} arrays, the model has {len(inputs)} inputs: "
                f"{listed(i.name for i in inputs)}"
            )
        feed = {spec.name: array for spec, array in zip(inputs, arrays, strict=True)}
    missing = [i.name for i in inputs if i.name not in feed]
    if missing:
        raise DataError(f"{where}: no array for input {listed(missing)}; got {listed(feed)}")
    for spec in inputs:
        if feed[spec.name].dtype != spec.dtype:
            raise DataError(
                f"{where}: {spec.name!r} is {feed[spec.name].dtype}, the model takes {spec.dtype}"
            )
        check_shape(f"{where}: {spec.name!r}", feed[spec.name].shape, spec)
    if labels is not None:
        check_labels(where, labels.dtype, labels.shape)
    return Batch({spec.name: feed[spec.name] for spec in inputs}, labels)


def _as_array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)
