"""Runs the installed script many times without its imports: as forks of a process that has them.

`Warm` is the side of the tests; run as a script, this file is the process that forks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0


class Warm:
    """Starts a Python script, one run at a time, each the leader of a process group of its own.
    Where ``room`` is, it runs."""

    def __init__(self) -> None:
        here = Path(__file__).resolve().parent
        folders = (here, here.parent, here.parent / "samples")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
        command = [sys.executable, "-W", "ignore", __file__]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env
        )
        assert self._told() == "ready"
        self.pid = 0
        self.room = Path()

    def start(self, script: str, *arguments: object) -> None:
        assert self._server.stdin is not None
        argv = [script, *map(str, arguments)]
        self._server.stdin.write(json.dumps([argv, str(self.room)]) + "\n")
        self.pid = int(self._told())

    def wait(self) -> tuple[int, str]:
        """The exit code, negative for a signal, and what stands on stderr."""
        code = int(self._told())
        return code, self.stderr.read_text("utf-8")

    @property
    def stderr(self) -> Path:
        """Not in the room, where a test may look at all there is."""
        return self.room.parent / f"{self.room.name}.stderr"

    def run(self, script: str, *arguments: object) -> tuple[int, str]:
        self.start(script, *arguments)
        return self.wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(PATIENCE_S)
        self._server.stdout.close()

    def _told(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = (tuple(map(int, line.split())) for line in listed.stdout.splitlines())
    return [child for child, parent in pairs if parent == pid]


def ended(group: int) -> bool:
    """Whether no process of the group is left, but for zombies."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat="],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = (line.split() for line in listed.stdout.splitlines())
    return all(int(number) != group or state[0] == "Z" for number, state in pairs)


def send(target: Callable[[int, int], None], pid: int, number: signal.Signals) -> None:
    """``os.kill`` or ``os.killpg``; the run may be done already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        target(pid, number)


def wait_until(holds: Callable[[], Any]) -> None:
    """Until ``holds`` does, or for a minute."""
    end = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)


# --- the process that forks ---------------------------------------------------------------------


def serve() -> None:
    for name in ("rich.progress", "calib.config", "calib.pipeline", "octav_calibrate_cli._show"):
        importlib.import_module(name)  # what the command imports late
    importlib.import_module("isolation").load_kernels()
    _tell("ready")
    for line in sys.stdin:
        argv, room = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(argv, Path(room))
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _tell(pid)
        _, status = os.waitpid(pid, 0)
        _tell(os.waitstatus_to_exitcode(status))


def _tell(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _become(argv: list[str], room: Path) -> None:
    code: object = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.chdir(room)
        nothing = os.open(os.devnull, os.O_RDWR)
        stderr = os.open(f"{room}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, opened in enumerate((nothing, nothing, stderr)):
            os.dup2(opened, number)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
