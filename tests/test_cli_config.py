"""``--config``, ``--print-config``, and the options that only `calib.config` checks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from cli_models import (
    ROOT,
    assert_tells,
    by_name,
    contents,
    copy_digits,
    enter_room,
    read_json,
    refuse,
    run_script,
    save_two_layers,
    succeed,
)

from calib.config import Config
from cli.calibrate import command

Capsys = pytest.CaptureFixture[str]

JOB = """
model: digits.onnx
data: digits.npz
samples: 64
bits: 4
output: made/out.onnx
summary: made/out.json
rules:
  - {match: block1.first.conv, kind: weight, bits: 6, method: max}
  - {match: ^flatten.out$, bits: 5, method: 'percentile:99.9'}
  - {match: block2.shortcut, skip: true}
  - {match: block2, bits: 3, granularity: per-tensor}
"""

pytestmark = pytest.mark.usefixtures("room")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the digits, a small model, and a job in a folder of its own."""
    save_two_layers(tmp_path / "model.onnx")
    (tmp_path / "job/made").mkdir(parents=True)
    copy_digits(tmp_path / "job")
    (tmp_path / "job/octav.yaml").write_text(JOB)
    return enter_room(tmp_path, monkeypatch)


# --- one list of settings ---------------------------------------------------------------------


def test_every_option_is_a_setting_and_every_setting_is_an_option_but_rules() -> None:
    parameters = {p.name for p in command.params} - {"config", "print_config", "version"}
    assert parameters == {f.name for f in fields(Config)} - {"rules"}
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")]
        assert names in ([], [f"--{(parameter.name or '').replace('_', '-')}"])


def test_the_help_tells_the_defaults_that_hold(capsys: Capsys) -> None:
    text = re.sub(r"-\n {10,}", "-", succeed(capsys, "--help").out)
    told = {}
    for entry in re.split(r"^  --", text, flags=re.MULTILINE):
        stated = re.search(r"\[default: ([^\]]+)\]", " ".join(entry.split()))
        if stated is not None:
            told[entry.split()[0]] = stated[1]
    default = Config()
    for f in fields(Config):
        key, value = f.name.replace("_", "-"), getattr(default, f.name)
        if value not in (None, (), {}, False, 0):
            assert told.pop(key) == str(value), key
    assert told.pop("mean-batches") == str(Config(reduce="mean").mean_batches)
    assert told.pop("percentile") == "99.99"
    assert (told.pop("seed"), default.seed) == ("0", 0)
    assert (told.pop("threads"), default.threads) == ("its choice", 0)
    none = {"edge-bits", "color", "pixel-scale", "layout", "max-memory", "output", "provider"}
    # It goes by the target.
    assert told.pop("weight-format") == "qdq, for target onnxruntime matmulnbits"
    assert default.weight_format is None
    assert set(told) == none
    assert all(getattr(default, key.replace("-", "_")) is None for key in none)


