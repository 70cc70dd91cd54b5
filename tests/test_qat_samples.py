"""Quantization-aware training: `samples/qat_cifar.py` and `samples/qat_digits.py`."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest

pytest.importorskip("torch")

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CIFAR = SAMPLES / "qat_cifar.py"
DIGITS = SAMPLES / "qat_digits.py"
NUMBER = r"-?\d+(?:\.\d+)?"
GAIN = rf"(?:{NUMBER} %|-)"


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(SAMPLES)
    return import_module("qat_cifar")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(SAMPLES)
    return import_module("qat_digits")


def lines_of(printed: str) -> dict[str, str]:
    """The table's lines by the name of their row."""
    body = printed.split("\nrow ", 1)[1].splitlines()[1:]
    return {line.split()[0]: line for line in body}


# --- parts ------------------------------------------------------------------------------------


def test_the_torch_network_computes_what_the_onnx_fixture_computes(
    cifar: Any, fixtures_dir: Path
) -> None:
    path = fixtures_dir / cifar.MODEL
    images, _ = cifar.read_cifar(fixtures_dir / "cifar10_val.npz", 50, "--val")
    expected = ort.InferenceSession(str(path)).run(None, {"input": images})[0]
    with cifar.torch.no_grad():
        found = cifar.load_network(path)(cifar.torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_weights_of_another_network_are_refused(cifar: Any) -> None:
    with pytest.raises(cifar.FixturesError, match="not the ResNet-20"):
        cifar.load_network(SAMPLES / "digits" / "digits.onnx")


def test_every_training_image_is_a_shifted_and_perhaps_mirrored_one_with_its_label(
    cifar: Any,
) -> None:
    torch = cifar.torch
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    black = torch.from_numpy(-cifar.CIFAR_MEAN / cifar.CIFAR_STD)[:, None, None]
    padded = torch.nn.functional.pad(images - black, (4, 4, 4, 4)) + black
    recipe = cifar.Recipe(2, 3, 0.1, 4, torch.device("cpu"))
    batches = list(cifar.augmented((images, torch.arange(6)), recipe, seed=0))
    assert sorted(int(label) for _, labels in batches[:2] for label in labels) == [*range(6)]
    for image, label in ((x, y) for batch in batches for x, y in zip(*batch, strict=True)):
        crops = padded[label].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
        candidates = torch.cat([crops, crops.flip(-1)]).flatten(0, 1)
        assert (candidates == image).flatten(1).all(1).any()


def test_batches_are_the_same_for_one_seed_and_others_for_another(cifar: Any) -> None:
    torch = cifar.torch
    data = (torch.arange(6 * 3 * 64.0).reshape(6, 3, 8, 8), torch.arange(6))
    recipe = cifar.Recipe(1, 6, 0.1, 4, torch.device("cpu"))
    first, again, other = (next(cifar.augmented(data, recipe, seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_gain_is_a_share_of_the_gap_and_a_dash_where_there_is_none(cifar: Any) -> None:
    lines = [cifar.Found("a", "one", (84.0, 86.0), 1.5)]
    open_gap, no_gap = cifar.Scale(none=84.0, all=86.0), cifar.Scale(none=84.0, all=83.0)
    assert cifar.table(lines, open_gap).splitlines()[1].split()[2:] == [
        *("85.00", "±", "1.41", "50", "%", "1.50")
    ]
    assert cifar.table(lines, no_gap).splitlines()[1].split()[-2:] == ["-", "1.50"]
    assert cifar.documents(lines, no_gap)[0]["gain_percent"] is None
    assert "gain_percent" not in cifar.documents(lines)[0]


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retrained(
    fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """What a short run prints, and its JSON."""
    path = tmp_path_factory.mktemp("qat") / "out.json"
    short = (
        "--limit",
        128,
        "--batch",
        16,
        "--epochs",
        1,
        "--val",
        200,
        "--timed-steps",
        1,
        "--seeds",
        1,
    )
    rows = ("--rows", "octav,max", "--fixtures", fixtures_dir)
    done = run(CIFAR, *short, *rows, "--json", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_retraining_prints_a_line_per_row_with_top_1_gain_and_step(
    retrained: tuple[str, dict[str, Any]],
) -> None:
    printed, _ = retrained
    lines = lines_of(printed)
    assert list(lines)[:5] == ["float", "float-tuned", "post-training", "max", "octav"]
    for name in ("max", "octav"):
        assert re.search(rf" {NUMBER} +{GAIN} +{NUMBER}$", lines[name]), lines[name]
    assert re.search(rf" {NUMBER} +(?:0 %|-) +-$", lines["post-training"])
    assert re.search(rf"A step of octav takes {NUMBER} times one of max\.", printed)


def test_retraining_writes_the_numbers_that_it_prints(
    retrained: tuple[str, dict[str, Any]],
) -> None:
    printed, document = retrained
    lines = lines_of(printed)
    rows = {row["name"]: row for row in document["rows"]}
    for name, row in rows.items():
        assert f" {row['mean']:.2f} " in lines[name]
        assert row["mean"] == pytest.approx(sum(row["top1"]) / len(row["top1"]))
    assert rows["float"]["mean"] > rows["post-training"]["mean"] > 50
    assert all(math.isfinite(row["step_ratio"]) for row in rows.values() if row["step_ratio"])
    assert document["recipe"]["bits"] == 4
    assert (document["images"], document["seeds"]) == (128, 1)


def test_the_exported_network_classifies_as_pytorch_does(
    retrained: tuple[str, dict[str, Any]],
) -> None:
    printed, document = retrained
    exported = document["exported"]
    assert exported["agreement"] >= 98
    assert f"top-1 {exported['top1']:.2f}" in printed


def test_digits_are_trained_from_scratch(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "out.json"
    rows = "octav,octav-static"
    done = run(DIGITS, "--epochs", 2, "--seeds", 2, "--rows", rows, "--json", path)
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert list(lines) == ["float", "octav-static", "octav"]
    document = json.loads(path.read_text())
    for row in document["rows"]:
        assert len(row["top1"]) == 2
        assert f" {row['mean']:.2f} ± {row['std']:.2f} " in lines[row["name"]]
    means = {row["name"]: row["mean"] for row in document["rows"]}
    assert means["float"] > 80
    assert means["octav"] > 50


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch", "2000"], "--batch 2000 is more than the 1257 training images"),
        (["--bits", "40"], "bits must be one of"),
        (["--rows", "octav,best"], "no row 'best'; there are max, octav-static, octav, "),
        (["--lr", "-1"], "--lr: must be above 0, got -1"),
        (["--device", "toaster"], "torch cannot use 'toaster'"),
        (["--json", "none/out.json"], "none/out.json must be a file in a folder that exists"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_trained(
    digits: Any,
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["qat_digits.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        sys.exit(digits.main())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert reason in printed.err.splitlines()[-1]


def test_absent_fixtures_are_named_in_one_line(tmp_path: Path) -> None:
    done = run(CIFAR, "--fixtures", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("qat_cifar.py: no fixtures folder at ")


@pytest.mark.parametrize("script", [CIFAR, DIGITS])
def test_each_sample_says_what_to_install_when_torch_is_missing(
    script: Path, tmp_path: Path
) -> None:
    # None in sys.modules makes the import fail as it does where the package is absent.
    code = (
        f"import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, {str(SAMPLES)!r}); "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{script.name} needs torch, which is not installed: pip install octav-calibrate[samples]"
    ]
