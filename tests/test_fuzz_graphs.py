"""Random valid graphs: `samples/fuzz_graphs.py`, a few dozen of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "samples" / "fuzz_graphs.py"
N_GRAPHS = 40


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    return run("--n", N_GRAPHS, "--seed", 0)


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    lines = re.findall(r"^(passed|refused|discarded|failed) +(\d+)$", done.stdout, re.MULTILINE)
    return {status: int(number) for status, number in lines}


def test_every_random_graph_is_quantized_or_deserves_its_refusal(
    done: subprocess.CompletedProcess[str],
) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts(done)["failed"] == 0


def test_most_random_graphs_are_valid_and_quantized(
    done: subprocess.CompletedProcess[str],
) -> None:
    found = counts(done)
    assert sum(found.values()) == N_GRAPHS
    assert found["passed"] > N_GRAPHS * 0.7


def test_one_graph_can_be_run_again_and_kept(tmp_path: Path) -> None:
    again = run("--one", 1, "--save", tmp_path)
    assert counts(again)["passed"] == 1, again.stdout + again.stderr
    assert (tmp_path / "fuzz1.onnx").is_file()
