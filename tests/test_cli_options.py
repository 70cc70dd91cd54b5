"""Every option of octav-calibrate does what its help says, seen in the summary it writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
import pytest
from cli_models import (
    by_name,
    copy_digits,
    enter_room,
    normal,
    read_json,
    save_one_layer,
    save_two_layers,
    succeed,
)

from calib import QuantType, Samples
from calib.calibrators import make
from cli.calibrate import command

Summary = dict[str, Any]
Calibrate = Callable[..., Summary]

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
METHODS = ("octav", "percentile", "percentile:99.9", "mse", "max", "entropy", "mse:10")
EDGE = {"image", "stem.conv.weight", "flatten.out", "head.weight"}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the digits, and a model of two layers with 50 samples for it."""
    copy_digits(tmp_path)
    save_two_layers(tmp_path / "two.onnx")
    np.savez(tmp_path / "two.npz", x=normal(50, 4, seed=2))
    return enter_room(tmp_path, monkeypatch)


@pytest.fixture
def two(room: Path, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Calibrates the two layers with the options given; returns the summary."""
    return _calibrate(room, capsys, "two.onnx", "--data", "two.npz")


@pytest.fixture
def digits(room: Path, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Calibrates the digits with the options given; returns the summary."""
    return _calibrate(room, capsys, "digits.onnx", "--data", "digits.npz")


@pytest.fixture
def made_up(room: Path, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Calibrates the two layers without data; returns the summary."""
    return _calibrate(room, capsys, "two.onnx")


def _calibrate(room: Path, capsys: pytest.CaptureFixture[str], *fixed: str) -> Calibrate:
    def calibrate(*options: object) -> Summary:
        outputs = ("--output", room / "out.onnx", "--summary", room / "out.json", "--force")
        succeed(capsys, *fixed, *options, *outputs, "--quiet")
        return read_json(room / "out.json")

    return calibrate


def thresholds(summary: Summary) -> dict[str, Any]:
    return {name: tensor["threshold"] for name, tensor in by_name(summary).items()}


def kinds(summary: Summary) -> dict[str, set[int]]:
    """Widths of weights and activations that are no edge layers'."""
    found: dict[str, set[int]] = {"weight": set(), "activation": set()}
    for name, tensor in by_name(summary).items():
        if name not in EDGE:
            found[tensor["kind"]].add(tensor["bits"])
    return found


def test_every_option_is_tested_here_or_beside() -> None:
    tests = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_cli*.py")]
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert any(f'"{parameter.opts[-1]}"' in text for text in tests), parameter.opts


# --- widths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.usefixtures("room")
def test_bits_sets_weights_and_activations_and_names_the_output(
    capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    arguments = ("--data", "digits.npz", "--samples", 64, "--summary", "s.json")
    succeed(capsys, "digits.onnx", *arguments, "--bits", bits)
    onnx.checker.check_model(f"digits-w{bits}a{bits}.onnx")
    summary = read_json("s.json")
    assert kinds(summary) == {"weight": {bits}, "activation": {bits}}
    assert {by_name(summary)[name]["bits"] for name in EDGE} == {max(8, bits)}


@pytest.mark.usefixtures("room")
def test_without_bits_it_is_8(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, "two.onnx", "--summary", "s.json")
    assert {tensor["bits"] for tensor in read_json("s.json")["tensors"]} == {8}
    assert Path("two-w8a8.onnx").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--weight-bits", 4), (4, 8)),
        (("--activation-bits", 4), (8, 4)),
        (("--weight-bits", 3, "--activation-bits", 16), (3, 16)),
        (("--bits", 4, "--activation-bits", 6), (4, 6)),
        (("--bits", 6, "--weight-bits", 4), (4, 6)),
    ],
)
@pytest.mark.usefixtures("room")
def test_weights_and_activations_have_widths_of_their_own(
    capsys: pytest.CaptureFixture[str], options: tuple[object, ...], expected: tuple[int, int]
) -> None:
    succeed(capsys, "digits.onnx", "--data", "digits.npz", *options, "--summary", "s.json")
    weights, activations = expected
    assert kinds(read_json("s.json")) == {"weight": {weights}, "activation": {activations}}
    assert Path(f"digits-w{weights}a{activations}.onnx").exists()


@pytest.mark.parametrize("edge", [2, 4, 16])
def test_edge_bits_are_those_of_the_first_and_last_layers(digits: Calibrate, edge: int) -> None:
    summary = digits("--bits", 4, "--edge-bits", edge)
    assert {by_name(summary)[name]["bits"] for name in EDGE} == {edge}
    assert kinds(summary) == {"weight": {4}, "activation": {4}}


# --- methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_the_threshold_of_its_calibrator(two: Calibrate, method: str) -> None:
    # Values that bfloat16 holds exactly, so that counting them loses nothing.
    values = (normal(1000, 4, seed=3).view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.savez("two.npz", x=values)
    expected = make(method)(Samples(values.reshape(1, -1)), QuantType(4, signed=True))
    found = thresholds(two("--edge-bits", 4, "--method", method))["x"]
    assert found == pytest.approx(expected[0], rel=1e-9)


def test_octav_is_the_default_method_and_no_two_methods_agree(two: Calibrate) -> None:
    np.savez("two.npz", x=normal(20_000, 4, seed=3))
    found = {m: thresholds(two("--edge-bits", 4, "--method", m))["x"] for m in METHODS}
    assert len(set(found.values())) == len(METHODS)
    assert thresholds(two("--edge-bits", 4))["x"] == found["octav"]
    assert max(found.values()) == found["max"]


def test_percentile_is_the_parameter_of_the_method_and_99_99_by_default(two: Calibrate) -> None:
    named = thresholds(two("--method", "percentile", "--percentile", 95))
    assert named == thresholds(two("--method", "percentile:95"))
    default = thresholds(two("--method", "percentile"))
    assert default == thresholds(two("--method", "percentile:99.99"))
    assert named != default


def test_weight_method_is_for_weights_alone(two: Calibrate) -> None:
    octav = thresholds(two("--bits", 4))
    mixed = thresholds(two("--bits", 4, "--weight-method", "max"))
    assert (mixed["x"], mixed["hidden"]) == (octav["x"], octav["hidden"])
    assert mixed["first.weight"] == np.abs(normal(4, 5)).max(axis=0).tolist()
    assert mixed["first.weight"] != octav["first.weight"]


def test_weight_granularity_per_tensor_gives_one_number(two: Calibrate) -> None:
    options = ("--weight-method", "max", "--weight-granularity")
    whole, channels = (by_name(two(*options, f"per-{what}")) for what in ("tensor", "channel"))
    assert whole["first.weight"]["granularity"] == "per-tensor"
    assert whole["first.weight"]["threshold"] == max(channels["first.weight"]["threshold"])
    assert channels == by_name(two("--weight-method", "max"))


@pytest.mark.parametrize(("batches", "rows"), [(1, 10), (3, 30), (5, 50)])
def test_reduce_mean_averages_the_thresholds_of_the_first_batches(
    two: Calibrate, batches: int, rows: int
) -> None:
    options = ("--reduce", "mean", "--mean-batches", batches, "--batch-size", 10)
    found = thresholds(two(*options, "--method", "max"))["x"]
    each = np.abs(normal(50, 4, seed=2)[:rows]).reshape(batches, -1).max(axis=1)
    assert found == pytest.approx(each.mean())


def test_reduce_is_pool_and_mean_takes_five_batches_by_default(two: Calibrate) -> None:
    options = ("--batch-size", 5, "--method", "max")
    assert thresholds(two(*options)) == thresholds(two(*options, "--reduce", "pool"))
    mean = thresholds(two(*options, "--reduce", "mean"))
    assert mean == thresholds(two(*options, "--reduce", "mean", "--mean-batches", 5))
    assert mean != thresholds(two(*options, "--reduce", "mean", "--mean-batches", 6))


def test_fewer_batches_than_the_mean_asks_for_are_noted(two: Calibrate) -> None:
    summary = two("--reduce", "mean", "--mean-batches", 9, "--batch-size", 10)
    assert any("5 batches" in note for note in by_name(summary)["hidden"]["notes"])


# --- selection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        (("--exclude", "^first$"), {"hidden", "second.weight"}),
        (("--exclude", r"weight$"), {"x", "hidden"}),
        (("--only", "^second$"), {"hidden", "second.weight"}),
        (("--only", "^first$"), {"x", "first.weight"}),
        (("--only", "first|second", "--exclude", "^second$"), {"x", "first.weight"}),
        (("--only", "^hidden$"), {"hidden"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_exclude_and_only_search_node_and_tensor_names(
    two: Calibrate, options: tuple[str, ...], quantized: set[str]
) -> None:
    summary = two(*options)
    assert set(by_name(summary)) == quantized
    assert len(summary["skipped"]) == 4 - len(quantized)
    for skipped in summary["skipped"]:
        assert re.search("--exclude|--only", skipped["reason"])


def test_weights_alone_can_be_quantized(digits: Calibrate) -> None:
    summary = digits("--only", r"conv\.weight$")
    assert {tensor["kind"] for tensor in summary["tensors"]} == {"weight"}
    assert len(summary["tensors"]) == 6


def test_op_types_quantizes_the_inputs_of_these_alone(digits: Calibrate) -> None:
    summary = digits("--op-types", "Gemm")
    assert set(by_name(summary)) == {"flatten.out", "head.weight"}
    assert all("--op-types" in s["reason"] for s in summary["skipped"])
    assert len(by_name(digits("--op-types", "Gemm,Conv"))) == len(by_name(digits()))


@pytest.mark.usefixtures("room")
def test_a_model_whose_only_activation_is_its_input_is_calibrated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_one_layer("one.onnx")
    succeed(capsys, "one.onnx", "--data", "two.npz", "--method", "max", "--summary", "s.json")
    assert thresholds(read_json("s.json"))["x"] == np.abs(normal(50, 4, seed=2)).max()


# --- data -------------------------------------------------------------------------------------


def test_samples_calibrates_on_the_first_and_compares_on_the_rest(
    two: Calibrate, room: Path
) -> None:
    some = two("--samples", 20)
    assert (some["n_samples"], some["compared_on"]) == (20, {"n_samples": 30, "held_out": True})
    np.savez(room / "two.npz", x=normal(50, 4, seed=2)[:20])
    alone = two()
    assert thresholds(some) == thresholds(alone) != {}
    assert alone["compared_on"] == {"n_samples": 20, "held_out": False}


def test_more_samples_than_there_are_is_all_of_them_and_noted(two: Calibrate) -> None:
    summary = two("--samples", 999)
    assert summary["n_samples"] == 50
    assert any("999" in note and "50" in note for note in summary["notes"])


def test_the_batch_size_is_what_a_feed_holds_and_changes_no_threshold(two: Calibrate) -> None:
    small, large = (thresholds(two("--batch-size", size)) for size in (1, 50))
    assert list(small) == list(large)
    for name, threshold in small.items():
        assert threshold == pytest.approx(large[name], rel=1e-4)
    mean = thresholds(two("--batch-size", 7, "--reduce", "mean", "--mean-batches", 1))["x"]
    np.savez("two.npz", x=normal(50, 4, seed=2)[:7])
    assert mean == thresholds(two())["x"]


def test_the_seed_decides_what_is_made_up(made_up: Calibrate) -> None:
    zero, one = thresholds(made_up("--seed", 0)), thresholds(made_up("--seed", 1))
    assert zero == thresholds(made_up())
    assert zero["x"] != one["x"]
    assert zero["first.weight"] == one["first.weight"]


@pytest.mark.usefixtures("room")
def test_an_npy_feeds_a_model_with_one_input(
    two: Calibrate, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("two.npy", normal(50, 4, seed=2))
    succeed(capsys, "two.onnx", "--data", "two.npy", "--summary", "npy.json")
    assert thresholds(read_json("npy.json")) == thresholds(two())


@pytest.mark.parametrize(
    "other",
    [("--method", "mse"), ("--bits", 4), ("--bits", 16), ("--only", "^second$"), ("--samples", 20)],
    ids=["method", "bits", "more bits", "fewer tensors", "same samples"],
)
def test_saved_observations_give_the_same_as_a_second_pass(
    two: Calibrate, monkeypatch: pytest.MonkeyPatch, other: tuple[object, ...]
) -> None:
    direct = two(*other, "--samples", 20)
    two("--save-observations", "seen.npz", "--samples", 20, "--exclude", "^second$")
    monkeypatch.delattr("calib.pipeline.observe_split")
    again = two(*other, "--observations", "seen.npz")
    assert again["tensors"] == direct["tensors"]
    assert again["n_samples"] == direct["n_samples"] == 20
    assert again["compared_on"] == {"n_samples": 30, "held_out": True}


def test_saved_observations_keep_the_batches_that_reduce_mean_needs(
    two: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = ("--reduce", "mean", "--batch-size", 10)
    direct = two(*mean, "--save-observations", "seen.npz")
    monkeypatch.delattr("calib.pipeline.observe_split")
    assert two(*mean, "--observations", "seen.npz")["tensors"] == direct["tensors"]


# --- the runtime ------------------------------------------------------------------------------


def test_provider_and_threads_reach_onnxruntime(
    two: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, tuple[str, ...]]] = set()

    def session(source: Any, options: Any, providers: list[str]) -> Any:
        seen.add((options.intra_op_num_threads, tuple(providers)))
        return original(source, options, providers=providers)

    original = ort.InferenceSession
    monkeypatch.setattr("calib.capture.ort.InferenceSession", session)
    options = two("--threads", 1, "--provider", "CPUExecutionProvider")["options"]
    assert seen == {(1, ("CPUExecutionProvider",))}
    assert (options["threads"], options["provider"]) == (1, "CPUExecutionProvider")
    seen.clear()
    two()
    assert seen == {(0, ("CPUExecutionProvider",))}
