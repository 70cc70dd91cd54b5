"""Checks of real models: what passes, what fails, what is refused, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from check_models import DATA, FLOAT, changed, digits_by_onnxruntime, digits_qdq, layers
from cli_models import N_CALIBRATION, contents, load_digits
from conftest import Save
from models import MODELS, feed_for, parsed
from onnx import TensorProto, helper

from calib.bounds import Bounds
from calib.data import Reading
from calib.errors import CalibError, DataError, ModelError, OptionError, OutputError
from calib.gate import Check, CheckFiles, check_models
from calib.run import Run

HELD_OUT = Run(samples=N_CALIBRATION)
ALL_FILES = CheckFiles(*(Path(name) for name in ("r.html", "r.xml", "r.md", "r.json")))


def bounded(**limits: float) -> Run:
    return Run(samples=N_CALIBRATION, bounds=Bounds(**limits))


def refused(*arguments: Any) -> CalibError:
    with pytest.raises(CalibError) as caught:
        check_models(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


# --- what passes, what fails ------------------------------------------------------------------


def test_a_sound_model_passes_on_samples_that_calibration_did_not_see() -> None:
    run = bounded(min_sqnr=30, min_agreement=0.98, max_top1_drop=1, max_size_ratio=0.45)
    check = check_models(FLOAT, digits_qdq(), DATA, run)
    assert check.passed
    assert check.failures == ()
    assert check.comparison is not None
    assert check.comparison.n_samples == 540
    assert check.n_skipped == N_CALIBRATION
    assert check.inspection.first is None
    assert check.notes == ("the first 256 samples, those that calibration saw, are left out",)
    sizes = check.quantized.n_bytes / check.float_model.n_bytes
    assert check.verdicts[-1].found == sizes
    assert check.float_model.n_bytes == FLOAT.stat().st_size


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_models_of_another_tool_are_checked_likewise(form: str) -> None:
    check = check_models(FLOAT, digits_by_onnxruntime(form), DATA, bounded(min_sqnr=25))
    assert check.passed, check.failures
    assert len(check.inspection.tensors) >= 18


def test_all_samples_are_compared_on_where_none_was_calibrated_on() -> None:
    check = check_models(FLOAT, digits_qdq(), DATA)
    assert check.comparison is not None
    assert check.comparison.n_samples == len(load_digits()[0])
    assert check.document()["samples"] == {
        "calibration": None,
        "evaluation": 796,
        "held_out": False,
    }


@pytest.mark.parametrize("samples", [796, 9999])
def test_where_calibration_saw_all_samples_none_are_left_to_compare_on(samples: int) -> None:
    error = refused(FLOAT, digits_qdq(), DATA, Run(samples=samples))
    assert isinstance(error, OptionError)
    assert str(error).startswith(f"samples: calibration saw the first {samples}, and there are 796")


def test_without_bounds_it_passes_and_says_that_nothing_was_asked_for() -> None:
    check = check_models(FLOAT, digits_qdq(4), DATA, HELD_OUT)
    assert check.passed
    assert check.verdicts == ()
    assert "no bound was asked for, so that none can fail: 'min-sqnr' would be one" in check.notes


def test_each_missed_bound_is_a_failure() -> None:
    run = bounded(min_sqnr=50, max_size_ratio=0.01, min_agreement=0.5)
    check = check_models(FLOAT, digits_qdq(4), DATA, run)
    assert not check.passed
    assert [line.split()[0] for line in check.failures] == ["min-sqnr", "max-size-ratio"]
    assert [verdict.holds for verdict in check.verdicts] == [False, True, False]


def test_a_model_equals_itself() -> None:
    strict = bounded(min_sqnr=math.inf, min_cosine=1, max_error=0, min_agreement=1)
    check = check_models(FLOAT, FLOAT, DATA, strict)
    assert check.passed, check.failures
    assert "both models are the same file, byte for byte" in check.notes
    assert check.document()["check"]["outputs"] == [
        {"name": "logits", "sqnr_db": None, "cosine": 1.0, "max_error": 0.0}
    ]


def test_without_data_inputs_are_made_up_and_a_warning_says_so() -> None:
    check = check_models(FLOAT, digits_qdq())
    (warning,) = check.warnings
    assert warning.startswith("NO DATA: the models were compared on made-up inputs")


def test_the_first_broken_layer_is_named(tmp_path: Path) -> None:
    _, scale = layers(digits_qdq())["block2.second.bn.out"]
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s * 7)
    check = check_models(FLOAT, broken, DATA, bounded(min_sqnr=20))
    assert not check.passed
    part = check.document()["check"]
    assert part["first"]["name"] == "block2.second.bn.out"
    assert part["first"]["sqnr_db"] < 20 < part["first"]["before_db"]


def test_nan_fails_every_bound_but_the_size_and_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, scale = layers(digits_qdq())["logits"]
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s * np.nan)
    run = bounded(min_sqnr=20, max_top1_drop=1, max_size_ratio=0.9)
    check = check_models(FLOAT, broken, DATA, run, ALL_FILES)
    assert not check.passed
    assert check.failures == (
        "output 'logits' of the quantized model holds NaN",
        "min-sqnr FAILS: output SQNR is not a number, at least 20 dB asked for",
        "max-top1-drop FAILS: top-1 drop is not a number, at most 1 points asked for",
    )
    assert check.verdicts[-1].holds
    assert check.inspection.first is not None
    assert check.inspection.first.tensor.name == "logits"
    assert all(Path(name).exists() for name in ("r.html", "r.xml", "r.md", "r.json"))
    without = check_models(FLOAT, broken, DATA, HELD_OUT)
    assert without.failures == ("output 'logits' of the quantized model holds NaN",)


def test_nan_that_a_relu_hides_is_named(tmp_path: Path) -> None:
    """onnxruntime's Relu makes 0 of it."""
    _, scale = layers(digits_qdq())["block1.first.bn.out"]
    broken = changed(digits_qdq(), tmp_path / "broken.onnx", scale, lambda s: s * np.nan)
    check = check_models(FLOAT, broken, DATA, bounded(min_sqnr=20))
    assert "it holds NaN or infinity" in check.inspection.text
    assert not check.passed


