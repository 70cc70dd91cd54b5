"""How observing fits into a bound on memory: fewer batches at a time, smaller ones, passes."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from calib.arrays import Batch
from calib.capture import Runtime, Session
from calib.counter import Counter
from calib.errors import OptionError
from calib.graph import Model
from calib.prepare import inner_nodes
from calib.samplewise import can_be_cut
from calib.shapes import value_bytes

_MEGABYTE = 1_000_000
_COUNTER_BYTES = 400_000  # of the tables, which are mostly empty
_MARGIN = 1.02  # what is reckoned was 1.5 % below what was measured
_ARENA = 2  # onnxruntime doubles what it keeps, and copies values to other layouts
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_MAPPED_BYTES = 1 << 20  # from here on, memory goes back to the system when it is freed
_STATUS = Path("/proc/self/status")
_PEAK_RESET = Path("/proc/self/clear_refs")
# Of these, onnxruntime writes the output where the input was, if nothing else reads that.
_IN_PLACE = {
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Elu"),
    *("Add", "Sub", "Mul", "Div", "BatchNormalization", "Identity", "Reshape", "Flatten"),
    *("Squeeze", "Unsqueeze", "Dropout", "Softmax"),
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How a batch is dealt with.

    Attributes:
        streams: batches under way at a time.
        samples: of a batch at a time; None for all of it.
        passes: what is counted in each run of the model; a session each.
        runtime: how to execute.
        note: what was done to fit; empty if nothing.
        sets: of counters: of both halves, and of single batches, where these are kept.
    """

    streams: int
    passes: tuple[tuple[str, ...], ...]
    runtime: Runtime
    samples: int | None = None
    note: str = ""
    sets: int = 1


def fit(model: Model, batch: Batch, names: Sequence[str], wanted: Fit, max_memory: int) -> Fit:
    """The fastest way to observe ``names`` within ``max_memory`` bytes of the process: as
    ``wanted``, or as near to it as can be.

    The model is run once on the smallest part of ``batch``, to see what that takes; what captured
    values add is reckoned from their sizes, and from how long each is held.

    Raises:
        OptionError: if there is no way, or this system does not tell what memory is in use.
        ModelError: if onnxruntime fails to run the model.
    """
    with suppress(OSError, AttributeError):  # not glibc
        # Once a block of up to 32 MB was freed, it would keep such blocks.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    if not names:
        return wanted
    return _Room(model, batch, wanted.runtime, names, wanted.sets).fit(wanted, max_memory)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _bound(n_bytes: int) -> str:
    return f"max-memory {n_bytes / _MEGABYTE:.0f} MB"


