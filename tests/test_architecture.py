"""The one-way flow, the doors of heavy libraries, sizes, docstrings, and names that hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports only files above it in this list.
FLOW = (
    "errors",
    "files",
    "progress",
    "stages",
    "making",
    "qtypes",
    "granularity",
    "quantize",
    "compiled",
    "counting",
    "bincounts",
    "counter",
    "counterfile",
    "ranked",
    "ordered",
    "products",
    "magnitudes",
    "rounding",
    "sweeping",
    "cells",
    "protocol",
    "samples",
    "histogram",
    "distribution",
    "calibrators.entropy",
    "calibrators.max",
    "calibrators.mse",
    "calibrators.octav",
    "calibrators.percentile",
    "calibrators",
    "checker",
    "prepare",
    "parts",
    "channels",
    "graph",
    "blocks",
    "rules",
    "placement",
    "targets",
    "drafting",
    "planning",
    "readers",
    "arrays",
    "synthetic",
    "arrayfiles",
    "folders",
    "testsets",
    "images",
    "labels",
    "imagefolder",
    "iterables",
    "data",
    "capture",
    "shapes",
    "samplewise",
    "memory",
    "observations",
    "streams",
    "padding",
    "observing",
    "shards",
    "cluster",
    "table",
    "biasscales",
    "asymmetric",
    "stacking",
    "register",
    "calibration",
    "confidence",
    "curves",
    "rivals",
    "storage",
    "saving",
    "editing",
    "equalizing",
    "biases",
    "matmulnbits",
    "write",
    "switchable",
    "comparison",
    "metric",
    "reference",
    "sensitivity",
    "bounds",
    "unpaired",
    "verification",
    "packed",
    "targetrules",
    "kernels",
    "run",
    "correcting",
    "report",
    "report.page",
    "resuming",
    "inspection",
    "interface",
    "report.document",
    "report.junit",
    "report.markdown",
    "gate",
    "yaml_text",
    "settings",
    "proposals",
    "config",
    "report.tensors",
    "report.calibrated",
    "pipeline",
    "survey",
    "surveying",
    "report.surveyed",
    "testing",
    "qat.grid",
    "qat.distribution",
    "qat.estimators",
    "qat.observing",
    "qat.quantizer",
    "qat.modules",
    "qat.hooks",
    "qat.settings",
    "qat.preparing",
    "qat.marking",
    "qat.recording",
    "qat.exporting",
    "qat",
)
TORCH = (
    *("grid", "distribution", "estimators", "observing", "quantizer", "modules", "hooks"),
    *("preparing", "marking", "exporting"),
)
# The only files that may import each of these libraries, or any part of them.
DOORS = {
    "onnxruntime": {"calib.capture", "calib.rivals", "calib.kernels"},
    "onnx": {
        "calib.prepare",
        "calib.checker",
        "calib.testsets",
        "calib.storage",
    },
    "onnx_ir": {
        "calib.checker",
        "calib.prepare",
        "calib.graph",
        "calib.capture",
        "calib.shapes",
        "calib.rivals",
        "calib.storage",
        "calib.saving",
        "calib.editing",
        "calib.biases",
        "calib.correcting",
        "calib.equalizing",
        "calib.matmulnbits",
        "calib.write",
        "calib.unpaired",
        "calib.verification",
        "calib.packed",
        "calib.parts",
        "calib.channels",
        "calib.samplewise",
        "calib.targetrules",
        "calib.kernels",
        "calib.switchable",
        "calib.inspection",
        "calib.qat.marking",
        "calib.qat.exporting",
    },
    "onnxscript": {"calib.prepare", "calib.storage"},
    "click": {
        "cli.calibrate",
        "cli.check",
        "cli.compare",
        "cli._main",
        "cli._completion",
        "cli._options",
    },
    "rich": {"cli._show", "cli._show_check", "cli._show_compare"},
    "yaml": {"calib.yaml_text"},
    "PIL": {"calib.images"},
    "numba": {"calib.compiled"},
    "llvmlite": {"calib.compiled"},  # what numba compiles with; it comes along
    "distributed": {"calib.cluster"},
    "plotly": {"calib.report.page"},
    "torch": {f"calib.qat.{name}" for name in TORCH},
}
# What a file of ours may import besides: anything else is a new dependency.
LIGHT = {"calib", "numpy", *sys.stdlib_module_names}
# None of these is loaded by importing the library, nor by asking the command for help.
HEAVY = (
    "onnxruntime",
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "rich",
    "yaml",
    "plotly",
    "numba",
    "distributed",
)

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 40

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_name(path: Path) -> str:
    """``calib/calibrators/max.py`` → ``calib.calibrators.max``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("calib", "cli")
    for path in (ROOT / package).rglob("*.py")
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}
CALIB = tuple(name for name in FILES if name.startswith("calib."))