def test_outputs_of_another_shape_fail(save: Save) -> None:
    text = "(float[N,6] x) => (float[M,K] y) {{ y = {0}(x) }}"
    one, other = (save(parsed(text.format(op))) for op in ("Relu", "Transpose"))
    check = check_models(one, other)
    assert not check.passed
    assert "has shape [6, 32], the float model's [32, 6]" in check.failures[0]


def test_a_metric_is_asked_for_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges_gate.py").write_text(
        "import numpy as np\n"
        "def right(answers):\n"
        "    hits = [(o['logits'].argmax(1) == labels).mean() for o, _, labels in answers]\n"
        "    return float(np.mean(hits))\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    run = Run(metric="judges_gate:right", bounds=Bounds(max_metric_drop=0.02))
    part = check_models(FLOAT, digits_qdq(), DATA, run).document()["check"]
    assert part["passed"]
    assert part["metric"]["name"] == "judges_gate:right"
    assert 0.9 < part["metric"]["quantized"] <= 1


def test_external_data_counts_in_the_size(tmp_path: Path) -> None:
    path = tmp_path / "outside.onnx"
    model = onnx.load(FLOAT)
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights")
    check = check_models(path, digits_qdq(), DATA, HELD_OUT)
    assert check.float_model.n_bytes == path.stat().st_size + (tmp_path / "weights").stat().st_size


def test_a_quantized_model_with_a_fixed_batch_is_fed_that_many(tmp_path: Path) -> None:
    model = onnx.load(digits_qdq())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(model, tmp_path / "fixed.onnx")
    check = check_models(FLOAT, tmp_path / "fixed.onnx", DATA, bounded(min_sqnr=30))
    assert check.passed
    assert check.comparison is not None
    assert check.comparison.n_samples % 7 == 0
    assert any("fed as the quantized one takes it" in note for note in check.notes)


def test_what_can_be_gone_through_once_is_compared_on_its_first_batch() -> None:
    images = load_digits()[0]
    check = check_models(FLOAT, digits_qdq(), iter([images[:8], images[8:16]]))
    assert check.comparison is not None
    assert check.comparison.n_samples == 8
    assert "the data can be gone through only once: compared on its first batch" in check.notes


