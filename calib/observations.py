"""One pass over the calibration data: a counter for every activation, nothing kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from calib.arrays import DAMAGED_FILE, Batch
from calib.capture import Runtime, Session
from calib.counter import Counter
from calib.errors import DataError, ModelError, ObservationsError, one_line
from calib.files import whole_file, writing
from calib.graph import Model

_SCHEMA = 1
_MANIFEST = "observations"

Counters = dict[str, Counter]


@dataclass(frozen=True, slots=True)
class Observations:
    """What was counted.

    Attributes:
        model_sha256: digest of the model observed.
        n_samples: how many samples were seen.
        counters: one for each activation, all samples together.
        batches: the same for each of the first few batches alone, where that was asked for.
        n_batches: how many batches were seen.
    """

    model_sha256: str
    n_samples: int
    counters: Counters
    batches: tuple[Counters, ...] = ()
    n_batches: int = 0

    def save(self, path: str | Path) -> None:
        """Writes an ``.npz``, whole or not at all.

        Raises:
            OutputError: if the file cannot be written.
        """
        with writing(Path(path)), whole_file(Path(path)) as temporary:
            self.write(temporary)

    def write(self, path: Path) -> None:
        """As `save`, straight to ``path``: non-empty bins, exact statistics beside them."""
        groups = [self.counters, *self.batches]
        manifest = {
            "schema": _SCHEMA,
            "model_sha256": self.model_sha256,
            "n_samples": self.n_samples,
            "names": list(self.counters),
            "batches": len(self.batches),
            "n_batches": self.n_batches,
        }
        arrays: dict[str, Any] = {_MANIFEST: np.frombuffer(json.dumps(manifest).encode(), np.uint8)}
        for group, counters in enumerate(groups):
            for position, counter in enumerate(counters.values()):
                codes = np.flatnonzero(counter.counts)
                exact = [counter.min, counter.max, counter.n_zero, counter.n_nan, counter.n_inf]
                key = f"{group}.{position}"
                arrays[f"{key}.codes"] = codes.astype(np.uint16)
                arrays[f"{key}.counts"] = counter.counts[codes]
                arrays[f"{key}.exact"] = np.array(exact, np.float64)
        with path.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> Observations:
        """Reads what `save` wrote.

        Raises:
            ObservationsError: if the file is missing, is something else, was written by an
                incompatible version, or belongs to another model than ``model``.
        """
        path = Path(path)
        try:
            with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as arrays:
                manifest = json.loads(arrays[_MANIFEST].tobytes())
                if manifest["schema"] != _SCHEMA:
                    raise ObservationsError(
                        f"{path}: written with schema {manifest['schema']}, this version reads "
                        f"{_SCHEMA}: observe again"
                    )
                groups = [
                    {
                        name: _restore(arrays, f"{group}.{position}")
                        for position, name in enumerate(manifest["names"])
                    }
                    for group in range(1 + manifest["batches"])
                ]
                digest = str(manifest["model_sha256"])
                n_samples, n_batches = int(manifest["n_samples"]), int(manifest["n_batches"])
        except FileNotFoundError:
            raise ObservationsError(f"{path}: no such file") from None
        except (*DAMAGED_FILE, KeyError, IndexError) as error:
            raise ObservationsError(
                f"{path}: not a file that --save-observations wrote: {one_line(error)}"
            ) from error
        if digest != model.sha256:
            raise ObservationsError(
                f"{path}: observed on another model (sha256 {digest[:12]}...) "
                f"than {model.path} ({model.sha256[:12]}...): observe again"
            )
        return cls(model.sha256, n_samples, groups[0], tuple(groups[1:]), n_batches)


def observe(
    model: Model,
    batches: Iterable[Batch],
    names: Sequence[str],
    keep_batches: int = 0,
    runtime: Runtime | None = None,
) -> Observations:
    """Runs every batch once and counts the values of the activations ``names``.

    Args:
        keep_batches: of that many first batches, counters of their own are kept too.

    Raises:
        DataError: if the data holds NaN or infinity, or there is none.
        ModelError: if an activation becomes NaN or infinite, or onnxruntime fails.
    """
    session = Session(model.ir, runtime, values=names)
    total: Counters = {name: Counter() for name in names}
    kept: list[Counters] = []
    n_samples = n_batches = 0
    for batch in batches:
        batch.check_finite(n_samples)
        counters = total
        if len(kept) < keep_batches:
            counters = {name: Counter() for name in names}
            kept.append(counters)
        for name, values in session.run(batch.feed).items():
            counters[name].update(values)
            _check_counter(name, counters[name], n_samples)
        n_samples += batch.n_samples
        n_batches += 1
    if n_samples == 0:
        raise DataError("the calibration data holds no samples")
    for counters in kept:
        for name, counter in counters.items():
            total[name].merge(counter)
    return Observations(model.sha256, n_samples, total, tuple(kept), n_batches)


def _check_counter(name: str, counter: Counter, first: int) -> None:
    if counter.n_nan or counter.n_inf:
        what = "NaN" if counter.n_nan else "infinite"
        raise ModelError(
            f"activation {name!r} becomes {what} in the batch that starts at sample {first}: "
            f"the float model overflows on this data, or the data is not preprocessed for it"
        )


def _restore(arrays: NpzFile, key: str) -> Counter:
    counter = Counter()
    codes = arrays[f"{key}.codes"]
    if codes.dtype != np.uint16:
        raise ValueError(f"{key}.codes are no bfloat16 codes")
    counter.counts[codes] = arrays[f"{key}.counts"]
    counter.min, counter.max, *exact = map(float, arrays[f"{key}.exact"])
    counter.n_zero, counter.n_nan, counter.n_inf = map(int, exact)
    return counter
