"""The sample that holds the target onnxruntime against onnxruntime's own quantizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SAMPLES / "bench_targets.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_it_measures_float_theirs_and_ours(tmp_path: Path) -> None:
    out = tmp_path / "targets.json"
    done = run("--models", "squeezenet", "--rounds", 1, "--runs", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "squeezenet" in done.stdout
    found = json.loads(out.read_text())
    assert found["kinds"] == ["float", "quantize_static", "ours"]
    (row,) = found["models"]
    assert (row["name"], row["top1"]) == ("squeezenet", None)
    assert all(ms > 0 for ms in row["ms"])
    assert row["ratio"] == row["ms"][2] / row["ms"][1]
    assert row["kilobytes"][2] < row["kilobytes"][0] / 3


def test_a_model_that_it_does_not_know_is_refused() -> None:
    done = run("--models", "alexnet")
    assert done.returncode == 2
    assert "no model 'alexnet', only resnet50, shufflenet, squeezenet" in done.stderr
