"""The figures that this tool promises on ResNet-20, from the fixtures; see the README's table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calib import (
    Calibration,
    Candidates,
    Histogram,
    Model,
    Observations,
    QuantType,
    Reading,
    Rules,
    Run,
    Samples,
    Widths,
    calibrate,
    calibrate_model,
    compare_methods,
    load_model,
    make_plan,
    observe,
)
from calib.arrays import Batch
from calib.calibrators import make
from calib.capture import Session
from calib.granularity import to_groups

ROOT = Path(__file__).resolve().parents[1]
N_CALIBRATION = 320
Images = NDArray[np.float32]


def fixture_file(name: str) -> Path:
    path = Path(os.environ.get("OCTAV_FIXTURES") or ROOT / "../shared/fixtures") / name
    if not path.is_file():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is absent, and in CI the fixtures must be there")
        pytest.skip(f"{path} is absent: set OCTAV_FIXTURES to the folder of the fixtures")
    return path


def normalised(name: str) -> tuple[Images, NDArray[np.int64]]:
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    with np.load(fixture_file(name)) as arrays:
        images = arrays["images"].astype(np.float32) / np.float32(255)
        scaled = ((images - mean) / deviation).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(scaled), arrays["labels"].astype(np.int64)


def batches(images: Images, size: int = 32) -> Iterator[Batch]:
    return (Batch({"input": images[i : i + size]}) for i in range(0, len(images), size))


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(fixture_file("resnet20_cifar10.onnx"))


@pytest.fixture(scope="module")
def images() -> Images:
    return normalised("cifar10_calib.npz")[0][:N_CALIBRATION]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Path:
    held_out, labels = normalised("cifar10_val.npz")
    path = tmp_path_factory.mktemp("resnet20") / "data.npz"
    unused = np.zeros(len(images), np.int64)
    np.savez(path, input=np.concatenate([images, held_out]), labels=np.append(unused, labels))
    return path


@pytest.fixture(scope="module")
def observations(model: Model, images: Images) -> Observations:
    return observe(model, batches(images), make_plan(model, Rules()).activations)


@pytest.fixture(scope="module")
def raw(model: Model, images: Images) -> dict[str, Images]:
    names = make_plan(model, Rules()).activations
    session = Session(model.ir, values=names)
    parts: dict[str, list[Images]] = {name: [] for name in names}
    for batch in batches(images):
        for name, values in session.run(batch.feed).items():
            parts[name].append(values.ravel())
    return {name: np.concatenate(values) for name, values in parts.items()}


@pytest.fixture(scope="module")
def calibrated(model: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    output = tmp_path_factory.mktemp("calibrated") / "q.onnx"

    @cache
    def run(method: str, bits: int) -> Calibration:
        rules = Rules(widths=Widths(bits, bits), method=method)
        settings = Run(samples=N_CALIBRATION, force=True, reading=Reading(100))
        return calibrate_model(model.path, data, rules, output, settings)

    return run


def top1(calibration: Calibration) -> tuple[float, float]:
    assert calibration.held_out
    assert calibration.comparison.top1 is not None
    return calibration.comparison.top1.float_model, calibration.comparison.top1.quantized_model


def test_at_8_bits_accuracy_stays_within_half_a_point(calibrated) -> None:  # type: ignore[no-untyped-def]
    float_model, quantized = top1(calibrated("octav", 8))
    assert float_model == pytest.approx(87.3, abs=0.1)
    assert abs(quantized - float_model) <= 0.5


def test_at_4_bits_octav_keeps_accuracy_and_leads_percentile_and_max(
    calibrated: Callable[[str, int], Calibration], model: Model, data: Path
) -> None:
    rivals = ("percentile:99.9", "percentile:99.99", "max")
    candidates = Candidates(bits=(4,), methods=("octav", "mse", *rivals), sensitivity=False)
    run = Run(samples=N_CALIBRATION, reading=Reading(100))
    found = {}
    for row in compare_methods(model.path, data, candidates, run=run).rows:
        assert row.comparison is not None
        assert row.comparison.top1 is not None
        found[row.method] = row.comparison.top1
    octav = found["octav"].quantized_model
    assert top1(calibrated("octav", 4)) == (found["octav"].float_model, octav)
    assert octav >= found["octav"].float_model - 2.5
    for rival in rivals:
        assert octav >= found[rival].quantized_model + 1.0, rival
    assert octav >= found["mse"].quantized_model - 0.5


TOLERANCES = {2: 1e-3, 4: 1e-3, 6: 5e-3, 8: 5e-3}


def test_octav_from_counters_equals_octav_from_raw_values(
    raw: dict[str, Images], observations: Observations
) -> None:
    octav = make("octav")
    for name, values in raw.items():
        counted, exact = Histogram(observations.counters[name]), Samples(values[None])
        for bits, tolerance in TOLERANCES.items():
            qtype = QuantType(bits, signed=counted.has_negative)
            ours, best = octav(counted, qtype), octav(exact, qtype)
            assert ours == pytest.approx(best, rel=tolerance), (name, bits)
            errors = exact.mse(np.stack([ours, best]), qtype)
            assert errors[0] == pytest.approx(errors[1], rel=1e-3), (name, bits)


def test_octav_is_within_2_percent_of_the_exhaustive_sweep_for_activations(
    raw: dict[str, Images], observations: Observations
) -> None:
    octav, sweep = make("octav"), make("mse:400")
    for name, values in raw.items():
        counted, exact = Histogram(observations.counters[name]), Samples(values[None])
        for bits in range(3, 9):
            qtype = QuantType(bits, signed=counted.has_negative)
            thresholds = np.stack([octav(counted, qtype), sweep(counted, qtype)])
            found, best = exact.mse(thresholds, qtype)
            assert found <= 1.02 * best, (name, bits)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_octav_is_within_8_percent_of_the_exhaustive_sweep_for_each_layers_weights(
    model: Model, bits: int
) -> None:
    octav, sweep = make("octav"), make("mse:1000")
    qtype = QuantType(bits, signed=True, narrow=True)
    for spec in make_plan(model, Rules()).specs:
        if spec.kind == "weight":
            dist = Samples(to_groups(model.weight(spec.name), spec.granularity))
            found, best = (dist.mse(c(dist, qtype), qtype).sum() for c in (octav, sweep))
            assert found <= 1.08 * best, spec.name


def test_thresholds_do_not_depend_on_the_batch_size_or_the_order_of_samples(
    model: Model, images: Images, observations: Observations
) -> None:
    rules = Rules(widths=Widths(4, 4))
    plan = make_plan(model, rules)
    expected = calibrate(model, observations, plan, rules).records
    shuffled = np.random.default_rng(0).permutation(images)
    for feeds in (batches(images, 1), batches(images, N_CALIBRATION), batches(shuffled)):
        again = observe(model, feeds, plan.activations)
        for one, other in zip(expected, calibrate(model, again, plan, rules).records, strict=True):
            assert other.threshold == pytest.approx(one.threshold, rel=1e-4), one.name


def test_the_same_activations_in_another_order_give_the_same_counters(
    model: Model, images: Images
) -> None:
    names = make_plan(model, Rules()).activations
    feeds = list(batches(images[:128]))
    forwards, backwards = (
        observe(model, order, names).counters for order in (feeds, reversed(feeds))
    )
    for name in names:
        assert np.array_equal(forwards[name].counts, backwards[name].counts), name
