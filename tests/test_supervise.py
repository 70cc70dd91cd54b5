"""The process that waits for the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The worker ends in the very moment in which its supervisor is told to end it.
SIGNAL_AT_THE_END = """
import os, signal, sys
from cli import _supervise
wait = os.waitpid
def waitpid(pid, options):
    ended = wait(pid, options)
    os.kill(os.getpid(), int(sys.argv[1]))
    return ended
os.waitpid = waitpid
sys.exit(_supervise.supervised(lambda: 0, "name"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_of_the_worker_changes_nothing(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SIGNAL_AT_THE_END, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
