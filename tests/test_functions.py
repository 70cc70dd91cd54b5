"""Calibration data from package.module:function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_models import ONE, joined, refusal

from calib.data import open_data
from calib.iterables import Batches

MODULE = r"""
import numpy as np
from onnxruntime.quantization import CalibrationDataReader
import helper_of_source

NUMBER = 3
calls = []

class MyReader(CalibrationDataReader):
    def __init__(self):
        self.left = [np.full((2, 6), n, np.float32) for n in range(3)]
    def get_next(self):
        return {"x": self.left.pop()} if self.left else None

def feeds():
    return iter(MyReader().get_next, None)

def generator():
    calls.append(1)
    yield from ({"x": np.ones((2, 6), np.float32)} for _ in range(5))

def failing():
    yield {"x": np.ones((2, 6), np.float32)}
    raise ValueError("the disk\nis gone")

def with_argument(folder):
    return []

def nothing(): pass
def mapping(): return {"x": np.ones((2, 6), np.float32)}
def misfit(): return [np.ones((2, 5), np.float32)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module in the current directory, which is not on sys.path."""
    (tmp_path / "source_of_feeds.py").write_text(MODULE)
    (tmp_path / "helper_of_source.py").write_text("")
    (tmp_path / "broken_source.py").write_text("1 / 0")
    (tmp_path / "exiting_source.py").write_text("import sys; sys.exit('no data today')")
    monkeypatch.chdir(tmp_path)
    path = [entry for entry in sys.path if entry not in ("", ".", str(tmp_path))]
    monkeypatch.setattr(sys, "path", path)
    yield "source_of_feeds"
    assert sys.path == path
    for name in ("source_of_feeds", "helper_of_source"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_function_is_called_for_each_pass(module: str, kind: Any) -> None:
    data = open_data(ONE, kind(f"{module}:generator"))
    assert isinstance(data, Batches)
    assert (data.once_only, data.n_samples, data.identity) == (False, None, None)
    assert sys.modules[module].calls == []
    for n_calls in (1, 2):
        assert sum(batch.n_samples for batch in data.batches(3, 8)) == 5
        assert len(sys.modules[module].calls) == n_calls


@pytest.mark.parametrize("name", ["feeds", "MyReader"])
def test_a_calibration_data_reader_comes_through_a_function_of_two_lines(
    module: str, name: str
) -> None:
    data = open_data(ONE, f"{module}:{name}")
    for _ in range(2):
        assert joined(data.batches(), "x")[:, 0].tolist() == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_"),
        ("broken_source:f", "cannot be imported: ZeroDivisionError: division by zero"),
        ("exiting_source:f", "cannot be imported: SystemExit: no data today"),
        ("source_of_feeds:f", "cannot be imported: AttributeError: module 'source_of_feeds' has"),
        ("source_of_feeds:NUMBER", "must be a function, is of type int"),
        ("source_of_feeds:failing", "ValueError: the disk is gone"),
        ("source_of_feeds:with_argument", "TypeError: with_argument() missing 1 required"),
        ("source_of_feeds:nothing", "it must return an iterable of batches, got None"),
        ("source_of_feeds:mapping", "it must return an iterable of batches, got one mapping"),
        ("source_of_feeds:misfit", "batch 0: 'x' is 2x5, the model takes Nx6"),
    ],
)
def test_a_function_that_gives_no_data_is_refused(module: str, source: str, message: str) -> None:
    assert module
    assert refusal(ONE, source).startswith(f"{source}: {message}")


def test_a_file_is_no_function_whatever_its_name(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}:feeds").write_text("")
    assert "must be an .npz or .npy file" in refusal(ONE, f"{module}:feeds")
    assert refusal(ONE, "no-module:feeds") == "no-module:feeds: no such file"
