"""Fixtures: models as files, and the real models and images of ../shared/fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from models import MODELS, Feed, feed_for

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.capture import version
from calib.graph import Model, load_model
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.rules import Rules, Widths
from calib.table import CalibrationTable

_ROOT = Path(__file__).resolve().parents[1]
_MOST_WORKERS = 4  # each takes up to 2 GB
# The files that last longest, by what they take: a run that began one last would wait for it.
_LONGEST_FIRST = (
    "figures",
    "qat_samples",
    "samples_speed",
    "nothing_lost",
    "recipes",
    "cli_output",
    "memory",
    "packaging",
    "page",
    "cluster",
    "resumed",
    "readme",
    "fuzz_bytes",
    "gate",
    "qat_export_models",
    "samples",
    "qat_export",
    "qat_training",
    "qat_resnet20",
    "external_data",
    "cli_options",
    "ci_samples",
    "corpus",
    "write",
    "qat_distributed",
)

Save = Callable[[onnx.ModelProto], Path]
Load = Callable[[str], Model]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A run of all tests is shared out between the cores, whole files at a time, unless -n or --pdb
    says otherwise; files that were asked for are run at once, here."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # which gets here, too
        return
    option = config.option
    asked = any(Path(name.partition("::")[0]).is_file() for name in option.file_or_dir)
    if asked or option.usepdb or getattr(option, "numprocesses", 0) is not None:
        return
    option.numprocesses = min(_cores(), _MOST_WORKERS)
    option.dist, option.loadscopereorder = "loadfile", False
    if option.numprocesses > 1:  # workers, and what they start, inherit it
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of the run that is shared out
        rank = {f"test_{name}.py": number for number, name in enumerate(_LONGEST_FIRST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The fixtures' folder; a test that needs it is skipped without, but never in CI."""
    folder = Path(os.environ.get("OCTAV_FIXTURES") or _ROOT.parent / "shared" / "fixtures")
    if not folder.is_dir():
        reason = f"no fixtures at {folder} (environment variable OCTAV_FIXTURES)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def needs_onnxruntime(major: int, minor: int) -> None:
    """Skips a test of what older versions compute otherwise, or cannot run."""
    if version() < (major, minor):
        pytest.skip(f"onnxruntime before {major}.{minor} behaves otherwise here")


@pytest.fixture(scope="session", autouse=True)
def one_thread_in_each_worker(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a run shared out between the cores, onnxruntime takes one thread where nobody says how
    many: as many as there are cores, in each worker, would spin in each other's way."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    start = ort.InferenceSession.__init__

    def with_one(self: Any, model: Any, sess_options: Any = None, *more: Any, **named: Any) -> None:
        options = sess_options or ort.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        start(self, model, options, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort.InferenceSession, "__init__", with_one)
        yield


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """`torch.onnx.export` reads the sources of all its operators again for each model, for nearly
    half of its time; here it does so once."""
    if "torch" not in sys.modules:
        yield
        return
    owner: Any = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    read = cache(owner.from_torchlib)

    def of_its_own(*arguments: Any, **settings: Any) -> Any:
        registry = copy(read(*arguments, **settings))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "from_torchlib", staticmethod(of_its_own))
        yield


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a model to a file of the test's own."""
    paths = (tmp_path / name for name in ["model.onnx", *(f"model{n}.onnx" for n in range(99))])

    def write(model: onnx.ModelProto) -> Path:
        path = next(paths)
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A model of ``models.MODELS`` as calib loads it, each once."""
    folder = tmp_path_factory.mktemp("models")
    loaded: dict[str, Model] = {}

    def read(name: str) -> Model:
        if name not in loaded:
            path = folder / f"{name}.onnx"
            onnx.save(MODELS[name](), path)
            loaded[name] = load_model(path)
        return loaded[name]

    return read


def all_bits(bits: int, activations: int | None = None) -> Rules:
    """Weights and activations, edges too, ``bits`` wide, or the activations otherwise."""
    edge = bits if activations is None else None
    return Rules(widths=Widths(bits, activations or bits, edge))


def calibrated(
    model: Model, rules: Rules, feed: Feed | None = None
) -> tuple[CalibrationTable, Feed]:
    """A table for ``model`` from one batch, and that batch; random where none is given."""
    feed = feed or feed_for(ir.to_proto(model.ir), n=16)
    plan = make_plan(model, rules)
    how = Observing(rules.reduction.kept_batches)
    observations = observe(model, [Batch(feed)], plan.activations, how)
    return calibrate(model, observations, plan, rules), feed
