"""Calibration data: batches from files, folders, iterables and functions, or made up."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from calib.arrayfiles import ARRAY_SUFFIXES, open_file
from calib.arrays import (
    LABELS,
    Array,
    Batch,
    Takes,
    check_input,
    check_labels,
    check_whole,
    listed,
)
from calib.errors import CalibError, DataError, OptionError
from calib.folders import array_folder, files_below, reason
from calib.graph import Model
from calib.imagefolder import image_folder
from calib.images import IMAGE_SUFFIXES, Preprocessing
from calib.readers import is_function
from calib.synthetic import synthetic
from calib.testsets import set_folder, sets_below


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
        """Equal for the same files read in the same way, and for the same function; None where
        that cannot be told."""

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the samples from ``start`` to before ``stop``."""


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
    identity: str | None = None
    n_samples: ClassVar[None] = None
    multiple: ClassVar[int] = 1
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def once_only(self) -> bool:
        """Whether a second pass would find nothing."""
        return hasattr(self.source, "get_next") or isinstance(self.source, Iterator)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches that reach beyond ``start`` or ``stop`` are cut there, unless the model fixes
        their size or keeps a state."""
        seen = 0
        uncut = bool(self.takes.first_axes or self.takes.fed_back)
        for batch in self._feeds():
            if stop is not None and seen >= stop:
                return
            first, last = max(start - seen, 0), batch.n_samples
            if stop is not None:
                last = min(last, stop - seen)
            seen += batch.n_samples
            if first < last:
                yield batch if uncut else batch.part(first, last)

    def _feeds(self) -> Iterator[Batch]:
        fixed, fed_back = self.takes.fixed, self.takes.fed_back
        where = f"{self.identity}: batch" if self.identity else "batch"
        for number, item in enumerate(_iterate(self.source)):
            batch = _as_batch(item, self.takes, f"{where} {number}")
            if fixed is None or batch.n_samples == fixed:
                yield replace(batch, restart=True) if fed_back and number == 0 else batch
                continue
            for first in range(0, batch.n_samples, fixed):
                part = batch.part(first, first + fixed)
                later = {n: a for n, a in part.feed.items() if n not in fed_back}
                restart = first == 0 and (number == 0 or batch.restart) and bool(fed_back)
                yield replace(part, feed=later if first else part.feed, restart=restart)


@dataclass(frozen=True, slots=True)
class _Function:
    """The batches of ``package.module:function``, which is called anew for each pass."""

    source: str
    function: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        try:
            batches = self.function()
            _check_batches(batches, f"{self.source}: it must return")
            yield from _iterate(batches)
        except CalibError:
            raise
        except Exception as error:
            raise DataError(f"{self.source}: {reason(error)}") from error


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
    takes = Takes.of(model, reading.batch_size)
    if isinstance(source, str | Path):
        return _open_path(Path(source), takes, reading)
    reading.check_unused("made up" if source is None else f"a {type(source).__name__}")
    if source is None:
        return synthetic(takes, reading.seed)
    _check_batches(source, "data must be a path or")
    return Batches(source, takes)


def _open_path(path: Path, takes: Takes, reading: Reading) -> Data:
    if path.is_dir():
        return _open_folder(path, takes, reading)
    function = is_function(str(path))
    if not function and not path.exists():
        raise DataError(f"{path}: no such file")
    reading.check_unused(str(path))
    if function:
        return Batches(_Function(str(path), _imported(str(path))), takes, str(path))
    if len(takes.first_axes) > 1:
        raise DataError(
            f"{path}: the model's inputs have different fixed first axes "
            f"{list(takes.first_axes)}: which of them counts samples cannot be told; feed "
            f"dictionaries from Python, or a folder with an .npz for each feed"
        )
    return open_file(path, takes)


def _check_batches(source: object, what: str) -> None:
    if not isinstance(source, Iterable) and not hasattr(source, "get_next"):
        raise DataError(f"{what} an iterable of batches, got {source!r}")
    if isinstance(source, Mapping):
        raise DataError(f"{what} an iterable of batches, got one mapping: wrap it in a list")


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
        return image_folder(folder, images, takes, reading.images, reading.labels)
    reading.check_unused(f"{found[0]} in {folder}")
    if arrays:
        return array_folder(folder, arrays, takes)
    return set_folder(folder, sets, takes)


def _imported(source: str) -> Callable[[], Any]:
    """The function that ``package.module:function`` names, also in the current directory."""
    module, _, name = source.partition(":")
    here = os.getcwd()  # noqa: PTH109 - a string, as sys.path wants it
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise DataError(f"{source}: cannot be imported: {reason(error)}") from error
    finally:
        with suppress(ValueError):  # the module may have removed it
            sys.path.remove(here)
    if not callable(found):
        raise DataError(f"{source}: must be a function, is of type {type(found).__name__}")
    return found


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
    if takes.fixed is not None and batch.n_samples % takes.fixed:
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
    return np.asarray(value)