# --- what is refused --------------------------------------------------------------------------


def test_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    missing, text = tmp_path / "missing.onnx", tmp_path / "text.onnx"
    text.write_text("hello", "utf-8")
    assert str(refused(missing, FLOAT)) == f"{missing}: no such file"
    assert str(refused(FLOAT, missing)) == f"{missing}: no such file"
    assert str(refused(FLOAT, tmp_path)) == f"{tmp_path}: is a directory, not a file"
    assert str(refused(FLOAT, text)).startswith(f"{text}: not a valid ONNX model: ")


BASE = """(float[N,6] x, int64[1] k) => (float[N,6] y, int64[1] i) {
  y = Relu(x)  i = Identity(k) }"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BASE.replace(" x", " z").replace("(x)", "(z)"),
            "its inputs are 'z', 'k', the float model's 'x', 'k':",
        ),
        (
            BASE.replace("N,6] y", "N,6] w").replace("y =", "w ="),
            "its outputs are 'w', 'i', the float model's 'y', 'i':",
        ),
        (
            """(float[N,6] x, int64[1] k) => (float[N,6] y) { y = Relu(x) }""",
            "its outputs are 'y', the float model's 'y', 'i':",
        ),
        (
            BASE.replace("float", "float16"),
            "input 'x' is float16, the float model's float32",
        ),
        (BASE.replace("N,6", "N,1,6"), "input 'x' is Nx1x6, the float model's Nx6"),
        (BASE.replace("N,6", "N,7"), "input 'x' is Nx7, the float model's Nx6"),
        (
            BASE.replace("int64[1] i", "float[1] i").replace("Identity(k)", "Cast<to=1>(k)"),
            "output 'i' is float, the float model's int64",
        ),
    ],
)
def test_another_interface_is_refused_and_the_difference_named(
    text: str, message: str, save: Save
) -> None:
    one, other = save(parsed(BASE)), save(parsed(text))
    error = refused(one, other)
    assert isinstance(error, ModelError)
    hint = " only models with the same interface can be compared" if message[-1] == ":" else ""
    assert str(error) == f"{other}: {message}{hint}"


def test_symbols_orders_and_optional_inputs_may_differ(save: Save) -> None:
    other = parsed("""(int64[1] k, float[B,6] x) => (int64[1] i, float[B,6] y) {
      y = Relu(x)  i = Identity(k) }""")
    default = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "spare")
    other.graph.initializer.append(default)
    other.graph.input.append(helper.make_tensor_value_info("spare", TensorProto.FLOAT, [1]))
    assert check_models(save(parsed(BASE)), save(other)).passed


def test_a_bound_that_cannot_be_measured_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(FLOAT, digits_qdq(), None, bounded(max_top1_drop=1), ALL_FILES)
    assert isinstance(error, OptionError)
    assert str(error).startswith("max-top1-drop cannot be measured: it needs labels")
    assert contents(tmp_path) == {}
    error = refused("missing.onnx", "missing.onnx", None, bounded(max_metric_drop=1))
    assert "needs --metric" in str(error), "said before anything is read"
    error = refused("missing.onnx", "missing.onnx", None, Run(metric="no_such_judge:f"))
    assert isinstance(error, DataError)


def test_data_that_does_not_fit_is_bad_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", image=np.full((4, 1, 8, 8), np.nan, np.float32))
    assert "holds NaN in sample 0" in str(refused(FLOAT, FLOAT, tmp_path / "bad.npz"))
    assert "no such file" in str(refused(FLOAT, FLOAT, tmp_path / "missing.npz"))
    reading = Run(reading=Reading(labels=tmp_path / "labels.csv"))
    assert str(refused(FLOAT, FLOAT, DATA, reading)).startswith("labels belongs to a folder")


def test_nan_from_the_float_model_is_bad_input(save: Save) -> None:
    text = "(float[N,6] x) => (float[N,6] y) {{ y = {0}(x) }}"
    one, other = (save(parsed(text.format(op))) for op in ("Sqrt", "Relu"))
    assert "of the float model holds NaN on this data" in str(refused(one, other))


# --- what is written --------------------------------------------------------------------------


def test_every_file_is_written_whether_it_passes_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for limit in (20, 90):
        run = Run(bounds=Bounds(min_sqnr=limit), force=True)
        check = check_models(FLOAT, digits_qdq(), DATA, run, ALL_FILES)
        assert set(contents(tmp_path)) == {"r.html", "r.xml", "r.md", "r.json"}
        assert json.loads(Path("r.json").read_text("utf-8")) == json.loads(
            json.dumps(check.document())
        )
        word = "PASSED" if limit == 20 else "FAILED"
        assert word in Path("r.md").read_text("utf-8")


def test_what_exists_or_is_an_input_or_named_twice_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.md").write_text("mine", "utf-8")
    quantized = tmp_path / "q.onnx"
    quantized.write_bytes(digits_qdq().read_bytes())
    one = Path("same.xml")
    for files, message in (
        (CheckFiles(markdown=Path("old.md")), "old.md: exists; choose another name"),
        (CheckFiles(junit=one, json=one), "same.xml: is named for two different outputs"),
        (CheckFiles(json=quantized), f"{quantized}: is an input, which is never overwritten"),
        (CheckFiles(json=Path("no/r.json")), "no/r.json: the directory no does not exist"),
    ):
        error = refused(FLOAT, quantized, DATA, Run(), files)
        assert isinstance(error, OutputError)
        assert str(error).startswith(message)
    assert set(contents(tmp_path)) == {"old.md", "q.onnx"}


def test_the_document_has_every_key_that_pages_and_summaries_read() -> None:
    run = bounded(min_sqnr=20)
    document = check_models(FLOAT, digits_qdq(), DATA, run).document()
    assert document["kind"] == "check"
    assert document["title"] == "digits.onnx"
    assert document["options"]["min-sqnr"] == 20
    assert document["float"]["top1"] == document["check"]["top1"]["float"]
    assert set(document["check"]) == {
        *("passed", "failure", "float", "quantized", "verdicts", "outputs", "agreement", "top1"),
        *("metric", "tensors", "first", "first_text"),
    }
    json.dumps(document, allow_nan=False)


# --- real models ------------------------------------------------------------------------------


def test_a_stateful_model_is_compared_step_by_step(fixtures_dir: Path) -> None:
    path = fixtures_dir / "gtcrn_stream.onnx"
    pairs = {f"{n}_cache": f"{n}_cache_out" for n in ("conv", "tra", "inter")}
    check = check_models(path, path, None, Run(feedback=pairs, bounds=Bounds(min_cosine=1)))
    assert check.passed, check.failures
    assert len(check.inspection.tensors) > 50


def test_mobilenet_and_a_broken_one_on_images(fixtures_dir: Path, tmp_path: Path) -> None:
    from calib import calibrate_model
    from calib.images import Preprocessing

    path, data = fixtures_dir / "mobilenet_v1_025_128.onnx", fixtures_dir / "imagenet_sample"
    images = Preprocessing(crop="87.5%", resize="128", mean=(0.5,), std=(0.5,))
    reading = Reading(labels=data / "labels.csv", images=images)
    written = tmp_path / "mobilenet.onnx"
    calibrate_model(path, data, output=written, run=Run(samples=100, reading=reading))
    run = Run(samples=100, reading=reading, bounds=Bounds(min_sqnr=5, max_top1_drop=20))
    check: Check = check_models(path, written, data, run)
    assert check.comparison is not None
    assert check.comparison.top1 is not None
    assert check.passed, check.failures
    found = layers(written)
    layer, (_, scale) = list(found.items())[len(found) // 2]
    broken = changed(written, tmp_path / "broken.onnx", scale, lambda s: s * 9)
    check = check_models(path, broken, data, run)
    assert check.inspection.first is not None
    assert check.inspection.first.tensor.name == layer


def test_models_of_the_test_suite_equal_themselves(save: Save) -> None:
    for name in ("if_subgraph", "embedding", "fixed_batch_4", "weights_are_inputs", "unnamed"):
        path = save(MODELS[name]())
        feed = feed_for(MODELS[name](), n=4)
        check = check_models(path, path, [feed], Run(bounds=Bounds(max_error=0)))
        assert check.passed, name
