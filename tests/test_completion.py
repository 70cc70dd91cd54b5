"""Tab completion: the scripts for shells, and what they are answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from test_architecture import HEAVY

from calib.calibrators import names
from calib.images import COLORS, LAYOUTS
from calib.rules import REDUCTIONS, WEIGHT_GRANULARITIES
from calib.run import EXTERNAL_DATA
from cli._completion import completion_variable
from cli.calibrate import command, main

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "_OCTAV_CALIBRATE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def ask(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What stands at the end of ``line``, as bash is told: ``type,value``."""
    words = line.split(" ")
    monkeypatch.setenv(VARIABLE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert main() == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    return captured.out.split()


def plain(values: tuple[str, ...]) -> list[str]:
    return [f"plain,{value}" for value in values]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script_for_each_shell(shell: str) -> None:
    executable = Path(sys.executable).with_name("octav-calibrate")
    done = subprocess.run(
        [executable],
        env={**os.environ, VARIABLE: f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{VARIABLE}={shell}_complete" in done.stdout
    assert "octav-calibrate" in done.stdout


def test_the_variable_is_the_one_that_click_reads() -> None:
    assert completion_variable("octav-calibrate") == VARIABLE


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lay", "--layout"),
        ("model.onnx --no-fo", "--no-force"),
        ("--layout nc", "nchw"),
        ("--reduce ", "pool mean"),
        ("model.onnx --bits 4 --method e", "entropy"),
    ],
)
def test_bash_itself_completes(words: str, expected: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    typed = ["octav-calibrate", *words.split(" ")]
    quoted = " ".join(f"'{word}'" for word in typed)
    script = (
        f'eval "$({VARIABLE}=bash_source octav-calibrate)"\n'
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(typed) - 1}\n"
        f"_octav_calibrate_completion octav-calibrate\n"
        f'echo "${{COMPREPLY[@]}}"'
    )
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "--norc", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_every_option_is_completed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {
        name
        for parameter in command.get_params(click.Context(command))
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }
    assert len(options) > 40
    assert set(ask("octav-calibrate --", monkeypatch, capfd)) == set(plain(tuple(options)))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--method", names()),
        ("--weight-method", names()),
        ("--color", COLORS),
        ("--layout", LAYOUTS),
        ("--reduce", REDUCTIONS),
        ("--weight-granularity", WEIGHT_GRANULARITIES),
        ("--external-data", EXTERNAL_DATA),
    ],
)
def test_values_that_the_library_knows_are_completed(
    option: str,
    values: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = ask(f"octav-calibrate model.onnx {option} ", monkeypatch, capfd)
    assert sorted(found) == sorted(plain(values))
    first = values[0]
    begun = ask(f"octav-calibrate model.onnx {option} {first[:2]}", monkeypatch, capfd)
    assert begun == plain(tuple(value for value in values if value.startswith(first[:2])))
    assert ask(f"octav-calibrate {option} zzz", monkeypatch, capfd) == []


@pytest.mark.parametrize(
    "typed", ["", "--data ", "--labels ", "--output ", "--config ", "--custom-ops ", "--summary "]
)
def test_files_are_completed_by_the_shell(
    typed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(f"octav-calibrate {typed}cal", monkeypatch, capfd) == ["file,cal"]


def test_what_is_wrong_on_the_line_so_far_is_not_told_yet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = "octav-calibrate --bits many --feed-back nothing --layout nh"
    assert ask(line, monkeypatch, capfd) == ["plain,nhwc"]


def test_plug_ins_that_clash_complete_to_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    clash = [EntryPoint("octav", "other:Octav", "octav_calibrate.calibrators")]
    monkeypatch.setattr("calib.calibrators.entry_points", lambda **_group: clash)
    assert ask("octav-calibrate --method ", monkeypatch, capfd) == []


def test_completing_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom octav_calibrate_cli.calibrate import main\n"
        f"main()\nprint('loaded', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    environment = {
        **os.environ,
        VARIABLE: "bash_complete",
        "COMP_WORDS": "octav-calibrate --method o",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.splitlines(), done.stderr) == (["plain,octav", "loaded"], "")


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (
            "nonsense",
            f"{VARIABLE} must be one of bash_source, zsh_source, fish_source, got 'nonsense'",
        ),
        (
            "bash_sauce",
            f"{VARIABLE} must be one of bash_source, zsh_source, fish_source, got 'bash_sauce'",
        ),
        ("bash_complete", f"{VARIABLE}=bash_complete is for shells: 'COMP_WORDS'"),
    ],
)
def test_another_instruction_is_one_line_and_2(
    instruction: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, instruction)
    assert main() == 2
    assert capfd.readouterr() == ("", f"octav-calibrate: error: {message}\n")
