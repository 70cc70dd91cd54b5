"""A third party's package, built and installed for real, and packages that misbehave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from calib.calibrators import Calibrator, make, names, thresholds
from calib.distribution import Samples
from calib.errors import CalibError, CalibratorError
from calib.graph import load_model
from calib.qtypes import QuantType

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "samples" / "digits"
BUILT_IN = ("octav", "percentile", "mse", "max", "entropy")
AVAILABLE = "Available: octav, percentile, mse, max, entropy, meanmax, three-sigma"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed tests/plugin into; needs setuptools>=70.1, no network."""
    source = tmp_path_factory.mktemp("plugin") / "source"
    shutil.copytree(ROOT / "tests" / "plugin", source)
    target = source.with_name("site")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
    command.append(str(source))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def python(site: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter that sees the packages of ``site``."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, "-c", dedent(code), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        env=environment,
    )


def said(site: Path, code: str) -> object:
    """What ``code`` printed, as JSON."""
    done = python(site, code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def add_package(site: Path, name: str, calibrators: dict[str, str], **modules: str) -> None:
    """What pip leaves of a distribution: its metadata, entry points and modules."""
    metadata = site / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in calibrators.items()]
    text = "\n".join(["[octav_calibrate.calibrators]", *lines, ""])
    (metadata / "entry_points.txt").write_text(text)
    for module, source in modules.items():
        (site / f"{module}.py").write_text(dedent(source))


# --- the package that works ---------------------------------------------------------------------


def test_a_plug_in_is_listed_behind_the_built_in_names_without_being_imported(
    installed: Path,
) -> None:
    code = """
        import json, sys
        from calib.calibrators import names
        listed = names()
        print(json.dumps([listed, "octav_plugin_example" in sys.modules]))
    """
    assert said(installed, code) == [[*BUILT_IN, "meanmax", "three-sigma"], False]


def test_a_plug_in_is_made_by_name_with_parameters(installed: Path) -> None:
    code = """
        import json
        from calib.calibrators import make
        specs = ("meanmax", "meanmax:0.5", "meanmax:weight=0.25")
        print(json.dumps([[repr(make(spec)) for spec in specs], make("three-sigma").__name__]))
    """
    made = [f"MeanMax(weight={weight})" for weight in (0.75, 0.5, 0.25)]
    assert said(installed, code) == [made, "three_sigma"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("meanmax:2", "OptionError", "meanmax: weight must be in (0, 1], got 2.0"),
        ("meanmax:x", "OptionError", "meanmax:x: weight must be a number, got 'x'"),
        ("meanmax:w=1", "OptionError", "meanmax:w=1: no parameter 'w'; allowed: weight"),
        (
            "three-sigma:4",
            "OptionError",
            "three-sigma takes no parameters, got '4' in 'three-sigma:4'",
        ),
        (
            "meanmx",
            "CalibratorError",
            f"No calibrator named 'meanmx'. Did you mean 'meanmax'? {AVAILABLE}",
        ),
    ],
)
def test_the_parameters_of_a_plug_in_are_checked_like_ours(
    installed: Path, spec: str, error: str, message: str
) -> None:
    code = f"""
        import json
        from calib.calibrators import make
        from calib.errors import CalibError
        try:
            make({spec!r})
        except CalibError as error:
            print(json.dumps([type(error).__name__, str(error)]))
    """
    assert said(installed, code) == [error, message]


def test_an_installed_plug_in_passes_the_battery(installed: Path) -> None:
    code = """
        import json
        from calib.calibrators import make
        from calib.testing import CALIBRATOR_CHECKS
        for spec in ("meanmax:0.5", "three-sigma"):
            for check in CALIBRATOR_CHECKS:
                check(make(spec))
        print(json.dumps(len(CALIBRATOR_CHECKS)))
    """
    assert said(installed, code) == 10


CLI = "import sys; from octav_calibrate_cli.calibrate import main; sys.exit(main(sys.argv[1:]))"


def test_the_command_line_calibrates_with_a_plug_in(installed: Path, tmp_path: Path) -> None:
    summary, output = tmp_path / "summary.json", tmp_path / "digits-q.onnx"
    arguments = (DIGITS / "digits.onnx", "--data", DIGITS / "digits.npz", "--samples", 64)
    options = ("--bits", 4, "--method", "meanmax", "--weight-granularity", "per-tensor")
    files = ("--output", output, "--summary", summary)
    done = python(installed, CLI, *arguments, *options, *files)
    assert done.returncode == 0, done.stderr
    assert output.is_file()
    model = load_model(DIGITS / "digits.onnx")
    tensors = json.loads(summary.read_text("utf-8"))["tensors"]
    weights = [tensor for tensor in tensors if tensor["kind"] == "weight"]
    assert len(weights) >= 3
    for tensor in weights:
        magnitude = np.abs(model.weight(tensor["name"]).astype(np.float64))
        expected = 0.25 * magnitude.mean() + 0.75 * magnitude.max()
        assert tensor["threshold"] == pytest.approx(expected, rel=1e-9)


