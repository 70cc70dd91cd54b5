"""octav-compare: what it says on which stream, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cli_models
import numpy as np
import pytest
from cli_models import (
    assert_tells,
    clean_environment,
    contents,
    copy_digits,
    enter_room,
    normal,
    read_json,
    run_main,
    save_relu,
    save_two_layers,
)
from warm_script import children, wait_until

from calib.config import Config
from calib.rivals import RIVALS
from cli.calibrate import main as calibrate

JOB = ("m.onnx", "--data", "d.npz")
QUICK = (*JOB, "--bits", "3,8", "--methods", "octav,max", "--edge-bits", 3)
needs_plotly = pytest.mark.skipif(find_spec("plotly") is None, reason="the extra report is absent")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small model, ``m.onnx``, and data with labels."""
    save_two_layers(tmp_path / "m.onnx")
    labels = np.arange(96) % 3
    np.savez(tmp_path / "d.npz", x=normal(96, 4), labels=labels)
    return enter_room(tmp_path, monkeypatch)


run = partial(run_main, name="octav-compare")
refuse = partial(cli_models.refuse, name="octav-compare")


def succeed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What stands on stdout; nothing may on stderr."""
    told = run(capsys, *arguments)
    assert (told.code, told.err) == (0, "")
    return told.out


def strict(path: str) -> dict[str, Any]:
    """JSON without NaN or infinity."""

    def never(constant: str) -> float:
        raise AssertionError(f"{constant} in {path}")

    document: dict[str, Any] = json.loads(Path(path).read_text("utf-8"), parse_constant=never)
    return document


def rows(document: dict[str, Any]) -> list[tuple[str, int]]:
    return [(row["method"], row["bits"]) for row in document["rows"]]


# --- what it says -------------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
def test_the_table_stands_on_stdout_and_nothing_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = succeed(capsys, *QUICK, "--json", "all.json")
    lines = out.splitlines()
    titles = ("bits", "method", "SQNR dB", "vs max", "agreement", "top-1", "seconds")
    assert_tells(lines[0], *titles)
    table = read_json("all.json")["rows"]
    for line, row in zip(lines[1:5], table, strict=True):
        bits, method, sqnr, gain, agreement, top1, _ = line.split()[:7]
        assert (int(bits), method) == (row["bits"], row["method"])
        assert float(sqnr) == pytest.approx(row["sqnr_db"], abs=0.051)
        assert float(gain) == pytest.approx(row["gain_db"], abs=0.051)
        assert float(agreement.rstrip("%")) == pytest.approx(100 * row["agreement"], abs=0.0051)
        assert float(top1) == pytest.approx(row["top1"], abs=0.0051)
    assert_tells(out, "float top-1:", "tensors that hurt, octav at 3 bits", "compared on")
    assert_tells(out, "96 samples of the calibration samples", "written", "all.json")


@pytest.mark.usefixtures("room")
def test_samples_that_calibration_did_not_see_are_called_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = succeed(capsys, *QUICK, "--samples", 64, "--no-sensitivity")
    assert "32 samples that calibration did not see" in out
    assert "tensors that hurt" not in out


@pytest.mark.usefixtures("room")
def test_quiet_says_nothing_and_verbose_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert succeed(capsys, *QUICK, "--quiet") == ""
    plain, verbose = succeed(capsys, *QUICK), run(capsys, *QUICK, "--verbose").out
    assert len(verbose.splitlines()) >= len(plain.splitlines())
    assert "mixed 3/8" in plain
    assert "bits: 3\n" in plain, "the rules, as there is no page"
    paged = succeed(capsys, *QUICK, "--report", "page.html")
    assert "bits: 3\n" not in paged


@pytest.mark.usefixtures("room")
def test_without_data_it_says_so_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "m.onnx", "--bits", 8, "--methods", "max", "--no-sensitivity")
    assert told.code == 0
    assert "NO DATA" in told.err


@pytest.mark.usefixtures("room")
def test_in_a_pipe_the_installed_command_says_nothing_on_stderr() -> None:
    script = Path(sys.executable).with_name("octav-compare")
    command = [str(script), *map(str, QUICK), "--no-sensitivity"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean_environment(), timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) > 5


# --- what it writes -----------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
def test_json_holds_all_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, *QUICK, "--json", "all.json")
    document = strict("all.json")
    assert rows(document) == [(method, bits) for bits in (3, 8) for method in ("octav", "max")]
    assert document["kind"] == "compare"
    assert document["command"].startswith("octav-compare ")
    assert document["samples"] == {
        "calibration": 96,
        "evaluation": 96,
        "held_out": False,
        "made_up": False,
    }
    assert document["float"]["top1"] is not None
    found = document["sensitivity"]
    assert (found["method"], found["bits"], found["wide_bits"]) == ("octav", 3, 8)
    names = {"x", "first.weight", "hidden", "second.weight"}
    assert {damage["name"] for damage in found["tensors"]} == names
    assert found["curve"][0] == {"n": 0, "sqnr_db": found["base_db"]}
    assert found["excluding"][0] == found["curve"][0]
    assert {tensor["name"] for tensor in document["tensors"]} == names
    for tensor in document["tensors"]:
        assert len(tensor["results"]) == 4
        assert {curve["bits"] for curve in tensor["curves"]} == {3, 8}
        assert sum(tensor["histogram"]["counts"]) == tensor["count"]
    assert document["confidence"]["n_samples"] == [48, 48]
    for proposal in found["proposals"]:
        Config.parse(proposal["yaml"])


@needs_plotly
@pytest.mark.usefixtures("room")
def test_the_page_shows_the_document_that_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, *QUICK, "--json", "all.json", "--report", "page.html")
    page = Path("page.html").read_text("utf-8")
    shown = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert shown is not None

    def close(one: Any, other: Any) -> None:
        if isinstance(one, dict):
            assert set(one) == set(other)
            for key in one:
                close(one[key], other[key])
        elif isinstance(one, list):
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                close(*pair)
        elif isinstance(one, float):
            assert other == pytest.approx(one, rel=6e-3)
        else:
            assert one == other

    close(strict("all.json"), json.loads(shown[1]))


@pytest.mark.usefixtures("room")
def test_no_model_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(contents(Path.cwd()))
    succeed(capsys, *QUICK)
    assert set(contents(Path.cwd())) == before


@pytest.mark.usefixtures("room")
def test_observations_that_were_saved_give_the_same_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    succeed(capsys, *QUICK, "--save-observations", "seen.npz", "--json", "one.json")
    assert not list(Path().glob("*.partial"))
    succeed(capsys, *QUICK, "--observations", "seen.npz", "--json", "two.json")
    one, two = strict("one.json"), strict("two.json")
    for document in (one, two):
        for row in document["rows"]:
            del row["seconds"]
    for part in ("rows", "tensors", "sensitivity", "confidence", "samples"):
        assert one[part] == two[part]


@pytest.mark.usefixtures("room")
def test_octav_calibrate_reads_the_observations_too(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, *QUICK, "--save-observations", "seen.npz", "--json", "all.json")
    arguments = (*JOB, "--observations", "seen.npz", "--bits", 3, "--edge-bits", 3)
    assert calibrate([*map(str, arguments), "--summary", "s.json"]) == 0
    row = read_json("all.json")["rows"][0]
    summary = read_json("s.json")
    assert summary["output_sqnr_db"] == row["sqnr_db"]
    assert summary["agreement"] == row["agreement"]
    assert summary["top1"]["quantized"] == row["top1"]


# --- methods, widths, the file of settings ------------------------------------------------------


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("octav:kappa=paper,iterations=10,max", ["octav:kappa=paper,iterations=10", "max"]),
        ("max, octav:kappa=paper, iterations=9", ["max", "octav:kappa=paper,iterations=9"]),
        ("percentile:99.9,percentile:99.99", ["percentile:99.9", "percentile:99.99"]),
    ],
)
def test_parameters_belong_to_the_method_before_them(
    capsys: pytest.CaptureFixture[str], text: str, methods: list[str]
) -> None:
    options = ("--bits", "4", "--methods", text, "--no-sensitivity", "--json", "all.json")
    succeed(capsys, *JOB, *options)
    assert read_json("all.json")["methods"] == methods


@pytest.mark.usefixtures("room")
def test_the_settings_of_octav_calibrate_hold_but_for_width_and_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = """model: m.onnx
data: d.npz
bits: 5
method: entropy
weight-method: max
edge-bits: 3
output: q.onnx
rules:
  - {match: second.weight, bits: 6}
