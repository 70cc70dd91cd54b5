"""What killed processes leave beside a file goes with the next one that is written there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from calib.files import whole_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")


def write(path: Path) -> None:
    with whole_file(path) as file:
        file.write_text("new")


def left_over(folder: Path, name: str, *files: str) -> Path:
    path = folder / name
    path.mkdir()
    for file in files:
        (path / file).write_text("")
    return path


@pytest.mark.parametrize("files", [(), ("out.onnx",), (".journal",), (".lock",)])
def test_a_folder_whose_process_died_while_working_or_removing_it_goes(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    left_over(tmp_path, ".octav-calibrate-x", *files)
    write(tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_folder_whose_process_died_while_making_it_goes_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left_over(tmp_path, ".new-octav-calibrate-x", ".lock")
    with monkeypatch.context() as patch:
        patch.setattr("calib.files._MAKING_S", 60)  # however busy the machine is
        write(tmp_path / "out.onnx")
    assert folder.exists()  # its process may be about to lock it
    os.utime(folder, times=(time.time() - 2,) * 2)
    write(tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_folder_of_a_process_at_work_stays(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.onnx") as file:
        file.write_text("a")
        write(tmp_path / "b.onnx")
        assert file.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