def test_the_command_line_names_the_plug_ins_when_the_method_is_unknown(installed: Path) -> None:
    done = python(installed, CLI, DIGITS / "digits.onnx", "--method", "meanmin", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert AVAILABLE in done.stderr


# --- packages that misbehave --------------------------------------------------------------------


def test_two_distributions_with_one_name_are_an_error_naming_both(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_package(tmp_path, "octav-rival", {"meanmax": "rival:Mine"})
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.syspath_prepend(str(tmp_path))
    for ask in (names, lambda: make("meanmax"), lambda: make("three-sigma")):
        with pytest.raises(CalibratorError) as caught:
            ask()
        told = str(caught.value)
        assert told.startswith("calibrator 'meanmax' is offered by ")
        assert "octav-rival" in told
        assert "octav-plugin-example" in told
        assert "rename one, or uninstall it" in told


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_plug_in_cannot_replace_a_built_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_package(tmp_path, "octav-usurper", {name: "usurper:Mine"}, usurper="Mine = None")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CalibratorError) as caught:
        names()
    assert str(caught.value) == (
        f"calibrator {name!r} is offered by octav-usurper and by octav-calibrate itself: "
        f"rename one, or uninstall it"
    )
    assert type(make(name)).__module__ == f"calib.calibrators.{name}"


def test_a_package_that_is_twice_on_the_path_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in ("first", "second"):
        add_package(tmp_path / site, "octav-twice", {"twice": "twice:Mine"})
        monkeypatch.syspath_prepend(str(tmp_path / site))
    assert names().count("twice") == 1


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("octav_broken_a", "raise ImportError('no\\n  such library')", "no such library"),
        ("octav_broken_b", "1 / 0", "division by zero"),
        ("octav_broken_c", "Other = 1", "has no attribute 'Mine'"),
        ("octav_broken_d", None, "No module named 'octav_broken_d'"),
    ],
)
def test_a_plug_in_that_cannot_be_loaded_is_one_line_and_only_when_it_is_used(
    module: str,
    source: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {} if source is None else {module: source}
    add_package(tmp_path, "octav-broken", {"broken": f"{module}:Mine"}, **modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken" in names()
    assert make("octav")
    with pytest.raises(CalibratorError) as caught:
        make("broken")
    told = str(caught.value)
    assert told.startswith("calibrator 'broken' of octav-broken cannot be loaded: ")
    assert told.endswith(reason) or reason in told
    assert "\n" not in told
    assert caught.value.__cause__ is not None


def odd_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrators that are valid Python, but not what the protocol's text asks for."""
    source = """
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Flagged:
            strict: bool = True

        @dataclass(frozen=True)
        class Needy:
            share: float

        @dataclass(frozen=True)
        class Optional:
            share: float | None = None

        @dataclass(frozen=True)
        class Picky:
            share: float = 0.5
            def __post_init__(self):
                if self.share > 1:
                    raise ValueError("at most 1,\\n  please")

        @dataclass(frozen=True)
        class Hinted:
            share: "OnlyKnownToTypeCheckers" = 0.5

        class Plain:
            def __call__(self, dist, qtype, /):
                return dist.max_abs()

        ready = Plain()
        number = 3
    """
    found = ("Flagged", "Needy", "Optional", "Picky", "Hinted", "Plain", "ready", "number")
    entries = {name.lower(): f"octav_odd:{name}" for name in found}
    add_package(tmp_path, "octav-odd", entries, octav_odd=source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "octav_odd", raising=False)


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("flagged", "Flagged(strict=True)"),
        ("flagged:strict=False", "Flagged(strict=False)"),
        ("flagged:true", "Flagged(strict=True)"),
        ("needy:0.5", "Needy(share=0.5)"),
        ("optional:0.5", "Optional(share=0.5)"),
        ("optional", "Optional(share=None)"),
        ("hinted", "Hinted(share=0.5)"),
    ],
)
def test_a_parameter_has_the_type_of_its_field(
    spec: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_plugin(tmp_path, monkeypatch)
    assert repr(make(spec)) == made


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("flagged:maybe", "strict must be true or false, got 'maybe'"),
        ("needy", "share"),
        ("needy:much", "share must be a number, got 'much'"),
        ("picky:2", "at most 1, please"),
        ("plain:1", "takes no parameters"),
        ("hinted:0.5", "OnlyKnownToTypeCheckers"),
    ],
)
def test_a_plug_in_that_cannot_be_made_is_an_error_of_this_library(
    spec: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_plugin(tmp_path, monkeypatch)
    with pytest.raises(CalibError) as caught:
        make(spec)
    told = str(caught.value)
    assert spec.partition(":")[0] in told
    assert reason in told
    assert "\n" not in told


@pytest.mark.parametrize("spec", ["plain", "ready"])
def test_a_class_without_fields_and_a_ready_made_callable_are_calibrators(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_plugin(tmp_path, monkeypatch)
    made: Calibrator = make(spec)
    dist = Samples(np.array([[1.0, -2.0]], np.float32))
    assert thresholds(made, dist, QuantType(4, signed=True))[0] == 2


def test_an_entry_point_that_is_no_callable_is_an_error_of_the_calibrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_plugin(tmp_path, monkeypatch)
    dist = Samples(np.array([[1.0, -2.0]], np.float32))
    with pytest.raises(CalibratorError):
        thresholds(make("number"), dist, QuantType(4, signed=True))
