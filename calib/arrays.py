"""Calibration data in ``.npz`` and ``.npy`` files, read in chunks and never whole.

The first axis of every array runs over samples.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from calib.errors import DataError, one_line
from calib.graph import ValueSpec

Array = NDArray[Any]
Reader = Callable[[int, int, int], Iterator[Array]]
LABELS = "labels"

# What zipfile, zlib and NumPy raise on files that are cut off, damaged, encrypted or no npz.
DAMAGED_FILE = (
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed: arrays by input name, and the class of each sample where it is known.

    ``labels`` is ``(samples,)`` of integers, or None.
    """

    feed: Mapping[str, Array]
    labels: Array | None = None

    @property
    def n_samples(self) -> int:
        """Length of the first axis of the first input; 1 where that has no axes."""
        first = next(iter(self.feed.values()))
        return int(first.shape[0]) if first.ndim else 1

    def part(self, first: int, last: int) -> Batch:
        """The samples from ``first`` to before ``last``."""
        if (first, last) == (0, self.n_samples):
            return self
        feed = {name: array[first:last] for name, array in self.feed.items()}
        return Batch(feed, None if self.labels is None else self.labels[first:last])

    def check_finite(self, first: int) -> None:
        """Raises `DataError` naming the sample if a float array holds NaN or infinity; ``first``
        is the number of the batch's first sample."""
        for name, array in self.feed.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                rows = array.reshape(array.shape[0] if array.ndim else 1, -1)
                row = int(np.argmin(np.isfinite(rows).all(axis=1)))
                what = "NaN" if np.isnan(rows[row]).any() else "infinity"
                raise DataError(
                    f"calibration data: {name!r} holds {what} in sample {first + row}: leave it "
                    f"out, or mend the preprocessing"
                )


@dataclass(frozen=True, slots=True)
class Arrays:
    """Data from equally long arrays that are read from their start, chunk by chunk.

    ``columns`` holds for each input a function that reads rows ``start … stop`` in chunks of
    ``size``; ``labels`` is such a function, where there are labels.
    """

    n_samples: int
    batch_size: int
    columns: Mapping[str, Reader]
    labels: Reader | None = None
    multiple: int = 1
    notes: tuple[str, ...] = ()

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        stop = self.n_samples if stop is None else min(stop, self.n_samples)
        streams = [read(start, stop, self.batch_size) for read in self.columns.values()]
        labels = self.labels and self.labels(start, stop, self.batch_size)
        for chunks in zip(*streams, strict=True):
            feed = dict(zip(self.columns, chunks, strict=True))
            yield Batch(feed, next(labels) if labels else None)


def open_file(path: Path, inputs: Sequence[ValueSpec], size: int, fixed: int | None) -> Arrays:
    """The arrays of an ``.npz`` (named after the inputs, and ``labels``) or of an ``.npy``.

    Args:
        size: samples a batch.
        fixed: the batch size that the model fixes, if it does.

    Raises:
        DataError: as `calib.data.open_data`.
    """
    try:
        columns = _open_columns(path, inputs)
    except DAMAGED_FILE as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    return _assemble(path, columns, inputs, size, fixed)


