"""Counters as they are stored in an ``.npz``, with a manifest, and as they travel between
processes: the non-empty bins of each, exact statistics beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from calib.counter import Counter

_MANIFEST = "observations"

Counters = Mapping[str, Counter]


def write_counters(path: Path, manifest: Mapping[str, Any], groups: Mapping[str, Counters]) -> None:
    """Writes ``groups``, all of counters of the same names, under their keys."""
    arrays: dict[str, Any] = {_MANIFEST: np.frombuffer(json.dumps(manifest).encode(), np.uint8)}
    for group, counters in groups.items():
        for position, counter in enumerate(counters.values()):
            codes, counts = counter.bins()
            exact = [counter.min, counter.max, counter.n_zero, counter.n_nan, counter.n_inf]
            key = f"{group}.{position}"
            arrays[f"{key}.codes"] = codes.astype(np.uint16)
            arrays[f"{key}.counts"] = counts
            arrays[f"{key}.exact"] = np.array(exact, np.float64)
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def read_manifest(arrays: NpzFile) -> dict[str, Any]:
    """What `write_counters` was told beside the counters."""
    manifest: dict[str, Any] = json.loads(arrays[_MANIFEST].tobytes())
    return manifest


def read_counters(arrays: NpzFile, group: str, names: list[str]) -> dict[str, Counter]:
    """The counters of one group.

    Raises:
        ValueError, KeyError: if the file is damaged.
    """
    return {name: _restore(arrays, f"{group}.{position}") for position, name in enumerate(names)}


def is_checkpoint(path: Path) -> bool:
    """Whether the file at ``path`` holds observations, of whatever model."""
    try:
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as arrays:
            return _MANIFEST in arrays.files
    except Exception:  # no npz, or damaged
        return False


def _restore(arrays: NpzFile, key: str) -> Counter:
    counter = Counter()
    codes, counts = arrays[f"{key}.codes"], arrays[f"{key}.counts"]
    if codes.dtype != np.uint16 or codes.shape != counts.shape or (counts < 0).any():
        raise ValueError(f"{key} holds no counts of bfloat16 codes")
    counter.counts[codes] = counts
    counter.min, counter.max, *exact = map(float, arrays[f"{key}.exact"])
    if len(counts) and not -np.inf < counter.min <= counter.max < np.inf:
        raise ValueError(f"{key} lies between {counter.min} and {counter.max}")
    counter.n_zero, counter.n_nan, counter.n_inf = map(int, exact)
    return counter


@dataclass(frozen=True, slots=True)
class Packed:
    """A counter as it travels: only the bins that hold something."""

    codes: NDArray[np.uint16]
    counts: NDArray[np.int64]
    ends: tuple[float, float]
    special: tuple[int, int, int]

    @classmethod
    def of(cls, counter: Counter) -> Packed:
        """All that ``counter`` has counted."""
        codes, counts = counter.bins()
        special = counter.n_zero, counter.n_nan, counter.n_inf
        return cls(codes.astype(np.uint16), counts, (counter.min, counter.max), special)

    def unpacked(self) -> Counter:
        """The counter."""
        counter = Counter()
        counter.counts[self.codes] = self.counts
        counter.min, counter.max = self.ends
        counter.n_zero, counter.n_nan, counter.n_inf = self.special
        return counter
