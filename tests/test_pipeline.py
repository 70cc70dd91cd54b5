"""The whole flow in one call: what it writes, says and compares on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits
from models import MODELS, Array, feed_for, parsed, run, values

import calib
from calib.arrays import Batch
from calib.capture import Runtime
from calib.comparison import evaluate
from calib.data import Reading, open_data
from calib.errors import DataError, OptionError
from calib.graph import load_model
from calib.pipeline import Calibration, calibrate_model
from calib.qtypes import WIDTHS
from calib.rules import Reduction, Rules, Selection, Widths
from calib.run import Run

TENSOR_FIELDS = {
    "name", "kind", "bits", "signed", "granularity", "threshold", "scale", "zero_point",
    "max_abs", "sqnr_db", "notes",
}  # fmt: skip
SUMMARY_FIELDS = {
    "tensors", "skipped", "output_sqnr_db", "top1", "bytes", "seconds", "options", "versions",
    "digests", "n_samples",
}  # fmt: skip


@pytest.fixture
def model(save: Save) -> Path:
    return save(MODELS["conv_bn_relu"]())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 samples with labels that the float model mostly agrees with."""
    images = values(40, 3, 6, 6, scale=1)
    labels = run(MODELS["conv_bn_relu"](), {"image": images})["logits"].argmax(1)
    labels[::4] = 4
    np.savez(tmp_path / "data.npz", image=images, labels=labels)
    return tmp_path / "data.npz"


def thresholds(result: Calibration) -> dict[str, Array]:
    return {record.name: record.threshold for record in result.table.records}


def metadata(path: Path) -> dict[str, Any]:
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    document: dict[str, Any] = json.loads(props["octav_calibrate"])
    return document