# What is typed, and the line of YAML that it becomes.
TYPED: dict[str, tuple[Sequence[object], str]] = {
    "model": (["m.onnx"], "model: m.onnx"),
    "data": (["--data", "calib.npz"], "data: calib.npz"),
    "a function": (["--data", "package.module:batches"], "data: package.module:batches"),
    "labels": (["--labels", "l.csv"], "labels: l.csv"),
    "resize": (["--resize", "240x320"], "resize: 240x320"),
    "crop": (["--crop", "224"], "crop: '224'"),
    "color": (["--color", "bgr"], "color: bgr"),
    "pixel scale": (["--pixel-scale", "1/4"], "pixel-scale: 0.25"),
    "mean": (["--mean", "0.5,0.25,1/8"], "mean: [0.5, 0.25, 0.125]"),
    "negative mean": (["--mean", "-0.5"], "mean: [-0.5]"),
    "std": (["--std", "2"], "std: [2.0]"),
    "layout": (["--layout", "nhwc"], "layout: nhwc"),
    "samples": (["--samples", 9], "samples: 9"),
    "batch size": (["--batch-size", 9], "batch-size: 9"),
    "seed": (["--seed", 9], "seed: 9"),
    "feed back": (["--feed-back", "a=b", "--feed-back", "c=d=e"], "feed-back: {a: b, c: d=e}"),
    "padding mask": (["--padding-mask", "mask"], "padding-mask: mask"),
    "target": (["--target", "tensorrt"], "target: tensorrt"),
    "reduce range": (["--reduce-range"], "reduce-range: true"),
    "bits": (["--bits", 4], "bits: 4"),
    "weight bits": (["--weight-bits", 4], "weight-bits: 4"),
    "activation bits": (["--activation-bits", 4], "activation-bits: 4"),
    "no activation bits": (["--activation-bits", "none"], "activation-bits: none"),
    "block size": (["--block-size", 32], "block-size: 32"),
    "weight format": (
        ["--activation-bits", "none", "--block-size", 32, "--weight-format", "matmulnbits"],
        "weight-format: matmulnbits",
    ),
    "edge bits": (["--edge-bits", 4], "edge-bits: 4"),
    "method": (["--method", "max"], "method: max"),
    "weight method": (["--weight-method", "mse:9"], "weight-method: mse:9"),
    "percentile": (["--method", "percentile", "--percentile", 99], "percentile: 99.0"),
    "granularity": (["--weight-granularity", "per-tensor"], "weight-granularity: per-tensor"),
    "activations": (["--activations", "auto"], "activations: auto"),
    "reduce": (["--reduce", "mean"], "reduce: mean"),
    "batches of reduce": (["--reduce", "mean"], "mean-batches: 5"),
    "mean batches": (["--reduce", "mean", "--mean-batches", 9], "mean-batches: 9"),
    "bias correction": (["--bias-correction"], "bias-correction: true"),
    "equalize": (["--equalize"], "equalize: true"),
    "exclude": (["--exclude", "^a"], "exclude: ^a"),
    "only": (["--only", "conv1"], "only: conv1"),
    "op types": (["--op-types", "Conv, Gemm"], "op-types: [Conv, Gemm]"),
    "output": (["--output", "o.onnx"], "output: o.onnx"),
    "summary": (["--summary", "o.json"], "summary: o.json"),
    "report": (["--report", "o.html"], "report: o.html"),
    "sqnr": (["--min-sqnr", 20], "min-sqnr: 20.0"),
    "cosine": (["--min-cosine", 0.99], "min-cosine: 0.99"),
    "error": (["--max-error", 0.5], "max-error: 0.5"),
    "agreement": (["--min-agreement", 0.98], "min-agreement: 0.98"),
    "top-1": (["--max-top1-drop", 1], "max-top1-drop: 1.0"),
    "metric drop": (["--max-metric-drop", 0.1], "max-metric-drop: 0.1"),
    "size": (["--max-size-ratio", 0.3], "max-size-ratio: 0.3"),
    "metric": (["--metric", "package.module:f1"], "metric: package.module:f1"),
    "keep failed": (["--keep-failed"], "keep-failed: true"),
    "save observations": (["--save-observations", "o.npz"], "save-observations: o.npz"),
    "observations": (["--observations", "o.npz"], "observations: o.npz"),
    "external data": (["--external-data", "always"], "external-data: always"),
    "force": (["--force"], "force: true"),
    "no force": (["--force", "--no-force"], "force: false"),
    "provider": (["--provider", "Any"], "provider: Any"),
    "threads": (["--threads", 2], "threads: 2"),
    "custom ops": (["--custom-ops", "a.so", "--custom-ops", "b.so"], "custom-ops: [a.so, b.so]"),
    "max memory": (["--max-memory", "1.5GB"], "max-memory: 1500000000"),
    "workers": (["--workers", 2], "workers: 2"),
    "scheduler": (["--scheduler", "tcp://host:8786"], "scheduler: tcp://host:8786"),
    "dry run": (["--dry-run"], "dry-run: true"),
    "quiet": (["--quiet"], "quiet: true"),
    "verbose": (["--verbose"], "verbose: true"),
}


@pytest.mark.parametrize(("typed", "line"), TYPED.values(), ids=TYPED)
def test_what_is_typed_is_what_print_config_shows(
    capsys: Capsys, typed: Sequence[object], line: str
) -> None:
    out = succeed(capsys, *typed, "--print-config").out
    assert line in out.splitlines()
    assert succeed(capsys, "--print-config").out == Config().to_yaml()


def test_no_option_is_left_out_above() -> None:
    typed = {str(word) for words, _ in TYPED.values() for word in words}
    options = {name for p in command.params for name in p.opts if name.startswith("--")}
    assert options - typed == {"--config", "--print-config", "--version"}


# --- --config ---------------------------------------------------------------------------------


def test_a_file_says_all_that_a_job_needs_from_wherever_it_is_called(
    room: Path, capsys: Capsys
) -> None:
    before = set(contents(room))
    succeed(capsys, "--config", "job/octav.yaml")
    made = {str(Path("job/made") / name) for name in ("out.onnx", "out.json")}
    assert set(contents(room)) - before == made
    summary = read_json("job/made/out.json")
    assert (summary["n_samples"], summary["options"]["widths"]["weights"]) == (64, 4)


def test_rules_change_the_tensors_that_they_match_and_no_other(capsys: Capsys) -> None:
    succeed(capsys, "--config", "job/octav.yaml")
    ruled = read_json("job/made/out.json")
    Path("job/plain.yaml").write_text(JOB.partition("rules:")[0])
    succeed(capsys, "--config", "job/plain.yaml", "--force")
    plain = by_name(read_json("job/made/out.json"))
    tensors = by_name(ruled)
    assert set(plain) - set(tensors) == {"block2.shortcut.conv.weight"}
    expected = {
        "block1.first.conv.weight": (6, "per-channel(axis=0)"),
        "flatten.out": (5, "per-tensor"),
        "block2.first.conv.weight": (3, "per-tensor"),
        "block2.second.conv.weight": (3, "per-tensor"),
    }
    for name, (bits, granularity) in expected.items():
        assert (tensors[name]["bits"], tensors[name]["granularity"]) == (bits, granularity), name
        assert tensors[name]["threshold"] != plain[name]["threshold"]
    narrow = {name for name, t in tensors.items() if t["kind"] == "activation" and t["bits"] == 3}
    for name, tensor in tensors.items():
        if name not in expected.keys() | narrow:
            assert tensor == plain[name], name
    assert all("block2" in " ".join(tensors[name]["consumers"]) for name in narrow)
    assert narrow
    reasons = {s["reason"] for s in ruled["skipped"]}
    assert reasons == {"matched by rule 'block2.shortcut'"}
    assert ruled["options"]["overrides"][0]["match"] == "block1.first.conv"


def test_the_command_line_wins(capsys: Capsys) -> None:
    options = ("--bits", 8, "--summary", "mine.json", "--samples", 32, "--output", "mine.onnx")
    succeed(capsys, "--config", "job/octav.yaml", *options)
    assert not list(Path("job/made").iterdir())
    summary = read_json("mine.json")
    assert (summary["n_samples"], summary["options"]["widths"]["weights"]) == (32, 8)
    assert by_name(summary)["block1.first.conv.weight"]["bits"] == 6
    succeed(capsys, "model.onnx", "--config", "job/octav.yaml", "--print-config")
    shown = succeed(capsys, "model.onnx", "--config", "job/octav.yaml", "--print-config").out
    assert "model: model.onnx" in shown.splitlines()


def test_a_switch_of_the_file_can_be_switched_back(capsys: Capsys) -> None:
    Path("job/octav.yaml").write_text(f"{JOB}\nforce: true\ndry-run: true\nquiet: true\n")
    told = succeed(capsys, "--config", "job/octav.yaml")
    assert "kept float: " in told.out
    told = succeed(capsys, "--config", "job/octav.yaml", "--no-dry-run")
    assert told.out == ""
    assert Path("job/made/out.onnx").exists()
    message = refuse(capsys, "--config", "job/octav.yaml", "--no-dry-run", "--no-force")
    assert_tells(message, "exists", "--force")
    told = succeed(capsys, "--config", "job/octav.yaml", "--no-dry-run", "--verbose")
    assert "output SQNR" in told.out


def test_a_job_from_a_file_is_the_same_as_from_the_command_line(capsys: Capsys) -> None:
    Path("job/octav.yaml").write_text(JOB.partition("rules:")[0])
    succeed(capsys, "--config", "job/octav.yaml")
    options = ("--samples", 64, "--bits", 4, "--output", "typed.onnx")
    succeed(capsys, "job/digits.onnx", "--data", "job/digits.npz", *options)
    assert Path("typed.onnx").read_bytes() == Path("job/made/out.onnx").read_bytes()


# --- --print-config ---------------------------------------------------------------------------


