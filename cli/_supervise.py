"""Runs a command in a process of its own, so that a crash in native code becomes one line, too."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

CRASHED = 2
_PASSED_ON = {signal.SIGINT, signal.SIGTERM}
_PATIENCE_S = 2


class Terminated(BaseException):
    """The process was asked to end."""


def supervised(work: Callable[[], int], name: str) -> int:
    """What ``work`` returns; where it is killed or crashes, one line on stderr and 2.

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
        os._exit(_worker(work, name))
    os.close(alive)
    code = _wait(pid)
    if code >= 0:
        return code
    if -code in (signal.SIGINT, signal.SIGTERM):
        return 128 - code
    crash = signal.Signals(-code).name
    hint = (
        "the machine is out of memory, most likely: try a smaller --batch-size"
        if -code == signal.SIGKILL
        else "a library crashed on this model or data; please report it"
    )
    print(f"{name}: error: ended by {crash}, nothing was written: {hint}", file=sys.stderr)
    return CRASHED


def _wait(pid: int) -> int:
    """The exit code of the worker, negative for a signal."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it is done: its exit code stands
            os.kill(pid, number)

    def pass_on_later(_number: int, _frame: FrameType | None) -> None:
        # A terminal has interrupted both; whoever interrupts only this one shall not wait long.
        signal.signal(signal.SIGALRM, lambda *_: pass_on(signal.SIGINT, None))
        signal.alarm(_PATIENCE_S)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status)


def _worker(work: Callable[[], int], name: str) -> int:
    code = 1
    try:
        signal.signal(signal.SIGTERM, _terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        code = work()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (KeyboardInterrupt, Terminated) as error:  # before the command could deal with it
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"{name}: {'interrupted' if interrupted else 'terminated'}", file=sys.stderr)
        code = 128 + (signal.SIGINT if interrupted else signal.SIGTERM)
    except BaseException:  # a bug: shown as Python would
        traceback.print_exc()
    return code


def _end_with_supervisor(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end closes
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(
        number, signal.SIG_IGN
    )  # a group's signal comes twice: the supervisor passes it on
    raise Terminated
