"""ONNX test data as calibration data: folders with ``input_0.pb``, ``input_1.pb`` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from calib.arrays import (
    Array,
    Batch,
    Feeds,
    Takes,
    check_whole,
    identify,
    listed,
)
from calib.errors import DataError
from calib.folders import natural, reason
from calib.graph import ValueSpec

_INPUT = re.compile(r"input_\d+\.pb")

Sets = Mapping[Path, Sequence[Path]]


def sets_below(folder: Path, files: Sequence[Path]) -> Sets:
    """The ``input_….pb`` of ``folder`` itself and of its ``test_data_set_…``, by set, in order."""
    sets: dict[Path, list[Path]] = {}
    for path in files:
        parent = path.parent
        in_set = parent.parent == folder and parent.name.startswith("test_data_set_")
        if _INPUT.fullmatch(path.name) and (parent == folder or in_set):
            sets.setdefault(parent, []).append(path)
    return {
        parent: sorted(sets[parent], key=lambda path: natural(path.name))
        for parent in sorted(sets, key=lambda parent: natural(parent.name))
    }


def set_folder(folder: Path, sets: Sets, takes: Takes) -> Feeds:
    """Every set as one feed, its files in the order of the model's inputs.

    Raises:
        DataError: if a set does not fit the model, or cannot be read.
    """
    parts = list(sets.items())

    def read(number: int, start: int, stop: int, _size: int) -> Iterator[Batch]:
        yield _read_set(*parts[number], takes).part(start, stop)

    counts = [_read_set(*part, takes).n_samples for part in parts]
    if not sum(counts):
        raise DataError(f"{folder}: 0 samples: nothing to calibrate on")
    files = [path for paths in sets.values() for path in paths]
    # A feed is never cut, and restart keeps neighbours from sharing one.
    return Feeds(counts, read, replace(takes, size=max(counts)), identity=identify(files))


def _read_set(parent: Path, paths: Sequence[Path], takes: Takes) -> Batch:
    specs = takes.required if len(paths) == len(takes.required) else takes.inputs
    if len(paths) != len(specs):
        raise DataError(
            f"{parent}: holds {listed(path.name for path in paths)}, the model has {len(specs)} "
            f"inputs: {listed(spec.name for spec in specs)}"
        )
    feed = {spec.name: _read(path, spec) for path, spec in zip(paths, specs, strict=True)}
    for spec in specs:
        check_whole(str(parent), feed[spec.name].shape, feed[spec.name].dtype, spec)
    return Batch(feed, restart=True, whole=takes.whole)


def _read(path: Path, spec: ValueSpec) -> Array:
    try:
        array: Array = onnx.numpy_helper.to_array(onnx.load_tensor(path))
    except Exception as error:  # protobuf and NumPy each raise types of their own
        raise DataError(
            f"{path}: no tensor for {spec.name!r} can be read: {reason(error)}"
        ) from error
    return array
