"""One pass over the calibration data: a counter for every activation, nothing kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from calib.arrays import Batch, listed
from calib.capture import Runtime, Session, Values
from calib.counter import Counter
from calib.counterfile import Counters, read_counters, read_manifest, write_counters
from calib.errors import DataError, ModelError, ObservationsError, OptionError, one_line
from calib.files import whole_file, writing
from calib.graph import Model

_SCHEMA = 1


class Summed(Mapping[str, Counter]):
    """Two halves together: a sum is made when it is asked for, so that none take memory."""

    def __init__(self, halves: tuple[Counters, Counters]):
        self._halves = halves

    def __getitem__(self, name: str) -> Counter:
        total = Counter()
        for half in self._halves:
            total.merge(half[name])
        return total

    def __contains__(self, name: object) -> bool:
        return name in self._halves[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._halves[0])

    def __len__(self) -> int:
        return len(self._halves[0])


@dataclass(frozen=True, slots=True)
class Observations:
    """What was counted.

    Attributes:
        model_sha256: digest of the model observed.
        n_samples: how many samples were seen.
        counters: one for each activation, all samples together.
        batches: the same for each of the first few batches alone, where that was asked for.
        n_batches: how many batches were seen.
        unmasked: activations counted with their padding, as the mask did not fit them.
        identity: of the data and settings, so that only the same run is resumed.
        padding_mask: the input that said what is padding and was not counted.
        feedback: see `calib.graph.Model`.
        halves: counters of every other batch from the first, and of those from the second, where
            that was asked for; ``counters`` are exactly their sums. None of a single batch.
        half_samples: how many samples each half has seen.
    """

    model_sha256: str
    n_samples: int
    counters: Counters
    batches: tuple[Counters, ...] = ()
    n_batches: int = 0
    unmasked: tuple[str, ...] = ()
    identity: str = ""
    padding_mask: str | None = None
    feedback: Mapping[str, str] = field(default_factory=dict)
    halves: tuple[Counters, ...] = ()
    half_samples: tuple[int, int] = (0, 0)

    def save(self, path: str | Path) -> None:
        """Writes an ``.npz``, whole or not at all.

        Raises:
            OutputError: if the file cannot be written.
        """
        with whole_file(Path(path)) as temporary, writing(Path(path)):
            self.write(temporary)

    def write(self, path: Path) -> None:
        """As `save`, straight to ``path``: non-empty bins, exact statistics beside them."""
        manifest = {
            "schema": _SCHEMA,
            "model_sha256": self.model_sha256,
            "n_samples": self.n_samples,
            "names": list(self.counters),
            "batches": len(self.batches),
            "n_batches": self.n_batches,
            "unmasked": self.unmasked,
            "identity": self.identity,
            "padding_mask": self.padding_mask,
            "feedback": dict(self.feedback),
            "half_samples": self.half_samples if self.halves else None,
        }
        groups: dict[str, Mapping[str, Counter]] = {
            f"{1 + n}": batch for n, batch in enumerate(self.batches)
        }
        if self.halves:
            groups.update({f"half{n}": half for n, half in enumerate(self.halves)})
        else:
            groups["0"] = self.counters
        write_counters(path, manifest, groups)

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
                seen = _read(arrays, path)
        except FileNotFoundError:
            raise ObservationsError(f"{path}: no such file") from None
        except (ObservationsError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes NumPy and zipfile raise
            raise ObservationsError(
                f"{path}: not a file that --save-observations wrote: {one_line(error)}"
            ) from error
        if seen.model_sha256 != model.sha256:
            raise ObservationsError(
                f"{path}: observed on another model (sha256 {seen.model_sha256[:12]}...) "
                f"than {model.path} ({model.sha256[:12]}...): observe again"
            )
        if seen.feedback != dict(model.feedback):
            raise ObservationsError(
                f"{path}: observed with feed-back {seen.feedback}, now it is "
                f"{dict(model.feedback)}: observe again"
            )
        return seen


def _read(arrays: NpzFile, path: Path) -> Observations:
    manifest = read_manifest(arrays)
    if manifest["schema"] != _SCHEMA:
        raise ObservationsError(
            f"{path}: written with schema {manifest['schema']}, this version reads {_SCHEMA}: "
            f"observe again"
        )
    names, half_samples = manifest["names"], manifest.get("half_samples")
    batches = (read_counters(arrays, str(1 + n), names) for n in range(manifest["batches"]))
    seen = Observations(
        model_sha256=str(manifest["model_sha256"]),
        n_samples=int(manifest["n_samples"]),
        counters={} if half_samples else read_counters(arrays, "0", names),
        batches=tuple(batches),
        n_batches=int(manifest["n_batches"]),
        unmasked=tuple(map(str, manifest.get("unmasked", ()))),
        identity=str(manifest.get("identity", "")),
        padding_mask=manifest.get("padding_mask"),
        feedback=dict(manifest.get("feedback", {})),
    )
    if not half_samples:
        return seen
    first, second = (read_counters(arrays, f"half{n}", names) for n in range(2))
    return _halved(seen, (first, second), tuple(map(int, half_samples)))


@dataclass(frozen=True, slots=True)
class Observing:
    """How a model is observed.

    Args:
        keep_batches: of that many first batches, counters of their own are kept too.
        halves: of every other batch, counters of their own are kept too, to tell how much depends
            on the samples; counting takes twice the memory then, and no more time.
        runtime: provider and threads.
        padding_mask: input that is 0 where padding stands; of activations whose first axes are the
            mask's, what stands there is not counted.
        resumed: what an earlier run has counted; the batches are those behind.
        checkpoint: called with what is counted so far, every ``checkpoint_seconds``.
        checkpoint_seconds: at most so much work is lost.
    """

    keep_batches: int = 0
    runtime: Runtime | None = None
    padding_mask: str | None = None
    resumed: Observations | None = None
    checkpoint: Callable[[Observations], None] | None = None
    checkpoint_seconds: float = 30.0
    halves: bool = False


def observe(
    model: Model,
    batches: Iterable[Batch],
    names: Sequence[str],
    how: Observing | None = None,
) -> Observations:
    """Runs every batch once and counts the values of the activations ``names``.

    Raises:
        DataError: if the data holds NaN or infinity, or there is none.
        ModelError: if an activation becomes NaN or infinite, or onnxruntime fails.
        OptionError: if the padding mask is no input.
    """
    how = how or Observing()
    inputs = [spec.name for spec in model.inputs]
    if how.padding_mask is not None and how.padding_mask not in inputs:
        raise OptionError(
            f"padding-mask: the model has no input {how.padding_mask!r}, only {listed(inputs)}"
        )
    maskable = _maskable(model, names, how.padding_mask)
    session = Session(model.ir, how.runtime, values=names, feedback=model.feedback)
    seen = how.resumed or Observations(
        model.sha256,
        0,
        {name: Counter() for name in names},
        padding_mask=how.padding_mask,
        feedback=model.feedback,
    )
    seen = _dealt(seen) if how.halves else seen
    last_checkpoint = time.monotonic()
    for batch in batches:
        batch.check_finite(seen.n_samples)
        mask = _mask(batch, how.padding_mask, seen.n_samples)
        values = session.run(batch.feed, batch.restart)
        seen = _add(seen, batch, values, (how.keep_batches, mask, maskable))
        if how.checkpoint and time.monotonic() - last_checkpoint >= how.checkpoint_seconds:
            how.checkpoint(_settled(seen))
            last_checkpoint = time.monotonic()
    if seen.n_samples == 0:
        raise DataError("the calibration data holds no samples")
    return _settled(seen)


def _halved(
    seen: Observations, halves: tuple[Counters, Counters], n_samples: tuple[int, ...]
) -> Observations:
    first, second = n_samples
    return replace(seen, counters=Summed(halves), halves=halves, half_samples=(first, second))


def _dealt(seen: Observations) -> Observations:
    """``seen``, ready to be counted on in halves; as it is where too much is counted already."""
    if seen.halves or seen.n_batches > 1:
        return seen
    return _halved(
        seen, (seen.counters, {name: Counter() for name in seen.counters}), (seen.n_samples, 0)
    )


def _settled(seen: Observations) -> Observations:
    """``seen`` without halves if one of them is empty."""
    if not seen.halves or seen.n_batches > 1:
        return seen
    return replace(seen, counters=seen.halves[0], halves=(), half_samples=(0, 0))


def _mask(batch: Batch, name: str | None, first: int) -> NDArray[np.bool_] | None:
    if name is None:
        return None
    if name not in batch.feed:
        raise DataError(f"padding-mask: the batch from sample {first} holds no {name!r}")
    return np.asarray(batch.feed[name] != 0)


def _maskable(model: Model, names: Sequence[str], mask: str | None) -> set[str]:
    """Values of which the first axes may be those of the mask: numbers where it has the same
    numbers, free where it is free. Lengths alone could mistake heads for tokens."""
    graph = model.ir.graph
    values = {v.name: v.shape for node in graph for v in node.outputs}
    values.update({v.name: v.shape for v in graph.inputs})
    wanted = values.get(mask)
    if wanted is None:
        return set()
    kinds = [d if isinstance(d, int) else None for d in wanted.dims]
    found = ((name, shape) for name in names if (shape := values.get(name)) is not None)
    return {
        name
        for name, shape in found
        if [d if isinstance(d, int) else None for d in shape.dims[: len(kinds)]] == kinds
    }


def _add(
    seen: Observations,
    batch: Batch,
    values: Values,
    how: tuple[int, NDArray[np.bool_] | None, set[str]],
) -> Observations:
    """``seen`` and one batch more; the counters are updated in place. ``how``: batches to keep, the
    mask of this one, and what it may fit."""
    keep_batches, mask, maskable = how
    whole = set(seen.unmasked)
    half = seen.n_batches % 2
    kept = seen.batches
    if len(kept) < keep_batches:
        kept = (*kept, {name: Counter() for name in seen.counters})
    counted = seen.halves[half] if seen.halves else seen.counters
    for name, array in values.items():
        fits = mask is not None and name in maskable and array.shape[: mask.ndim] == mask.shape
        if mask is not None and not fits:
            whole.add(name)
        for counters in (counted, *kept[len(seen.batches) :]):
            counters[name].update(array[mask] if fits else array)
        _check_counter(name, counted[name], seen.n_samples)
    first, second = seen.half_samples
    n = batch.n_samples if seen.halves else 0
    return replace(
        seen,
        n_samples=seen.n_samples + batch.n_samples,
        n_batches=seen.n_batches + 1,
        batches=kept,
        unmasked=tuple(sorted(whole)),
        half_samples=(first, second + n) if half else (first + n, second),
    )


def _check_counter(name: str, counter: Counter, first: int) -> None:
    if counter.n_nan or counter.n_inf:
        what = "NaN" if counter.n_nan else "infinite"
        raise ModelError(
            f"activation {name!r} becomes {what} in the batch that starts at sample {first}: "
            f"the float model overflows on this data, or the data is not preprocessed for it"
        )
