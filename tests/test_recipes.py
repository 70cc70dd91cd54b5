"""The recipes of samples/fixtures.py on the fixtures, and their images against Pillow by hand."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import Array

from calib import Preprocessing, Reading, Rules, Run, Widths, calibrate_model, load_model, open_data
from calib.pipeline import Calibration

SCRIPT = Path(__file__).resolve().parents[1] / "samples" / "fixtures.py"
FEEDBACK = {f"{name}_cache": f"{name}_cache_out" for name in ("conv", "tra", "inter")}
MOBILENET = Preprocessing(crop="87.5%", resize="128", mean=(0.5,), std=(0.5,))
ULTRAFACE = Preprocessing(resize="240x320", pixel_scale=1, mean=(127.0,), std=(128.0,))
N_CALIBRATION = 100


def by_hand(path: Path) -> Array:
    """An image as the fixtures' README says that MobileNet takes it, (3, 128, 128)."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = round(min(image.size) * 0.875)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    small = square.resize((128, 128), Image.Resampling.BILINEAR)
    planes = np.asarray(small, np.float32).transpose(2, 0, 1)
    scaled: Array = planes / np.float32(127.5) - np.float32(1)
    return scaled


def mobilenet(fixtures: Path) -> tuple[Path, Path, Reading]:
    """Model, images and how to read them."""
    images = fixtures / "imagenet_sample"
    reading = Reading(labels=images / "labels.csv", images=MOBILENET)
    return fixtures / "mobilenet_v1_025_128.onnx", images, reading


def calibrated(
    model: Path, data: Path, run: Run, folder: Path, rules: Rules | None = None
) -> Calibration:
    return calibrate_model(model, data, rules, folder / "out.onnx", run)


def test_images_of_a_folder_are_those_made_by_hand_with_their_classes(fixtures_dir: Path) -> None:
    pytest.importorskip("PIL")
    model, images, reading = mobilenet(fixtures_dir)
    with (images / "labels.csv").open(newline="", encoding="utf-8") as lines:
        rows = sorted((row["file"], int(row["label"])) for row in csv.DictReader(lines))
    data = open_data(load_model(model), images, reading)
    assert data.n_samples == len(rows) == 500
    (note,) = data.notes
    assert note.endswith("resized to 128x128; rgb; (pixel / 255 - 0.5) / 0.5; nchw")
    done = 0
    for batch in data.batches():
        chosen = rows[done : done + batch.n_samples]
        wanted = np.stack([by_hand(images / name) for name, _ in chosen])
        np.testing.assert_allclose(batch.feed["t0"], wanted, atol=1e-6)
        assert np.asarray(batch.labels).tolist() == [label for _, label in chosen]
        done += batch.n_samples
    assert done == 500


def test_mobilenet_keeps_its_accuracy_with_8_bits(fixtures_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    model, images, reading = mobilenet(fixtures_dir)
    result = calibrated(model, images, Run(samples=N_CALIBRATION, reading=reading), tmp_path)
    assert (result.comparison.n_samples, result.held_out) == (400, True)
    top1 = result.comparison.top1
    assert top1 is not None
    assert top1.float_model == pytest.approx(45.2, abs=0.3)
    assert abs(top1.quantized_model - top1.float_model) <= 3


def test_ultraface_is_fed_images_one_by_one(fixtures_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    images = some_images(fixtures_dir, tmp_path / "images")
    run = Run(samples=16, reading=Reading(images=ULTRAFACE))
    result = calibrated(fixtures_dir / "ultraface_rfb_320.onnx", images, run, tmp_path)
    assert (result.comparison.n_samples, result.held_out) == (8, True)
    assert result.comparison.output_sqnr_db > 20


def test_gtcrn_is_fed_sequences_and_its_own_state(
    fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    path = fixtures_dir / "gtcrn_stream.onnx"
    batches = list(open_data(load_model(path, FEEDBACK), "fixtures:voices").batches())
    assert [batch.feed["mix"].shape for batch in batches] == [(1, 257, 1, 2)] * 2000
    assert [n for n, batch in enumerate(batches) if batch.restart] == list(range(0, 2000, 125))
    assert all(("conv_cache" in b.feed) == (n % 125 == 0) for n, b in enumerate(batches))
    run, rules = Run(feedback=FEEDBACK, samples=125), Rules(widths=Widths(16, 16))
    data = [{"mix": batch.feed["mix"]} for batch in batches[:250]]
    result = calibrate_model(path, data, rules, tmp_path / "out.onnx", run)
    assert (result.comparison.n_samples, result.held_out) == (125, True)
    assert result.comparison.sqnr_db["enh"] > 15


def some_images(fixtures: Path, folder: Path) -> Path:
    """``folder`` with the first 24 images of the sample."""
    folder.mkdir()
    for path in sorted((fixtures / "imagenet_sample").glob("*.jpg"))[:24]:
        (folder / path.name).symlink_to(path)
    return folder


def script(arguments: list[object]) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def commands() -> list[list[str]]:
    """The octav-calibrate commands of the script's docstring, as arguments."""
    text = SCRIPT.read_text("utf-8").replace("\\\\\n", " ")
    found = re.findall(r"^    octav-calibrate (.+)$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


@pytest.fixture
def room(fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like the fixtures' folder, with less in it."""
    for path in fixtures_dir.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    images = some_images(fixtures_dir, tmp_path / "imagenet_sample")
    (images / "labels.csv").symlink_to(fixtures_dir / "imagenet_sample" / "labels.csv")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script(["resnet20", tmp_path / "OUT.npz", "--calib", 20, "--val", 10])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(4))
def test_the_commands_of_the_recipes_run_as_they_stand(number: int, room: Path) -> None:
    from cli.calibrate import main

    pytest.importorskip("PIL")
    assert len(commands()) == 4
    arguments = commands()[number]
    arguments[arguments.index("--samples") + 1] = "16"
    before = set(room.iterdir())
    assert main([*arguments, "--quiet"]) == 0
    (made,) = set(room.iterdir()) - before
    assert made.name.startswith(arguments[0].removesuffix(".onnx"))
