"""octav-calibrate as a program: which stream gets what, odd terminals, help and version."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cli_models import (
    by_name,
    clean_environment,
    contents,
    copy_digits,
    enter_room,
    read_json,
    run_main,
    run_script,
    save_two_layers,
    script,
    succeed,
)

from cli.calibrate import command

JOB = ("digits.onnx", "--data", "digits.npz", "--bits", 4, "--samples", 256)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the digits sample."""
    copy_digits(tmp_path)
    return enter_room(tmp_path, monkeypatch)


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
def test_in_a_pipe_there_are_no_escape_codes_and_no_progress_bar() -> None:
    told = run_script("digits.onnx", "--verbose", "--samples", 8, TERM="xterm-256color")
    assert told.code == 0
    assert "WARNING" in told.err
    assert not re.search(r"[\x1b\r\b]", told.out + told.err)
    assert "left" not in told.err


@pytest.mark.usefixtures("room")
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_stderr_shows_progress_and_stdout_stays_clean() -> None:
    reader, terminal = os.openpty()
    environment = {**clean_environment(), "TERM": "xterm"}
    command_line = [script(), *map(str, JOB)]
    done = subprocess.run(
        command_line, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True
    )
    os.close(terminal)
    shown = read_all(reader)
    assert "observe" in shown
    assert "samples, left" in shown
    assert "\x1b" in shown
    assert b"\x1b" not in done.stdout


def read_all(descriptor: int) -> str:
    """What a pseudo-terminal still holds; Linux ends it with an error."""
    blocks = []
    try:
        while block := os.read(descriptor, 4096):
            blocks.append(block)
    except OSError:
        pass
    os.close(descriptor)
    return b"".join(blocks).decode()


def test_quiet_prints_nothing_where_there_is_nothing_to_warn_of(room: Path) -> None:
    told = run_script(*JOB, "--quiet")
    assert told == type(told)(0, "", "")
    assert (room / "digits-w4a4.onnx").exists()


@pytest.mark.usefixtures("room")
def test_verbose_prints_every_tensor_on_stdout_and_logs_on_stderr() -> None:
    told = run_script(*JOB, "--verbose", "--summary", "s.json")
    assert told.code == 0
    rows = [line.split() for line in told.out.splitlines()]
    for name, tensor in by_name(read_json("s.json")).items():
        (row,) = (row for row in rows if row and row[0] == name)
        assert row[1] == f"{'' if tensor['signed'] else 'u'}int{tensor['bits']}"
        assert f"{tensor['sqnr_db']:.1f}" in row
    assert re.search(r"^onnx\w+\.\S+: ", told.err, flags=re.MULTILINE)
    assert not re.search(r"^onnx\w+\.\S+: ", told.out, flags=re.MULTILINE)
    assert not run_script(*JOB, "--force").err


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    "name",
    ["[red]x[/red]", "a:cat:b", "/model/" + "layer/" * 40 + "weight", "back\\slash[", "größe"],
    ids=["markup", "emoji", "long", "backslash", "umlaut"],
)
@pytest.mark.parametrize("option", ["--dry-run", "--verbose"])
def test_names_are_printed_as_they_are_and_whole(
    capsys: pytest.CaptureFixture[str], name: str, option: str
) -> None:
    save_two_layers("odd.onnx", names=("x", name, "hidden", "w", "y"))
    assert name in succeed(capsys, "odd.onnx", option).out


def test_a_long_path_is_printed_whole(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = room / ("long" * 30) / ("path" * 30)
    folder.mkdir(parents=True)
    output = folder / "out.onnx"
    assert str(output) in succeed(capsys, *JOB, "--output", output).out


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [JOB, ("digits.onnx", "--verbose"), ("--help",)],
    ids=["main job", "verbose", "help"],
)
def test_a_stdout_that_is_not_utf_8_gets_its_table_too(
    encoding: str, arguments: tuple[object, ...]
) -> None:
    told = run_script(*arguments, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert told.code == 0, told.err
    assert "Traceback" not in told.err
    assert "digits" in told.out or "Usage" in told.out


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and a device that is full")
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"], ids=["full", "closed"])
@pytest.mark.usefixtures("room")
def test_a_stdout_that_takes_nothing_is_no_traceback(redirection: str) -> None:
    line = shlex.join([script(), *map(str, JOB)])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{line} {redirection}"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_an_interrupt_is_one_word_and_exit_code_130(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calib.pipeline.verify", interrupted)
    before = contents(room)
    told = run_main(capsys, *JOB)
    assert (told.code, told.out) == (130, "")
    assert told.err.strip() == "octav-calibrate: interrupted"
    assert contents(room) == before


# --- help and version -------------------------------------------------------------------------


def test_the_version_is_that_of_the_distribution() -> None:
    told = run_script("--version")
    assert (told.code, told.err) == (0, "")
    assert told.out == f"octav-calibrate {version('octav-calibrate')}\n"


def test_help_describes_every_option_and_fits_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = succeed(capsys, "--help")
    assert max(map(len, told.out.splitlines())) <= 100
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    assert len(options) > 25
    for option in options:
        assert re.search(
            rf"^  (-\w, )?{option.opts[-1]}\b.*\s{{2,}}[^-\s]", told.out, re.MULTILINE
        ), f"{option.opts}: no help"
    assert succeed(capsys, "-h").out == told.out


def test_every_example_of_the_help_works(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("digits.onnx", "model.onnx")
    shutil.move("digits.npz", "calib.npz")
    (room / "octav.yaml").write_text("data: calib.npz\n")
    text = succeed(capsys, "--help").out
    examples = re.findall(r"^  octav-calibrate (.*)$|^    octav-calibrate (.*)$", text, re.M)
    lines = [first or second for first, second in examples]
    assert len(lines) >= 4
    for line in lines:
        succeed(capsys, *shlex.split(line), *([] if "--dry-run" in line else ["--force"]))
    assert {"model-w4a4.onnx", "model-w4a8.onnx"} <= set(contents(room))


@pytest.mark.parametrize("name", ["octav-calibrate", "octav-compare", "octav-check"])
@pytest.mark.usefixtures("room")
def test_whoever_stops_reading_changes_neither_exit_code_nor_files(name: str) -> None:
    arguments = {
        "octav-calibrate": ["digits.onnx", "--output", "out.onnx"],
        "octav-compare": ["digits.onnx", "--bits", "4", "--methods", "max", "--json", "out.onnx"],
        "octav-check": ["digits.onnx", "digits.onnx", "--json", "out.onnx"],
    }[name]
    command = [str(Path(script()).with_name(name)), *arguments, "--data", "digits.npz"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out.onnx").stat().st_size > 0
