"""One pass over the calibration data: every activation is counted, nothing kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import Runtime, Session, Values
from calib.compiled import enabled
from calib.counter import Counter, update_all
from calib.counterfile import Counters
from calib.errors import CalibError, DataError, ModelError, one_line
from calib.graph import Model
from calib.memory import Fit, fit
from calib.observations import Observations, halved
from calib.padding import Padding
from calib.samplewise import can_be_cut, part_size
from calib.streams import Streams

_STREAMS = 2
_GROUP = 8  # activations, counted together


@dataclass(frozen=True, slots=True)
class Observing:
    """How a model is observed.

    Args:
        keep_batches: of that many first batches, counters of their own are kept too.
        halves: of every other batch, counters of their own are kept too, to tell how much depends
            on the samples.
        runtime: provider and threads.
        padding_mask: input that is 0 where padding stands; of activations whose first axes are the
            mask's, what stands there is not counted.
        resumed: what an earlier run has counted; the batches are those behind.
        checkpoint: called with what is counted so far, every ``checkpoint_seconds``.
        checkpoint_seconds: at most so much work is lost.
        max_memory: bytes that the whole process may take; None for no bound. Where it would take
            more, by what the first batch tells, there is one batch at a time, then parts of
            batches, then several passes. glibc then gives back what is freed, for good.
    """

    keep_batches: int = 0
    runtime: Runtime | None = None
    padding_mask: str | None = None
    resumed: Observations | None = None
    checkpoint: Callable[[Observations], None] | None = None
    checkpoint_seconds: float = 30.0
    halves: bool = False
    max_memory: int | None = None


def observe(
    model: Model,
    batches: Iterable[Batch],
    names: Sequence[str],
    how: Observing | None = None,
    load: Callable[..., Session] | None = None,
) -> Observations:
    """Runs every batch once and counts the values of the activations ``names``.

    All cores run the model, then all cores count. Where samples do not depend on each other, what
    is captured of a batch may be more than caches hold: then it is run in parts, two at a time,
    each in a thread of its own; and so are single samples, of which operators have too little to
    share. Counting is exact in any order. See README, "Speed". Without a bound on memory, one more
    part waits for each thread.

    Args:
        model, batches, names, how: what is run on what, which values, and how.
        load: makes the session for a `Runtime` and ``values``; by default a new one.

    Raises:
        DataError: if the data holds NaN or infinity, or there is none.
        ModelError: if an activation becomes NaN or infinite, or onnxruntime fails.
        OptionError: if the padding mask is no input, or ``max_memory`` is too little.
    """
    how = how or Observing()
    padding = Padding(model, names, how.padding_mask)
    runtime = how.runtime or Runtime()
    sizes = _sizes(model, names)
    plan, batches = _plan(model, batches, names, how, sizes)
    seen = _start(model, names, how)
    load = load or partial(Session, model.ir, feedback=model.feedback)
    work = _Work(
        tuple(load(plan.runtime, values=part) for part in plan.passes),
        padding,
        partial(sizes, most=None if how.max_memory is None else plan.samples),
        max(1, runtime.cores // plan.streams),
        _groups(names),
        Lock() if plan.streams > 1 and not enabled() else nullcontext(),
    )
    last_checkpoint = time.monotonic()
    ahead = 1 if how.max_memory is None else 0
    with work, Streams(plan.streams, work.cancel, ahead) as streams:
        for batch in batches:
            batch.check_finite(seen.n_samples)
            seen = work.put(streams, seen, batch, how.keep_batches)
            if how.checkpoint and time.monotonic() - last_checkpoint >= how.checkpoint_seconds:
                streams.drain()
                how.checkpoint(work.settled(seen, halves=how.halves))
                last_checkpoint = time.monotonic()
        streams.drain()
    if seen.n_samples == 0:
        raise DataError("the calibration data holds no samples")
    seen = replace(seen, notes=(plan.note,) if plan.note else ())
    return _together(seen, work.settled(seen, halves=how.halves))


def _together(seen: Observations, settled: Observations) -> Observations:
    """``settled`` with sums of the halves of ``seen`` in place of them, if it has none."""
    if settled.halves or not seen.halves:
        return settled
    first, second = seen.halves
    for name in first:
        first[name].merge(second[name])
    return replace(settled, counters=first)


def _plan(
    model: Model,
    batches: Iterable[Batch],
    names: Sequence[str],
    how: Observing,
    size: Callable[[Batch], int | None],
) -> tuple[Fit, Iterable[Batch]]:
    """How to deal with each batch; and the batches."""
    batches = iter(batches)
    first = next(batches, None)
    runtime = replace(how.runtime or Runtime(), yielding=True, scattered=True)
    if first is None:
        return Fit(1, (tuple(names),), runtime), ()
    samples = size(first)
    many = runtime.cores > 1 and not model.feedback and (samples or first.n_samples == 1)
    sets = how.keep_batches + (2 if how.halves else 1)
    plan = Fit(_STREAMS if many else 1, (tuple(names),), runtime, samples, sets=sets)
    if how.max_memory is not None:
        plan = fit(model, first, names, plan, how.max_memory)
    if plan.streams > 1:  # a thread that runs a part is one of those that share it
        threads = runtime.cores - plan.streams + 1
        plan = replace(plan, runtime=replace(plan.runtime, threads=threads))
    return plan, chain([first], batches)


def _sizes(model: Model, names: Sequence[str]) -> Callable[..., int | None]:
    """How many samples of a batch to run at a time, and at ``most``; None for all. But for that it
    depends on no other batch, so that it does not matter where a run begins."""
    known = dict[object, int | None]()

    def size(batch: Batch, most: int | None = None) -> int | None:
        shapes = batch.whole, *((name, array.shape) for name, array in batch.feed.items())
        if shapes not in known:
            known[shapes] = part_size(model, names, batch)
        found = known[shapes]
        return min(found or most, most) if most and can_be_cut(model, batch) else found

    return size


def _start(model: Model, names: Sequence[str], how: Observing) -> Observations:
    """What is counted on; where too much is counted already without halves, that goes on."""
    seen = how.resumed or Observations(
        model.sha256,
        0,
        {name: Counter() for name in names},
        padding_mask=how.padding_mask,
        feedback=model.feedback,
    )
    if seen.halves or seen.n_batches > 1 or not how.halves:
        return seen
    return halved(
        seen, (seen.counters, {name: Counter() for name in seen.counters}), (seen.n_samples, 0)
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Activations that are counted together, and what is held meanwhile."""

    names: tuple[str, ...]
    lock: Lock = field(default_factory=Lock)


