"""Runs a command in a process of its own, so that a crash in native code becomes one line, too, and
says what signals do there."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

CRASHED = 2
_PASSED_ON = {signal.SIGINT, signal.SIGTERM}
_PATIENCE_S = 2
_IMPORT_S = 10
_REPEATED_S = 3
_AGAIN_S = 0.02


class Terminated(BaseException):
    """The process was asked to end."""


def supervised(work: Callable[[], int], name: str) -> int:
    """What ``work`` returns; 130 where it is interrupted, 143 where it is terminated; and where it
    is killed or crashes otherwise, 2, with one line on stderr.

    The processes live and die together: signals are passed on, and the worker ends with its
    supervisor. Where processes cannot fork, ``work`` runs in this one.
    """
    if not hasattr(os, "fork"):
        return work()
    alive, life = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until both know what to do with them
    pid = os.fork()
    if pid == 0:
        os.close(life)
        threading.Thread(target=_end_with_supervisor, args=(alive,), daemon=True).start()
        code = 1
        try:
            code = _worker(work)
        finally:
            os._exit(code)
    os.close(alive)
    code, asked = _wait(pid)
    if code >= 0:
        return code
    # What native code does when it is interrupted is no news.
    number = -code if -code == signal.SIGKILL else asked or -code
    if number in _PASSED_ON:
        return 128 + number
    crash = signal.Signals(-code).name
    hint = (
        "the machine is out of memory, most likely: try a smaller --batch-size"
        if -code == signal.SIGKILL
        else "a library crashed on this model or data; please report it"
    )
    say(f"{name}: error: ended by {crash}, nothing was written: {hint}")
    return CRASHED


def say(line: str) -> None:
    """On stderr, if anybody reads that."""
    try:
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until exit


def _wait(pid: int) -> tuple[int, int]:
    """The exit code of the worker, negative for a signal; and the signal that asked for its end,
    or 0."""
    asked = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        with suppress(ProcessLookupError):  # it is done: its exit code stands
            os.kill(pid, number)

    def pass_on_later(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        # A terminal has interrupted both; whoever interrupts only this one shall not wait long.
        signal.signal(signal.SIGALRM, lambda *_: pass_on(signal.SIGINT, None))
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(_PATIENCE_S)

    signal.signal(signal.SIGTERM, pass_on)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, pass_on_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _, status = os.waitpid(pid, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # it is done: its exit code stands
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status), asked


def _worker(work: Callable[[], int]) -> int:
    code, signals = 1, _Signals()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        code = work()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:
        if signals.first:  # before the command could deal with it, or where it could not
            return 128 + signals.first
        traceback.print_exc()  # a bug: shown as Python would
    return code


def _end_with_supervisor(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end closes
    os.kill(os.getpid(), signal.SIGKILL)


class _Signals:
    """SIGINT raises KeyboardInterrupt, and SIGTERM `Terminated`, from now on in this process alone.

    An import is let finish first, as far as that takes no more than ``_IMPORT_S``: some turn what
    is raised in them into an error of their own, others go on without what they could not load.
    Where it is lost otherwise, as in a finalizer or a callback from native code, it is raised
    again. What tidies up after it is not interrupted for ``_REPEATED_S``.

    Attributes:
        first: the signal that was raised first, or 0.
    """

    def __init__(self) -> None:
        self.first = 0
        self._raised = -math.inf
        self._asked: dict[int, float] = {}
        self._shown, sys.unraisablehook = sys.unraisablehook, self._lost
        os.register_at_fork(after_in_child=self._leave)
        signal.signal(signal.SIGTERM, self._end)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored: nohup
            signal.signal(signal.SIGINT, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._raised < _REPEATED_S:  # the supervisor passes on what a group has got
            return
        if _imports(frame) and now - self._asked.setdefault(number, now) < _IMPORT_S:
            self._again(number)
            return
        self._asked.clear()
        self._raised = now
        self.first = self.first or number
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _again(self, number: int) -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    def _lost(self, seen: sys.UnraisableHookArgs) -> None:
        if issubclass(seen.exc_type, (KeyboardInterrupt, Terminated)):
            self._raised = -math.inf
            interrupted = issubclass(seen.exc_type, KeyboardInterrupt)
            self._again(signal.SIGINT if interrupted else signal.SIGTERM)
        elif time.monotonic() - self._raised > _REPEATED_S:  # otherwise it comes of that
            self._shown(seen)

    def _leave(self) -> None:
        sys.unraisablehook = self._shown
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == self._end:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
