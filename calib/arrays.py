"""What a model is fed: batches, what it takes at a time, and data that comes in parts."""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import DataError
from calib.graph import Model, ValueSpec

Array = NDArray[Any]
LABELS = "labels"

# What zipfile, zlib and NumPy raise on files that are cut off, damaged, encrypted or no npz.
DAMAGED_FILE = (
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed: arrays by input name, and the class of each sample where it is known.

    ``labels`` is ``(samples,)`` of integers, or None. ``restart``: a sequence starts here, and
    inputs that are fed back start anew. ``whole``: inputs whose first axis, if they have one, does
    not run over samples.
    """

    feed: Mapping[str, Array]
    labels: Array | None = None
    restart: bool = False
    whole: frozenset[str] = frozenset()

    @property
    def n_samples(self) -> int:
        """Length of the first axis of the first input that has samples along it; 1 if none has."""
        return next((len(array) for array in self.rows().values()), 1)

    def rows(self) -> dict[str, Array]:
        """The inputs with samples along their first axis."""
        return {n: a for n, a in self.feed.items() if n not in self.whole and a.ndim}

    def part(self, first: int, last: int) -> Batch:
        """The samples from ``first`` to before ``last``."""
        if (first, last) == (0, self.n_samples):
            return self
        feed = {**self.feed, **{name: array[first:last] for name, array in self.rows().items()}}
        labels = None if self.labels is None else self.labels[first:last]
        return Batch(feed, labels, self.restart and first == 0, self.whole)

    def parts(self, size: int | None) -> Iterator[Batch]:
        """Parts of at most ``size`` samples; None for all of it."""
        n = self.n_samples
        size = size or max(n, 1)
        return (self.part(start, min(start + size, n)) for start in range(0, max(n, 1), size))

    def stacks_with(self, other: Batch) -> bool:
        """Whether the two can be one feed: samples of the same shapes, all else equal."""
        mine, others = self.rows(), other.rows()
        if not mine or {n: a.shape[1:] for n, a in mine.items()} != {
            n: a.shape[1:] for n, a in others.items()
        }:
            return False
        shared = self.feed.keys() - mine.keys()
        return (
            (self.labels is None) == (other.labels is None)
            and shared == other.feed.keys() - others.keys()
            and all(np.array_equal(self.feed[n], other.feed[n]) for n in shared)
        )

    def check_finite(self, first: int) -> None:
        """Raises `DataError` naming the sample if a float array holds NaN or infinity; ``first``
        is the number of the batch's first sample."""
        for name, array in self.feed.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                sampled = name not in self.whole and array.ndim
                rows = array.reshape(len(array) if sampled else 1, -1)
                row = int(np.argmin(np.isfinite(rows).all(axis=1)))
                what = "NaN" if np.isnan(rows[row]).any() else "infinity"
                raise DataError(
                    f"calibration data: {name!r} holds {what} in sample {first + row}: leave it "
                    f"out, or mend the preprocessing"
                )


@dataclass(frozen=True, slots=True)
class Takes:
    """What a model takes at a time.

    Attributes:
        inputs: all of the model's inputs.
        fed_back: inputs that get an output of the feed before.
        size: samples a feed; 1 with inputs that are fed back, unless the model fixes it.
        first_axes: lengths of first axes that the model fixes; more than one where its required
            inputs disagree, so that their first axes do not count samples.
    """

    inputs: tuple[ValueSpec, ...]
    fed_back: frozenset[str]
    size: int
    first_axes: tuple[int, ...]

    @classmethod
    def of(cls, model: Model, batch_size: int) -> Takes:
        """What ``model`` takes, ``batch_size`` samples at a time where it leaves that free."""
        fed_back = frozenset(model.feedback)
        axes = [s.shape[0] for s in _required(model.inputs) if s.shape]
        lengths = {length for length in axes if isinstance(length, int) and length}
        free = any(not isinstance(length, int) for length in axes)
        fixed = () if free else tuple(sorted(lengths))
        size = 1 if fed_back or len(fixed) > 1 else batch_size
        return cls(model.inputs, fed_back, fixed[0] if len(fixed) == 1 else size, fixed)

    @property
    def required(self) -> tuple[ValueSpec, ...]:
        """Inputs that must be fed."""
        return _required(self.inputs)

    @property
    def fixed(self) -> int | None:
        """The batch size that the model fixes; None where it is free, or cannot be told."""
        return self.first_axes[0] if len(self.first_axes) == 1 else None

    @property
    def whole(self) -> frozenset[str]:
        """Inputs whose first axis is not one of samples: single numbers, states, those of a fixed
        length that may be left out or where others are free, and all where the required ones
        disagree."""
        return frozenset(spec.name for spec in self.inputs if self._is_whole(spec))

    def _is_whole(self, spec: ValueSpec) -> bool:
        if len(self.first_axes) > 1 or spec.name in self.fed_back or spec.shape == ():
            return True
        first = spec.shape[0] if spec.shape else None
        return isinstance(first, int) and (spec.optional or first != self.fixed)


def _required(inputs: tuple[ValueSpec, ...]) -> tuple[ValueSpec, ...]:
    return tuple(spec for spec in inputs if not spec.optional) or inputs


@dataclass(frozen=True, slots=True)
class Feeds:
    """Data in parts that are read again in each pass: arrays, files, or what is made up.

    Attributes:
        counts: how many samples of each part are used.
        read: given the number of a part, rows ``start`` and ``stop`` and a size, gives these rows
            in batches of at most that size.
        takes: what the model takes; samples of equal shapes are stacked up to its size.
        notes: what the user should know about the data.
        identity: equal for the same data read in the same way; None where that is not known.
        origin: what another process opens the same data from, see `calib.data.Origin`.
    """

    counts: Sequence[int]
    read: Callable[[int, int, int, int], Iterator[Batch]]
    takes: Takes
    notes: tuple[str, ...] = ()
    identity: str | None = None
    origin: object = None

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return sum(self.counts)

    @property
    def multiple(self) -> int:
        """The batch size that the model fixes; otherwise 1."""
        return self.takes.fixed or 1

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the samples from ``start`` to before ``stop``; the first starts a sequence,
        for models with inputs that are fed back."""
        pieces = self._pieces(start, self.n_samples if stop is None else stop)
        restart = bool(self.takes.fed_back)
        for batch in stacked(pieces, self.takes.size):
            yield replace(batch, restart=True) if restart else batch
            restart = False

    def _pieces(self, start: int, stop: int) -> Iterator[Batch]:
        position = 0
        for number, count in enumerate(self.counts):
            first, last = max(start - position, 0), min(stop - position, count)
            if first < last:
                yield from self.read(number, first, last, self.takes.size)
            position += count
            if position >= stop:
                return


def stacked(pieces: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Neighbours that can be one feed as one, up to ``size`` samples; nothing else is changed."""
    held: list[Batch] = []
    n = 0
    for piece in pieces:
        if held and (piece.restart or not held[0].stacks_with(piece)):
            yield _joined(held)
            held, n = [], 0
        split = min(size - n, piece.n_samples)
        held, n = [*held, piece.part(0, split)], n + split
        if n == size:
            yield _joined(held)
            n = piece.n_samples - split
            held = [piece.part(split, piece.n_samples)] if n else []
    if held:
        yield _joined(held)


def _joined(batches: list[Batch]) -> Batch:
    first = batches[0]
    if len(batches) == 1:
        return first
    rows = {n: np.concatenate([b.feed[n] for b in batches]) for n in first.rows()}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return replace(
        first, feed={**first.feed, **rows}, labels=np.concatenate(labels) if labels else None
    )


def identify(files: Iterable[Path], *settings: object) -> str:
    """A digest of names, sizes and times of ``files`` and of how they are read, 16 hex digits.

    Raises:
        DataError: if there is no such file.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def check_input(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], spec: ValueSpec) -> None:
    """Raises `DataError` if an array of that shape and type cannot be samples of ``spec``, one or
    more batches of them."""
    _check_type(where, dtype, spec)
    if spec.shape is None:
        return
    if not _fits(shape[1:], spec.shape[1:]) or len(shape) != len(spec.shape):
        raise DataError(
            f"{where}: {spec.name!r} is {by(shape)}, the model takes {by(spec.shape)}, with "
            f"samples along the first axis"
        )


def check_whole(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], spec: ValueSpec) -> None:
    """Raises `DataError` if an array of that shape and type cannot be fed as it is."""
    _check_type(where, dtype, spec)
    if spec.shape is not None and not _fits(shape, spec.shape):
        raise DataError(f"{where}: {spec.name!r} is {by(shape)}, the model takes {by(spec.shape)}")


def _check_type(where: str, dtype: np.dtype[Any], spec: ValueSpec) -> None:
    if dtype != spec.dtype:
        raise DataError(
            f"{where}: {spec.name!r} is {dtype}, the model takes {spec.dtype}: convert it with "
            f".astype(np.{spec.dtype})"
        )


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(declared) and all(
        not isinstance(d, int) or d == n for d, n in zip(declared, shape, strict=True)
    )


def check_labels(where: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raises `DataError` unless labels of that type and shape are one integer for each sample."""
    if dtype.kind not in "iu" or len(shape) != 1:
        raise DataError(
            f"{where}: {LABELS!r} must be one integer for each sample, got {dtype} {shape}"
        )


def by(shape: tuple[int | str | None, ...]) -> str:
    """A shape for messages: ``32x3x?x?``."""
    return "x".join("?" if d is None else str(d) for d in shape) or "a single number"


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names in quotes, for messages; only ``most`` of them."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return (", ".join(quoted[:most]) or "nothing") + more
