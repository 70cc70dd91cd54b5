"""The CI jobs under samples/ci: what they call is run here, step by step, in bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from cli_models import DIGITS, ROOT, clean_environment

CI = ROOT / "samples" / "ci"
BOUNDS = ["min-sqnr", "min-agreement", "max-top1-drop", "max-size-ratio"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the jobs find in a copy of the repository, as far as they use it."""
    for script in ("octav-calibrate", "octav-check", "bash"):
        beside = None if script == "bash" else str(Path(sys.executable).parent)
        assert shutil.which(script, path=beside) is not None, f"{script} is not installed"
    folder = tmp_path / "samples" / "digits"
    folder.mkdir(parents=True)
    for name in ("digits.onnx", "digits.npz"):
        shutil.copy(DIGITS / name, folder)
    return tmp_path


def parsed(name: str) -> dict[str, Any]:
    document = yaml.safe_load((CI / name).read_text("utf-8"))
    assert isinstance(document, dict)
    return document


def runs_here(step: str) -> bool:
    """Not what installs: the tests run what is installed."""
    return "pip install" not in step


def shell(step: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As both services run a step: bash, which stops at the first command that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step],  # noqa: S607
        cwd=folder,
        env={**clean_environment(), **environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_github(job: dict[str, Any], folder: Path) -> tuple[bool, str]:
    """Whether the job is green, and its summary; steps after a failed one run if ``always()``."""
    (steps,) = (each["steps"] for each in job["jobs"].values())
    summary = folder / "summary.md"
    environment = {**job["env"], "GITHUB_STEP_SUMMARY": str(summary)}
    green = True
    for step in steps:
        assert step.get("if") in (None, "always()")
        if runs_here(step.get("run", "pip install")) and (green or "if" in step):
            green &= shell(step["run"], folder, environment).returncode == 0
    return green, summary.read_text("utf-8") if summary.exists() else ""


def run_gitlab(job: dict[str, Any], folder: Path) -> bool:
    script = "\n".join(filter(runs_here, [*job["before_script"], *job["script"]]))
    return shell(script, folder, job["variables"]).returncode == 0


def stricter(text: str, found: str = "--min-sqnr 30", wanted: str = "--min-sqnr 99") -> str:
    assert found in text
    return text.replace(found, wanted)


def cases(path: Path) -> dict[str, bool]:
    """Whether each test case passed."""
    root = ElementTree.parse(path).getroot()  # noqa: S314 - we wrote it
    return {case.attrib["name"]: case.find("failure") is None for case in root.iter("testcase")}


def test_the_github_job_is_green_on_the_sample_and_publishes_what_it_found(checkout: Path) -> None:
    green, summary = run_github(parsed("github.yml"), checkout)
    assert green
    assert "PASSED" in summary
    assert cases(checkout / "check.xml") == dict.fromkeys(BOUNDS, True)
    assert (checkout / "check.html").read_text("utf-8").startswith("<!")
    assert (checkout / "quantized.onnx").exists()


def test_the_github_job_goes_red_where_a_bound_is_missed_and_still_publishes(
    checkout: Path,
) -> None:
    job = yaml.safe_load(stricter((CI / "github.yml").read_text("utf-8")))
    green, summary = run_github(job, checkout)
    assert not green
    assert "FAILED" in summary
    assert cases(checkout / "check.xml") == dict.fromkeys(BOUNDS, True) | {"min-sqnr": False}
    assert (checkout / "check.html").exists()


def test_the_github_job_goes_red_without_its_model_and_has_no_summary(checkout: Path) -> None:
    (checkout / "samples/digits/digits.onnx").unlink()
    assert run_github(parsed("github.yml"), checkout) == (False, "")


def test_the_github_job_uploads_what_its_steps_write() -> None:
    (steps,) = (each["steps"] for each in parsed("github.yml")["jobs"].values())
    (upload,) = (step for step in steps if "upload-artifact" in step.get("uses", ""))
    commands = " ".join(step.get("run", "") for step in steps)
    for path in upload["with"]["path"].split():
        assert path in commands
    assert upload["if"] == "always()"


def test_the_gitlab_job_is_green_on_the_sample(checkout: Path) -> None:
    job = parsed("gitlab.yml")["quantize"]
    assert run_gitlab(job, checkout)
    assert cases(checkout / job["artifacts"]["reports"]["junit"]) == dict.fromkeys(BOUNDS, True)
    for path in job["artifacts"]["paths"]:
        assert (checkout / path).exists()
    assert job["artifacts"]["when"] == "always"


def test_the_gitlab_job_goes_red_where_a_bound_is_missed(checkout: Path) -> None:
    job = yaml.safe_load(stricter((CI / "gitlab.yml").read_text("utf-8")))["quantize"]
    assert not run_gitlab(job, checkout)
    assert cases(checkout / job["artifacts"]["reports"]["junit"])["min-sqnr"] is False
    assert "FAILED" in (checkout / "check.md").read_text("utf-8")


def test_both_jobs_ask_for_the_same() -> None:
    github = parsed("github.yml")
    (steps,) = (each["steps"] for each in github["jobs"].values())
    gitlab = parsed("gitlab.yml")["quantize"]
    ours = [step["run"] for step in steps if "octav-" in step.get("run", "")]
    assert ours == [step for step in gitlab["script"] if "octav-" in step]
    assert github["env"] == gitlab["variables"]
