"""Observing goes on where a killed run was; a run that dies at any of its steps loses nothing;
what is overwritten takes its external data with it, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_models import DIGITS, contents, copy_digits
from models import run as run_model
from warm_script import Warm

from calib import Rules, Run, calibrate_model
from calib.capture import Runtime
from calib.data import Reading
from calib.pipeline import Calibration
from calib.rules import Reduction

Child = Callable[..., int]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")

N_SAMPLES = 96
BATCH = 8
PARTIAL = "seen.npz.partial"
# Dies when it is about to ask for another batch than the first ones.
OBSERVE = """
import os, signal, sys
from contextlib import contextmanager
from test_resumed import observe

@contextmanager
def progress(stage, total):
    left = int(sys.argv[1])
    def advance(n):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

observe(progress=progress, reduction=sys.argv[2])
"""
# Gets the given signal at the given step of those that make, move or remove files.
STEPS = """
import os, pathlib, shutil, sys
from test_resumed import overwrite

left = int(sys.argv[1])

def dying(function):
    def call(*arguments, **settings):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), int(sys.argv[2]))
        return function(*arguments, **settings)
    return call

for name in sys.argv[3:]:
    owner = shutil if name == "rmtree" else pathlib.Path
    setattr(owner, name, dying(getattr(owner, name)))
