"""What is installed: packages, extras, entry point, version, the wheel, and its types."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE_SUFFIXES = (".html", ".css", ".js")
SETUPTOOLS_NEEDED = 77  # as pyproject.toml says: licence expressions


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def lines(text: str) -> list[str]:
    """A setup.cfg list: one item a line, comment lines left out."""
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def requirement_names(text: str) -> set[str]:
    """``numpy>=1.26`` → ``numpy``."""
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines(text)}


def packages_in_the_tree() -> set[str]:
    """Folders of Python files below calib and cli, the latter under its installed name."""
    folders = {path.parent for top in ("calib", "cli") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    return {re.sub(r"^cli\b", "octav_calibrate_cli", name) for name in names}


# --- setup.cfg --------------------------------------------------------------------------------


def test_the_packages_are_those_in_the_tree(setup_cfg: configparser.ConfigParser) -> None:
    assert set(lines(setup_cfg["options"]["packages"])) == packages_in_the_tree()
    assert lines(setup_cfg["options"]["package_dir"]) == ["octav_calibrate_cli = cli"]


def test_every_folder_of_python_files_is_a_package() -> None:
    for top in ("calib", "cli"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_the_type_marker_is_packaged_and_empty(setup_cfg: configparser.ConfigParser) -> None:
    assert "py.typed" in lines(setup_cfg["options.package_data"]["calib"])
    assert (ROOT / "calib/py.typed").read_bytes() == b""


def test_the_dev_extra_includes_every_other_extra(setup_cfg: configparser.ConfigParser) -> None:
    extras = dict(setup_cfg["options.extras_require"])
    dev = requirement_names(extras.pop("dev"))
    assert extras
    for name, requirements in extras.items():
        assert requirement_names(requirements) <= dev, name


def test_the_dev_extra_brings_what_building_without_isolation_needs(
    setup_cfg: configparser.ConfigParser,
) -> None:
    wanted = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert wanted is not None
    dev = lines(setup_cfg["options.extras_require"]["dev"])
    assert set(re.findall(r'"([^"]+)"', wanted[1])) <= set(dev)


def test_everything_that_is_imported_is_required(setup_cfg: configparser.ConfigParser) -> None:
    required = requirement_names(setup_cfg["options"]["install_requires"])
    imported: set[str] = set()
    for path in (path for top in ("calib", "cli") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    outside = imported - sys.stdlib_module_names - {"calib"}
    distributions = {"yaml": "pyyaml", "PIL": "pillow"}
    found = {distributions.get(name, name.replace("_", "-")) for name in outside}
    extras = setup_cfg["options.extras_require"]
    assert found == required.union(
        *(
            requirement_names(extras[e])
            for e in ("distributed", "fast", "images", "report", "torch")
        )
    )


# --- what is installed ------------------------------------------------------------------------


def test_the_version_is_the_newest_of_the_changelog(setup_cfg: configparser.ConfigParser) -> None:
    import calib

    headings = re.findall(r"^## \[?(\d\S*?)\]?(?: .*)?$", changelog(), re.M)
    assert headings[0] == setup_cfg["metadata"]["version"]
    assert headings[0] == version("octav-calibrate") == calib.__version__


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_entry_point_is_the_function_that_runs_the_command() -> None:
    scripts = distribution("octav-calibrate").entry_points.select(group="console_scripts")
    assert sorted(script.name for script in scripts) == [
        "octav-calibrate",
        "octav-check",
        "octav-compare",
    ]
    for script in scripts:
        command = script.name.removeprefix("octav-")
        assert script.value == f"octav_calibrate_cli.{command}:main"
        main = script.load()
        assert main(["--version"]) == 0
        assert main(["--batch-size", "x"]) == 2


# --- the wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree; skipped where no setuptools can, but never in CI."""
    found = version("setuptools") if find_spec("setuptools") else "0"
    if int(found.partition(".")[0]) < SETUPTOOLS_NEEDED or find_spec("build") is None:
        reason = f"needs build and setuptools>={SETUPTOOLS_NEEDED}, this is {found}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(
        [*command, str(folder / "tree")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, and sees our dependencies.

    A path file is not followed by another one, so this checkout is not seen through ours.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = {
        str(Path(path)) for path in sys.path if path.endswith(("site-packages", "dist-packages"))
    }
    (site / "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n", "utf-8")
    return python


def run(python: Path, *arguments: object, cwd: Path | None = None, code: int = 0) -> str:
    """stdout of an interpreter that knows nothing of this checkout but its site-packages."""
    command = [str(python), *map(str, arguments)]
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd or python.parent, env=kept
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_both_packages_the_licence_and_the_marker_and_nothing_else(
    wheel: Path,
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert {name.partition("/")[0] for name in names} == {"calib", "octav_calibrate_cli", info}
    sources = {
        str(path.relative_to(ROOT).as_posix()).replace("cli/", "octav_calibrate_cli/", 1)
        if path.is_relative_to(ROOT / "cli")
        else str(path.relative_to(ROOT).as_posix())
        for top in ("calib", "cli")
        for path in (ROOT / top).rglob("*.py")
    }
    shipped = {name for name in names if not name.startswith(info)}
    report = ROOT / "calib/report"
    page = {f"calib/report/{p.name}" for p in report.iterdir() if p.suffix in PAGE_SUFFIXES}
    assert shipped == {*sources, *page, "calib/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_is_for_any_platform_and_says_who_and_what(wheel: Path) -> None:
    assert wheel.name == f"octav_calibrate-{version('octav-calibrate')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.M)
    assert "Requires-Python: >=3.10" in metadata
    assert (ROOT / "README.md").read_text("utf-8").splitlines()[0] in metadata


def test_the_wheel_runs_in_an_environment_of_its_own(environment: Path, tmp_path: Path) -> None:
    for name in ("digits.onnx", "digits.npz"):
        shutil.copy(ROOT / "samples/digits" / name, tmp_path)
    program = (
        "import sys, calib, octav_calibrate_cli; "
        "from importlib.metadata import distribution; "
        "print(calib.__file__); print(octav_calibrate_cli.__file__); "
        "scripts = distribution('octav-calibrate').entry_points; "
        "(script,) = scripts.select(name='octav-calibrate'); "
        "sys.exit(script.load()(sys.argv[1:]))"
    )
    arguments = ("digits.onnx", "--data", "digits.npz", "--bits", 4, "--quiet")
    out = run(environment, "-c", program, *arguments, cwd=tmp_path)
    home = environment.parents[1].resolve()
    assert all(Path(line).resolve().is_relative_to(home) for line in out.splitlines()), out
    assert (tmp_path / "digits-w4a4.onnx").stat().st_size > 0


USER_SCRIPT = """\
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib import (
    CalibError,
    Calibration,
    Calibrator,
    Comparison,
    Distribution,
    QuantType,
    Reduction,
    Rules,
    Run,
    Samples,
    Selection,
    Widths,
    calibrate,
    calibrate_model,
    evaluate,
    load_model,
    make_plan,
    observe,
    open_data,
    write_qdq,
)
from calib.testing import CALIBRATOR_CHECKS


def half(dist: Distribution, qtype: QuantType, /) -> NDArray[np.float64]:
    return dist.max_abs() / 2


def batches() -> Iterator[dict[str, NDArray[np.float32]]]:
    yield {"image": np.zeros((8, 1, 8, 8), np.float32)}


def by_steps(path: Path) -> Comparison:
    model = load_model(path)
    rules = Rules(Widths(4, 4), method="mse", selection=Selection(exclude="head"))
    plan = make_plan(model, rules)
    data = open_data(model, "calib.npz")
    observations = observe(model, data.batches(), plan.activations)
    quantized = write_qdq(model, calibrate(model, observations, plan, rules))
    quantized.save(path.with_name("out.onnx"))
    return evaluate(model, path.with_name("out.onnx"), data.batches())


def main() -> float:
    try:
        result: Calibration = calibrate_model("model.onnx", batches(), Rules(), run=Run(samples=8))
    except CalibError as error:
        print(error)
        return 0.0
    calibrator: Calibrator = half
    threshold = calibrator(Samples(np.ones((1, 9), np.float32)), QuantType(4, signed=True))
    for check in CALIBRATOR_CHECKS:
        check(calibrator)
    return result.comparison.output_sqnr_db + float(threshold[0]) + Reduction("mean").batches
"""


def test_a_users_script_is_type_checked_against_the_wheel(
    environment: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(USER_SCRIPT, "utf-8")
    bad.write_text(
        "from calib import QuantType, Widths, load_model\n"
        "a: str = QuantType(4, signed=True).steps\n"
        'b = Widths("four")\n'
        "c = load_model(4)\n",
        "utf-8",
    )
    options = ("--strict", "--python-executable", environment, "--cache-dir", tmp_path / "cache")
    run(Path(sys.executable), "-m", "mypy", *options, good, cwd=tmp_path)
    found = run(Path(sys.executable), "-m", "mypy", *options, bad, cwd=tmp_path, code=1)
    assert [line.split(":")[1] for line in found.splitlines() if ": error: " in line] == [
        "2",
        "3",
        "4",
    ]