@dataclass(frozen=True, slots=True)
class _Column:
    """One array of a file: what its header says, and how to reach its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    open: Callable[[], BinaryIO]
    path: Path

    def read(self, start: int, stop: int, size: int) -> Iterator[Array]:
        row_shape = self.shape[1:]
        row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        try:
            with self.open() as stream:
                _read_header(stream)
                stream.seek(start * row_bytes, 1)
                for first in range(start, stop, size):
                    rows = min(size, stop - first)
                    block = stream.read(rows * row_bytes)
                    if len(block) != rows * row_bytes:
                        raise DataError(f"{self.path}: {self.name!r} ends before row {stop}")
                    yield np.frombuffer(block, self.dtype).reshape(rows, *row_shape)
        except DAMAGED_FILE as error:
            raise DataError(f"{self.path}: {self.name!r}: {one_line(error)}") from error


def _open_columns(path: Path, inputs: Sequence[ValueSpec]) -> dict[str, _Column]:
    if not path.is_file():
        raise DataError(
            f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file"
        )
    if path.suffix == ".npy":
        if len(inputs) != 1:
            raise DataError(
                f"{path}: an .npy holds one array, the model has {len(inputs)} inputs: "
                f"use an .npz with arrays named {listed(i.name for i in inputs)}"
            )
        return {inputs[0].name: _column(path, inputs[0].name, lambda: path.open("rb"))}
    if path.suffix != ".npz":
        raise DataError(f"{path}: calibration data must be an .npz or .npy file")
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if m.endswith(".npy")]
    return {m[:-4]: _column(path, m[:-4], _member_opener(path, m)) for m in members}


def _member_opener(path: Path, member: str) -> Callable[[], BinaryIO]:
    return lambda: cast(BinaryIO, zipfile.ZipFile(path).open(member))


def _column(path: Path, name: str, open_: Callable[[], BinaryIO]) -> _Column:
    with open_() as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        raise DataError(f"{path}: {name!r} holds Python objects, only numbers can be fed")
    if fortran_order and len(shape) > 1:
        raise DataError(
            f"{path}: {name!r} is stored in Fortran order and cannot be read by samples: "
            f"save np.ascontiguousarray of it"
        )
    return _Column(name, shape, dtype, open_, path)


def _read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(stream)


def _assemble(
    path: Path,
    columns: dict[str, _Column],
    inputs: Sequence[ValueSpec],
    size: int,
    fixed: int | None,
) -> Arrays:
    missing = [i.name for i in inputs if i.name not in columns]
    if missing:
        raise DataError(
            f"{path}: no array for input {listed(missing)}; it holds {listed(columns)}: "
            f"arrays must be named after the model's inputs"
        )
    for spec in inputs:
        _check_column(path, columns[spec.name], spec)
    fed = {spec.name: columns[spec.name] for spec in inputs}
    labels = columns.get(LABELS) if LABELS not in fed else None
    used = fed if labels is None else {**fed, LABELS: labels}
    lengths = {name: column.shape[0] if column.shape else 0 for name, column in used.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name!r}: {n}" for name, n in lengths.items())
        raise DataError(f"{path}: arrays differ in their number of samples ({described})")
    if labels is not None:
        check_labels(str(path), labels.dtype, labels.shape)
    n_samples, notes = _whole_feeds(path, lengths[inputs[0].name], fixed)
    extra = sorted(set(columns) - set(used))
    if extra:
        notes = (*notes, f"arrays that are no input of the model are not used: {listed(extra)}")
    return Arrays(
        n_samples=n_samples,
        batch_size=size,
        columns={name: column.read for name, column in fed.items()},
        labels=None if labels is None else labels.read,
        multiple=fixed or 1,
        notes=notes,
    )


def _whole_feeds(path: Path, n: int, fixed: int | None) -> tuple[int, tuple[str, ...]]:
    whole = n - n % fixed if fixed else n
    if whole == 0:
        enough = f", the model takes {fixed} at a time" if n else ""
        raise DataError(f"{path}: {n} samples{enough}: nothing to calibrate on")
    left = n - whole
    return whole, (f"the last {left} samples fill no batch of {fixed}: not used",) if left else ()


def _check_column(path: Path, column: _Column, spec: ValueSpec) -> None:
    if column.dtype != spec.dtype:
        raise DataError(
            f"{path}: {spec.name!r} is {column.dtype}, the model takes {spec.dtype}: "
            f"save it with .astype(np.{spec.dtype})"
        )
    check_shape(f"{path}: {spec.name!r}", column.shape, spec)


def check_shape(where: str, shape: tuple[int, ...], spec: ValueSpec) -> None:
    """Raises `DataError` if an array of ``shape`` cannot be a batch, or batches, of ``spec``."""
    if spec.shape is None:
        return
    declared = "x".join("?" if d is None else str(d) for d in spec.shape)
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(d, int) or d == n for d, n in zip(spec.shape[1:], shape[1:], strict=True)
    )
    if not fits:
        found = "x".join(map(str, shape)) or "a single number"
        raise DataError(
            f"{where} is {found}, the model takes {declared or 'a single number'}, with samples "
            f"along the first axis"
        )


def check_labels(where: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raises `DataError` unless labels of that type and shape are one integer for each sample."""
    if dtype.kind not in "iu" or len(shape) != 1:
        raise DataError(
            f"{where}: {LABELS!r} must be one integer for each sample, got {dtype} {shape}"
        )


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for messages."""
    return ", ".join(repr(name) for name in names) or "nothing"
