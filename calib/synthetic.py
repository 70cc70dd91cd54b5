"""Made-up inputs, for models without calibration data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from calib.arrays import Array, Batch, Feeds, Takes
from calib.errors import DataError
from calib.graph import ValueSpec

_FREE_AXIS = 32
_N_SAMPLES = 64
_PIXELS_RANK = 3
_MOST_BYTES = 1 << 32


def synthetic(takes: Takes, seed: int) -> Feeds:
    """64 samples or a little more, so that they fill whole feeds, of what the model requires.

    Floats are Gaussian. Integers are 0 and 1, valid as indices, lengths and masks almost
    everywhere; uint8 arrays of three axes or more are taken for pixels, 0 to 255. Free axes are
    32 long.

    Raises:
        DataError: in a pass, if a feed would take more than 4 GiB.
    """
    required = {spec.name for spec in takes.required}
    whole = takes.whole
    if required <= whole:
        takes = replace(takes, size=1)

    def read(_part: int, start: int, stop: int, size: int) -> Iterator[Batch]:
        for first in range(start, stop, size):
            rows = min(size, stop - first)
            feed = {
                spec.name: _random(
                    np.random.default_rng((seed, number, first)),
                    spec,
                    None if spec.name in whole else rows,
                )
                for number, spec in enumerate(takes.inputs)
                if spec.name in required
            }
            yield Batch(feed, whole=whole)

    n_samples = -(-_N_SAMPLES // takes.size) * takes.size
    return Feeds([n_samples], read, takes, identity=f"synthetic:{seed}:{takes.size}")


def _random(rng: np.random.Generator, spec: ValueSpec, rows: int | None) -> Array:
    shape = [d if isinstance(d, int) else _FREE_AXIS for d in spec.shape or ()]
    if rows is not None and shape:
        shape[0] = rows
    n_bytes = math.prod(shape) * spec.dtype.itemsize
    if n_bytes > _MOST_BYTES:
        raise DataError(
            f"{spec.name!r} would take {n_bytes / 1e9:.0f} GB a feed, too much to make up: give "
            f"--data, or a smaller --batch-size"
        )
    dtype: np.dtype[Any] = spec.dtype
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    pixels = dtype == np.uint8 and len(shape) >= _PIXELS_RANK
    return rng.integers(0, 256 if pixels else 2, shape).astype(dtype)