def imported(name: str) -> set[str]:
    """Every module that ``name`` imports, wherever in the file: ``from calib import table`` counts
    as ``calib.table``."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve(name, node)
            members = {f"{base}.{alias.name}" for alias in node.names}
            found.update(member if member in FILES else base for member in members)
    return found


def resolve(name: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a ``from … import`` names."""
    if node.level == 0:
        return node.module or ""
    is_package = FILES[name].name == "__init__.py"
    parts = name.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def definitions(name: str) -> Iterator[tuple[str, Definition]]:
    """Functions and classes at the top level of a module, and what stands in public classes."""
    for node in TREES[name].body:
        if isinstance(node, Definition):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for inner in node.body:
                    if isinstance(inner, Definition):
                        yield f"{node.name}.{inner.name}", inner


# Documented where the protocol is; what implements it need not repeat that.
PROTOCOL_METHODS = {
    inner.name
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    for inner in node.body
    if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner)
}


def docstring_lines(node: ast.AST) -> int:
    """How many lines the docstring of ``node`` takes."""
    body = getattr(node, "body", [])
    first = body[0] if body else None
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return 0
    assert isinstance(first.value.value, str), "a constant that does nothing"
    return (first.end_lineno or first.lineno) - first.lineno + 1


def run_python(code: str) -> str:
    """stdout of ``code`` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the flow ---------------------------------------------------------------------------------


def test_every_file_of_calib_has_its_place_in_the_flow() -> None:
    assert sorted(f"calib.{name}" for name in FLOW) == sorted(CALIB)


@pytest.mark.parametrize("name", FLOW)
def test_a_file_imports_only_files_above_it(name: str) -> None:
    above = {f"calib.{earlier}" for earlier in FLOW[: FLOW.index(name)]}
    ours = {m for m in imported(f"calib.{name}") if m.partition(".")[0] in ("calib", "cli")}
    assert ours <= above


@pytest.mark.parametrize("name", FILES)
def test_a_heavy_library_is_imported_only_through_its_doors(name: str) -> None:
    for module in imported(name):
        library = module.partition(".")[0]
        if library in DOORS:
            assert name in DOORS[library], f"{name} imports {module}"
        elif library != "cli":
            assert library in LIGHT, f"{name} imports {module}"


@pytest.mark.parametrize("library", [name for name, doors in DOORS.items() if doors])
def test_every_library_with_a_door_comes_through_it(library: str) -> None:
    through = {name for name in FILES for m in imported(name) if m.partition(".")[0] == library}
    assert through == DOORS[library]


def test_the_command_line_names_its_own_modules_relatively() -> None:
    # The folder is called octav_calibrate_cli once it is installed.
    for name in FILES:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] not in ("cli", "octav_calibrate_cli")
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                assert not names & {"cli", "octav_calibrate_cli"}


# --- what a file looks like -------------------------------------------------------------------


@pytest.mark.parametrize("name", CALIB)
def test_nothing_below_the_command_line_prints(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "input", "breakpoint"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            stream = ast.unparse(node)
            assert stream not in ("sys.stdout", "sys.stderr"), f"line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_350_lines(name: str) -> None:
    assert len(FILES[name].read_text("utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_40_lines(name: str) -> None:
    too_long = {
        f"{node.name}: {length} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node))
        > MAX_FUNCTION_LINES
    }
    assert not too_long


@pytest.mark.parametrize("name", FILES)
def test_modules_and_public_names_have_docstrings(name: str) -> None:
    undocumented = [
        where
        for where, node in definitions(name)
        if not any(part.startswith("_") for part in where.split("."))
        and not ("." in where and node.name in PROTOCOL_METHODS)
        and ast.get_docstring(node) is None
    ]
    assert undocumented == []
    assert ast.get_docstring(TREES[name])


# --- what an import costs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import calib",
        "import calib; calib.__all__; dir(calib); calib.__version__",
        "from calib import CalibError",
        "from octav_calibrate_cli.calibrate import main; assert main(['--help']) == 0",
        "from octav_calibrate_cli.calibrate import main; assert main(['--version']) == 0",
        "from octav_calibrate_cli.calibrate import main; assert main(['--bits', 'x', 'm']) == 2",
        "from octav_calibrate_cli.check import main; assert main(['--help']) == 0",
        "from octav_calibrate_cli.check import main; assert main(['--version']) == 0",
        "from octav_calibrate_cli.check import main; assert main(['--min-sqnr', 'x', 'm']) == 2",
    ],
    ids=[
        *("import", "names", "errors", "help", "version", "usage error"),
        *("check's help", "check's version", "check's usage error"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    report = f"import sys; print('loaded', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run_python(f"{code}\n{report}").splitlines()[-1] == "loaded"


def test_numpy_is_not_imported_with_the_package_either() -> None:
    assert run_python("import calib, sys; print('numpy' in sys.modules)") == "False\n"


def test_numba_is_not_loaded_before_it_is_needed() -> None:
    what = "import calib.calibration, calib.observing, calib.counter, sys"
    assert run_python(f"{what}; print('numba' in sys.modules)") == "False\n"


# --- the public names -------------------------------------------------------------------------


def test_every_public_name_stays_what_it_is_when_all_submodules_are_imported() -> None:
    modules = sorted(CALIB)
    code = f"""
