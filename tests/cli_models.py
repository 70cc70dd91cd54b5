"""What the command-line tests share: small models, a room to work in, a way to run the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "samples" / "digits"
N_CALIBRATION = 256  # the first images of digits.npz; the rest are the test images
# Each of these makes rich believe that it writes to a terminal, or how wide one is.
_TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE", "COLUMNS")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Told:
    """What a run of the command said."""

    code: int
    out: str
    err: str


def run_main(
    capsys: pytest.CaptureFixture[str], *arguments: object, name: str = "octav-calibrate"
) -> Told:
    """The command in this process."""
    main = import_module(f"cli.{name.removeprefix('octav-')}").main
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Told(code, captured.out, captured.err)


def succeed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Told:
    """The command in this process, which must end well."""
    told = run_main(capsys, *arguments)
    assert told.code == 0, told.err
    return told


def run_script(*arguments: object, **environment: str) -> Told:
    """The installed script, in a process of its own with pipes for stdout and stderr."""
    command = [script(), *map(str, arguments)]
    env = {**clean_environment(), **environment}
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=env)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    return Told(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


def script() -> str:
    """The path of ``octav-calibrate`` beside the running interpreter."""
    found = shutil.which("octav-calibrate", path=str(Path(sys.executable).parent))
    assert found is not None, "octav-calibrate is not installed: pip install -e .[dev]"
    return found


def clean_environment() -> dict[str, str]:
    """The environment without what would make a pipe look like a terminal; UTF-8 throughout."""
    kept = {name: value for name, value in os.environ.items() if name not in _TERMINAL}
    return {**kept, "PYTHONIOENCODING": "utf-8"}


def enter_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which nothing looks like a terminal."""
    for name in _TERMINAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_digits(folder: Path) -> None:
    """``digits.onnx`` and ``digits.npz`` in ``folder``; nothing is written into samples/."""
    for name in ("digits.onnx", "digits.npz"):
        shutil.copy(DIGITS / name, folder)


def load_digits() -> tuple[Floats, NDArray[np.int64]]:
    """All images ``(796, 1, 8, 8)`` and their labels ``(796,)``."""
    with np.load(DIGITS / "digits.npz") as arrays:
        return arrays["image"], arrays["labels"]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` and its bytes; None for a directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """A summary."""
    document: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    return document


def by_name(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of a summary by their names."""
    return {tensor["name"]: tensor for tensor in summary["tensors"]}


def normal(*shape: int, seed: int = 0) -> Floats:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save_two_layers(
    path: str | Path,
    first: Floats | None = None,
    second: Floats | None = None,
    *,
    names: Sequence[str] = ("x", "first.weight", "hidden", "second.weight", "y"),
    batch: int | str = "N",
) -> None:
    """``y = relu(x @ first) @ second``, nodes ``first``, ``relu`` and ``second``; x is (N, 4)."""
    first = normal(4, 5) if first is None else first
    second = normal(5, 3, seed=1) if second is None else second
    x, w, hidden, v, y = names
    nodes = [
        helper.make_node("MatMul", [x, w], ["product"], name="first"),
        helper.make_node("Relu", ["product"], [hidden], name="relu"),
        helper.make_node("MatMul", [hidden, v], [y], name="second"),
    ]
    save_model(path, nodes, {w: first, v: second}, (x, [batch, 4]), (y, [batch, 3]))


def save_one_layer(path: str | Path) -> None:
    """``y = x @ weight``, node ``only``: the one activation is the model's input."""
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"], name="only")]
    save_model(path, nodes, {"weight": normal(4, 3)}, ("x", ["N", 4]), ("y", ["N", 3]))


def save_relu(path: str | Path) -> None:
    """``y = relu(x)``: valid, and nothing in it to quantize."""
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    save_model(path, nodes, {}, ("x", ["N", 4]), ("y", ["N", 4]))


def save_model(
    path: str | Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Floats],
    source: tuple[str, Sequence[int | str]],
    result: tuple[str, Sequence[int | str]],
) -> None:
    """A checked float32 model with one input and one output, opset 17."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
        [helper.make_tensor_value_info(result[0], TensorProto.FLOAT, result[1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def refuse(
    capsys: pytest.CaptureFixture[str], *arguments: object, name: str = "octav-calibrate"
) -> str:
    """The command, which must refuse: returns the one line on stderr, less its beginning.

    Nothing may stand on stdout, and every file of the working directory must be as before.
    """
    before = contents(Path.cwd())
    told = run_main(capsys, *arguments, name=name)
    assert (told.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    beginning = f"{name}: error: "
    assert line.startswith(beginning)
    assert "  " not in line, "a gap in the message"
    assert " ," not in line, "a gap in the message"
    after = contents(Path.cwd())
    assert set(after) == set(before), "files came or went"
    assert after == before, "a file was changed"
    return line.removeprefix(beginning)


def assert_tells(message: str, *parts: str) -> None:
    """Every part stands in the message."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
