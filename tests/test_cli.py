"""octav-calibrate on real input: what it writes, and what it says on which stream."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from cli_models import (
    N_CALIBRATION,
    by_name,
    contents,
    copy_digits,
    enter_room,
    load_digits,
    read_json,
    run_script,
    succeed,
)

STAGES = {"load", "observe", "calibrate", "write", "save", "verify", "evaluate"}
SUFFIXES = {"float": "", "quantized": "-w4a4"}
JOB = ("digits.onnx", "--data", "digits.npz", "--bits", 4, "--method", "octav", "--samples", 256)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the digits sample."""
    copy_digits(tmp_path)
    return enter_room(tmp_path, monkeypatch)


def top1(model: Path) -> float:
    """Percent of the test images that onnxruntime reads right."""
    images, labels = load_digits()
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images[N_CALIBRATION:]})
    return float(100 * np.mean(np.argmax(logits, axis=1) == labels[N_CALIBRATION:]))


# --- the main job -----------------------------------------------------------------------------


def test_the_main_job_writes_a_checked_4_bit_model_beside_the_float_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").mkdir()
    copy_digits(tmp_path / "models")
    enter_room(tmp_path, monkeypatch)
    before = contents(tmp_path)
    succeed(capsys, "models/digits.onnx", "--data", "models/digits.npz", "--bits", 4)
    after = contents(tmp_path)
    new = {"models/digits-w4a4.onnx".replace("/", os.sep)}
    assert set(after) - set(before) == new
    assert {name: after[name] for name in before} == before
    written = tmp_path / "models/digits-w4a4.onnx"
    onnx.checker.check_model(str(written), full_check=True)
    assert written.stat().st_size < 0.35 * (tmp_path / "models/digits.onnx").stat().st_size