import importlib, types
import calib
before = {{name: getattr(calib, name) for name in calib.__all__}}
for module in {modules!r}:
    importlib.import_module(module)
for name, thing in before.items():
    assert getattr(calib, name) is thing, name
    assert not isinstance(thing, types.ModuleType), name
print(len(before))
"""
    assert int(run_python(code)) > 20
    # The other way round: submodules first.
    code = f"""
import importlib, types
for module in {modules!r}:
    importlib.import_module(module)
import calib
for name in calib.__all__:
    assert not isinstance(getattr(calib, name), types.ModuleType), name
"""
    run_python(code)


def test_no_public_name_is_that_of_a_submodule() -> None:
    import calib

    assert not {f"calib.{name}" for name in calib.__all__} & set(CALIB)


def test_dir_lists_the_public_names_and_star_imports_them() -> None:
    import calib

    assert set(calib.__all__) <= set(dir(calib))
    assert len(set(calib.__all__)) == len(calib.__all__)
    namespace: dict[str, object] = {}
    exec("from calib import *", namespace)  # noqa: S102 - there is no other way to run it
    assert set(calib.__all__) <= set(namespace)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import calib

    with pytest.raises(AttributeError, match="module 'calib' has no attribute 'calibrator'"):
        _ = calib.calibrator
    assert not hasattr(calib, "np")


def test_type_checkers_and_the_interpreter_find_the_same_names_in_the_same_places() -> None:
    import calib

    block = next(node for node in TREES["calib"].body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    declared = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported"
            declared[alias.name] = (node.module or "").removeprefix("calib.")
    assert declared == calib._HOME
    for name, home in declared.items():
        assert getattr(calib, name).__module__ == f"calib.{home}", name


def test_every_error_is_a_calib_error_and_drawn_in_the_tree() -> None:
    from calib import errors

    tree = errors.__doc__ or ""
    classes = [n.name for n in TREES["calib.errors"].body if isinstance(n, ast.ClassDef)]
    for name in classes:
        assert issubclass(getattr(errors, name), errors.CalibError)
        assert name in tree
