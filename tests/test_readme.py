"""The README's commands and code are run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMAND = re.compile(r"(?:.* && \S*/)?octav-(calibrate|compare|check) (.*)")


def commands() -> list[tuple[str, str]]:
    """Name and arguments of every command that is shown."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    found = (COMMAND.fullmatch(line) for line in lines)
    return [(match[1], match[2]) for match in found if match is not None]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sample, under its own name and under the names that the README uses."""
    shutil.copytree(ROOT / "samples/digits", tmp_path / "samples/digits")
    shutil.copy(ROOT / "samples/digits/digits.onnx", tmp_path / "model.onnx")
    shutil.copy(ROOT / "samples/digits/digits.npz", tmp_path / "calib.npz")
    (settings,) = blocks("yaml")
    (tmp_path / "octav.yaml").write_text(settings, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_works(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name for name, _ in commands()} == {"calibrate", "compare", "check"}
    assert len(commands()) >= 12
    for name, line in commands():
        main = import_module(f"cli.{name}").main
        code = main([*shlex.split(line), "--force"])
        captured = capsys.readouterr()
        assert code == 0, f"octav-{name} {line}: {captured.err}"
    assert (workplace / "model-w4a4.onnx").stat().st_size > 0
    assert (workplace / "samples/digits/digits-w4a4.onnx").stat().st_size > 0


def test_every_python_block_of_the_readme_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = blocks("python")
    assert len(sources) >= 3
    for source in sources:
        namespace: dict[str, object] = {"__name__": "readme"}
        exec(compile(source, "README.md", "exec", dont_inherit=True), namespace)  # noqa: S102 - our own text
    assert (workplace / "digits-w4a8.onnx").stat().st_size > 0
    assert "Top1" in capsys.readouterr().out


def test_the_readme_shows_a_calibrator_that_passes_the_battery() -> None:
    from calib.testing import CALIBRATOR_CHECKS

    source = next(block for block in blocks("python") if "class Sigma" in block)
    namespace: dict[str, object] = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec", dont_inherit=True), namespace)  # noqa: S102 - our own text
    sigma = namespace["Sigma"]
    assert isinstance(sigma, type)
    for check in CALIBRATOR_CHECKS:
        check(sigma())


def test_continuous_integration_runs_the_readmes_two_set_up_commands() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    set_up = [line for block in blocks("sh") for line in block.splitlines() if "venv" in line]
    assert len(set_up) == 2
    for line in set_up:
        assert line in script.splitlines()