def test_print_config_shows_what_holds_reads_no_model_and_writes_nothing(
    room: Path, capsys: Capsys
) -> None:
    before = contents(room)
    options = ("--config", "job/octav.yaml", "--bits", 8, "--force", "--print-config")
    told = succeed(capsys, *options)
    assert contents(room) == before
    assert told.err == ""
    Path("shown.yaml").write_text(told.out)
    config = Config.read("shown.yaml")
    assert config == Config.read("job/octav.yaml").over({"bits": 8, "force": True})
    assert config.model == Path("job/digits.onnx")
    assert succeed(capsys, "--config", "shown.yaml", "--print-config").out == told.out
    assert "model: no.onnx" in succeed(capsys, "no.onnx", "--print-config").out.splitlines()


def test_what_print_config_shows_is_ascii_on_any_terminal() -> None:
    told = run_script("größe.onnx", "--print-config", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert told.code == 0, told.err
    assert Config.parse(told.out).model == Path("größe.onnx")


def test_print_config_refuses_what_a_run_would(capsys: Capsys) -> None:
    assert_tells(refuse(capsys, "--bits", 9, "--print-config"), "--bits must be", "got 9")


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 9", "octav.yaml: bits must be one of 2 to 8 or 16, got 9"),
        ("bit: 9", "octav.yaml: unknown key 'bit', did you mean 'bits'?"),
        ("bits: [", "octav.yaml: line 1, column 8: while parsing a flow node: expected the node"),
        (
            "rules:\n- {match: a}\n- {match: b}\n- {match: c, bits: 9}",
            "octav.yaml: rules[2].bits must be one of 2 to 8 or 16, got 9",
        ),
        ("config: a.yaml", "octav.yaml: unknown key 'config'; allowed are the long options of"),
        (
            "rules: [{match: zebra}]",
            "octav.yaml: rules[0].match: 'zebra' matches no node and no tensor; --dry-run lists",
        ),
        ("exclude: zebra", "octav.yaml: exclude 'zebra' matches no node and no tensor"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_with_its_name_and_place(
    capsys: Capsys, text: str, message: str
) -> None:
    Path("octav.yaml").write_text(text)
    assert refuse(capsys, "model.onnx", "--config", "octav.yaml").startswith(message)


def test_a_file_that_is_not_there_is_refused(capsys: Capsys) -> None:
    assert refuse(capsys, "--config", "no.yaml") == "no.yaml: no such file"
    assert refuse(capsys, "--config", "job") == "job: is a directory, not a file"


def test_a_file_that_names_no_model_needs_one(capsys: Capsys) -> None:
    Path("octav.yaml").write_text("bits: 4")
    message = refuse(capsys, "--config", "octav.yaml")
    assert message == "Missing argument 'MODEL', and octav.yaml names no 'model'"
    assert refuse(capsys, "--bits", 4) == "Missing argument 'MODEL'"
    succeed(capsys, "model.onnx", "--config", "octav.yaml")
    assert Path("model-w4a4.onnx").exists()


def test_a_command_without_a_model_is_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from cli.calibrate import main; code = main([]);"
        "print(code, *{'numpy', 'onnx', 'yaml', 'calib.config'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "2\n"


# --- dry runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--data", "--labels", "--observations", "--custom-ops"])
def test_a_dry_run_refuses_a_file_that_is_not_there(capsys: Capsys, option: str) -> None:
    arguments = ("model.onnx", option, "no.file")
    assert refuse(capsys, *arguments, "--dry-run") == "no.file: no such file"


def test_a_dry_run_takes_data_that_is_there_and_imports_no_function(capsys: Capsys) -> None:
    np.savez("calib.npz", x=np.zeros((4, 4), np.float32))
    for data in ("calib.npz", "job", "no.such.module:function"):
        assert succeed(capsys, "model.onnx", "--data", data, "--dry-run").err == ""


def test_a_dry_run_shows_what_rules_change(capsys: Capsys) -> None:
    out = succeed(capsys, "--config", "job/octav.yaml", "--dry-run").out
    rows = {line.split()[0]: line.split()[1:5] for line in out.splitlines() if line.strip()}
    first, last = rows["block1.first.conv.weight"], rows["flatten.out"]
    assert first == ["weight", "6", "per-channel(axis=0)", "max"]
    assert last == ["activation", "5", "per-tensor", "percentile:99.9"]
    assert rows["block2.first.conv.weight"] == ["weight", "3", "per-tensor", "octav"]
    skipped = [line for line in out.splitlines() if line.startswith("kept float: ")]
    assert len(skipped) == 2
    assert all("matched by rule 'block2.shortcut'" in line for line in skipped)
