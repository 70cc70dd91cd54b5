"""What every command shares: one-line errors, exit codes, logging."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence

import click

from calib.errors import CalibError, one_line

from ._completion import complete, is_asked
from ._supervise import Terminated, say, supervised

MISSED = 1  # a bound that the user set
BAD_INPUT = 2
_INTERRUPTED = 130
_TERMINATED = 143
_ENDED = {_INTERRUPTED: "interrupted", _TERMINATED: "terminated"}


def run(command: click.Command, name: str, arguments: Sequence[str] | None) -> int:
    """Runs ``command`` and returns its exit code: 0 done, 2 bad input, 130 interrupted, 143
    terminated. With the arguments of the process itself, in a worker process."""

    def work() -> object:
        told = sys.argv[1:] if arguments is None else arguments
        return command.main(
            args=arguments, prog_name=name, standalone_mode=False, obj=shlex.join([name, *told])
        )

    if arguments is not None:
        code = _guarded(work, name)
    elif instruction := is_asked(name):
        code = _guarded(lambda: complete(command, name, instruction), name)
    else:
        code = supervised(lambda: _guarded(work, name), name)
    if code in _ENDED:  # here, so that a worker that crashes after that says no second line
        say(f"{name}: {_ENDED[code]}")
    return code


def _guarded(work: Callable[[], object], name: str) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what the terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.ClickException, CalibError, OSError, MemoryError, SystemExit) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # click could not end the line
            return _INTERRUPTED
        say(f"{name}: error: {_told(error)}")
        if isinstance(error, OSError):  # a full disk behind stdout, say
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until exit
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except Terminated:
        return _TERMINATED
    return code if isinstance(code, int) else 0


def _told(error: BaseException) -> str:
    """One line."""
    if isinstance(error, MemoryError):
        return "out of memory: try a smaller --batch-size"
    if isinstance(error, SystemExit):
        return f"a function of yours ended Python ({error.code})"
    return one_line(error.format_message() if isinstance(error, click.ClickException) else error)


def set_verbosity(verbose: bool) -> None:
    """Log records and Python warnings of libraries reach the user only when asked for."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        return
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
