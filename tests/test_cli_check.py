"""octav-check: exit codes, what it says on which stream, what it writes and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import cli_models
import numpy as np
import pytest
from check_models import changed, digits_by_onnxruntime, digits_qdq, layers
from cli_models import (
    Told,
    assert_tells,
    clean_environment,
    contents,
    copy_digits,
    enter_room,
    run_main,
    save_one_layer,
)

JOB = ("digits.onnx", "q.onnx", "--data", "digits.npz", "--samples", 256)
ASKED = ("--min-sqnr", 20, "--min-agreement", 0.98, "--max-top1-drop", 1, "--max-size-ratio", 0.45)
FILES = ("--report", "r.html", "--junit", "r.xml", "--markdown", "r.md", "--json", "r.json")
WRITTEN = {"r.html", "r.xml", "r.md", "r.json"}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the digits sample, and ``q.onnx``, which is it at 8 bits."""
    copy_digits(tmp_path)
    shutil.copy(digits_qdq(), tmp_path / "q.onnx")
    return enter_room(tmp_path, monkeypatch)


run = partial(run_main, name="octav-check")
refuse = partial(cli_models.refuse, name="octav-check")


# --- exit codes -------------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
def test_the_command_of_the_issue_passes_and_writes_its_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = set(contents(Path.cwd()))
    told = run(capsys, *JOB, *ASKED, *FILES)
    assert (told.code, told.err) == (0, "")
    assert set(contents(Path.cwd())) - before == WRITTEN
    for bound in ("min-sqnr", "min-agreement", "max-top1-drop", "max-size-ratio"):
        assert re.search(rf"^{bound} holds: ", told.out, re.M)
    assert re.search(r"^samples +540 that calibration did not see *$", told.out, re.M)
    assert re.search(r"^top-1 +float 99\.\d\d %, quantized 99\.\d\d % *$", told.out, re.M)
    assert "no tensor stands out" in told.out
    document = json.loads(Path("r.json").read_text("utf-8"))
    assert document["check"]["passed"] is True
    assert f"SQNR {document['check']['outputs'][0]['sqnr_db']:.1f} dB" in told.out


@pytest.mark.usefixtures("room")
def test_a_missed_bound_is_exit_code_1_a_line_for_each_and_all_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bounds = ("--min-sqnr", 90, "--min-agreement", 0.5, "--max-size-ratio", 0.01)
    told = run(capsys, *JOB, *bounds, *FILES)
    assert told.code == 1
    first, second = told.err.splitlines()
    assert first.startswith("octav-check: failed: min-sqnr FAILS: output SQNR ")
    assert second.startswith("octav-check: failed: max-size-ratio FAILS: size ratio ")
    assert set(contents(Path.cwd())) >= WRITTEN
    root = ElementTree.parse("r.xml").getroot()  # noqa: S314 - our own
    assert root.attrib["failures"] == "2"
    assert "FAILED" in Path("r.md").read_text("utf-8")


@pytest.mark.usefixtures("room")
def test_the_first_broken_layer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, scale = layers(Path("q.onnx"))["block1.second.bn.out"]
    changed(Path("q.onnx"), Path("q.onnx"), scale, lambda s: s * 7)
    told = run(capsys, *JOB, "--min-sqnr", 20)
    assert told.code == 1
    assert "the first tensor whose error stands out is 'block1.second.bn.out'" in told.out
    verbose = run(capsys, *JOB, "--verbose")
    assert re.search(r"^ *block1\.second\.bn\.out .* <- stands out *$", verbose.out, re.M)
    assert verbose.out.count("stands out") == 2


@pytest.mark.usefixtures("room")
def test_nan_is_a_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    _, scale = layers(Path("q.onnx"))["logits"]
    changed(Path("q.onnx"), Path("q.onnx"), scale, lambda s: s * np.nan)
    told = run(capsys, *JOB)
    assert told.code == 1
    assert told.err == ("octav-check: failed: output 'logits' of the quantized model holds NaN\n")


@pytest.mark.usefixtures("room")
def test_without_bounds_figures_are_printed_and_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = run(capsys, *JOB)
    assert (told.code, told.err) == (0, "")
    assert "no bound was asked for" in told.out
    assert set(contents(Path.cwd())) == {"digits.onnx", "digits.npz", "q.onnx"}


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_models_of_onnxruntimes_tools_are_checked(
    form: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digits_by_onnxruntime(form), room / "q.onnx")
    assert run(capsys, *JOB, "--min-sqnr", 25, "--min-agreement", 0.95).code == 0