@dataclass(slots=True)
class _Room:
    """What a model takes, and would take with more of its values held.

    Attributes:
        samples: of a whole batch, if it can be cut; otherwise 1 stands for the batch.
    """

    model: Model
    batch: Batch
    runtime: Runtime
    names: Sequence[str]
    sets: int = 1
    samples: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    resident: int = 0
    session: int = 0
    overhead: int = 0

    def __post_init__(self) -> None:
        part = self.batch
        if can_be_cut(self.model, self.batch):
            self.samples, part = self.batch.n_samples, self.batch.part(0, 1)
        self.runtime = replace(self.runtime, frugal=True)
        self.sizes = value_bytes(self.model, part, self.runtime)
        Counter().update(np.zeros(1, np.float32))  # what counting loads and compiles is there now
        before = _resident()
        session = Session(self.model.ir, self.runtime, feedback=self.model.feedback)
        self.resident = _resident()
        self.session = max(0, self.resident - before)
        with suppress(OSError):
            _PEAK_RESET.write_text("5")
        session.run(part.feed, restart=True)
        self.overhead = max(0, _peak() - self.resident) - self._held(())

    def fit(self, wanted: Fit, max_memory: int) -> Fit:
        """As the function."""
        names, size = self.names, wanted.samples or self.samples
        if self.needed(names, size * wanted.streams * _ARENA) <= max_memory:
            return wanted
        told = _bound(max_memory)
        frugal = replace(wanted, runtime=self.runtime, note=f"{told}: no memory is kept")
        if self.needed(names, size * wanted.streams) <= max_memory:
            return frugal
        while size > 1 and self.needed(names, size) > max_memory:
            size //= 2
        samples = size if size < self.samples else None
        part = _counted(size, "sample") if samples else "one batch"
        what = f"{told}: {part} at a time"
        if self.needed(names, size) <= max_memory:
            return replace(frugal, streams=1, samples=samples, note=what)
        passes = self.passes(max_memory)
        note = f"{what}, the model run {_counted(len(passes), 'time')} on each"
        return replace(frugal, streams=1, samples=samples, passes=passes, note=note)

    def needed(self, names: Sequence[str], samples: int = 1) -> int:
        """Bytes of the process while ``names`` are captured of so many samples."""
        working = max(0, self.overhead + self._held(names))
        needed = self.resident + self._counters + samples * working
        return int(needed * _MARGIN)

    @property
    def _counters(self) -> int:
        return len(self.names) * self.sets * _COUNTER_BYTES

    def passes(self, bound: int) -> tuple[tuple[str, ...], ...]:
        """The values in groups, each of which can be captured of one sample; as few as can be.

        Raises:
            OptionError: if one value alone is too much.
        """
        names = self.names
        for n_groups in range(1, len(names) + 1):  # the session of each has the weights
            left = bound - (n_groups - 1) * self.session
            groups = self._grouped(names, left)
            if len(groups) <= n_groups:
                break
        largest = max(names, key=lambda name: self.needed([name]))
        least = self.needed([largest]) + (len(groups) - 1) * self.session
        if least > bound:
            alone = self.resident + self._counters > bound
            hint = "" if alone else ", or leave the tensor out with --exclude"
            raise OptionError(
                f"{_bound(bound)} is too little: with {largest!r} captured, the process takes "
                f"{math.ceil(least / _MEGABYTE)} MB on one "
                f"{'sample' if self.samples > 1 else 'batch'}: allow more{hint}"
            )
        return tuple(map(tuple, groups))

    def _grouped(self, names: Sequence[str], bound: int) -> list[list[str]]:
        """Neighbours together as long as they fit."""
        groups: list[list[str]] = []
        for name in names:
            if groups and self.needed([*groups[-1], name]) <= bound:
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def _held(self, captured: Iterable[str]) -> int:
        """The most bytes of values at a time; those ``captured`` are held until the end, and what
        none of them needs is not computed."""
        kept = set(captured) or {spec.name for spec in self.model.outputs}
        nodes = _needed(self.model, kept)
        last_use = {name: step for step, (_, read, _) in enumerate(nodes) for name in read}
        live = set(self.batch.feed)
        total = most = sum(self.sizes.get(name, 0) for name in live)
        for step, (op_type, read, made) in enumerate(nodes):
            done = {name for name in read & live if last_use[name] == step and name not in kept}
            added = sum(self.sizes.get(name, 0) for name in made)
            reused = max((self.sizes.get(name, 0) for name in done), default=0)
            total += added
            most = max(most, total - (min(reused, added) if op_type in _IN_PLACE else 0))
            total -= sum(self.sizes.get(name, 0) for name in done)
            live = (live | made) - done
        return most


def _needed(model: Model, names: set[str]) -> list[tuple[str, set[str], set[str]]]:
    """Of each node that any of ``names`` needs: type, names read and names made, in order."""
    wanted, nodes = set(names), []
    for node in reversed(list(model.ir.graph)):
        made = {str(v.name) for v in node.outputs}
        if made & wanted:
            readers = (node, *inner_nodes(node))
            read = {str(v.name) for reader in readers for v in reader.inputs if v is not None}
            wanted |= read
            nodes.append((node.op_type, read, made))
    return nodes[::-1]


def _status(key: str) -> int:
    """A figure of the process, in bytes."""
    lines: list[str] = []
    with suppress(OSError):
        lines = _STATUS.read_text("ascii").splitlines()
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OptionError(
        f"max-memory needs a system that tells what memory a process takes, as Linux does; this is "
        f"{sys.platform}: choose a smaller --batch-size instead"
    )


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")
