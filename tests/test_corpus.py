"""The models of the onnx wheel at 16 bits: `samples/corpus.py`, a few of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "samples" / "corpus.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    file = tmp_path_factory.mktemp("corpus") / "outcomes.json"
    command = [sys.executable, str(SCRIPT), "--fast", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, str]] = json.loads(file.read_text("utf-8"))["outcomes"]
    return found


def test_no_model_of_the_onnx_wheel_crashes(outcomes: list[dict[str, str]]) -> None:
    assert [o for o in outcomes if o["status"] == "crashed"] == []


def test_models_of_all_kinds_are_quantized_and_keep_sixty_decibels(
    outcomes: list[dict[str, str]],
) -> None:
    quantized = [o for o in outcomes if o["status"] == "quantized"]
    kinds = Counter(o["name"].partition("/")[0] for o in quantized)
    assert all(float(o["sqnr_db"]) > 60 for o in quantized)
    assert kinds["node"] >= 15
    assert kinds["pytorch-converted"] >= 10
    assert kinds["light"] >= 1


def test_what_is_refused_says_why_in_one_line(outcomes: list[dict[str, str]]) -> None:
    refused = [o["message"] for o in outcomes if o["status"] == "refused"]
    assert refused
    assert all(message and message.isprintable() for message in refused)
