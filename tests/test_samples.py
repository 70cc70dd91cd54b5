"""The samples: the committed digits model and data, the script that made them, the fixtures."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
DIGITS = SAMPLES / "digits"
FIXTURES = Path(os.environ.get("OCTAV_FIXTURES") or ROOT.parent / "shared" / "fixtures")
N_CALIBRATION = 256
N_TEST = 540

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES} (environment variable OCTAV_FIXTURES)"
)


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def predict(model: Path, images: NDArray[np.generic]) -> NDArray[np.int64]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [images[start : start + 100] for start in range(0, len(images), 100)]
    logits = [np.asarray(session.run(None, {name: batch})[0]) for batch in batches]
    predicted: NDArray[np.int64] = np.concatenate(logits).argmax(1).astype(np.int64)
    return predicted


def interface(model: onnx.ModelProto) -> list[tuple[str, int, list[str | int]]]:
    values = [*model.graph.input, *model.graph.output]
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


def nodes_of(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(node.op_type, node.name) for node in model.graph.node]


# --- digits -----------------------------------------------------------------------------------


def test_the_digits_model_passes_the_full_onnx_check() -> None:
    onnx.checker.check_model(str(DIGITS / "digits.onnx"), full_check=True)


def test_the_digits_model_takes_any_batch_of_images_and_gives_ten_logits() -> None:
    model = onnx.load(DIGITS / "digits.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert interface(model) == [
        ("image", onnx.TensorProto.FLOAT, ["N", 1, 8, 8]),
        ("logits", onnx.TensorProto.FLOAT, ["N", 10]),
    ]


def test_the_digits_model_keeps_batch_normalisation_and_has_a_residual_add() -> None:
    model = onnx.load(DIGITS / "digits.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert {"Conv", "BatchNormalization", "Relu", "Add", "Gemm"} <= set(operators)
    assert operators.count("BatchNormalization") == operators.count("Conv")


def test_every_node_of_the_digits_model_has_a_name_of_its_own() -> None:
    names = [node.name for node in onnx.load(DIGITS / "digits.onnx").graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_the_digits_data_holds_calibration_images_then_the_test_images() -> None:
    arrays = load_arrays(DIGITS / "digits.npz")
    assert set(arrays) == {"image", "labels"}
    image, labels = arrays["image"], arrays["labels"]
    assert image.shape == (N_CALIBRATION + N_TEST, 1, 8, 8)
    assert image.dtype == np.dtype(np.float32)
    assert labels.shape == (N_CALIBRATION + N_TEST,)
    assert labels.dtype == np.dtype(np.int64)
    assert (float(np.min(image)), float(np.max(image))) == (0.0, 1.0)
    assert np.bincount(labels[N_CALIBRATION:]).min() >= 50


def test_no_calibration_image_of_the_digits_is_a_test_image() -> None:
    image = load_arrays(DIGITS / "digits.npz")["image"]
    calibration = {one.tobytes() for one in image[:N_CALIBRATION]}
    assert not calibration & {one.tobytes() for one in image[N_CALIBRATION:]}


def test_the_digits_model_reads_at_least_97_percent_of_the_test_images() -> None:
    arrays = load_arrays(DIGITS / "digits.npz")
    predicted = predict(DIGITS / "digits.onnx", arrays["image"][N_CALIBRATION:])
    assert np.mean(predicted == arrays["labels"][N_CALIBRATION:]) >= 0.97


def test_the_digits_files_are_small_enough_to_live_in_the_repository() -> None:
    assert (DIGITS / "digits.onnx").stat().st_size < 250_000
    assert (DIGITS / "digits.npz").stat().st_size < 150_000


def test_the_training_script_makes_the_same_model_graph_and_the_same_data(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    done = run_script(DIGITS / "train.py", "--epochs", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    made, committed = (onnx.load(folder / "digits.onnx") for folder in (tmp_path, DIGITS))
    onnx.checker.check_model(made, full_check=True)
    assert interface(made) == interface(committed)
    assert nodes_of(made) == nodes_of(committed)
    arrays, expected = (load_arrays(folder / "digits.npz") for folder in (tmp_path, DIGITS))
    for name in ("image", "labels"):
        np.testing.assert_array_equal(arrays[name], expected[name])

    # torch printed this accuracy, onnxruntime must find it in the exported graph.
    printed = re.search(r"float test accuracy: ([\d.]+)%", done.stdout)
    assert printed is not None
    predicted = predict(tmp_path / "digits.onnx", arrays["image"][N_CALIBRATION:])
    found = 100 * np.mean(predicted == arrays["labels"][N_CALIBRATION:])
    assert found == pytest.approx(float(printed[1]), abs=100 / N_TEST + 0.005)
    assert found > 20


def test_the_training_script_says_what_to_install_when_torch_is_missing(tmp_path: Path) -> None:
    # None in sys.modules makes the import fail as it does where the package is absent.
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"runpy.run_path({str(DIGITS / 'train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train.py needs torch, which is not installed: pip install octav-calibrate[samples]"
    ]


# --- fixtures ---------------------------------------------------------------------------------


@needs_fixtures
def test_the_resnet20_data_is_preprocessed_as_the_network_was_trained(tmp_path: Path) -> None:
    out = tmp_path / "resnet20.npz"
    arguments = ("--calib", 3, "--val", 200, "--fixtures", FIXTURES)
    done = run_script(SAMPLES / "fixtures.py", "resnet20", out, *arguments)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [out]

    arrays = load_arrays(out)
    assert set(arrays) == {"input", "labels"}
    images, labels = arrays["input"], arrays["labels"]
    assert images.shape == (203, 3, 32, 32)
    assert images.dtype == np.dtype(np.float32)
    assert labels.shape == (203,)
    assert labels.dtype == np.dtype(np.int64)

    calibration, evaluation = (
        load_arrays(FIXTURES / f"cifar10_{part}.npz") for part in ("calib", "val")
    )
    np.testing.assert_array_equal(labels[:3], calibration["labels"][:3])
    np.testing.assert_array_equal(labels[3:], evaluation["labels"][:200])
    constants = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    for channel, (mean, deviation) in enumerate(constants):
        raw = evaluation["images"][7, :, :, channel].astype(np.float64)
        expected = (raw / 255 - mean) / deviation
        np.testing.assert_allclose(images[3 + 7, channel], expected, rtol=1e-5, atol=1e-6)

    predicted = predict(FIXTURES / "resnet20_cifar10.onnx", images[3:])
    assert np.mean(predicted == labels[3:]) > 0.8


def test_the_gtcrn_data_is_sequences_of_spectra_and_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SAMPLES)
    voices = importlib.import_module("fixtures").voices
    first, second = (list(islice(voices(), 2)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        spectra = one["mix"]
        np.testing.assert_array_equal(spectra, other["mix"])
        assert (spectra.shape, spectra.dtype) == ((125, 257, 1, 2), np.float32)
        assert np.isfinite(spectra).all()
        # A spectrum of real samples is real at both ends.
        assert (spectra[:, [0, -1], :, 1] == 0).all()
        # Voices lie below 4 kHz.
        energy = np.square(spectra).sum(axis=(0, 2, 3))
        assert energy[:128].sum() > 4 * energy[128:].sum()
        assert not one["conv_cache"].any()
    assert not np.array_equal(first[0]["mix"], first[1]["mix"])


def test_a_missing_fixtures_folder_is_one_line_that_names_it(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    out = tmp_path / "out.npz"
    done = run_script(SAMPLES / "fixtures.py", "resnet20", out, "--fixtures", absent)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"fixtures.py: no fixtures folder at {absent}: give it with --fixtures or OCTAV_FIXTURES"
    ]
    assert not out.exists()


def test_a_fixtures_folder_without_the_images_is_one_line_that_names_the_file(
    tmp_path: Path,
) -> None:
    done = run_script(
        SAMPLES / "fixtures.py", "resnet20", tmp_path / "out.npz", "--fixtures", tmp_path
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "cifar10_calib.npz") in done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_fixtures
def test_more_images_than_the_fixtures_hold_is_an_error_that_gives_the_number(
    tmp_path: Path,
) -> None:
    arguments = ("--calib", 513, "--fixtures", FIXTURES)
    done = run_script(SAMPLES / "fixtures.py", "resnet20", tmp_path / "out.npz", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("fixtures.py: --calib must be in 1..512")
    assert done.stderr.endswith("got 513\n")
    assert list(tmp_path.iterdir()) == []


@needs_fixtures
def test_an_output_in_a_folder_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "absent" / "out.npz"
    arguments = ("--calib", 1, "--val", 1, "--fixtures", FIXTURES)
    done = run_script(SAMPLES / "fixtures.py", "resnet20", out, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"fixtures.py: cannot write {out}: it must be a file in a folder that exists"
    ]


# --- bench_compare ----------------------------------------------------------------------------


def test_the_benchmark_of_comparing_prints_what_every_method_takes(tmp_path: Path) -> None:
    images = load_arrays(DIGITS / "digits.npz")["image"]
    np.savez(tmp_path / "d.npz", image=images)
    options = (DIGITS / "digits.onnx", tmp_path / "d.npz", "--samples", 64, "--runs", 1)
    done = run_script(SAMPLES / "bench_compare.py", *options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("tensors, 64 samples, medians of process time")
    methods = [line.split()[0] for line in lines[2:-1]]
    assert methods == ["octav", "mse", "percentile:99.9", "percentile:99.99", "max"]
    assert re.fullmatch(r"5 methods at 4, 6, 8 bits: \d+\.\d\d s", lines[-1])


# --- low_bits ---------------------------------------------------------------------------------


@needs_fixtures
def test_the_table_of_low_bits_is_printed_for_chosen_rows_and_widths(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    options = ("--nets", "resnet20", "--widths", "W4A4", "--rows", "octav,+ both")
    low_bits = SAMPLES / "low_bits.py"
    done = run_script(
        low_bits, "--fixtures", FIXTURES, "--evaluate", 64, *options, "--json", written
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:30].strip() for line in done.stdout.strip().splitlines()] == [
        *("resnet20", "float", "octav", "+ both"),
    ]
    figures = json.loads(written.read_text())["resnet20"]
    assert all(list(found) == ["W4A4"] for found in figures.values())
    assert abs(figures["octav"]["W4A4"] - figures["float"]["W4A4"]) < 10


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--nets", "resnet20,mobilenet"),
        ("--widths", "W8A8,W6A6,W5A8,W4A8,W4A4,W3A3"),
    ],
)
def test_a_choice_that_the_table_of_low_bits_lacks_is_one_line(option: str, known: str) -> None:
    done = run_script(SAMPLES / "low_bits.py", option, "best")
    assert (done.returncode, done.stderr) == (1, f"{option}: no 'best', only {known}\n")
