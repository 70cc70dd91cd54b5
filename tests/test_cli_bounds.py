"""The gate in octav-calibrate: which model is written, what is said, and the exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_models import Told, contents, copy_digits, enter_room, read_json, refuse, run_main, succeed

from calib.config import Config

Capsys = pytest.CaptureFixture[str]

QUICK = ("digits.onnx", "--data", "digits.npz", "--samples", 256, "--bits", 4)
TO = ("--output", "out.onnx", "--summary", "out.json")
# Digits at 4 bits: 18.4 dB, 99.6 % agreement, 99.44 % top-1 as in float, a fifth of the size.
HELD = {
    "--min-sqnr": 15,
    "--min-cosine": 0.98,
    "--max-error": 100,
    "--min-agreement": 0.95,
    "--max-top1-drop": 1,
    "--max-size-ratio": 0.5,
}
MISSED = {
    "--min-sqnr": 30,
    "--min-cosine": 0.9999,
    "--max-error": 0.001,
    "--min-agreement": 1,
    "--max-top1-drop": -5,
    "--max-size-ratio": 0.1,
}
METRIC = """
import os

def accuracy(batches):
    right = n = 0
    for outputs, feed, labels in batches:
        assert list(feed) == ["image"] and len(feed["image"]) == len(labels)
        right += int((outputs["logits"].argmax(axis=1) == labels).sum())
        n += len(labels)
    return right / n

def fails(batches):
    raise ValueError("no such class")

def nothing(batches):
    return float("nan")

def ends(batches):
    raise SystemExit(3)
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy_digits(tmp_path)
    (tmp_path / "my_metrics.py").write_text(METRIC)
    return enter_room(tmp_path, monkeypatch)


def flat(options: dict[str, float]) -> list[object]:
    return [part for pair in options.items() for part in pair]


def test_a_model_that_keeps_its_bounds_is_written(capsys: Capsys) -> None:
    told = succeed(capsys, *QUICK, *TO, *flat(HELD))
    verdicts = read_json("out.json")["verdicts"]
    assert [f"--{v['bound']}" for v in verdicts] == list(HELD)
    assert all(v["holds"] for v in verdicts)
    assert [v["limit"] for v in verdicts] == list(HELD.values())
    for verdict in verdicts:
        assert verdict["text"] in told.out
    assert Path("out.onnx").exists()


def failed(capsys: Capsys, *arguments: object) -> Told:
    told = run_main(capsys, *arguments)
    assert told.code == 1, told.err
    return told


@pytest.mark.parametrize(("option", "limit"), MISSED.items())
def test_a_bound_that_is_missed_is_exit_code_1_and_no_model(
    room: Path, capsys: Capsys, option: str, limit: float
) -> None:
    before = set(contents(room))
    told = failed(capsys, *QUICK, *TO, option, limit)
    assert set(contents(room)) - before == {"out.json"}
    first, second = told.err.splitlines()
    assert first.startswith(f"octav-calibrate: failed: {option.removeprefix('--')} FAILS: ")
    assert second == "octav-calibrate: no model was written; --keep-failed would"
    summary = read_json("out.json")
    (verdict,) = summary["verdicts"]
    assert (verdict["holds"], verdict["limit"], summary["output"]) == (False, limit, None)
    assert verdict["found"] is not None


def test_the_verdicts_are_on_what_the_summary_says(capsys: Capsys) -> None:
    failed(capsys, *QUICK, *TO, *flat(MISSED))
    summary = read_json("out.json")
    found = {v["bound"]: v["found"] for v in summary["verdicts"]}
    assert found["min-sqnr"] == summary["output_sqnr_db"]
    assert found["min-cosine"] == summary["cosine"]
    assert found["max-error"] == summary["max_error"]
    assert found["min-agreement"] == summary["agreement"]
    top1, sizes = summary["top1"], summary["bytes"]
    assert found["max-top1-drop"] == top1["float"] - top1["quantized"]
    assert found["max-size-ratio"] == sizes["quantized"] / sizes["float"]


def test_keep_failed_writes_the_model_all_the_same(capsys: Capsys) -> None:
    told = failed(capsys, *QUICK, *TO, "--min-sqnr", 30, "--keep-failed")
    assert Path("out.onnx").exists()
    assert read_json("out.json")["output"] == "out.onnx"
    (line,) = told.err.splitlines()
    assert "min-sqnr FAILS" in line


