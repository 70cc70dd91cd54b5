"""Calibration data in ``.npz`` and ``.npy`` files, read in chunks and never whole."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from calib.arrays import (
    DAMAGED_FILE,
    LABELS,
    Array,
    Batch,
    Feeds,
    Takes,
    check_input,
    check_labels,
    check_whole,
    identify,
    listed,
)
from calib.errors import DataError, one_line

ARRAY_SUFFIXES = (".npy", ".npz")
_LOCAL_HEADER = struct.Struct("<26s2H")  # ends with how long the name and the extra field are


@dataclass(frozen=True, slots=True)
class _Column:
    """One array of a file: what its header says, and how to reach its bytes.

    Attributes:
        member: of an archive.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    path: Path
    member: str | None = None

    def read(self, start: int, stop: int, size: int) -> Iterator[Array]:
        row_shape = self.shape[1:]
        row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        try:
            stream, end = self._opened_for(start, stop)
            with stream:
                _read_header(stream)
                stream.seek(start * row_bytes, 1)
                for first in range(start, stop, size):
                    rows = min(size, stop - first)
                    block = stream.read(rows * row_bytes)
                    if len(block) != rows * row_bytes or stream.tell() > end:
                        raise DataError(f"{self.path}: {self.name!r} ends before row {stop}")
                    yield np.frombuffer(block, self.dtype).reshape(rows, *row_shape)
        except DAMAGED_FILE as error:
            raise DataError(f"{self.path}: {self.name!r}: {one_line(error)}") from error

    def _opened_for(self, start: int, stop: int) -> tuple[BinaryIO, float]:
        """What rows are read from, and where it ends at the latest.

        To begin in the middle, an archive reads all before. Only who reads the last row lets it:
        then it has seen all, and holds it against its checksum.
        """
        if self.member is not None and start > 0 and stop < self.shape[0]:
            span = _stored_at(self.path, self.member)
            if span is not None:
                stream = self.path.open("rb")
                stream.seek(span[0])
                return stream, span[1]
        return _opened(self.path, self.member), math.inf

    def as_one_row(self) -> _Column:
        """The same values with a leading axis of length 1."""
        return replace(self, shape=(1, *self.shape))

    def read_whole(self) -> Array:
        """The array as it is."""
        return next(self.as_one_row().read(0, 1, 1)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An ``.npz`` or ``.npy`` that fits a model: ``rows`` holds samples along the first axes,
    ``whole`` what is fed as it is, ``unused`` the names of what is no input."""

    path: Path
    takes: Takes
    n_samples: int
    rows: Mapping[str, _Column]
    whole: Mapping[str, _Column]
    labels: _Column | None
    unused: tuple[str, ...]

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the samples, input by input."""
        return tuple(column.shape[1:] for column in self.rows.values())

    def read(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """The samples from ``start`` to before ``stop`` in chunks of ``size``. The first starts a
        sequence where inputs are fed back, and holds their first values if the file does."""
        fed_back = self.takes.fed_back
        whole = {name: column.read_whole() for name, column in self.whole.items()}
        streams = [column.read(start, stop, size) for column in self.rows.values()]
        chunks = zip(*streams, strict=True) if streams else iter([()])
        labels: Iterable[Array | None] = repeat(None)
        if self.labels is not None:
            labels = chain(self.labels.read(start, stop, size), repeat(None))
        restart = bool(fed_back)
        for arrays, batch_labels in zip(chunks, labels, strict=False):
            feed = {**dict(zip(self.rows, arrays, strict=True)), **whole}
            yield Batch(feed, batch_labels, restart, self.takes.whole)
            whole = {name: array for name, array in whole.items() if name not in fed_back}
            restart = False


def open_array_file(path: Path, takes: Takes, *, single: bool = False) -> ArrayFile:
    """The arrays of an ``.npz`` (named after the inputs, and ``labels``) or of an ``.npy``.

    Args:
        path: the file; its headers are read.
        takes: what the model takes.
        single: an array with one axis less than the input is one sample.

    Raises:
        DataError: as `calib.data.open_data`.
    """
    try:
        columns = _open_columns(path, takes)
    except DAMAGED_FILE as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    missing = [spec.name for spec in takes.required if spec.name not in columns]
    if missing:
        raise DataError(
            f"{path}: no array for input {listed(missing)}; it holds {listed(columns)}: "
            f"arrays must be named after the model's inputs"
        )
    fed_whole = takes.whole
    rows: dict[str, _Column] = {}
    whole: dict[str, _Column] = {}
    for spec in takes.inputs:
        column = columns.get(spec.name)
        if column is None:
            continue
        if spec.name in fed_whole or (spec.shape is None and not column.shape):
            check_whole(str(path), column.shape, column.dtype, spec)
            whole[spec.name] = column
            continue
        if single and spec.shape is not None and len(column.shape) == len(spec.shape) - 1:
            column = column.as_one_row()
        check_input(str(path), column.shape, column.dtype, spec)
        rows[spec.name] = column
    labels = _labels(columns, takes, single)
    n_samples = _length(path, rows if labels is None else {**rows, LABELS: labels})
    used = {*rows, *whole, *(() if labels is None else (LABELS,))}
    unused = tuple(sorted(set(columns) - used))
    return ArrayFile(path, takes, n_samples, rows, whole, labels, unused)


def open_file(path: Path, takes: Takes) -> Feeds:
    """The samples of one ``.npz`` or ``.npy``, along the first axes of its arrays.

    Raises:
        DataError: as `calib.data.open_data`.
    """
    file = open_array_file(path, takes)
    left = file.n_samples % takes.size if takes.fixed else 0
    n_samples = file.n_samples - left
    if n_samples == 0:
        enough = f", the model takes {takes.fixed} at a time" if left else ""
        raise DataError(f"{path}: {left} samples{enough}: nothing to calibrate on")
    notes = [f"the last {left} samples fill no batch of {takes.fixed}: not used"] if left else []
    return Feeds(
        counts=[n_samples],
        read=lambda _part, start, stop, size: file.read(start, stop, size),
        takes=takes,
        notes=(*notes, *unused_note(file.unused)),
        identity=identify([path], takes.size),
    )


def unused_note(names: Iterable[str]) -> tuple[str, ...]:
    """A note on arrays that are no input, if there are any."""
    names = list(names)
    told = f"arrays that are no input of the model are not used: {listed(names)}"
    return (told,) if names else ()


def _labels(columns: Mapping[str, _Column], takes: Takes, single: bool) -> _Column | None:
    """The classes, unless an input is called so."""
    labels = columns.get(LABELS)
    if labels is None or LABELS in {spec.name for spec in takes.inputs}:
        return None
    if single and labels.shape == ():
        labels = labels.as_one_row()
    check_labels(str(labels.path), labels.dtype, labels.shape)
    return labels


def _length(path: Path, columns: Mapping[str, _Column]) -> int:
    lengths = {name: column.shape[0] for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name!r}: {n}" for name, n in lengths.items())
        raise DataError(f"{path}: arrays differ in their number of samples ({described})")
    return next(iter(lengths.values()), 1)


def _open_columns(path: Path, takes: Takes) -> dict[str, _Column]:
    if not path.is_file():
        raise DataError(
            f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file"
        )
    if path.suffix == ".npy":
        names = [spec.name for spec in takes.required]
        if len(names) != 1:
            raise DataError(
                f"{path}: an .npy holds one array, the model has {len(names)} inputs: "
                f"use an .npz with arrays named {listed(names)}"
            )
        return {names[0]: _column(path, names[0])}
    if path.suffix != ".npz":
        raise DataError(
            f"{path}: calibration data must be an .npz or .npy file, a directory, or "
            f"package.module:function"
        )
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if m.endswith(".npy")]
    return {m[:-4]: _column(path, m[:-4], m) for m in members}


def _opened(path: Path, member: str | None) -> BinaryIO:
    return path.open("rb") if member is None else cast(BinaryIO, zipfile.ZipFile(path).open(member))


def _stored_at(path: Path, member: str) -> tuple[int, int] | None:
    """Where the bytes of a member begin and end, if it is neither compressed nor encrypted."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        return None
    start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[-2:])
    return start, start + info.file_size


def _column(path: Path, name: str, member: str | None = None) -> _Column:
    with _opened(path, member) as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        raise DataError(f"{path}: {name!r} holds Python objects, only numbers can be fed")
    if fortran_order and len(shape) > 1:
        raise DataError(
            f"{path}: {name!r} is stored in Fortran order and cannot be read by samples: "
            f"save np.ascontiguousarray of it"
        )
    return _Column(name, shape, dtype, path, member)


def _read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(stream)
