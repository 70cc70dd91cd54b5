"""Run a function in a forked child: a crash of native code, or a hang, becomes an answer."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import numpy as np

from calib import Histogram, QuantType, Samples
from calib.calibrators import make
from calib.counter import Counter

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Died:
    """Why a child gave no result."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Sent(Generic[Result]):
    result: Result | Died


def isolated(work: Callable[[], Result], seconds: float) -> Result | Died:
    """What ``work`` returns; `Died` if it raises, is killed, or takes longer than ``seconds``.

    A RuntimeWarning of NumPy counts as raised. The parent must hold no onnxruntime session: a
    forked child has none of its threads.
    """
    load_kernels()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, sender))
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; NumPy's BLAS stops its own before a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return Died(f"no result within {seconds:g} s")
        sent: _Sent[Result] = receiver.recv()
        return sent.result
    except EOFError:
        child.join()
        code = child.exitcode or 0
        return Died(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
    finally:
        receiver.close()
        child.kill()
        child.join()
        child.close()


@cache
def load_kernels() -> None:
    """Once, what each child would load again: compiled kernels, half a second of them."""
    values = np.linspace(-1, 1, 1000, dtype=np.float32)
    counter = Counter()
    counter.update(values)
    for dist in (Histogram(counter), Samples(values[None])):
        for method in ("octav", "mse"):
            dist.mse(make(method)(dist, QuantType(8, signed=True)), QuantType(8, signed=True))


def _work(work: Callable[[], Result], sender: Connection) -> None:
    warnings.simplefilter("error", RuntimeWarning)
    try:
        sender.send(_Sent(work()))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        sender.send(_Sent(Died(f"{type(error).__name__} at {where}: {error}")))
