"""What was observed: a counter for every activation, in memory and in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from numpy.lib.npyio import NpzFile

from calib.counter import Counter
from calib.counterfile import Counters, read_counters, read_manifest, write_counters
from calib.errors import ObservationsError, one_line
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
        notes: what was done to observe within a bound on memory; not saved.
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
    notes: tuple[str, ...] = ()

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
    return halved(seen, (first, second), tuple(map(int, half_samples)))


def halved(
    seen: Observations, halves: tuple[Counters, Counters], n_samples: tuple[int, ...]
) -> Observations:
    """``seen`` with counters in two halves, of so many samples each."""
    first, second = n_samples
    return replace(seen, counters=Summed(halves), halves=halves, half_samples=(first, second))


def pooled(counters: Counters, names: Sequence[str]) -> Counter:
    """What was counted of all of ``names`` together."""
    if len(names) == 1:
        return counters[names[0]]
    total = Counter()
    for name in names:
        total.merge(counters[name])
    return total
