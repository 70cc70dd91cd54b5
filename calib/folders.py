"""Folders of calibration data: what lies in them, in which order, and folders of arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from calib.arrayfiles import ArrayFile, open_array_file, unused_note
from calib.arrays import Batch, Feeds, Takes, identify
from calib.errors import DataError, one_line


def files_below(folder: Path) -> list[Path]:
    """Every file below ``folder`` in natural order of the paths (``2.npy`` before ``10.npy``);
    none that is hidden, or in a hidden folder.

    Raises:
        DataError: if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(found, key=lambda path: natural(path.relative_to(folder).as_posix()))


def natural(text: str) -> tuple[list[str | int], str]:
    """A key that sorts numbers within names by their value."""
    parts: list[str | int] = [*re.split(r"(\d+)", text)]
    parts[1::2] = map(int, parts[1::2])
    return parts, text


def array_folder(folder: Path, files: Sequence[Path], takes: Takes) -> Feeds:
    """The samples of many ``.npz`` and ``.npy``, a sample or a batch each.

    An array with one axis less than the input is one sample. Neighbours of equal shapes share a
    feed. Where inputs are fed back each file is a sequence.

    Raises:
        DataError: as `calib.data.open_data`.
    """
    lengths: list[int] = []
    runs: list[Hashable] = []
    unused: set[str] = set()
    first: ArrayFile | None = None
    for number, path in enumerate(files):
        file = open_array_file(path, takes, single=True)
        first = first or file
        if (file.labels is None) != (first.labels is None):
            with_, without = (file, first) if file.labels else (first, file)
            raise DataError(f"{without.path}: has no 'labels', {with_.path.name} has: none or all")
        lengths.append(file.n_samples)
        runs.append(number if takes.fed_back else file.row_shapes)
        unused.update(file.unused)

    def read(number: int, start: int, stop: int, size: int) -> Iterator[Batch]:
        return open_array_file(files[number], takes, single=True).read(start, stop, size)

    counts, notes = usable(folder, lengths, runs, takes)
    return Feeds(
        counts=counts,
        read=read,
        takes=takes,
        notes=(*notes, *unused_note(sorted(unused))),
        identity=identify(files, takes.size),
    )


def usable(
    folder: Path, lengths: Sequence[int], runs: Sequence[Hashable], takes: Takes
) -> tuple[list[int], tuple[str, ...]]:
    """How many samples of each part fill whole feeds, and a note on the others.

    Args:
        folder: for messages.
        lengths: how many samples each part holds.
        runs: equal for neighbours that may share a feed.
        takes: what the model takes.

    Raises:
        DataError: if none do.
    """
    counts = list(lengths)
    fixed = takes.fixed or 1
    start = 0
    for stop in range(1, len(counts) + 1):
        if stop == len(counts) or runs[stop] != runs[start]:
            excess = sum(counts[start:stop]) % fixed
            for number in reversed(range(start, stop)):
                dropped = min(excess, counts[number])
                counts[number] -= dropped
                excess -= dropped
            start = stop
    left = sum(lengths) - sum(counts)
    if not sum(counts):
        enough = f", the model takes {fixed} of the same shape at a time" if left else ""
        raise DataError(f"{folder}: {left} samples{enough}: nothing to calibrate on")
    note = f"{left} samples fill no batch of {fixed}: not used"
    return counts, (note,) if left else ()


def reason(error: BaseException) -> str:
    """Type and message of an exception of foreign code, in one line."""
    return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
