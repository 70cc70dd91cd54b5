"""Observing in shards of consecutive samples, wherever each is counted, and adding them up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from calib import capture
from calib.arrays import Batch, Feeds
from calib.capture import Runtime, Session
from calib.counter import Counter
from calib.counterfile import Counters, Packed
from calib.data import Data, Origin, open_data
from calib.errors import CalibError, ClusterError, OptionError
from calib.graph import Model, load_model
from calib.observations import Observations, halved
from calib.observing import Observing, observe

_LEAST_BATCHES = 2
_MOST_BATCHES = 64  # so much is lost with a worker that dies


@dataclass(frozen=True, slots=True)
class Task:
    """What is observed, in terms that a process on another machine can open.

    Attributes:
        model: the file.
        sha256: its digest, as `Model.sha256`.
        origin: of the data.
        identity: of the data.
        names: activations.
        how: without what only one process can do: going on from earlier, and checkpoints.
        versions: what must be the same there.
        given: absolute paths that are opened there, and how messages name them.
    """

    model: Path
    sha256: str
    origin: Origin
    identity: str
    names: tuple[str, ...]
    how: Observing
    versions: tuple[object, ...]
    given: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, model: Model, data: Data, names: Sequence[str], how: Observing) -> Task:
        """Observing ``names`` as ``how`` says; each worker in one thread, if that does not say.

        Raises:
            OptionError: if the work cannot be shared: the data is not in files, or feeds depend on
                each other.
        """
        if model.feedback:
            raise OptionError(
                "workers cannot share the work with feed-back: each feed depends on the one before"
            )
        if not (isinstance(data, Feeds) and isinstance(data.origin, Origin) and data.identity):
            raise OptionError(
                "workers need data in files, which each of them opens: batches that come from "
                "Python cannot be dealt out"
            )
        given: list[tuple[str, str]] = []
        reading, runtime = data.origin.reading, how.runtime or Runtime()
        libraries = (_absolute(path, given) for path in runtime.custom_ops)
        runtime = replace(runtime, threads=runtime.threads or 1, custom_ops=tuple(libraries))
        return cls(
            model=_absolute(model.path, given),
            sha256=model.sha256,
            origin=Origin(
                data.origin.source and _absolute(data.origin.source, given),
                replace(reading, labels=reading.labels and _absolute(reading.labels, given)),
            ),
            identity=data.identity,
            names=tuple(names),
            how=replace(how, runtime=runtime, resumed=None, checkpoint=None),
            versions=_versions(),
            given=tuple(given),
        )

    def told(self, error: CalibError) -> CalibError:
        """``error`` with paths as they were given, and nothing that cannot travel."""
        text = str(error)
        for absolute, given in self.given:
            text = text.replace(absolute, given)
        return type(error)(text)


def _absolute(path: Path, given: list[tuple[str, str]]) -> Path:
    given.append((str(path.absolute()), str(path)))
    return path.absolute()


def _versions() -> tuple[object, ...]:
    return version("octav-calibrate"), capture.version()


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive samples, an even number of batches of them unless it is the last.

    Attributes:
        start, stop: the samples from ``start`` to before ``stop``.
        n_kept: of that many first batches, counters of their own are kept too.
        full: every batch must be as large as the model takes, or the next shard does not begin
            where a batch does in one process.
    """

    start: int
    stop: int
    n_kept: int = 0
    full: bool = False


@dataclass(frozen=True, slots=True)
class Uneven:
    """What `count` answers where batches are of different sizes: `cut_uneven`."""


