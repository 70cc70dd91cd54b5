"""The transformer that is trained in the samples, and the table of its blocks."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from calib.capture import Session

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module("transformer")


def test_the_graph_computes_what_was_trained(sample: ModuleType, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    size = sample.Size(layers=2, width=32, heads=2, context=16)
    weights, _ = sample.train(size, 3)
    onnx.save(sample.transformer(weights, size), tmp_path / "gpt.onnx")
    onnx.checker.check_model(tmp_path / "gpt.onnx", full_check=True)
    for length in (1, 7, 16):
        tokens = np.random.default_rng(length).integers(0, size.symbols, (3, length))
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        wanted = sample._forward(tensors, torch.from_numpy(tokens), size).numpy()
        found = Session(tmp_path / "gpt.onnx").run({"tokens": tokens})["logits"]
        assert found.shape == (3, length, size.symbols)
        assert np.allclose(found, wanted, atol=1e-4)


def test_the_graph_of_berts_size_has_its_85_million_weights(sample: ModuleType) -> None:
    one = sample.random_weights(sample.Size(layers=1, width=768, heads=12, context=4))
    layer = sum(array.size for name, array in one.items() if name.startswith("0."))
    assert abs(layer * sample.BERT.layers / 1e6 - 85) < 0.5


def test_held_out_text_is_none_that_was_trained_on(sample: ModuleType) -> None:
    seen, held_out = sample.text()
    assert min(len(seen), len(held_out)) > 100_000
    assert max(seen.max(), held_out.max()) < len(sample.SYMBOLS)
    whole = "".join(map(chr, seen))
    parts = sample.windows(held_out, 20, 200, 0)
    assert sum("".join(map(chr, part)) in whole for part in parts) <= 1


def test_the_table_has_a_row_for_every_setting(sample: ModuleType, tmp_path: Path) -> None:
    size = sample.Size(layers=1)
    onnx.save(sample.transformer(sample.random_weights(size), size), tmp_path / "gpt.onnx")
    command = [sys.executable, str(SAMPLES / "bench_blocks.py"), str(tmp_path / "gpt.onnx")]
    command += ["--sequences", "4", "--runs", "2", "--blocks", "32", "--methods", "max", "octav"]
    command += ["--json", str(tmp_path / "blocks.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "blocks.json").read_text("utf-8"))
    assert len(rows) == len(done.stdout.splitlines()) - 1 == 1 + 2 * 2 + 2
    known = {(row["weights"], row["method"]): row for row in rows}
    plain, rounded = (known[name, "octav"] for name in ("blocks of 32, matmulnbits", BLOCKS))
    assert plain["dB"] == plain["dB float32"]
    assert rounded["dB"] != rounded["dB float32"]
    assert known[BLOCKS, "octav"]["dB"] > known["4 bits, per channel", "octav"]["dB"]
    assert all(math.isfinite(row["perplexity"]) and row["ms"] > 0 for row in rows)
    assert known[BLOCKS, "octav"]["MB"] < 0.25 * known["float", ""]["MB"]


BLOCKS = "4 bits, blocks of 32"