@pytest.mark.usefixtures("room")
def test_quiet_says_only_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *JOB, "--quiet", "--min-sqnr", 20) == Told(0, "", "")
    told = run(capsys, *JOB, "--quiet", "--min-sqnr", 99)
    assert (told.code, told.out) == (1, "")
    assert told.err.count("\n") == 1


@pytest.mark.usefixtures("room")
def test_made_up_inputs_are_a_warning_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "digits.onnx", "q.onnx", "--quiet")
    assert told.code == 0
    assert told.err.startswith("WARNING: NO DATA: ")


# --- settings in a file -----------------------------------------------------------------------


@pytest.mark.usefixtures("room")
def test_the_file_of_octav_calibrate_serves_both_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("octav.yaml").write_text(
        "model: digits.onnx\noutput: q.onnx\ndata: digits.npz\nsamples: 256\nbits: 8\n"
        "method: mse\nreport: page.html\nsummary: s.json\nsave-observations: seen.npz\n"
        "min-sqnr: 99\nmax-size-ratio: 0.5\nrules:\n  - {match: '^head', bits: 4}\n",
        "utf-8",
    )
    before = contents(Path.cwd())
    told = run(capsys, "--config", "octav.yaml")
    assert told.code == 1
    assert told.err.count("min-sqnr FAILS") == 1
    assert contents(Path.cwd()) == before, "what the file names to write is octav-calibrate's"
    told = run(capsys, "--config", "octav.yaml", "--min-sqnr", 20)
    assert (told.code, told.err) == (0, "")
    assert "540 that calibration did not see" in told.out
    told = run(capsys, "q.onnx", "q.onnx", "--config", "octav.yaml")
    assert "SQNR infinite" in told.out


@pytest.mark.usefixtures("room")
def test_what_the_file_lacks_is_a_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(capsys) == "Missing argument 'FLOAT'"
    assert refuse(capsys, "digits.onnx") == "Missing argument 'QUANTIZED'"
    Path("octav.yaml").write_text("model: digits.onnx\n", "utf-8")
    line = refuse(capsys, "--config", "octav.yaml")
    assert line == "Missing argument 'QUANTIZED', and octav.yaml names no 'output'"


@pytest.mark.usefixtures("room")
def test_the_settings_file_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("octav.json").write_text("model: digits.onnx\n", "utf-8")
    job = (*JOB, "--config", "octav.json", "--json", "octav.json", "--force")
    assert refuse(capsys, *job).startswith("octav.json: is an input")


