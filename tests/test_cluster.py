"""A real cluster of two worker processes: the same integers as one process, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_models import clean_environment, run_main, script
from conftest import Save
from models import parsed
from test_resumed import observed
from test_shards import SEQUENCES, everything, opened

pytest.importorskip("distributed")

from calib import Rules, Run, calibrate_model, cluster, shards
from calib.calibration import calibrate
from calib.cluster import connected, observe_on
from calib.data import Reading
from calib.errors import CalibError, ClusterError, OptionError
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.resuming import observe_split
from calib.rules import Reduction
from calib.run import Split
from calib.shards import Shard, Task

Capsys = pytest.CaptureFixture[str]

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"
NOWHERE = "tcp://127.0.0.1:9"  # the port that discards: nobody listens


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected(workers=2) as found:
        yield found


@pytest.fixture
def address(client: Any) -> str:
    """Of the scheduler that the client is connected to."""
    return str(client.scheduler.address)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def empty_scheduler() -> Iterator[Any]:
    """One without workers, in this process."""
    from distributed import LocalCluster

    make: Any = LocalCluster
    with make(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as found:
        yield found


# --- the same as one process ------------------------------------------------------------------


def assert_same(client: Any, model_path: Path, data_path: Path, n_samples: int, size: int) -> None:
    """Every integer, and every bit of every threshold."""
    model, data = opened(model_path, data_path, size)
    rules = Rules()
    plan = make_plan(model, rules)
    how = Observing(halves=True)
    one = observe(model, data.batches(0, n_samples), plan.activations, how)
    advanced: list[int] = []
    task = Task.of(model, data, plan.activations, how)
    seen = observe_on(client, task, data, n_samples, advanced.append)
    assert everything(seen) == everything(one)
    assert sum(advanced) == n_samples == seen.n_samples
    assert len(advanced) > 2, "one shard for each worker is not enough to share them evenly"
    tables = [calibrate(model, each, plan, rules) for each in (one, seen)]
    thresholds = [[r.threshold.tobytes() for r in table.records] for table in tables]
    assert thresholds[0] == thresholds[1]
    assert tables[0].to_json() == tables[1].to_json()


@pytest.mark.parametrize("batch_size", [5, 32])
def test_two_workers_count_the_digits_as_one_process_does(client: Any, batch_size: int) -> None:
    model, data = DIGITS / "digits.onnx", DIGITS / "digits.npz"
    assert_same(client, model, data, 256, batch_size)


def test_two_workers_count_a_real_model_as_one_process_does(
    client: Any, fixtures_dir: Path, room: Path
) -> None:
    images = np.load(fixtures_dir / "cifar10_calib.npz")["images"][:320].transpose(0, 3, 1, 2)
    np.save(room / "images.npy", (images / np.float32(127.5) - 1).astype(np.float32))
    assert_same(client, fixtures_dir / "resnet20_cifar10.onnx", room / "images.npy", 320, 16)


def test_samples_of_different_lengths_share_feeds_as_in_one_process(
    client: Any, save: Save, room: Path
) -> None:
    rng = np.random.default_rng(0)
    (room / "data").mkdir()
    for number in range(40):
        shape = (3 + number // 7 % 3, 4)
        x, mask = rng.standard_normal(shape).astype(np.float32), np.ones(shape[0], np.int64)
        np.savez(room / f"data/{number}.npz", x=x, mask=mask)
    model, data = opened(save(parsed(SEQUENCES)), room / "data", 3)
    how = Observing(padding_mask="mask", halves=True)
    one = observe(model, data.batches(), ["x", "hidden"], how)
    advanced: list[int] = []
    task = Task.of(model, data, ["x", "hidden"], how)
    seen = observe_on(client, task, data, advance=advanced.append)
    assert everything(seen) == everything(one)
    assert sum(advanced) == 40


def files(room: Path, **settings: Any) -> dict[str, Any]:
    """What a whole calibration leaves behind."""
    run = Run(
        samples=200, reading=Reading(8), save_observations=Path("seen.npz"), force=True, **settings
    )
    calibrate_model(DIGITS / "digits.onnx", DIGITS / "digits.npz", None, "out.onnx", run)
    model = (room / "out.onnx").read_bytes()
    return {
        "model": model,
        "seen": observed(room / "seen.npz"),
        "files": {path.name for path in room.iterdir()},
    }


def test_a_whole_calibration_on_workers_writes_the_same_files(room: Path, address: str) -> None:
    assert files(room, scheduler=address) == files(room)


def test_first_batches_are_kept_for_the_mean_of_their_thresholds(address: str) -> None:
    model, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    rules = Rules(reduction=Reduction("mean", 3))
    plan = make_plan(model, rules)
    runs = Run(samples=200), Run(samples=200, scheduler=address)
    one, seen = (observe_split(model, Split.of(data, r, None), plan, rules) for r in runs)
    assert everything(seen) == everything(one)
    assert len(seen.batches) == 3


def test_the_command_starts_workers_of_its_own(room: Path, capsys: Capsys) -> None:
    for name, options in (("one", ()), ("two", ("--workers", 2, "--max-memory", "4GB"))):
        data = (DIGITS / "digits.onnx", "--data", DIGITS / "digits.npz", "--samples", 64)
        told = run_main(capsys, *data, "--bits", 4, "--output", f"{name}.onnx", *options)
        assert (told.code, told.err) == (0, "")
    one, two = (onnx.load(room / f"{name}.onnx") for name in ("one", "two"))
    assert one.graph.SerializeToString() == two.graph.SerializeToString()


# --- what dies --------------------------------------------------------------------------------


def die_once(marker: str) -> None:
    """In a worker: makes the first of them that has counted a shard die before it can tell."""
    module: Any = shards
    count = module.observe

    def observe_and_die(*arguments: Any) -> Any:
        seen = count(*arguments)
        try:
            Path(marker).open("x").close()
        except FileExistsError:
            return seen
        return os.kill(os.getpid(), signal.SIGKILL)

    module.observe = observe_and_die


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_a_worker_that_is_killed_in_a_shard_loses_nothing(client: Any, tmp_path: Path) -> None:
    model, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    names = make_plan(model, Rules()).activations
    how = Observing(halves=True)
    one = observe(model, data.batches(), names, how)
    before = set(client.run(os.getpid).values())
    client.run(die_once, str(tmp_path / "dead"))
    seen = observe_on(client, Task.of(model, data, names, how), data)
    assert (tmp_path / "dead").exists()
    assert everything(seen) == everything(one)
    client.wait_for_workers(2, timeout=60)  # another one takes its place
    after = set(client.run(os.getpid).values())
    assert len(after) == 2
    assert len(before - after) == 1


def test_workers_that_keep_dying_and_errors_without_a_name_tell_the_samples() -> None:
    class KilledWorker(Exception):  # noqa: N818 - Dask's name
        pass

    class Future:
        def __init__(self, error: Exception):
            self.error = error

        def result(self) -> None:
            raise self.error

    with pytest.raises(ClusterError, match=r"^samples 32 to 63: several workers died of them, for"):
        cluster._result(Future(KilledWorker()), Shard(32, 64))
    message = r"^samples 0 to 7: a worker failed: ValueError: of two lines$"
    with pytest.raises(ClusterError, match=message):
        cluster._result(Future(ValueError("of two\nlines")), Shard(0, 8))
    with pytest.raises(MemoryError):
        cluster._result(Future(MemoryError()), Shard(0, 8))


def test_a_scheduler_that_is_lost_is_named_and_not_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dask:
        @staticmethod
        def wait(_: object, **__: object) -> None:
            raise FuturesCancelledError

    class FuturesCancelledError(CancelledError):
        pass

    class CommClosedError(OSError):
        pass

    lost = r"^scheduler: the connection to it was lost: start again$"
    monkeypatch.setattr(cluster, "_dask", Dask)
    with pytest.raises(ClusterError, match=lost):
        cluster._finished(object(), [])

    class Lost:
        def __init__(self, error: Exception):
            self.error = error

        def result(self) -> None:
            raise self.error

    for error in (CommClosedError("in <TCP>"), FuturesCancelledError()):
        with pytest.raises(ClusterError, match=lost):
            cluster._result(Lost(error), Shard(0, 8))


def test_workers_that_are_all_gone_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dask:
        @staticmethod
        def wait(_: object, **__: object) -> None:
            raise asyncio.TimeoutError  # as Dask does; the built-in one from Python 3.11 on

    class Client:
        @staticmethod
        def nthreads() -> dict[str, int]:
            return {}

    monkeypatch.setattr(cluster, "_dask", Dask)
    with pytest.raises(ClusterError, match=r"^all workers have been gone for \d+ s$"):
        cluster._finished(Client(), [])


@pytest.mark.skipif(os.name != "posix", reason="semaphores as POSIX has them")
@pytest.mark.parametrize("given", [None, "default"])
def test_what_a_process_that_is_killed_leaves_behind_is_tidied_up_in_silence(
    given: str | None,
) -> None:
    code = (
        "import multiprocessing, os\n"
        "from calib import cluster\n"
        "with cluster._uninterrupted_children(): pass\n"
        "kept = multiprocessing.get_context('spawn').Semaphore()\n"
        "print(os.environ.get('PYTHONWARNINGS'), flush=True)\n"
        "os._exit(0)\n"
    )
    environment = {**clean_environment(), **({"PYTHONWARNINGS": given} if given else {})}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == (str(given), "")


PS = ["ps", "-A", "-o", "sid=,args="]


def processes(session: int) -> list[str]:
    """What runs in a session."""
    lines = subprocess.run(PS, capture_output=True, text=True, check=True).stdout.splitlines()
    found = (line.split(maxsplit=1) for line in lines)
    return [args for sid, args in found if int(sid) == session and "<defunct>" not in args]


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_command_that_is_interrupted_leaves_no_processes_behind(
    number: signal.Signals, code: int, word: str, room: Path
) -> None:
    images = np.load(DIGITS / "digits.npz")["image"]
    np.save("many.npy", np.tile(images, (100, 1, 1, 1)))
    command = [script(), str(DIGITS / "digits.onnx"), "--data", "many.npy", "--output", "out.onnx"]
    command += ["--batch-size", "1", "--workers", "2"]
    (room / "tmp").mkdir()
    environment = {**clean_environment(), "TMPDIR": str(room / "tmp")}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(room.glob("tmp/*/*/worker-*"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes(process.pid)) >= 4, "the command, and workers"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (code, f"octav-calibrate: {word}")
    while processes(process.pid):  # Python's own, which tidies up behind the others
        assert time.monotonic() < deadline, processes(process.pid)
        time.sleep(0.1)
    assert sorted(path.name for path in room.iterdir()) == ["many.npy", "tmp"]


# --- errors -----------------------------------------------------------------------------------


def test_the_earliest_of_several_bad_samples_is_named_as_in_one_process(
    client: Any, room: Path
) -> None:
    images = np.load(DIGITS / "digits.npz")["image"].copy()
    images[[61, 100, 290]] = np.nan
    np.save("bad.npy", images)
    model, data = opened(DIGITS / "digits.onnx", Path("bad.npy"))
    with pytest.raises(CalibError) as one:
        observe(model, data.batches(), ["image"])
    with pytest.raises(CalibError) as several:
        observe_on(client, Task.of(model, data, ["image"], Observing()), data)
    assert (type(several.value), str(several.value)) == (type(one.value), str(one.value))
    assert "in sample 61:" in str(several.value)
    assert room.exists()


def test_a_worker_that_has_other_files_is_one_line_and_exit_code_2(
    room: Path, address: str, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Task.of

    def moved(*arguments: Any) -> Task:
        return replace(made(*arguments), model=room / "other.onnx")

    monkeypatch.setattr(Task, "of", moved)
    options = ("--data", DIGITS / "digits.npz", "--scheduler", address, "--output", "out.onnx")
    told = run_main(capsys, DIGITS / "digits.onnx", *options)
    start, text = told.err.strip().split(": worker on ")
    assert (told.code, start) == (2, "octav-calibrate: error")
    assert text.endswith(f": {room / 'other.onnx'}: no such file")
    assert not any(room.iterdir())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (NOWHERE, f"scheduler: {NOWHERE} cannot be reached: "),
        ("nonsense", "scheduler must be an address, as tcp://host:8786, got 'nonsense': "),
        ("http://there:1", "scheduler must be an address, as tcp://host:8786, got 'http://there"),
    ],
)
def test_a_scheduler_that_cannot_be_reached_is_one_line_and_exit_code_2(
    scheduler: str,
    message: str,
    room: Path,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE_S", 1)
    told = run_main(capsys, DIGITS / "digits.onnx", "--output", "x.onnx", "--scheduler", scheduler)
    assert told.code == 2
    assert told.err.startswith(f"octav-calibrate: error: {message}")
    assert told.err.count("\n") == 1
    assert not any(room.iterdir())


def test_a_scheduler_without_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE_S", 1)
    with empty_scheduler() as scheduler:
        address = scheduler.scheduler_address
        message = rf"^scheduler: {address} has had no worker for 1 s: start one with dask worker"
        with pytest.raises(ClusterError, match=message), connected(scheduler=address):
            pass


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("0.0.1", "has octav-calibrate 0.0.1, here it is"),
        (PackageNotFoundError("octav-calibrate"), "has no octav-calibrate, here it is"),
    ],
)
def test_a_worker_with_another_version_is_refused(theirs: object, message: str) -> None:
    class Client:
        @staticmethod
        def wait_for_workers(*_: object, **__: object) -> None:
            pass

        @staticmethod
        def run(*_: object, **__: object) -> dict[str, object]:
            return {"tcp://there:1": theirs}

    with pytest.raises(ClusterError, match=f"^scheduler: worker tcp://there:1 {message}"):
        cluster._check_workers(Client(), "tcp://here:1")


def test_workers_that_cannot_be_started_are_told_with_what_scripts_forget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "_START_S", 0)
    message = r"^workers: 1 processes cannot be started; a script must start them under: if __name_"
    with pytest.raises(ClusterError, match=message), connected(workers=1):
        pass


def test_the_extra_is_asked_for_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch, room: Path, capsys: Capsys
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    told = run_main(capsys, DIGITS / "digits.onnx", "--output", room / "x.onnx", "--workers", 2)
    assert told.code == 2
    assert told.err == (
        "octav-calibrate: error: workers: need Dask distributed: "
        "pip install 'octav-calibrate[distributed]'\n"
    )
    with pytest.raises(OptionError), connected(workers=2):
        pass