def _groups(names: Sequence[str]) -> tuple[_Group, ...]:
    """Of neighbours, which are about as large, each goes to another."""
    n = -(-len(names) // _GROUP)
    return tuple(_Group(tuple(names[first::n])) for first in range(n))


@dataclass(slots=True)
class _Work:
    """What becomes of each batch.

    Attributes:
        sessions: each captures some of the activations.
        padding: of all activations.
        size: of a batch, how many samples to run at a time; None for all of it.
        n_threads: that count a part.
        groups: of all activations.
        turn: is held while a part is counted; NumPy holds the interpreter's lock for most of
            that time, and streams that count by turns wait less.
    """

    sessions: tuple[Session, ...]
    padding: Padding
    size: Callable[[Batch], int | None]
    n_threads: int
    groups: tuple[_Group, ...]
    turn: AbstractContextManager[object]
    helpers: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.helpers = ThreadPoolExecutor(_STREAMS * self.n_threads, "octav-calibrate-counting")

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.helpers.shutdown(cancel_futures=True)

    def cancel(self) -> None:
        """Ends what is under way."""
        for session in self.sessions:
            session.cancel()

    def put(
        self, streams: Streams, seen: Observations, batch: Batch, keep_batches: int
    ) -> Observations:
        """Has one batch more counted; answers ``seen`` as it will be then."""
        half, kept = seen.n_batches % 2, seen.batches
        counted = [seen.halves[half] if seen.halves else seen.counters]
        if len(kept) < keep_batches:
            kept = (*kept, {name: Counter() for name in seen.counters})
            counted.append(kept[-1])
        self.padding.check(batch, seen.n_samples)
        for part in batch.parts(self.size(batch)):
            streams.put(partial(self._count, part, counted, seen.n_samples))
        first, second = seen.half_samples
        n = batch.n_samples if seen.halves else 0
        return replace(
            seen,
            n_samples=seen.n_samples + batch.n_samples,
            n_batches=seen.n_batches + 1,
            batches=kept,
            half_samples=(first, second + n) if half else (first + n, second),
        )

    def settled(self, seen: Observations, *, halves: bool) -> Observations:
        """``seen`` once all of it is counted; without halves if one is empty, or none wanted."""
        seen = replace(seen, unmasked=tuple(sorted({*seen.unmasked, *self.padding.unmasked})))
        if not seen.halves or (halves and seen.n_batches > 1):
            return seen
        return replace(seen, halves=(), half_samples=(0, 0))

    def _count(self, part: Batch, counted: list[Counters], first: int) -> None:
        """Runs a part of a batch, and counts all of its activations in each of ``counted``."""
        mask = self.padding.mask(part)
        for session in self.sessions:
            values = session.run(part.feed, part.restart)
            names, spoiled = list(values), dict[str, str]()
            with self.turn:
                self._share(partial(self._update, values, mask, counted, spoiled))
            for name in values:
                raise ModelError(f"activation {name!r} cannot be counted: it is part of a list")
            for name in names:
                if name in spoiled:
                    raise ModelError(
                        f"activation {name!r} becomes {spoiled[name]} in the batch that starts at "
                        f"sample {first}: the float model overflows on this data, or the data is "
                        f"not preprocessed for it"
                    )

    def _share(self, update: Callable[[Sequence[str]], None]) -> None:
        """Calls ``update`` with the names of every group, in several threads; last with those that
        another stream is busy with."""
        waiting, choosing = [*self.groups], Lock()

        def work() -> None:
            while True:
                with choosing:
                    if not waiting:
                        return
                    free = (group for group in waiting if group.lock.acquire(blocking=False))
                    found = next(free, None)
                    group = found or waiting[0]
                    waiting.remove(group)
                if found is None:
                    group.lock.acquire()
                try:
                    update(group.names)
                finally:
                    group.lock.release()

        others = [self.helpers.submit(work) for _ in range(1, min(self.n_threads, len(waiting)))]
        work()
        for other in others:
            other.result()

    def _update(
        self,
        values: Values,
        mask: NDArray[np.bool_] | None,
        counted: list[Counters],
        spoiled: dict[str, str],
        names: Sequence[str],
    ) -> None:
        """Counts those of ``values``, and lets go of them; what is not finite stands in
        ``spoiled`` then."""
        names = [name for name in names if name in values]
        arrays = [self.padding.removed(name, values.pop(name), mask) for name in names]
        first = [counted[0][name] for name in names]
        before = [(counter.n_nan, counter.n_inf) for counter in first]
        try:
            for counters in counted:
                update_all([counters[name] for name in names], arrays)
        except (CalibError, MemoryError):
            raise
        except Exception as error:  # in a thread, where nothing else would tell which they were
            what = "activation" if len(names) == 1 else "one of the activations"
            reason = f"cannot be counted: {one_line(error)}"
            raise ModelError(f"{what} {', '.join(map(repr, names))} {reason}") from error
        for name, counter, (n_nan, n_inf) in zip(names, first, before, strict=True):
            if (counter.n_nan, counter.n_inf) != (n_nan, n_inf):
                spoiled[name] = "NaN" if counter.n_nan > n_nan else "infinite"