@pytest.mark.usefixtures("room")
def test_a_mistake_in_the_file_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("octav.yaml").write_text("min-agreement: 98\n", "utf-8")
    line = refuse(capsys, *JOB, "--config", "octav.yaml")
    assert_tells(line, "octav.yaml: min-agreement must be 0 to 1, got 98")
    Path("octav.yaml").write_text("max-metric-drop: 0.1\n", "utf-8")
    line = refuse(capsys, *JOB, "--config", "octav.yaml")
    assert line.startswith("octav.yaml: max-metric-drop cannot be measured: ")


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits.onnx", "none.onnx"), "none.onnx: no such file"),
        (("none.onnx", "q.onnx"), "none.onnx: no such file"),
        (("digits.onnx", "digits.npz"), "digits.npz: not a valid ONNX model"),
        ((*JOB, "--min-agreement", 98), "--min-agreement must be 0 to 1, got 98: 0.98 is 98 %"),
        ((*JOB, "--min-sqnr", "high"), "Invalid value for '--min-sqnr'"),
        ((*JOB, "--min-sqnr", "nan"), "--min-sqnr must be a number, got nan"),
        ((*JOB, "--max-metric-drop", 1), "max-metric-drop cannot be measured: it needs --metric"),
        ((*JOB, "--metric", "nothing"), "--metric must be package.module:function, got 'nothing'"),
        ((*JOB, "--metric", "no_such:f"), "no_such:f: "),
        ((*JOB, "--bits", 4), "No such option"),
        ((*JOB, "third.onnx"), "Got unexpected extra argument (third.onnx)"),
        ((*JOB, "--config", "none.yaml"), "none.yaml: no such file"),
        ((*JOB, "--provider", "Abacus"), "provider 'Abacus' is not available"),
        ((*JOB, "--json", "q.onnx", "--force"), "q.onnx: is an input, which is never overwritten"),
        ((*JOB, "--junit", "a", "--json", "a"), "a: is named for two different outputs"),
        (("digits.onnx", "q.onnx", "--max-top1-drop", 1), "max-top1-drop cannot be measured: it"),
    ],
)
def test_bad_usage_and_bad_input_are_one_line(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refuse(capsys, *arguments).startswith(message)


@pytest.mark.usefixtures("room")
def test_models_with_another_interface_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save_one_layer("other.onnx")
    line = refuse(capsys, "digits.onnx", "other.onnx", "--data", "digits.npz")
    assert_tells(line, "other.onnx: its inputs are 'x', the float model's 'image'")


@pytest.mark.usefixtures("room")
def test_what_exists_is_overwritten_only_when_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.md").write_text("mine", "utf-8")
    assert refuse(capsys, *JOB, *FILES).startswith("r.md: exists; choose another name")
    assert run(capsys, *JOB, *FILES, "--force").code == 0
    assert Path("r.md").read_text("utf-8").startswith("## octav-check: ")


# --- the command itself -----------------------------------------------------------------------


def test_help_tells_all_options_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "--help")
    assert told.code == 0
    assert "[FLOAT] [QUANTIZED]" in told.out
    for option in ("min-sqnr", "min-cosine", "max-error", "min-agreement", "max-top1-drop",
                   "max-metric-drop", "max-size-ratio", "metric", "report", "junit", "markdown",
                   "json", "force", "config", "labels", "provider", "samples"):  # fmt: skip
        assert f"--{option} " in told.out
    for absent in ("--bits", "--keep-failed", "--padding-mask", "--dry-run", "--output"):
        assert absent not in told.out
    examples = re.findall(r"^  octav-check .*", told.out.split("Examples:")[1], re.M)
    assert len(examples) >= 3 or told.out.count("octav-check model.onnx") >= 3
    assert "Exit codes: 0 every bound holds, 1 one does not, 2 bad" in told.out


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "--version")
    assert (told.code, told.out) == (0, f"octav-check {version('octav-calibrate')}\n")


@pytest.mark.usefixtures("room")
def test_the_installed_script_ends_with_the_exit_code_of_the_gate() -> None:
    found = shutil.which("octav-check", path=str(Path(sys.executable).parent))
    assert found is not None, "octav-check is not installed: pip install -e .[dev]"
    for limit, code in ((20, 0), (99, 1), ("x", 2)):
        command = [found, *map(str, JOB), "--min-sqnr", str(limit)]
        env = clean_environment()
        done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=env)
        assert done.returncode == code, done.stderr.decode()
        assert len(done.stderr.splitlines()) == (0 if code == 0 else 1)
        assert b"\x1b" not in done.stdout


@pytest.mark.usefixtures("room")
def test_a_metric_of_the_users_is_found_beside_the_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("judges_cli.py").write_text(
        "def margin(answers):\n"
        "    rows = [row for outputs, _, _ in answers for row in outputs['logits']]\n"
        "    return float(sum(row.max() - row.min() for row in rows) / len(rows))\n",
        "utf-8",
    )
    told = run(capsys, *JOB, "--metric", "judges_cli:margin", "--max-metric-drop", 0.5)
    assert (told.code, told.err) == (0, "")
    assert re.search(r"^metric +judges_cli:margin: float \d.*, quantized \d", told.out, re.M)


@pytest.mark.skipif(os.name == "nt", reason="no such names of files there")
@pytest.mark.usefixtures("room")
def test_a_file_name_is_markup_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[red]q|`<b>.onnx"
    Path("q.onnx").rename(odd)
    told = run(capsys, "digits.onnx", odd, *JOB[2:], *FILES)
    assert (told.code, told.err) == (0, "")
    assert re.search(rf"^quantized +{re.escape(odd)} *$", told.out, re.M)
    root = ElementTree.parse("r.xml").getroot()  # noqa: S314 - our own
    names = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert names["quantized.name"] == odd
    assert f"``{odd}``" in Path("r.md").read_text("utf-8")
    assert odd not in Path("r.html").read_text("utf-8")
