"""Runs a command in a process of its own, so that a crash in native code becomes one line, too."""

from __future__ import annotations

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
        os._exit(_worker(work))
    os.close(alive)
    code, asked = _wait(pid)
    if code >= 0:
        return code
    number = asked or -code  # what native code does when it is interrupted is no news
    if number in _PASSED_ON:
        return 128 + number
    crash = signal.Signals(-code).name
    hint = (
        "the machine is out of memory, most likely: try a smaller --batch-size"
        if -code == signal.SIGKILL
        else "a library crashed on this model or data; please report it"
    )
    print(f"{name}: error: ended by {crash}, nothing was written: {hint}", file=sys.stderr)
    return CRASHED


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
        signal.alarm(_PATIENCE_S)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # it is done: its exit code stands
    return os.waitstatus_to_exitcode(status), asked


def _worker(work: Callable[[], int]) -> int:
    code = 1
    try:
        _raise_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        code = work()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (KeyboardInterrupt, Terminated) as error:  # before the command could deal with it
        code = 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    except BaseException:  # a bug: shown as Python would
        traceback.print_exc()
    return code


def _end_with_supervisor(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end closes
    os.kill(os.getpid(), signal.SIGKILL)


def _raise_signals() -> None:
    """From now on SIGINT raises KeyboardInterrupt, and SIGTERM `Terminated`.

    An import is let finish first, as far as that takes no more than ``_IMPORT_S``: some turn what
    is raised in them into an error of their own, others go on without what they could not load.
    Where it is lost otherwise, as in a finalizer or a callback from native code, it is raised
    again.
    """
    asked: dict[int, float] = {}

    def end(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        waited = now - asked.setdefault(number, now)
        if waited < _IMPORT_S and _imports(frame):
            again(number)
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_IGN)  # a group's comes twice: the supervisor passes it on
        raise Terminated

    def again(number: int) -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    def lost(seen: sys.UnraisableHookArgs) -> None:
        if issubclass(seen.exc_type, KeyboardInterrupt):
            again(signal.SIGINT)
        elif issubclass(seen.exc_type, Terminated):
            signal.signal(signal.SIGTERM, end)
            again(signal.SIGTERM)
        elif not asked:  # otherwise it comes of that
            shown(seen)

    shown, sys.unraisablehook = sys.unraisablehook, lost
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, end)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
