"""The samples that measure speed: real topologies, the paper's table 6, the benchmarks. What they
compute is tested, how long it takes is not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from calib import Histogram, QuantType, Rules, Samples, load_model, make_plan, observe
from calib.arrays import Batch
from calib.calibrators import make
from calib.capture import Runtime, Session
from calib.observing import Observing

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
SHIPPED = ("resnet50", "shufflenet", "squeezenet", "inception_v1")
ONE_THREAD = Runtime(threads=1)


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module(name)


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


# --- topologies -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_activations_of_a_real_topology_neither_vanish_nor_explode(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{name}.onnx"
    onnx.save(module("topologies", monkeypatch).topology(name), path)
    model = load_model(path)
    (spec,) = model.inputs
    assert spec.shape == (1, 3, 224, 224)
    image = np.random.default_rng(0).standard_normal(spec.shape, np.float32)

    names = make_plan(model, Rules()).activations
    assert len(names) >= 18
    how = Observing(runtime=ONE_THREAD)
    counters = observe(model, [Batch({spec.name: image})], names, how).counters
    powers = [float(Histogram(counter).rms()[0]) for counter in counters.values()]
    assert 0.1 < min(powers) <= max(powers) < 20

    (output,) = Session(path, ONE_THREAD).run({spec.name: image}).values()
    assert output.size == 1000
    assert np.isfinite(output).all()
    assert np.unique(output).size > 500


def test_a_topology_is_the_graph_that_onnx_ships_and_its_weights_come_from_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topology = module("topologies", monkeypatch).topology
    model = topology("resnet50")
    operators = [node.op_type for node in model.graph.node]
    assert (operators.count("Conv"), operators.count("BatchNormalization")) == (53, 53)
    assert (operators.count("Sum"), operators.count("Gemm")) == (16, 1)
    assert "ConstantOfShape" not in operators
    assert len(model.graph.input) == 1
    assert 25e6 < sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < 26e6

    again, other = topology("shufflenet"), topology("shufflenet", seed=1)
    assert topology("shufflenet").SerializeToString() == again.SerializeToString()
    assert other.SerializeToString() != again.SerializeToString()


def test_the_encoder_decoder_holds_32_and_64_channels_at_full_resolution(tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    done = run_script("topologies.py", "encoder_decoder", path, "--size", 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {path}: image [1, 3, 64, 64], 25 nodes, ")
    onnx.checker.check_model(str(path), full_check=True)

    model = load_model(path)
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    names = make_plan(model, Rules()).activations
    seen = Session(model.ir, ONE_THREAD, values=names).run({"image": image})
    full = {array.shape[1] for array in seen.values() if array.shape[2:] == (64, 64)}
    assert full == {3, 32, 64}
    assert {array.shape[2] for array in seen.values()} == {64, 32, 16, 8}
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators == {"Conv", "Relu", "ConvTranspose", "Resize", "Concat"}
    (output,) = Session(path, ONE_THREAD).run({"image": image}).values()
    assert output.shape == (1, 2, 64, 64)
    assert 0.1 < output.std() < 10


def test_a_size_that_cannot_be_halved_three_times_is_one_line(tmp_path: Path) -> None:
    done = run_script("topologies.py", "encoder_decoder", tmp_path / "u.onnx", "--size", 100)
    assert done.returncode == 1
    assert done.stderr == "topologies.py: the size must be a multiple of 8, got 100\n"
    assert not list(tmp_path.iterdir())


# --- the paper's table 6 ----------------------------------------------------------------------


def test_bert_base_has_the_74_weights_and_1220_activations_of_the_paper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paper = module("paper_table6", monkeypatch)
    assert len(paper.weights()) == 74
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert sum(tensor.size for tensor in paper.weights()) == layers + 768**2 + 2 * 768
    activations = paper.activations(2, 128)
    assert len(activations) == 1220
    hidden, heads = 2 * 128 * 768, 2 * 12 * 128 * 128
    layer = 5 * hidden + 4 * hidden + 3 * hidden + heads
    assert sum(tensor.size for tensor in activations) == 10 * (12 * layer + 2 * 768 + hidden)
    assert len({tensor.seed for tensor in [*paper.weights(), *activations]}) == 1294


@pytest.mark.parametrize("kind", ["weight", "normed", "gelu", "softmax"])
def test_the_papers_three_ways_agree_with_the_library(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = module("paper_table6", monkeypatch)
    values = paper.Tensor(kind, (64, 48), 7).values()
    signed = kind != "softmax"
    dist = Samples(values.reshape(1, -1))
    ours, octav, sweep = paper.ours(values), paper.octav(values), paper.sweep(values)
    for number, bits in enumerate(paper.WIDTHS):
        qtype = QuantType(bits, signed=signed)
        assert octav[number] == pytest.approx(make("octav:iterations=10")(dist, qtype)[0])
        assert ours[number] == pytest.approx(make("octav")(dist, qtype)[0], rel=5e-3)
        assert sweep[number] == pytest.approx(make("mse")(dist, qtype)[0], rel=0.011)
        error = paper.error(values, sweep[number], qtype)
        assert error == pytest.approx(dist.mse(np.array([sweep[number]]), qtype)[0], rel=1e-3)


def test_the_papers_table_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = module("paper_table6", monkeypatch)
    monkeypatch.setattr(paper, "HIDDEN", 48)
    monkeypatch.setattr(paper, "INNER", 192)
    file = tmp_path / "figures.json"
    options = ["--sequences", "1", "--length", "8", "--every", "60", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["paper_table6.py", *options])
    paper.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("26 tensors, ")
    assert [line.split(",")[0].split("(")[0].strip() for line in lines[2:5]] == [
        "sweep",
        "octav",
        "ours",
    ]
    figures = json.loads(file.read_text("utf-8"))
    assert figures["tensors"] == 26
    assert figures["sweep_over_ours"] == pytest.approx(figures["sweep_s"] / figures["ours_s"])
    assert min(figures.values()) > 0


# --- the benchmarks ---------------------------------------------------------------------------


def test_the_benchmark_of_calibration_writes_the_figures_of_its_table(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    sections = "ratios,memory,kernel,weights,startup,scaleout"
    options = ("--quick", "--only", sections, "--models", "shufflenet,resnet20", "--json", file)
    done = run_script("bench_calibration.py", *options, "--fixtures", tmp_path / "absent")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(file.read_text("utf-8"))
    assert set(figures["machine"]) >= {"cpu", "cores", "numpy", "onnxruntime", "numba"}
    assert set(figures["ratios"]) == {"shufflenet"}
    assert str(tmp_path / "absent") in figures["skipped"]["resnet20"]
    assert set(figures["rivals"]["shufflenet"]) == {"MinMax", "Percentile", "Entropy"}
    assert set(figures["kernel_ns"]) == {"gaussian", "half_zero"}
    assert set(figures["weights"]) == {"per_channel_s", "blocked_s"}
    assert figures["scaleout"]["ratio"] > 0
    assert figures["max_memory"]["peak_mb"] < 1000
    few, many = figures["memory_mb"].values()
    assert figures["memory_ratio"] == pytest.approx(many / few)
    assert figures["memory_more_mb"] == pytest.approx(many - few)
    for measured in (figures, figures["numpy"]):
        assert measured["ratios"]["shufflenet"] > measured["exposed"]["shufflenet"] * 0.5
        assert measured["memory_ratio"] > 0.5
        assert min([*measured["kernel_ns"].values(), *measured["weights"].values()]) > 0
    for value in (figures["ratios"], figures["numpy"]["ratios"]):
        assert f"{value['shufflenet']:.2f}" in done.stdout


def test_a_section_that_does_not_exist_is_an_error_that_lists_them() -> None:
    done = run_script("bench_calibration.py", "--only", "kernel,speed")
    assert done.returncode == 2
    assert "speed not among ratios, memory, kernel, weights" in done.stderr


def test_a_job_of_the_benchmark_compares_the_ways_over_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = module("bench_jobs", monkeypatch)
    path = tmp_path / "squeezenet.onnx"
    onnx.save(module("topologies", monkeypatch).topology("squeezenet"), path)
    model = load_model(path)
    first, second = (jobs.random_feeds(model, 2, 1) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["data_0"], other["data_0"])
    exposed = onnx.load_from_string(jobs.exposing(model))
    names = make_plan(model, Rules()).activations
    assert {o.name for o in exposed.graph.output} == {*names} - {"data_0"}
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    assert set(jobs.interleaved(ways, 2)) == {"a", "b"}
    assert called == ["a", "b"] * 3
    assert jobs.peak_mb() > 20


def test_the_kernels_that_keep_a_history_compute_what_they_should(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    storage = f"--benchmark-storage={tmp_path}"
    options = ("-q", "-p", "no:cacheprovider", "--benchmark-disable", storage, "bench_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=SAMPLES,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout
