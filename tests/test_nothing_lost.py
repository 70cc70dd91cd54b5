"""Whatever ends a run, no file is lost, half written, or left behind: kills, signals, full disks.

Random moments come from fixed seeds, but what a run is doing then depends on the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from cli_models import DIGITS, contents, copy_digits, normal, run_script, save_two_layers, script
from numpy.typing import NDArray
from warm_script import Warm, children, ended, send, wait_until

from calib.graph import load_model
from calib.observations import Observations

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

N_KILLS = 100
N_COLD_KILLS = 6
N_SIGNALS = 8
MAKING_S = 1.1  # a folder that was being made when its process died is left alone for a second
INPUTS = ("digits.onnx", "digits.npz")
QUICK = ("digits.onnx", "--data", "digits.npz", "--samples", 16, "--threads", 1, "--quiet")
TO = ("--output", "out.onnx")
BESIDE = ("--summary", "out.json", "--save-observations", "out.npz")
FORMS = ((), BESIDE, ("--external-data", "always"), ("--external-data", "always", *BESIDE))
# As root nothing is read-only; who is nobody cannot import from everywhere, so first all is.
AS_NOBODY = """
import os, sys
from octav_calibrate_cli.calibrate import main
assert main([*sys.argv[2:], "--output", "elsewhere.onnx"]) == 0
os.remove("elsewhere.onnx")
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.chdir(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
WITH_LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the digits in it."""
    folder = tmp_path / "room"
    folder.mkdir()
    copy_digits(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def warm(server: Warm, room: Path) -> Warm:
    server.room = room
    return server


def hidden(room: Path) -> list[str]:
    return [path.name for path in room.iterdir() if path.name.startswith(".")]


def assert_inputs_untouched(room: Path) -> None:
    for name in INPUTS:
        assert (room / name).read_bytes() == (DIGITS / name).read_bytes(), name


def assert_whole(room: Path) -> None:
    """Every output that exists is complete; the model runs with its external data."""
    if (room / "out.onnx").exists():
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(room / "out.onnx"), options)
        image: NDArray[np.float32] = np.zeros((1, 1, 8, 8), np.float32)
        assert session.run(None, {"image": image})[0].shape == (1, 10)
    if (room / "out.json").exists():
        assert json.loads((room / "out.json").read_text("utf-8"))["tensors"]
    if (room / "out.npz").exists():
        model = load_model(room / "digits.onnx")
        assert Observations.load(room / "out.npz", model).n_samples == 16
    assert_inputs_untouched(room)


def assert_tidy(room: Path, *names: str) -> None:
    """Nothing but inputs and ``names`` is there."""
    assert sorted(path.name for path in room.iterdir()) == sorted({*INPUTS, *names})


def only_line(err: str) -> str:
    (line,) = err.strip().splitlines()  # click goes to a new line after ^C
    return line


# --- killed -------------------------------------------------------------------------------------


def timed(room: Path, warm: Warm) -> tuple[float, float]:
    """Seconds until the first hidden file of a run with everything, and to its end."""
    start = time.monotonic()
    warm.start(script(), *QUICK, *TO, *FORMS[-1])
    wait_until(lambda: hidden(room))
    writing = time.monotonic()
    assert warm.wait() == (0, "")
    return writing - start, time.monotonic() - start


def test_a_run_killed_at_any_moment_leaves_every_file_as_it_was_or_complete(
    room: Path, warm: Warm
) -> None:
    rng = np.random.default_rng(0)
    to_writing, to_end = timed(room, warm)
    for number in range(N_KILLS):
        if number % 10 == 0:  # now and then there is nothing to overwrite
            for path in room.iterdir():
                if path.name not in INPUTS and path.is_file():
                    path.unlink()
        form = FORMS[int(rng.integers(len(FORMS)))]
        warm.start(script(), *QUICK, *TO, *form, "--force", "--bits", int(rng.choice([4, 8])))
        if number % 4 == 0:
            time.sleep(rng.uniform(0, to_end))
        else:
            wait_until(lambda: hidden(room) or not alive(warm.pid))
            time.sleep(rng.uniform(0, 1.1 * (to_end - to_writing)))
        send(os.killpg, warm.pid, signal.SIGKILL)
        warm.wait()
        assert_whole(room)
    time.sleep(MAKING_S)
    assert warm.run(script(), *QUICK, *TO, *FORMS[-1], "--force") == (0, "")
    assert_whole(room)
    data = [path.name for path in room.iterdir() if path.name.endswith(".data")]
    assert len(data) == 1
    assert_tidy(room, "out.onnx", "out.json", "out.npz", *data)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_same_holds_while_the_script_still_imports(room: Path) -> None:
    rng = np.random.default_rng(1)
    start = time.monotonic()
    told = run_script(*QUICK, *TO)
    assert (told.code, told.err) == (0, "")
    duration = time.monotonic() - start
    for _ in range(N_COLD_KILLS):
        command = [script(), *map(str, (*QUICK, *TO, "--force"))]
        with subprocess.Popen(command, start_new_session=True) as process:
            time.sleep(rng.uniform(0.1, duration))
            send(os.killpg, process.pid, signal.SIGKILL)
            wait_until(partial(ended, process.pid))  # till then it holds its lock
        assert_whole(room)
        assert (room / "out.onnx").exists()
    time.sleep(MAKING_S)
    assert run_script(*QUICK, *TO, "--force").code == 0
    assert_tidy(room, "out.onnx")


def test_a_killed_worker_is_one_line_that_names_the_signal(room: Path, warm: Warm) -> None:
    long_run(room)
    warm.start(script(), *LONG, *TO)
    wait_until(lambda: children(warm.pid))
    (worker,) = children(warm.pid)
    time.sleep(0.3)
    send(os.kill, worker, signal.SIGKILL)
    code, err = warm.wait()
    assert code == 2
    assert "SIGKILL" in only_line(err)
    assert_tidy(room, "long.npz")


def test_a_worker_does_not_outlive_its_killed_supervisor(room: Path, warm: Warm) -> None:
    long_run(room)
    warm.start(script(), *LONG, *TO)
    wait_until(lambda: children(warm.pid))
    (worker,) = children(warm.pid)
    send(os.kill, warm.pid, signal.SIGKILL)
    warm.wait()
    wait_until(lambda: not alive(worker))
    assert not alive(worker)


# --- interrupted --------------------------------------------------------------------------------

LONG = ("digits.onnx", "--data", "long.npz", "--batch-size", 1, "--threads", 1, "--quiet")


def long_run(room: Path) -> None:
    """Data on which a run lasts a minute."""
    images = np.load(DIGITS / "digits.npz")["image"]
    np.savez(room / "long.npz", image=np.concatenate([images] * 80))


@pytest.mark.parametrize("target", [os.kill, os.killpg], ids=["supervisor", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_in_one_line_and_leaves_nothing(
    room: Path, warm: Warm, number: signal.Signals, target: Callable[[int, int], None]
) -> None:
    rng = np.random.default_rng(int(number))
    _, duration = timed(room, warm)
    for _ in range(N_SIGNALS):
        for path in room.iterdir():
            if path.name not in INPUTS:
                path.unlink()
        warm.start(script(), *QUICK, *TO, *FORMS[-1])
        wait_until(lambda: children(warm.pid))
        time.sleep(rng.uniform(0.02, duration))
        send(target, warm.pid, number)
        code, err = warm.wait()
        assert code in (0, 128 + number), err
        if code:
            word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
            assert only_line(err) == f"octav-calibrate: {word}"
        else:
            assert err == ""
        if code == 0 or (room / "out.onnx").exists():  # it was done, and about to say so
            assert_tidy(room, "out.onnx", "out.onnx.data", "out.json", "out.npz")
            assert_whole(room)
        else:
            assert_tidy(room)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_run_need_not_be_interrupted_as_a_group(
    room: Path, warm: Warm, number: signal.Signals
) -> None:
    long_run(room)
    warm.start(script(), *LONG, *TO)
    wait_until(lambda: children(warm.pid))
    time.sleep(0.5)
    send(os.kill, warm.pid, number)
    code, err = warm.wait()
    assert code == 128 + number
    assert only_line(err).startswith("octav-calibrate: ")
    assert_tidy(room, "long.npz")


# --- no room, no permission ---------------------------------------------------------------------


def small_run(folder: Path, width: int = 5) -> list[str]:
    """A run whose outputs are a few kB; its observations, and with few weights its summary, are
    larger than its model."""
    save_two_layers(folder / "m.onnx", normal(4, width), normal(width, 3))
    np.save(folder / "d.npy", normal(3000, 4))
    return [*("m.onnx", "--data", "d.npy", "--threads", "1", "--quiet"), *TO]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ((), "out.onnx"),
        (("--external-data", "always"), "out.onnx.data"),
        (("--summary", "out.json"), "out.json"),
        (("--save-observations", "out.npz"), "out.npz"),
    ],
)
def test_a_file_that_cannot_grow_is_one_line_and_nothing_is_left(
    server: Warm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*small_run(tmp_path, 80 if part.endswith("data") else 5), *options]
    server.room = tmp_path
    assert server.run(script(), *arguments) == (0, "")
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("out.*")}
    limit = (sizes[part] + max((n for n in sizes.values() if n < sizes[part]), default=0)) // 2
    for name in sizes:
        (tmp_path / name).unlink()
    before = contents(tmp_path)
    command = [sys.executable, "-c", WITH_LIMIT, str(limit), script(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    line = only_line(done.stderr)
    assert line.startswith(f"octav-calibrate: error: {part.removesuffix('.data')}: cannot be ")
    assert contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_nothing_is_left(server: Warm, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    mounting = [str(mount), "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copy(DIGITS / "digits.onnx", disk)
        server.room = disk
        before = contents(disk)
        for form in FORMS:
            data = ("--data", DIGITS / "digits.npz", "--samples", 16)
            code, err = server.run(script(), "digits.onnx", *data, *TO, "--bits", 16, *form)
            assert code == 2
            assert only_line(err).startswith("octav-calibrate: error: out.onnx: cannot be ")
            assert contents(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


def test_a_folder_that_may_not_be_written_to_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as outer:  # pytest's own are closed to other users
        folder = Path(outer, "closed")
        folder.mkdir()
        arguments = small_run(folder)
        arguments[0], arguments[2] = str(folder / "m.onnx"), str(folder / "d.npy")
        monkeypatch.chdir(outer)
        Path(outer).chmod(0o777)
        folder.chmod(0o555)
        before = contents(folder)
        command = [sys.executable, "-c", AS_NOBODY, str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 2, done.stderr
        assert "cannot be written" in only_line(done.stderr)
        assert contents(folder) == before
        folder.chmod(0o755)