"""
    Path("octav.yaml").write_text(text, "utf-8")
    options = ("--bits", "3,8", "--methods", "octav,max", "--json", "all.json")
    succeed(capsys, "--config", "octav.yaml", *options)
    document = strict("all.json")
    assert rows(document) == [(m, b) for b in (3, 8) for m in ("octav", "max")]
    assert not Path("q.onnx").exists()
    assert calibrate(["--config", "octav.yaml", "--bits", "3", "--method", "octav",
                      "--summary", "s.json"]) == 0  # fmt: skip
    assert read_json("s.json")["output_sqnr_db"] == document["rows"][0]["sqnr_db"]
    message = refuse(capsys, "--config", "octav.yaml", "--json", "octav.yaml", "--force")
    assert message == "octav.yaml: is an input, which is never overwritten"


@pytest.mark.usefixtures("room")
def test_onnxruntimes_calibrators_add_three_rows_a_width(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--with-onnxruntime", "--no-sensitivity", "--json", "all.json")
    succeed(capsys, *QUICK, *options)
    wanted = [(method, bits) for bits in (3, 8) for method in ("octav", "max", *RIVALS)]
    assert rows(strict("all.json")) == wanted


@pytest.mark.usefixtures("room")
def test_a_metric_is_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    Path("judge_compare.py").write_text(
        "def first(answers):\n    return float(next(answers)[0]['y'].mean())\n", "utf-8"
    )
    options = ("--metric", "judge_compare:first", "--no-sensitivity", "--json", "all.json")
    out = succeed(capsys, *QUICK, *options)
    document = strict("all.json")
    assert "metric" in out.splitlines()[0]
    assert document["metric_name"] == "judge_compare:first"
    assert document["float"]["metric"] is not None
    assert all(row["metric"] is not None for row in document["rows"])


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--bits", "4,x"), ["--bits must be whole numbers with commas, as 4,6,8, got '4,x'"]),
        (("--bits", ""), ["--bits must be whole numbers", "got ''"]),
        (("--bits", "4,,8"), ["--bits must be whole numbers"]),
        (("--bits", "4,9"), ["bits must be one of 2 to 8 or 16, got 9"]),
        (("--bits", "4,6,4"), ["bits: 4 is given twice"]),
        (("--bits", "9" * 30), ["--bits must be whole numbers"]),
        (("--bits", "99"), ["bits must be one of 2 to 8 or 16, got 99"]),
        (("--methods", "octave"), ["No calibrator named 'octave'", "Available: octav"]),
        (("--methods", ""), ["No calibrator named ''"]),
        (("--methods", "octav,,max"), ["No calibrator named ''"]),
        (("--methods", "max,octav,max"), ["methods: max is given twice"]),
        (("--methods", "percentile:101"), ["percentile", "101"]),
        (("--methods", "octav:kapa=paper"), ["kapa"]),
        (("--edge-bits", "1"), ["edge-bits"]),
        (("--samples", "0"), ["samples must be at least 1"]),
        (("--exclude", "("), ["exclude", "no regular expression"]),
        (("--exclude", "absent"), ["matches no node and no tensor"]),
        (("--metric", "nowhere:f"), ["nowhere:f: cannot be imported"]),
        (("--json", "no/all.json"), ["no/all.json", "does not exist"]),
        (("--observations", "absent.npz"), ["absent.npz"]),
    ],
)
def test_a_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: list[str]
) -> None:
    message = refuse(capsys, *JOB, *arguments)
    assert_tells(message, *parts)
    assert len(message) < 300


@pytest.mark.usefixtures("room")
def test_a_model_that_is_missing_or_nowhere_named_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_tells(refuse(capsys, "absent.onnx"), "absent.onnx: no such file")
    assert refuse(capsys, "--bits", "4") == "Missing argument 'MODEL'"
    Path("octav.yaml").write_text("bits: 4\n", "utf-8")
    message = refuse(capsys, "--config", "octav.yaml")
    assert message == "Missing argument 'MODEL', and octav.yaml names no 'model'"
    save_relu("relu.onnx")
    assert_tells(refuse(capsys, "relu.onnx"), "nothing to quantize")


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("option", ["--json", "--report", "--save-observations"])
def test_files_are_overwritten_only_with_force_and_inputs_never(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    if option == "--report" and find_spec("plotly") is None:
        pytest.skip("the extra report is absent")
    Path("there").write_text("mine", "utf-8")
    message = refuse(capsys, *QUICK, option, "there")
    assert message == "there: exists; choose another name, or overwrite it with --force"
    for source, what in (("m.onnx", "the input model"), ("d.npz", "an input")):
        message = refuse(capsys, *QUICK, option, source, "--force")
        assert message == f"{source}: is {what}, which is never overwritten"
    succeed(capsys, *QUICK, "--no-sensitivity", option, "there", "--force")
    assert Path("there").read_bytes() != b"mine"


@pytest.mark.usefixtures("room")
def test_two_outputs_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse(capsys, *QUICK, "--json", "a", "--save-observations", "a")
    assert message == "a: is named for two different outputs"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_room(tmp_path, monkeypatch)
    copy_digits(tmp_path)
    images = np.load("digits.npz")["image"]
    np.savez("long.npz", image=np.tile(images, (80, 1, 1, 1)))  # for about a minute
    before = contents(tmp_path)
    script = Path(sys.executable).with_name("octav-compare")
    options = ("digits.onnx", "--data", "long.npz", "--json", "all.json", "--with-onnxruntime")
    process = subprocess.Popen(
        [str(script), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    )
    wait_until(lambda: children(process.pid))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "octav-compare: interrupted"
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("room")
def test_saved_observations_without_data_are_compared_on_made_up_inputs_and_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    succeed(capsys, *QUICK, "--save-observations", "seen.npz", "--no-sensitivity")
    model = QUICK[0]
    told = run(capsys, model, "--observations", "seen.npz", "--bits", 3, "--json", "all.json")
    assert told.code == 0
    assert "made-up inputs" in told.out
    assert "calibration samples" not in told.out
    assert "sensitivity was not measured: it takes real samples" in told.out
    assert "NO DATA" in told.err
    assert strict("all.json")["samples"]["made_up"] is True