def test_the_example_of_the_package_works(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    data.rename("calib.npz")
    lines = [line.strip() for line in (calib.__doc__ or "").splitlines() if line.startswith("    ")]
    printed: list[tuple[object, ...]] = []
    assert any("calibrate_model" in line for line in lines)
    exec("\n".join(lines), {"print": lambda *items: printed.append(items)})  # noqa: S102
    ((output, sqnr_db),) = printed
    assert output == Path("model-w4a4.onnx")
    assert Path("model-w4a4.onnx").is_file()
    assert isinstance(sqnr_db, float)


def test_the_default_output_lies_beside_the_model_and_is_named_after_the_widths(
    model: Path,
) -> None:
    for rules, name in (
        (None, "model-w8a8.onnx"),
        (Rules(widths=Widths(4, 16)), "model-w4a16.onnx"),
    ):
        result = calibrate_model(str(model), rules=rules)
        assert result.output == model.with_name(name)
        onnx.checker.check_model(str(result.output), full_check=True)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("method", ["octav", "percentile:99.9", "mse", "max", "entropy"])
def test_every_method_works_at_every_width(method: str, bits: int, model: Path) -> None:
    rules = dataclasses.replace(all_bits(bits), method=method)
    result = calibrate_model(model, [values(16, 3, 6, 6)], rules)
    assert result.comparison.output_sqnr_db > bits


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_goes_through(name: str, save: Save) -> None:
    path = save(MODELS[name]())
    content = path.read_bytes()
    result = calibrate_model(path, rules=Rules(widths=Widths(4, 8)))
    assert result.output.is_file()
    assert path.read_bytes() == content
    assert list(result.comparison.sqnr_db) == [o.name for o in load_model(path).outputs]


def test_the_summary_tells_everything_and_the_file_holds_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    rules = Rules(selection=Selection(exclude="^flat$"), reduction=Reduction("mean", 2))
    settings = Run(samples=24, reading=Reading(8, seed=5), summary=tmp_path / "out.json",
                   runtime=Runtime(threads=1))  # fmt: skip
    result = calibrate_model(model, data, rules, run=settings)
    summary = json.loads((tmp_path / "out.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert summary == json.loads(json.dumps(result.summary()))
    assert set(summary) >= SUMMARY_FIELDS
    assert [t["name"] for t in summary["tensors"]] == ["image", "kernel", "head"]
    assert all(set(tensor) >= TENSOR_FIELDS for tensor in summary["tensors"])
    assert [s["name"] for s in summary["skipped"]] == ["flat of /Gemm/logits"]
    assert summary["n_samples"] == 24
    assert summary["output"] == str(result.output)
    sizes = {"float": model.stat().st_size, "quantized": result.output.stat().st_size}
    assert summary["bytes"] == sizes
    assert list(summary["seconds"]) == [
        "load", "observe", "calibrate", "write", "save", "verify", "evaluate",
    ]  # fmt: skip
    assert min(summary["seconds"].values()) >= 0
    assert summary["digests"] == {"model_sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    assert summary["versions"]["onnx"] == onnx.__version__
    options = summary["options"]
    assert options["widths"] == {"weights": 8, "activations": 8, "edge": None}
    assert options["reduction"] == {"name": "mean", "batches": 2}
    assert options["selection"]["exclude"] == "^flat$"
    assert (options["data"], options["samples"], options["batch_size"]) == ("data.npz", 24, 8)
    assert (options["seed"], options["threads"], options["provider"]) == (5, 1, None)
    assert summary["notes"] == list(result.notes)
    assert "1 BatchNormalization nodes folded into the layer before them" in summary["notes"]
    assert summary["warnings"] == []


def test_the_model_carries_the_manifest_of_the_summary(model: Path, data: Path) -> None:
    result = calibrate_model(model, data)
    manifest, summary = metadata(result.output), json.loads(json.dumps(result.summary()))
    assert set(manifest) >= {"options", "versions", "digests", "n_samples"}
    assert manifest == {key: summary[key] for key in manifest}


def test_the_comparison_is_on_samples_that_calibration_did_not_see(model: Path, data: Path) -> None:
    result = calibrate_model(model, data, run=Run(samples=24, reading=Reading(7)))
    assert (result.held_out, result.table.n_samples) == (True, 24)
    source = open_data(load_model(model), data)
    expected = evaluate(load_model(model), result.output, source.batches(24))
    assert result.comparison.n_samples == expected.n_samples == 16
    assert result.comparison.output_sqnr_db == pytest.approx(expected.output_sqnr_db, abs=0.5)
    assert result.comparison.top1 is not None
    assert expected.top1 is not None
    assert result.comparison.top1.float_model == expected.top1.float_model < 90
    assert result.summary()["compared_on"] == {"n_samples": 16, "held_out": True}
    first = calibrate_model(model, [np.load(data)["image"][:24]], run=Run(force=True))
    for name, threshold in thresholds(result).items():
        np.testing.assert_allclose(threshold, thresholds(first)[name], rtol=1e-4)


@pytest.mark.parametrize("samples", [None, 40, 100])
def test_without_samples_left_the_comparison_is_on_those_of_calibration(
    samples: int | None, model: Path, data: Path
) -> None:
    result = calibrate_model(model, data, run=Run(samples=samples))
    assert (result.held_out, result.comparison.n_samples, result.table.n_samples) == (False, 40, 40)
    note = "100 samples were asked for, 40 are used"
    assert (note in result.notes) == (samples == 100)


def test_a_fixed_batch_takes_whole_batches_of_the_samples(save: Save, tmp_path: Path) -> None:
    path, data = save(MODELS["fixed_batch_4"]()), tmp_path / "x.npy"
    np.save(data, values(14, 6))
    result = calibrate_model(path, data, run=Run(samples=7))
    assert (result.table.n_samples, result.comparison.n_samples, result.held_out) == (4, 8, True)
    assert result.notes[-2:] == (
        "the last 2 samples fill no batch of 4: not used",
        "7 samples were asked for, 4 are used",
    )
    with pytest.raises(
        DataError, match="samples must be at least 4, the model's fixed batch, got 3"
    ):
        calibrate_model(path, data, run=Run(samples=3, force=True))


def test_batch_sizes_agree_closely_when_pooled(model: Path, data: Path) -> None:
    results = [
        calibrate_model(model, data, all_bits(4), run=Run(reading=Reading(size), force=True))
        for size in (1, 7, 40)
    ]
    for other in results[1:]:
        for name, threshold in thresholds(results[0]).items():
            np.testing.assert_allclose(thresholds(other)[name], threshold, rtol=1e-4)


def test_observations_serve_another_width_and_method_without_a_second_pass(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen.npz"
    first = Rules(selection=Selection(only="Gemm"))
    calibrate_model(model, data, first, run=Run(samples=24, save_observations=seen))
    wanted = calibrate_model(model, data, all_bits(4), run=Run(samples=24))
    monkeypatch.setattr("calib.pipeline.observe_split", pytest.fail)
    again = calibrate_model(model, data, all_bits(4), run=Run(observations=seen, force=True))
    assert again.table.n_samples == 24
    for name, threshold in thresholds(wanted).items():
        np.testing.assert_array_equal(thresholds(again)[name], threshold)
    assert (again.held_out, again.comparison.n_samples) == (True, 16)
    assert metadata(again.output)["options"]["observations"] == "seen.npz"


@pytest.mark.parametrize("samples", [None, 8, 32, 40])
def test_what_observations_have_seen_is_never_called_held_out(
    samples: int | None, model: Path, data: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen.npz"
    calibrate_model(model, data, run=Run(samples=32, save_observations=seen))
    try:
        result = calibrate_model(
            model, data, run=Run(observations=seen, samples=samples, force=True)
        )
    except OptionError:
        assert samples not in (None, 32)
        return
    assert result.table.n_samples == 32
    assert not result.held_out or result.comparison.n_samples <= 8


# --- iterables ----------------------------------------------------------------------------------


def batches() -> Iterator[Array]:
    for seed in range(3):
        yield values(8, 3, 6, 6, seed=seed)


@pytest.mark.parametrize(("samples", "seen"), [(None, 24), (16, 16)])
def test_an_iterable_that_can_be_gone_through_once_is_enough(
    samples: int | None, seen: int, model: Path
) -> None:
    once = calibrate_model(model, batches(), run=Run(samples=samples))
    again = calibrate_model(model, list(batches()), run=Run(samples=samples, force=True))
    assert once.table.n_samples == again.table.n_samples == seen
    for name, threshold in thresholds(again).items():
        np.testing.assert_array_equal(thresholds(once)[name], threshold)
    unseen = 24 - seen
    assert (once.comparison.n_samples, again.comparison.n_samples) == (8, unseen or seen)
    assert not once.held_out
    assert again.held_out == bool(unseen)


def test_an_array_of_batches_is_an_iterable_too(model: Path) -> None:
    stacked = calibrate_model(model, np.stack(list(batches())))
    listed = calibrate_model(model, list(batches()), run=Run(force=True))
    for name, threshold in thresholds(listed).items():
        np.testing.assert_array_equal(thresholds(stacked)[name], threshold)
    assert metadata(listed.output)["options"]["data"] == "list"


# --- warnings and progress ----------------------------------------------------------------------


def test_made_up_inputs_are_warned_of(model: Path, tmp_path: Path) -> None:
    first = calibrate_model(model, run=Run(save_observations=tmp_path / "seen.npz"))
    second = calibrate_model(model, run=Run(observations=tmp_path / "seen.npz", force=True))
    third = calibrate_model(model, list(batches()), run=Run(force=True))
    assert first.warnings[0].startswith("NO DATA: activations were calibrated on made-up inputs.")
    assert second.warnings[0] == "NO DATA: the models were compared on made-up inputs; give --data"
    assert first.summary()["warnings"] == list(first.warnings)
    assert third.warnings == ()


def test_a_low_sqnr_is_warned_of_with_the_three_worst_tensors(save: Save) -> None:
    path = save(MODELS["attention"]())
    feed = feed_for(MODELS["attention"](), n=30)
    result = calibrate_model(path, [feed["tokens"]], all_bits(2))
    assert result.comparison.output_sqnr_db < 10
    (warning,) = result.warnings
    known = sorted((r.sqnr_db, r.name) for r in result.table.records if r.sqnr_db is not None)
    worst = ", ".join(f"{name!r} ({db:.1f} dB)" for db, name in known[:3])
    assert warning == (
        f"output SQNR is {result.comparison.output_sqnr_db:.1f} dB, accuracy has likely "
        f"collapsed. Worst tensors: {worst}. Try --bias-correction, more bits, --exclude for "
        f"these, or another --method; octav-compare finds the layers that hurt"
    )
    assert calibrate_model(path, [feed["tokens"]], all_bits(8)).warnings == ()


def test_progress_is_told_by_stage_in_samples(model: Path, data: Path) -> None:
    told: dict[str, tuple[int | None, list[int]]] = {}

    def progress(stage: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        told[stage] = (total, [])
        return nullcontext(told[stage][1].append)

    calibrate_model(model, data, run=Run(samples=24, reading=Reading(10), progress=progress))
    assert told == {"observe": (24, [10, 10, 4]), "evaluate": (16, [10, 6])}


def test_a_model_with_external_data_goes_through(tmp_path: Path) -> None:
    path, folder = tmp_path / "model.onnx", tmp_path / "elsewhere"
    folder.mkdir()
    onnx.save(MODELS["tied"](), path, save_as_external_data=True, size_threshold=0, location="w")
    result = calibrate_model(path, output=folder / "out.onnx")
    assert result.n_bytes[0] == path.stat().st_size + (tmp_path / "w").stat().st_size
    (tmp_path / "w").unlink()
    assert list(run(result.output, feed_for(MODELS["tied"]()))) == ["y", "scaled"]


def test_resnet20_is_folded_calibrated_and_verified(fixtures_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((8, 3, 32, 32)).astype(np.float32)
    output = tmp_path / "resnet.onnx"
    path = fixtures_dir / "resnet20_cifar10.onnx"
    result = calibrate_model(path, [images[:4], images[4:]], Rules(widths=Widths(4, 4)), output)
    assert result.n_bytes[1] < result.n_bytes[0] / 4
    whole = calibrate_model(path, [images], Rules(widths=Widths(4, 4)), output, run=Run(force=True))
    for name, threshold in thresholds(result).items():
        np.testing.assert_allclose(thresholds(whole)[name], threshold, rtol=1e-4)
    (batch,) = [Batch({"input": images})]
    assert evaluate(load_model(path), output, [batch]).output_sqnr_db > 0


def test_weights_alone_need_no_activation(save: Save) -> None:
    text = "(float[N,6] x) => (float[N,4] y) <float[6,4] weight> { y = MatMul(x, weight) }"
    rules = Rules(Widths(4, 4, 4), selection=Selection(only="weight"))
    result = calibrate_model(save(parsed(text)), [values(9, 6)], rules)
    assert [r.name for r in result.table.records] == ["weight"]
    assert result.table.n_samples == 9
