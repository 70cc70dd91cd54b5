"""Calibration data: batches from files, folders, iterables and functions, or made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from calib.arrayfiles import ARRAY_SUFFIXES, open_file
from calib.arrays import Batch, Feeds, Takes, listed
from calib.errors import DataError, OptionError
from calib.folders import array_folder, files_below
from calib.graph import Model
from calib.imagefolder import image_folder
from calib.images import IMAGE_SUFFIXES, Preprocessing
from calib.iterables import Batches, Function, check_batches, import_function
from calib.readers import is_function
from calib.synthetic import synthetic
from calib.testsets import set_folder, sets_below

_SILENT_SUFFIXES = {"", ".csv", ".json", ".md", ".txt", ".yaml", ".yml", ".onnx"}


@dataclass(frozen=True, slots=True)
class Reading:
    """How calibration data becomes feeds.

    Args:
        batch_size: samples a feed, where the model leaves that free.
        seed: of synthetic values.
        labels: CSV file with the class of each image.
        images: what happens to images.

    Raises:
        OptionError: if a number is out of bounds.
    """

    batch_size: int = 32
    seed: int = 0
    labels: Path | None = None
    images: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"batch-size must be at least 1, got {self.batch_size}")
        if self.seed < 0:
            raise OptionError(f"seed must not be negative, got {self.seed}")
        if self.labels is not None:
            object.__setattr__(self, "labels", Path(self.labels))

    def check_unused(self, what: str) -> None:
        """Raises `OptionError` if something is set that belongs to images; ``what`` there is
        instead."""
        asked = {"labels": self.labels}
        asked |= {name: getattr(self.images, name) for name in Preprocessing.__slots__}
        given = [name.replace("_", "-") for name, value in asked.items() if value is not None]
        if given:
            raise OptionError(
                f"{given[0]} belongs to a folder of images, the calibration data is {what}"
            )


@dataclass(frozen=True, slots=True)
class Origin:
    """What data was opened from, so that another process can open it, too.

    Attributes:
        source: path of a file or folder; None for made-up inputs.
        reading: how it becomes feeds.
    """

    source: Path | None
    reading: Reading


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

    @property
    def identity(self) -> str | None:
        """Equal for the same files read in the same way; None where that cannot be told."""

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the samples from ``start`` to before ``stop``."""


def open_data(model: Model, source: object, reading: Reading | None = None) -> Data:
    """Data that fits ``model``'s inputs.

    Args:
        model: names, types and shapes of the inputs are taken from it.
        source: path of an ``.npz`` (arrays named after the inputs, and ``labels``), of an ``.npy``
            (models with one required input), or of a folder: of images, of such files with a sample
            or a batch each, or of ONNX test data (``test_data_set_0/input_0.pb``);
            ``package.module:function``, which returns an iterable of batches; such an iterable, see
            `Batches`; or None for seeded synthetic values.
        reading: batch size, preprocessing and the like.

    Raises:
        DataError: if a file is missing or unreadable, an array is missing, misnamed, of the wrong
            type, or of a shape the model does not take, or there are no samples.
        OptionError: if ``reading`` says something of images, and there are none.
    """
    reading = reading or Reading()
    data = _open(source, Takes.of(model, reading.batch_size), reading)
    if not isinstance(data, Feeds):
        return data
    path = Path(source) if isinstance(source, str | Path) else None
    return replace(data, origin=Origin(path, reading))


def _open(source: object, takes: Takes, reading: Reading) -> Data:
    if isinstance(source, str | Path):
        return _open_path(Path(source), takes, reading)
    reading.check_unused("made up" if source is None else f"a {type(source).__name__}")
    if source is None:
        return synthetic(takes, reading.seed)
    check_batches(source, "data must be a path or")
    return Batches(source, takes)


def _open_path(path: Path, takes: Takes, reading: Reading) -> Data:
    if path.is_dir():
        return _open_folder(path, takes, reading)
    function = is_function(str(path))
    if not function and not path.exists():
        raise DataError(f"{path}: no such file")
    reading.check_unused(str(path))
    if function:
        return Batches(Function(str(path), import_function(str(path))), takes)
    if len(takes.first_axes) > 1:
        raise DataError(
            f"{path}: the model's inputs have different fixed first axes "
            f"{list(takes.first_axes)}: which of them counts samples cannot be told; feed "
            f"dictionaries from Python, or a folder with an .npz for each feed"
        )
    return open_file(path, takes)


def _open_folder(folder: Path, takes: Takes, reading: Reading) -> Data:
    files = files_below(folder)
    arrays = [path for path in files if path.suffix in ARRAY_SUFFIXES]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    sets = sets_below(folder, files)
    kinds = {"images": images, ".npy and .npz files": arrays, "ONNX test data sets": sets}
    found = [f"{len(paths)} {kind}" for kind, paths in kinds.items() if paths]
    if not found:
        names = (path.relative_to(folder).as_posix() for path in files)
        raise DataError(
            f"{folder}: the directory must hold images, .npy or .npz files, or ONNX test data "
            f"(input_0.pb, or test_data_set_0 and so on), it holds {listed(names, 3)}"
        )
    if len(found) > 1:
        raise DataError(
            f"{folder}: the directory holds {' and '.join(found)}: calibration data must be of one "
            f"kind"
        )
    if images:
        others = {p.suffix for p in files} - {p.suffix for p in images} - _SILENT_SUFFIXES
        note = (f"files that are no images are passed over: {listed(sorted(others))}",)
        data = image_folder(folder, images, takes, reading.images, reading.labels)
        return replace(data, notes=(*data.notes, *(note if others else ())))
    reading.check_unused(f"{found[0]} in {folder}")
    return array_folder(folder, arrays, takes) if arrays else set_folder(folder, sets, takes)
