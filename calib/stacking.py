"""Thresholds of many tensors at once: those of which the same is asked are one distribution.

Groups do not touch each other, so it makes no difference to a calibrator's answer which tensor a
group is of; and what sorting, counting and measuring cost is shared by all that is asked.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from threading import Event, Semaphore
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calib.calibrators import Calibrator, Flags, mended_thresholds, notes_on
from calib.calibrators.mse import Mse
from calib.compiled import enabled
from calib.counter import Counter
from calib.distribution import HISTOGRAM_BITS, Distribution, Floats, Histogram, Samples
from calib.qtypes import QuantType, places
from calib.quantize import scale_from_threshold

_MOST_WORKERS = 4  # each has memory of its own
_LITTLE = 1 << 17  # values
_LITTLE_PLAIN = 1 << 21
_NONE = np.zeros((3, 1), np.bool_)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Asked:
    """Thresholds by ``calibrator`` on the grid of ``qtype``."""

    calibrator: Calibrator
    qtype: QuantType


@dataclass(frozen=True)
class Answers:
    """Everything that was asked of a tensor, of A questions.

    Attributes:
        threshold: float64 ``(A, G)``.
        scale: float32 ``(A, G)``.
        mended: see `mended_thresholds`, ``(A, 3, G)``.
        noise: the sum of squared errors, ``(A,)``.
        max_abs, count, signal: of the tensor: its largest magnitude, how many values it has, and
            the sum of their squares.
        more: notes besides those on ``mended``, for each question.
    """

    threshold: Floats
    scale: NDArray[np.float32]
    mended: Flags
    noise: Floats
    max_abs: float
    count: int
    signal: float
    more: Sequence[tuple[str, ...]] = ()

    def some(self, places: Sequence[int]) -> Answers:
        """Those to the questions at ``places``."""
        return replace(
            self,
            threshold=self.threshold[places],
            scale=self.scale[places],
            mended=self.mended[places],
            noise=self.noise[places],
            more=[self.more[place] for place in places] if self.more else (),
        )

    @cached_property
    def notes(self) -> list[tuple[str, ...]]:
        """What is to be said of each answer."""
        more = self.more or [()] * len(self.mended)
        if not self.mended.any():
            return list(more)
        return [(*notes_on(own), *other) for own, other in zip(self.mended, more, strict=True)]


def merged(parts: Sequence[Answers]) -> Answers:
    """The answers on a tensor from those on its parts, in the order of its groups."""
    if len(parts) == 1:
        return parts[0]
    return Answers(
        np.concatenate([part.threshold for part in parts], axis=-1),
        np.concatenate([part.scale for part in parts], axis=-1),
        np.concatenate([part.mended for part in parts], axis=-1),
        np.sum([part.noise for part in parts], axis=0),
        max(part.max_abs for part in parts),
        sum(part.count for part in parts),
        sum(part.signal for part in parts),
    )


def of_values(
    pieces: Sequence[NDArray[np.floating]], asked: Sequence[Asked], dtype: str
) -> list[Answers]:
    """Answers on each of ``pieces``, raw values ``(G, N)`` of tensors of type ``dtype``.

    Raises:
        CalibratorError: see `mended_thresholds`.
    """
    dist = Samples.stacked(pieces)
    sweeps = ((each.calibrator, each.qtype) for each in asked)
    expected = ((mse.points, qtype) for mse, qtype in sweeps if isinstance(mse, Mse))
    dist.expect(expected, dict.fromkeys(each.qtype.rounding_noise for each in asked))
    found = [_asked(dist, each) for each in asked]
    return _measured(dist, [len(piece) for piece in pieces], asked, found, dtype)


def of_counters(counters: Sequence[Counter], asked: Sequence[Asked], dtype: str) -> list[Answers]:
    """As `of_values`, on tensors of which ``counters`` were observed."""
    dist = Histogram(*counters)
    found = [_asked(dist, each) for each in asked]
    return _measured(dist, [1] * len(counters), asked, found, dtype)


def of_batches(
    counter: Counter, batches: Sequence[Counter], asked: Sequence[Asked], dtype: str
) -> list[Answers]:
    """As `of_values`, on one tensor: the mean of the thresholds from single batches, measured on
    all of them; those in which it is all zero have no threshold to add."""
    pooled = Histogram(counter)
    seen = [h for batch in batches if (h := Histogram(batch)).max_abs()[0] > 0]
    found, notes = [], []
    for each in asked:
        single = [_asked(dist, each) for dist in seen or [pooled]]
        found.append((np.mean([threshold for threshold, _ in single], axis=0), _NONE))
        said = list(dict.fromkeys(note for _, mended in single for note in notes_on(mended)))
        if seen and len(seen) < len(batches):
            said.append(f"all zero in {len(batches) - len(seen)} batches: left out of the mean")
        notes.append(tuple(said))
    answers = _measured(pooled, [1], asked, found, dtype)
    return [replace(each, more=notes) for each in answers]


def _asked(dist: Distribution, each: Asked) -> tuple[Floats, Flags]:
    threshold, mended = mended_thresholds(each.calibrator, dist, each.qtype)
    if each.qtype.bits > HISTOGRAM_BITS and isinstance(dist, Histogram):
        threshold = np.where(dist.max_abs() > 0, dist.snap(threshold), threshold)
    return threshold, mended


def _measured(
    dist: Samples | Histogram,
    groups: Sequence[int],
    asked: Sequence[Asked],
    found: Sequence[tuple[Floats, Flags]],
    dtype: str,
) -> list[Answers]:
    """What was ``found`` on ``dist``, of which the first so many ``groups`` belong to the first
    tensor, and so on."""
    threshold, mended = (np.stack(part) for part in zip(*found, strict=True))
    count, largest = dist.count(), dist.max_abs()
    scale, noise = _scales_and_noises(dist, threshold, [each.qtype for each in asked], dtype)
    ends = np.cumsum(np.asarray(groups, np.intp))
    starts = ends - np.asarray(groups, np.intp)
    noise = np.add.reduceat(noise, starts, axis=1)
    signal = np.add.reduceat(dist.rms() ** 2 * count, starts).tolist()
    most = np.maximum.reduceat(largest, starts).tolist()
    total = np.add.reduceat(count, starts).tolist()
    parts = [slice(*ends_) for ends_ in zip(starts, ends, strict=True)]
    return [
        Answers(
            threshold[:, part],
            scale[:, part],
            mended[:, :, part],
            noise[:, tensor],
            most[tensor],
            int(total[tensor]),
            signal[tensor],
        )
        for tensor, part in enumerate(parts)
    ]


def _scales_and_noises(
    dist: Samples | Histogram, threshold: Floats, qtypes: Sequence[QuantType], dtype: str
) -> tuple[NDArray[np.float32], Floats]:
    """The scales in ``dtype`` and the sums of squared errors, ``(A, G)``, of every ``threshold`` on
    its grid; the errors are those of scales in float32."""
    scale, noise = np.empty(threshold.shape, np.float32), np.empty(threshold.shape)
    steps, narrow = scale if dtype == "float32" else scale.copy(), list[int]()
    for qtype, rows in places(qtypes).items():
        chosen = threshold[rows]
        scale[rows] = scale_from_threshold(chosen, qtype, dtype)
        if qtype.bits > HISTOGRAM_BITS:
            noise[rows] = dist.mse(chosen, qtype) * dist.count()
            continue
        if steps is not scale:
            steps[rows] = scale_from_threshold(chosen, qtype)
        narrow += rows
    if narrow:
        noise[narrow] = dist.squared_errors(steps[narrow], [qtypes[row] for row in narrow])
    return scale, noise


def one_by_one(
    work: Callable[[Item], Result], items: Iterable[tuple[Item, int]]
) -> Iterator[Result]:
    """As `spread`, in this thread alone."""
    return (work(item) for item, _ in items)


def spread(work: Callable[[Item], Result], items: Iterable[tuple[Item, int]]) -> Iterator[Result]:
    """``work`` of each of ``items``, in their order, on all cores; few are under way, so that
    few take memory. With each comes its size: threads are not begun for little, nor for what
    mostly holds the interpreter's lock."""
    ahead, size, rest = list[Item](), 0, iter(items)
    little = _LITTLE if enabled() else _LITTLE_PLAIN
    for item, own in rest:
        ahead.append(item)
        size += own
        if size > little:
            break
    else:
        yield from map(work, ahead)
        return
    yield from _on_all_cores(work, chain(ahead, (item for item, _ in rest)))


def _on_all_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    gate, failed = Event(), Event()
    room = Semaphore(2 * workers)

    def ended(one: Future[Result]) -> None:
        if one.exception() is not None:
            failed.set()
        room.release()

    # A thread that works at once keeps this one from starting the next, hence the gate.
    with ThreadPoolExecutor(workers, initializer=gate.wait) as pool:
        try:
            begun: deque[Future[Result]] = deque()
            for item in items:
                begun.append(pool.submit(work, item))
                begun[-1].add_done_callback(ended)
                if len(begun) >= workers:
                    gate.set()
                room.acquire()  # where a long one is the first, too, others go on
                if failed.is_set():
                    break
                while begun and begun[0].done():
                    yield begun.popleft().result()
            gate.set()
            while begun:
                yield begun.popleft().result()
        finally:
            gate.set()
