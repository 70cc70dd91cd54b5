"""The worker of a command, and the process that waits for it: whatever moment a signal comes in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The worker ends in the very moment in which its supervisor is told to end it.
AT_THE_END = """
wait = os.waitpid
def waitpid(pid, options):
    ended = wait(pid, options)
    os.kill(os.getpid(), number)
    return ended
os.waitpid = waitpid
sys.exit(_supervise.supervised(lambda: 0, "name"))
"""
# As Python itself does when it ends.
WITHOUT_HANDLERS = """
code = _supervise.supervised(lambda: 0, "name")
signal.signal(number, signal.SIG_DFL)
os.kill(os.getpid(), number)
sys.exit(code)
"""
WORK = """
def work():
    {}
    return 0
sys.exit(_supervise.supervised(work, "name"))
"""
# As onnxruntime and others load, in native code.
LOADING = """
import os, sys, time
try:
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.1)
except BaseException as error:
    raise ImportError("initialization failed") from error
print("loaded")
"""
HANGING = """
import os, sys, time
os.kill(os.getpid(), int(sys.argv[1]))
time.sleep(60)
"""
LOST = """class Lost:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
    Lost()
    time.sleep(60)"""
BROKEN = """class Broken:
        def __del__(self):
            raise ValueError("half made")
    broken = Broken()
    os.kill(os.getpid(), number) if number else None
    time.sleep(60 if number else 0)"""
CRASHING = """try:
        os.killpg(0, number)
        time.sleep(60)
    except BaseException:
        os.abort()"""
TIDYING_UP = """try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        print("tidy", flush=True)"""
IGNORING = """try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    except BaseException:
        time.sleep(0.5)
    os.kill(os.getpid(), number)
    time.sleep(60)"""
FAILING = """try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    except BaseException:
        raise RuntimeError("release unlocked lock")"""
FORKING = """pid = os.fork()
    if pid == 0:
        found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        os._exit(found != (signal.default_int_handler, signal.SIG_DFL))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"""
IMPATIENT = """for _ in range(50):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.1)"""
KILLED = """os.kill(os.getppid(), number)
    with suppress(BaseException):
        time.sleep(5)
    os.kill(os.getpid(), signal.SIGKILL)"""
KILLED_WITHOUT_HANDLER = """signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)"""
INTERRUPTED = """os.kill(os.getpid(), number)
    time.sleep(60)"""
COMMAND = """
import click
from cli import _main
@click.command()
def command():
    {}
sys.argv[1:] = []
sys.exit(_main.run(command, "name", None))
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork")
signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def run(
    script: str, number: int, *more: object, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    names = "import os, signal, sys, time; from contextlib import suppress\n"
    start = f"{names}from cli import _supervise; number = int(sys.argv[1])\n"
    command = [sys.executable, "-c", start + script, *map(str, (int(number), *more))]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
        start_new_session=True,
    )


def ended(done: subprocess.CompletedProcess[str], number: signal.Signals) -> bool:
    return (done.returncode, done.stderr) == (128 + number, "")


@signals
@pytest.mark.parametrize("script", [AT_THE_END, WITHOUT_HANDLERS])
def test_a_signal_after_the_end_of_the_worker_changes_nothing(
    script: str, number: signal.Signals
) -> None:
    done = run(script, number)
    assert (done.returncode, done.stderr) == (0, "")


@signals
def test_an_import_is_let_finish_before_a_signal_ends_the_worker(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "loading.py").write_text(LOADING)
    work = WORK.format("import loading; time.sleep(60)")
    done = run("sys.path.append(sys.argv[2])" + work, number, tmp_path)
    assert ended(done, number), done.stderr
    assert done.stdout == "loaded\n"


@signals
def test_an_import_that_does_not_finish_is_ended_in_the_end(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    start = "sys.path.append(sys.argv[2]); _supervise._IMPORT_S = 0.5"
    done = run(start + WORK.format("import hanging"), number, tmp_path)
    assert ended(done, number), done.stderr


@signals
def test_a_signal_that_is_lost_in_a_finalizer_comes_again(number: signal.Signals) -> None:
    done = run(WORK.format(LOST), number)
    assert ended(done, number), done.stderr


@signals
def test_what_finalizers_meet_after_a_signal_is_not_shown(number: signal.Signals) -> None:
    done = run(WORK.format(BROKEN), number)
    assert ended(done, number), done.stderr
    undisturbed = run(WORK.format(BROKEN), 0)
    assert undisturbed.returncode == 0
    assert "half made" in undisturbed.stderr


@signals
def test_a_worker_that_crashes_because_it_was_to_end_has_ended(number: signal.Signals) -> None:
    done = run(WORK.format(CRASHING), number)
    assert ended(done, number), done.stderr


@signals
def test_a_worker_without_handlers_that_is_told_to_end_has_ended(number: signal.Signals) -> None:
    done = run(WORK.format(KILLED_WITHOUT_HANDLER), number)
    assert ended(done, number), done.stderr


@pytest.mark.parametrize("work", [INTERRUPTED, CRASHING])
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_that_a_command_was_ended_is_said_once(
    number: signal.Signals, word: str, work: str
) -> None:
    done = run(COMMAND.format(work), number)
    assert (done.returncode, done.stderr.strip()) == (128 + number, f"name: {word}")


def test_a_signal_that_was_ignored_before_stays_so() -> None:
    start = "signal.signal(number, signal.SIG_IGN)"
    done = run(start + WORK.format("os.kill(os.getpid(), number)"), signal.SIGINT)
    assert (done.returncode, done.stderr) == (0, "")


@signals
def test_what_tidies_up_is_not_interrupted_again(number: signal.Signals) -> None:
    done = run(WORK.format(TIDYING_UP), number)
    assert ended(done, number), done.stderr
    assert done.stdout == "tidy\n"


@signals
def test_a_worker_that_ignored_one_signal_ends_with_a_later_one(number: signal.Signals) -> None:
    done = run("_supervise._REPEATED_S = 0.2" + WORK.format(IGNORING), number)
    assert ended(done, number), done.stderr


@signals
def test_an_error_that_comes_of_a_signal_is_not_told_as_a_bug(number: signal.Signals) -> None:
    done = run(WORK.format(FAILING), number)
    assert ended(done, number), done.stderr


def test_processes_that_a_worker_forks_deal_with_signals_as_others_do() -> None:
    assert run(WORK.format(FORKING), 0).returncode == 0


def test_a_supervisor_that_is_interrupted_often_passes_it_on_as_soon() -> None:
    done = run("_supervise._PATIENCE_S = 1" + WORK.format(IMPATIENT), 0)
    assert ended(done, signal.SIGINT), done.stderr


@pytest.mark.parametrize("ignored", [True, False])
def test_a_worker_that_is_killed_was_not_interrupted(ignored: bool) -> None:
    start = "signal.signal(number, signal.SIG_IGN)" if ignored else ""
    done = run(start + WORK.format(KILLED), signal.SIGINT)
    assert done.returncode == 2
    assert "ended by SIGKILL" in done.stderr


@signals
@pytest.mark.parametrize("closed", [True, False])
def test_the_exit_code_stands_where_nobody_reads_what_is_said(
    number: signal.Signals, closed: bool
) -> None:
    start = "os.close(2); sys.stderr = None" if closed else ""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stderr:
        done = run(start + COMMAND.format(INTERRUPTED), number, stderr=stderr)
    assert (done.returncode, done.stdout.strip()) == (128 + number, "")
