"""Mutated models and data: `samples/fuzz_bytes.py`, a few hundred of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits and forks of POSIX")

SCRIPT = Path(__file__).resolve().parents[1] / "samples" / "fuzz_bytes.py"
N_MUTANTS = 200


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    return run("--n", N_MUTANTS, "--seed", 0, "--json")


@pytest.fixture(scope="module")
def verdicts(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_no_mutant_crashes_hangs_or_leaves_anything_behind(
    done: subprocess.CompletedProcess[str], verdicts: list[dict[str, Any]]
) -> None:
    assert [v for v in verdicts if v["status"] == "failed"] == []
    assert done.returncode == 0, done.stderr
    assert len(verdicts) == N_MUTANTS


def test_mutants_reach_beyond_the_checker_and_some_are_quantized(
    verdicts: list[dict[str, Any]],
) -> None:
    models = [v for v in verdicts if v["kind"] == "model"]
    assert sum(v["valid"] for v in models) >= 0.2 * len(models)
    for kind in ("model", "data", "observations"):
        counts = Counter(v["status"] for v in verdicts if v["kind"] == kind)
        assert counts["right"] >= 1, kind
        assert counts["refused"] >= 5, kind


def test_a_mutant_is_the_same_each_time_and_can_be_kept(
    tmp_path: Path, verdicts: list[dict[str, Any]]
) -> None:
    seed = next(v["seed"] for v in verdicts if v["kind"] == "model" and v["status"] == "right")
    again = run("--one", seed, "--save", tmp_path / "kept", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == [verdicts[seed]]
    assert (tmp_path / "kept" / "files" / "out.onnx").is_file()
    run("--one", seed, "--save", tmp_path / "other", "--json")
    kept, other = ((tmp_path / n / "files" / "model.onnx").read_bytes() for n in ("kept", "other"))
    assert kept == other


def test_the_report_counts_every_kind() -> None:
    told = run("--n", 3, "--seed", 7).stdout
    for word in ("right", "refused", "failed", "model", "data", "past onnx.checker"):
        assert word in told