overwrite()
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the digits in it."""
    copy_digits(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def child(server: Warm, room: Path, tmp_path_factory: pytest.TempPathFactory) -> Child:
    """Runs code in a process, which may import this file; returns the exit code."""
    server.room = room
    script = tmp_path_factory.mktemp("code") / "code.py"

    def run(code: str, *arguments: object) -> int:
        script.write_text(code, "utf-8")
        return server.run(str(script), *arguments)[0]

    return run


def observe(
    data: str = "digits.npz", batch_size: int = BATCH, reduction: str = "pool", **settings: Any
) -> Calibration:
    """A calibration that saves its observations after every batch."""
    run = Run(
        samples=N_SAMPLES,
        reading=Reading(batch_size),
        runtime=Runtime(threads=1),
        save_observations=Path("seen.npz"),
        checkpoint_seconds=0,
        force=True,
        **settings,
    )
    return calibrate_model("digits.onnx", data, Rules(reduction=Reduction(reduction)), None, run)


def observed(path: Path) -> dict[str, bytes]:
    with np.load(path) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def partial_notes(result: Calibration) -> list[str]:
    return [note for note in result.notes if PARTIAL in note]


# --- observing goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_batches", "reduction"), [(1, "pool"), (5, "pool"), (3, "mean")])
def test_a_killed_run_goes_on_and_counts_what_one_without_a_break_counts(
    room: Path, child: Child, n_batches: int, reduction: str
) -> None:
    whole = observe(reduction=reduction)
    expected, model = observed(room / "seen.npz"), whole.output.read_bytes()
    (room / "seen.npz").unlink()
    assert child(OBSERVE, n_batches, reduction) == -signal.SIGKILL
    assert (room / PARTIAL).exists()
    assert not (room / "seen.npz").exists()
    result = observe(reduction=reduction)
    sample = n_batches * BATCH
    assert partial_notes(result) == [f"observing went on from sample {sample} ({PARTIAL})"]
    assert result.table.n_samples == N_SAMPLES
    assert observed(room / "seen.npz") == expected
    assert result.output.read_bytes() == model
    assert not (room / PARTIAL).exists()


@pytest.fixture
def killed(room: Path, child: Child) -> Path:
    """The room that a run left behind that was killed after three batches."""
    assert child(OBSERVE, 3, "pool") == -signal.SIGKILL
    assert (room / PARTIAL).exists()
    return room


def assert_from_the_start(result: Calibration) -> None:
    (note,) = partial_notes(result)
    assert "from the start" in note
    assert result.table.n_samples == N_SAMPLES
    assert not Path(PARTIAL).exists()


def test_other_data_is_observed_from_the_start(killed: Path) -> None:
    images = np.load(DIGITS / "digits.npz")["image"]
    np.savez(killed / "digits.npz", image=images[::-1])
    assert_from_the_start(observe())
    found = observed(killed / "seen.npz")
    observe()
    assert observed(killed / "seen.npz") == found


def test_data_of_another_name_but_the_same_content_is_no_harm(killed: Path) -> None:
    shutil.copy(killed / "digits.npz", killed / "copy.npz")
    result = observe("copy.npz")
    assert len(partial_notes(result)) == 1
    found = observed(killed / "seen.npz")
    observe()
    assert observed(killed / "seen.npz") == found


@pytest.mark.parametrize("other", [{"batch_size": 16}, {"reduction": "mean"}])
def test_other_settings_are_observed_from_the_start(killed: Path, other: dict[str, Any]) -> None:
    assert killed.is_dir()
    assert_from_the_start(observe(**other))


def test_another_model_is_observed_from_the_start(killed: Path) -> None:
    model = onnx.load(killed / "digits.onnx")
    model.doc_string = "another"
    onnx.save(model, killed / "digits.onnx")
    assert_from_the_start(observe())


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "a flipped byte"])
def test_a_damaged_part_is_observed_from_the_start(killed: Path, damage: str) -> None:
    path = killed / PARTIAL
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    damaged = {"cut off": data[:middle], "empty": b"", "text": b"seen", "a flipped byte": flipped}
    path.write_bytes(damaged[damage])
    assert_from_the_start(observe())


# --- every step may be the last -------------------------------------------------------------------


def overwrite() -> Calibration:
    """Replaces everything that a run may write."""
    run = Run(
        samples=16,
        runtime=Runtime(threads=1),
        save_observations=Path("seen.npz"),
        summary=Path("out.json"),
        external_data="always",
        force=True,
    )
    return calibrate_model("digits.onnx", "digits.npz", None, "out.onnx", run)


def assert_runs(path: Path) -> None:
    images = np.load(DIGITS / "digits.npz")["image"][:1]
    assert run_model(path, {"image": images})["logits"].shape == (1, 10)


def test_a_run_that_dies_at_any_step_leaves_a_model_that_runs_and_the_next_run_tidies_up(
    room: Path, child: Child
) -> None:
    overwrite()
    inputs = {name: (room / name).read_bytes() for name in ("digits.onnx", "digits.npz")}
    step, code = 0, -9
    while code:
        step += 1
        code = child(STEPS, step, 9, "replace", "rename", "unlink", "rmtree")
        assert code in (0, -9), "it failed, instead of being killed"
        assert_runs(room / "out.onnx")
        if code and step % 2:  # at times one dies after the other
            continue
        for path in room.glob(".new-*"):  # what nobody has locked yet is left alone for an hour
            os.utime(path, (0, 0))
        overwrite()
        assert_runs(room / "out.onnx")
        (data,) = room.glob("*.data")
        names = [*inputs, "out.onnx", data.name, "out.json", "seen.npz"]
        assert sorted(contents(room)) == sorted(names), f"after step {step}"
    assert step > 8
    assert {name: (room / name).read_bytes() for name in inputs} == inputs


def test_an_interrupt_between_two_files_leaves_all_of_them_or_none(
    room: Path, child: Child
) -> None:
    inputs = contents(room)
    codes = []
    for step in range(1, 8):
        codes.append(child(STEPS, step, int(signal.SIGINT), "replace"))
        added = sorted(set(contents(room)) - set(inputs))
        everything = ["out.json", "out.onnx", "out.onnx.data", "seen.npz"]
        assert added in ([], everything), f"before step {step}"
        for name in added:
            (room / name).unlink()
    assert codes[0] != 0, "nothing was interrupted"
    assert codes[-1] == 0, f"there are more steps than that: {codes}"


# --- external data --------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["out.onnx.data", "out.onnx.2.data", "digits.onnx.data"])
def test_overwriting_leaves_one_model_one_data_file_and_the_data_of_the_input(
    room: Path, theirs: str
) -> None:
    model = onnx.load(room / "digits.onnx")
    onnx.save(model, room / "digits.onnx", save_as_external_data=True, location=theirs)
    before = contents(room)
    run = Run(samples=16, runtime=Runtime(threads=1), external_data="always", force=True)
    for _ in range(4):
        calibrate_model("digits.onnx", "digits.npz", None, "out.onnx", run)
        added = sorted(set(contents(room)) - set(before))
        assert len(added) == 2
        assert added[0] == "out.onnx"
        assert added[1].endswith(".data")
        assert {name: contents(room)[name] for name in before} == before
        assert_runs(room / "out.onnx")


def test_a_file_of_someone_else_with_the_name_of_our_data_is_not_touched(room: Path) -> None:
    (room / "out.onnx.data").write_bytes(b"mine")
    run = Run(samples=16, runtime=Runtime(threads=1), external_data="always", force=True)
    for _ in range(3):
        calibrate_model("digits.onnx", "digits.npz", None, "out.onnx", run)
    assert (room / "out.onnx.data").read_bytes() == b"mine"
    assert len(list(room.glob("out.onnx*"))) == 3


def test_a_model_that_no_longer_has_external_data_leaves_none_behind(room: Path) -> None:
    for external_data in ("always", "never", "always", "always"):
        run = Run(samples=16, external_data=external_data, force=True)
        calibrate_model("digits.onnx", "digits.npz", None, "out.onnx", run)
    assert len(list(room.glob("out.onnx*"))) == 2
    run = Run(samples=16, external_data="never", force=True)
    calibrate_model("digits.onnx", "digits.npz", None, "out.onnx", run)
    assert len(list(room.glob("out.onnx*"))) == 1
