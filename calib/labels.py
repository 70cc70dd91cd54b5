"""The class of each image, from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from calib.arrays import listed
from calib.errors import DataError, one_line

_HEADER = ("file", "label")


def read_labels(
    path: Path, folder: Path, images: Sequence[Path]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The class of each image, and a note on classes of images that are not there.

    Args:
        path: a CSV with the columns ``file`` and ``label`` under a header, or these two columns and
            no header. Files are relative to ``folder``, or names that only one image has.
        folder: where the images lie.
        images: paths below ``folder``.

    Raises:
        DataError: if the file is unreadable, a class is no integer, a name belongs to several
            images or stands there with two classes, or an image has none.
    """
    found: dict[Path, int] = {}
    paths = {image.relative_to(folder).as_posix(): image for image in images}
    names: dict[str, list[Path]] = {}
    for image in images:
        names.setdefault(image.name, []).append(image)
    absent = 0
    for line, name, label in _rows(path):
        relative = PurePosixPath(name.replace("\\", "/")).as_posix()
        matches = [paths[relative]] if relative in paths else names.get(relative, [])
        if len(matches) > 1:
            raise DataError(f"{path}: line {line}: {name!r} is the name of {len(matches)} images")
        absent += not matches
        if matches and found.setdefault(matches[0], label) != label:
            raise DataError(
                f"{path}: line {line}: {name!r} has class {label} here, {found[matches[0]]} before"
            )
    without = [image for image in images if image not in found]
    if without:
        raise DataError(
            f"{path}: no class for {len(without)} of {len(images)} images: "
            f"{listed((image.relative_to(folder).as_posix() for image in without), 3)}"
        )
    note = f"{path.name}: {absent} classes belong to no image: not used"
    return np.array([found[image] for image in images], np.int64), (note,) if absent else ()


def _rows(path: Path) -> Iterator[tuple[int, str, int]]:
    """Line, file and class of each row."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines, strict=True)
            columns: tuple[int, int] | None = None
            for row in rows:
                if not row:
                    continue
                if columns is None:
                    columns, is_header = _columns(path, row)
                    if is_header:
                        continue
                yield _row(f"{path}: line {rows.line_num}", rows.line_num, row, columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def _columns(path: Path, row: list[str]) -> tuple[tuple[int, int], bool]:
    """Where file and class stand, and whether ``row``, the first, is a header."""
    named = [cell.strip().lower() for cell in row]
    if all(name in named for name in _HEADER):
        return (named.index("file"), named.index("label")), True
    if len(row) != 2:
        raise DataError(
            f"{path}: line 1: {len(row)} columns and no header: two columns, file and label, or a "
            f"header that names them are needed"
        )
    return (0, 1), False


def _row(where: str, line: int, row: list[str], columns: tuple[int, int]) -> tuple[int, str, int]:
    if len(row) <= max(columns):
        raise DataError(f"{where}: {len(row)} columns, {max(columns) + 1} are needed")
    text = row[columns[1]].strip()
    try:
        label = int(text)
    except ValueError:
        raise DataError(
            f"{where}: the class must be an integer, got {text!r}; a header must be file,label"
        ) from None
    if abs(label) > np.iinfo(np.int64).max:
        raise DataError(f"{where}: the class {text} is too large")
    return line, row[columns[0]].strip(), label