def cut(data: Feeds, stop: int, n_workers: int, n_kept: int = 0) -> list[Shard]:
    """Shards of the samples before ``stop``, if all batches but the last ones are full."""
    size = data.takes.size
    edges = [edge * size for edge in _edges(-(-stop // size), n_workers, n_kept)]
    edges[-1] = stop
    return [
        Shard(first, last, n_kept=0 if first else n_kept, full=last < stop)
        for first, last in pairwise(edges)
    ]


def cut_uneven(data: Feeds, stop: int, n_workers: int, n_kept: int = 0) -> list[Shard]:
    """As `cut`, whatever the sizes of batches, which are found by reading all of them."""
    ends = [0]
    for batch in data.batches(0, stop):
        ends.append(ends[-1] + batch.n_samples)
    edges = [ends[edge] for edge in _edges(len(ends) - 1, n_workers, n_kept)]
    return [Shard(first, last, n_kept=0 if first else n_kept) for first, last in pairwise(edges)]


def _edges(n_batches: int, n_workers: int, n_kept: int) -> list[int]:
    """Batches before which shards begin, and the end: the first shards are large, as each costs a
    session, the last ones small, so that no worker is waited for. Even numbers, so that the halves
    of every shard are those of the whole."""
    edges = [0]
    while edges[-1] < n_batches:
        share = (n_batches - edges[-1]) // (2 * n_workers)
        least = max(_LEAST_BATCHES, 0 if edges[1:] else n_kept)
        wanted = max(min(share, _MOST_BATCHES), least)
        edges.append(min(edges[-1] + wanted + wanted % 2, n_batches))
    return edges


# --- in a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted of a shard: all of it, or its halves; and of first batches, where wanted."""

    n_samples: int
    n_batches: int
    half_samples: tuple[int, int]
    groups: tuple[dict[str, Packed], ...]
    batches: tuple[dict[str, Packed], ...]
    unmasked: tuple[str, ...]
    notes: tuple[str, ...] = ()


def count(task: Task, shard: Shard) -> Counted | Uneven | CalibError:
    """Observes a shard; answers an error instead of raising it, as tracebacks cannot travel."""
    try:
        model, data = _opened(task)
        start = shard.start
        before = Observations(
            model.sha256,
            start,
            {name: Counter() for name in task.names},
            padding_mask=task.how.padding_mask,
        )
        how = replace(task.how, resumed=before, keep_batches=shard.n_kept)
        load = partial(_session, task) if how.max_memory is None else None
        seen = observe(model, _checked(data, shard), task.names, how, load)
    except BaseException as error:
        _KEPT.session = None  # what failed is cancelled for good
        if isinstance(error, _UnevenError):
            return Uneven()
        if isinstance(error, CalibError):
            return task.told(error)
        raise
    first, second = seen.half_samples
    return Counted(
        n_samples=seen.n_samples - start,
        n_batches=seen.n_batches,
        half_samples=(first - start, second) if seen.halves else (seen.n_samples - start, 0),
        groups=tuple(map(_packed, seen.halves or (seen.counters,))),
        batches=tuple(map(_packed, seen.batches)),
        unmasked=seen.unmasked,
        notes=seen.notes,
    )


class _UnevenError(Exception):
    pass


def _checked(data: Feeds, shard: Shard) -> Iterator[Batch]:
    for batch in data.batches(shard.start, shard.stop):
        if shard.full and batch.n_samples != data.takes.size:
            raise _UnevenError
        yield batch


def _packed(counters: Counters) -> dict[str, Packed]:
    return {name: Packed.of(counter) for name, counter in counters.items()}


_OPENING = threading.Lock()


def _opened(task: Task) -> tuple[Model, Feeds]:
    """The model and the data of ``task``, which a worker opens once.

    Raises:
        ClusterError: if they cannot be opened here, or are not what they are at the client.
    """
    with _OPENING:
        try:
            return _open(task)
        except CalibError as error:
            raise ClusterError(f"worker on {socket.gethostname()}: {error}") from error


@lru_cache(maxsize=1)
def _open(task: Task) -> tuple[Model, Feeds]:
    if task.versions != _versions():
        raise ClusterError(
            f"octav-calibrate and onnxruntime are {_listed(_versions())}, here they are "
            f"{_listed(task.versions)}: install the same"
        )
    model = load_model(task.model)
    if model.sha256 != task.sha256:
        raise ClusterError(f"{task.model}: is another model there than here")
    data = open_data(model, task.origin.source, task.origin.reading)
    if not isinstance(data, Feeds) or data.identity != task.identity:
        raise ClusterError(
            f"{task.origin.source}: is other data there than here, by names, sizes or times: "
            f"share one folder, or copy it with its times (cp -p, rsync -a)"
        )
    return model, data


class _Kept(threading.local):
    """A session, kept for the next shard; each thread has its own, as it may be cancelled."""

    key: object = None
    session: Session | None = None


_KEPT = _Kept()


def _session(task: Task, runtime: Runtime, values: tuple[str, ...]) -> Session:
    key = task, runtime, values
    if _KEPT.session is None or _KEPT.key != key:
        _KEPT.session = None  # gone before there is another
        _KEPT.session = Session(_opened(task)[0].ir, runtime, values=values)
        _KEPT.key = key
    return _KEPT.session


def _listed(versions: tuple[object, ...]) -> str:
    return " and ".join(".".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in versions)


# --- at the client --------------------------------------------------------------------------------


@dataclass(slots=True)
class Total:
    """The sum of shards, in whatever order they come: exact, as counts are integers."""

    task: Task
    counted: tuple[dict[str, Counter], dict[str, Counter]] = field(init=False)
    batches: tuple[dict[str, Counter], ...] = ()
    n_samples: int = 0
    n_batches: int = 0
    half_samples: tuple[int, int] = (0, 0)
    unmasked: set[str] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first, second = ({name: Counter() for name in self.task.names} for _ in range(2))
        self.counted = first, second

    def add(self, found: Counted) -> None:
        """One shard more."""
        for total, group in zip(self.counted, found.groups, strict=False):
            for name, packed in group.items():
                total[name].merge(packed.unpacked())
        for batch in found.batches:
            self.batches += ({name: packed.unpacked() for name, packed in batch.items()},)
        first, second = self.half_samples
        self.half_samples = first + found.half_samples[0], second + found.half_samples[1]
        self.n_samples += found.n_samples
        self.n_batches += found.n_batches
        self.unmasked.update(found.unmasked)
        self.notes.update(dict.fromkeys(found.notes))

    def observations(self) -> Observations:
        """What `calib.observing.observe` would have returned for all samples."""
        seen = Observations(
            self.task.sha256,
            self.n_samples,
            self.counted[0],
            self.batches,
            self.n_batches,
            tuple(sorted(self.unmasked)),
            padding_mask=self.task.how.padding_mask,
            notes=tuple(self.notes),
        )
        if not self.task.how.halves or self.n_batches < 2:
            return seen
        return halved(seen, self.counted, self.half_samples)