def test_a_model_that_stands_there_stays_when_the_new_one_fails(room: Path, capsys: Capsys) -> None:
    succeed(capsys, *QUICK, *TO, "--external-data", "always")
    before = {name: (room / name).read_bytes() for name in ("out.onnx", "out.onnx.data")}
    failed(capsys, *QUICK, *TO, "--min-sqnr", 30, "--force")
    assert {name: (room / name).read_bytes() for name in before} == before
    assert read_json("out.json")["output"] is None


def test_observations_are_saved_when_the_model_fails(capsys: Capsys) -> None:
    earlier = (*QUICK, "--output", "earlier.onnx", "--save-observations", "seen.npz")
    succeed(capsys, *earlier)
    Path("seen.npz").rename("seen.npz.partial")
    failed(capsys, *QUICK, *TO, "--min-sqnr", 30, "--save-observations", "seen.npz")
    assert not Path("seen.npz.partial").exists()
    told = succeed(
        capsys, *QUICK[:3], "--observations", "seen.npz", "--min-sqnr", 30, "--output", "o.onnx"
    )
    assert "min-sqnr holds" in told.out


def test_bounds_in_the_file_hold_and_the_command_line_wins(room: Path, capsys: Capsys) -> None:
    (room / "octav.yaml").write_text("model: digits.onnx\ndata: digits.npz\nmin-sqnr: 90\n")
    failed(capsys, "--config", "octav.yaml")
    succeed(capsys, "--config", "octav.yaml", "--min-sqnr", 10)


def test_the_users_metric_is_measured_on_both_models(capsys: Capsys) -> None:
    metric = ("--metric", "my_metrics:accuracy")
    told = succeed(capsys, *QUICK, *TO, *metric, "--max-metric-drop", 0.01)
    summary = read_json("out.json")
    found, top1 = summary["metric"], summary["top1"]
    assert found["name"] == "my_metrics:accuracy"
    assert 100 * found["float"] == pytest.approx(top1["float"])
    assert 100 * found["quantized"] == pytest.approx(top1["quantized"])
    assert re.search(r"metric +float 0\.99\d*, quantized 0\.99", told.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-metric-drop", 1), ("max-metric-drop cannot be measured", "--metric")),
        (("--metric", "accuracy"), ("--metric", "package.module:function", "'accuracy'")),
        (("--metric", "my_metrics:none"), ("my_metrics:none", "cannot be imported")),
        (("--metric", "my_metrics:fails"), ("my_metrics:fails", "ValueError: no such class")),
        (("--metric", "my_metrics:nothing"), ("my_metrics:nothing", "finite number", "nan")),
        (("--metric", "my_metrics:ends"), ("a function of yours ended Python (3)",)),
        (("--min-agreement", 98), ("--min-agreement must be 0 to 1, got 98: 0.98 is 98 %",)),
        (("--min-cosine", 2), ("--min-cosine must be -1 to 1, got 2",)),
        (("--max-size-ratio", -1), ("--max-size-ratio must be at least 0, got -1",)),
        (("--min-sqnr", "much"), ("--min-sqnr", "much")),
        (("--min-sqnr", "nan"), ("--min-sqnr must be a number",)),
    ],
)
def test_what_cannot_be_measured_or_makes_no_sense_is_one_line(
    room: Path, capsys: Capsys, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    before = set(contents(room))
    message = refuse(capsys, *QUICK, *TO, *options)
    for word in words:
        assert word in message
    assert set(contents(room)) - {"__pycache__"} == before - {"__pycache__"}


def test_top1_needs_labels(room: Path, capsys: Capsys) -> None:
    import numpy as np

    np.save(room / "images.npy", np.load(room / "digits.npz")["image"][:40])
    message = refuse(capsys, "digits.onnx", "--data", "images.npy", *TO, "--max-top1-drop", 1)
    assert "max-top1-drop cannot be measured: it needs labels" in message


def test_a_bound_that_is_no_number_is_told_with_its_place_in_the_file(
    room: Path, capsys: Capsys
) -> None:
    (room / "octav.yaml").write_text("min-agreement: 98\n")
    assert "octav.yaml: min-agreement must be 0 to 1" in refuse(capsys, "--config", "octav.yaml")
    assert Config().to_bounds().asked == ()