def test_the_main_job_prints_the_accuracies_that_onnxruntime_finds(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = succeed(capsys, *JOB)
    printed = re.search(r"top-1 +float ([\d.]+) %, quantized ([\d.]+) %", told.out)
    assert printed is not None, told.out
    expected = (top1(room / "digits.onnx"), top1(room / "digits-w4a4.onnx"))
    assert tuple(map(float, printed.groups())) == pytest.approx(expected, abs=0.005)
    assert expected[1] > 95


def test_the_table_tells_tensors_sizes_error_and_seconds(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = succeed(capsys, *JOB, "--exclude", "stem.conv").out
    assert "digits-w4a4.onnx" in out
    assert "6 weights (5 at 4 bits, 1 at 8 bits), 5 activations (4 at 4 bits, 1 at 8 bits)" in out
    assert re.search(r"kept float +image of stem.conv: .*'stem.conv'", out)
    before, after = ((room / n).stat().st_size for n in ("digits.onnx", "digits-w4a4.onnx"))
    assert f"{before / 1000:.0f} kB -> {after / 1000:.0f} kB ({after / before:.0%})" in out
    assert re.search(r"output SQNR +\d\d\.\d dB on 540 samples that calibration did not see", out)
    assert re.search(r"seconds +load [\d.]+, observe [\d.]+, calibrate [\d.]+, write", out)
    assert "opset raised from 17 to 21" in out


@pytest.mark.usefixtures("room")
def test_what_is_compared_on_the_calibration_samples_is_said_to_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = succeed(capsys, "digits.onnx", "--data", "digits.npz").out
    assert "dB on 796 of the calibration samples" in out
    assert "did not see" not in out


@pytest.mark.usefixtures("room")
def test_without_labels_no_accuracy_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("plain.npz", image=load_digits()[0][:64])
    told = succeed(capsys, "digits.onnx", "--data", "plain.npz", "--summary", "s.json")
    assert "top-1" not in told.out
    assert read_json("s.json")["top1"] is None


def test_the_installed_script_writes_the_same_bytes_as_the_command_in_process(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_script(*JOB)
    assert (told.code, told.err) == (0, "")
    assert re.search(r"top-1 +float 99\.44 %, quantized \d\d\.\d\d %", told.out)
    by_script = (room / "digits-w4a4.onnx").read_bytes()
    succeed(capsys, *JOB, "--force")
    assert (room / "digits-w4a4.onnx").read_bytes() == by_script


@pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["told", "quiet"])
def test_the_shortest_form_warns_that_its_inputs_are_made_up(
    room: Path, capsys: pytest.CaptureFixture[str], quiet: tuple[str, ...]
) -> None:
    arguments = ("digits.onnx", "--bits", 4, "--method", "octav", "--summary", "s.json", *quiet)
    told = succeed(capsys, *arguments)
    assert (room / "digits-w4a4.onnx").exists()
    (line,) = told.err.splitlines()
    assert line.startswith("WARNING: NO DATA: ")
    assert "made-up inputs" in line
    assert "smoke tests only" in line
    assert "WARNING" not in told.out
    assert read_json("s.json")["warnings"] == [line.removeprefix("WARNING: ")]


@pytest.mark.usefixtures("room")
def test_a_collapsed_output_is_a_warning_that_names_the_three_worst_tensors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--bits", 2, "--edge-bits", 2, "--method", "max", "--summary", "s.json")
    told = succeed(capsys, "digits.onnx", "--data", "digits.npz", *arguments)
    summary = read_json("s.json")
    assert summary["output_sqnr_db"] < 10
    worst = sorted(summary["tensors"], key=lambda t: t["sqnr_db"])[:3]
    (line,) = told.err.splitlines()
    assert re.findall(r"'([^']+)'", line) == [tensor["name"] for tensor in worst]
    assert f"WARNING: output SQNR is {summary['output_sqnr_db']:.1f} dB" in line
    assert "--exclude" in line


# --- files ------------------------------------------------------------------------------------


def test_output_and_summary_go_where_they_are_told(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (room / "sub").mkdir()
    before = set(contents(room))
    paths = ("sub/model.onnx", "sub/all.json", "sub/seen.npz")
    outputs = zip(("--output", "--summary", "--save-observations"), paths, strict=True)
    succeed(capsys, "digits.onnx", *(word for pair in outputs for word in pair))
    assert set(contents(room)) - before == {str(Path(path)) for path in paths}
    assert read_json("sub/all.json")["output"] == str(Path("sub/model.onnx"))


def test_force_overwrites_all_outputs(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ("--output", "o.onnx", "--summary", "o.json", "--save-observations", "o.npz")
    for name in outputs[1::2]:
        (room / name).write_text("old")
    succeed(capsys, "digits.onnx", *outputs, "--force")
    assert all((room / name).read_bytes() != b"old" for name in outputs[1::2])


def test_a_dry_run_lists_everything_and_writes_nothing(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(room)
    options = ("--bits", 4, "--weight-method", "mse:10", "--exclude", "block2.shortcut")
    told = succeed(capsys, "digits.onnx", *options, "--dry-run", "--summary", "s.json")
    assert contents(room) == before
    rows = {line.split()[0]: line.split()[1:] for line in told.out.splitlines() if line.strip()}
    assert rows["head.weight"] == ["weight", "8", "per-channel(axis=0)", "mse:10", "head"]
    assert rows["stem.relu.out"] == ["activation", "4", "per-tensor", "octav", "block1.first.conv"]
    skipped = [line for line in told.out.splitlines() if line.startswith("kept float: ")]
    assert len(skipped) == 2
    assert all("block2.shortcut" in line and "--exclude" in line for line in skipped)
    assert told.err == ""


# --- the summary ------------------------------------------------------------------------------


def test_the_summary_holds_every_quantized_tensor_with_its_parameters(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(capsys, *JOB, "--summary", "s.json")
    tensors = by_name(read_json("s.json"))
    fields = "name kind bits signed granularity threshold scale zero_point max_abs sqnr_db notes"
    for tensor in tensors.values():
        assert set(fields.split()) <= set(tensor)
        assert tensor["zero_point"] == 0
    image, weight = tensors["image"], tensors["block2.first.conv.weight"]
    assert (image["kind"], image["bits"], image["signed"]) == ("activation", 8, False)
    assert (image["granularity"], image["max_abs"]) == ("per-tensor", 1.0)
    assert image["scale"] == pytest.approx(image["threshold"] / 255)
    assert (weight["kind"], weight["bits"], weight["signed"]) == ("weight", 4, True)
    assert weight["granularity"] == "per-channel(axis=0)"
    model = onnx.load(room / "digits.onnx")
    shape = next(tuple(i.dims) for i in model.graph.initializer if i.name == weight["name"])
    assert len(weight["threshold"]) == len(weight["scale"]) == shape[0]
    assert weight["scale"] == pytest.approx([t / 7 for t in weight["threshold"]])


def test_the_summary_holds_the_result_and_how_it_came_about(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(capsys, *JOB, "--exclude", "head", "--summary", "s.json")
    summary = read_json("s.json")
    assert {s["name"].partition(" ")[0] for s in summary["skipped"]} == {
        "flatten.out",
        "head.weight",
    }
    assert all("'head'" in s["reason"] for s in summary["skipped"])
    assert not {"flatten.out", "head.weight"} & set(by_name(summary))
    assert 10 < summary["output_sqnr_db"] < 40
    accuracy = summary["top1"]
    assert accuracy["float"] == pytest.approx(top1(room / "digits.onnx"))
    assert accuracy["quantized"] == pytest.approx(top1(room / "digits-w4a4.onnx"))
    assert summary["compared_on"] == {"n_samples": 540, "held_out": True}
    sizes = {k: (room / f"digits{s}.onnx").stat().st_size for k, s in SUFFIXES.items()}
    assert summary["bytes"] == sizes
    assert set(summary["seconds"]) == STAGES
    assert summary["options"]["widths"] == {"weights": 4, "activations": 4, "edge": None}
    assert summary["options"]["method"] == "octav"
    assert summary["options"]["data"] == "digits.npz"
    assert summary["versions"]["onnxruntime"] == ort.__version__
    assert summary["versions"]["octav-calibrate"] == version("octav-calibrate")
    assert re.fullmatch("[0-9a-f]{64}", summary["digests"]["model_sha256"])
    assert (summary["n_samples"], summary["warnings"]) == (256, [])


def test_the_written_model_carries_the_manifest_of_the_summary(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(capsys, *JOB, "--summary", "s.json")
    properties = {p.key: p.value for p in onnx.load(room / "digits-w4a4.onnx").metadata_props}
    manifest, summary = json.loads(properties["octav_calibrate"]), read_json("s.json")
    assert {"options", "versions", "digests", "n_samples"} <= set(manifest)
    assert manifest == {key: summary[key] for key in manifest}
