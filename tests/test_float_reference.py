"""The float model's outputs on disk: comparing with them is what `evaluate` says, exactly."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits, calibrated
from models import MODELS, Array, feed_for, parsed, values

from calib.arrays import Batch
from calib.calibration import calibrate
from calib.capture import Session
from calib.comparison import Comparison, Scores, evaluate
from calib.errors import DataError, OutputError, VerificationError
from calib.graph import Model, load_model
from calib.observing import observe
from calib.planning import make_plan
from calib.reference import Reference
from calib.write import write_qdq

INTEGER = """(float[N,6] x) => (int64[N] chosen, float[N,4] a) <float[6,4] w> {
  a = MatMul(x, w)
  chosen = ArgMax<axis=1, keepdims=0>(a) }"""
RUNNING_SUM = """(float[1,6] x, float[1,6] state) => (float[1,3] y, float[1,6] next)
<float[6,3] w> {
  next = Add(x, state)
  y = MatMul(next, w)
}"""


def quantized(model: Model, batches: list[Batch], path: Path, bits: int = 4) -> Path:
    rules = all_bits(bits)
    plan = make_plan(model, rules)
    table = calibrate(model, observe(model, iter(batches), plan.activations), plan, rules)
    write_qdq(model, table).save(path)
    return path


def batches_for(
    proto: onnx.ModelProto, n: int = 3, labels: Callable[[int], Array | None] = lambda _: None
) -> list[Batch]:
    return [Batch(feed_for(proto, seed=seed), labels(seed)) for seed in range(n)]


def both(model: Model, path: Path, batches: list[Batch]) -> tuple[Comparison, Comparison]:
    with Reference(model, lambda: iter(batches)) as reference:
        return reference.compare(path), evaluate(model, path, iter(batches))


# --- exactly what evaluate says -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["conv_bn_relu", "two_inputs", "attention", "tied", "float16_conv"]
)
def test_a_comparison_is_the_one_of_both_models(save: Save, tmp_path: Path, name: str) -> None:
    proto = MODELS[name]()
    model, batches = load_model(save(proto)), batches_for(proto)
    found, expected = both(model, quantized(model, batches, tmp_path / "q.onnx"), batches)
    assert found == expected
    assert found.n_samples == 24


def test_labels_give_the_same_top1(save: Save, tmp_path: Path) -> None:
    proto = MODELS["conv_bn_relu"]()
    batches = batches_for(proto, labels=lambda seed: (np.arange(8) + seed) % 5)
    model = load_model(save(proto))
    found, expected = both(model, quantized(model, batches, tmp_path / "q.onnx", 2), batches)
    assert found == expected
    assert found.top1 is not None


def test_integer_outputs_are_counted_the_same(save: Save, tmp_path: Path) -> None:
    proto = parsed(INTEGER)
    model, batches = load_model(save(proto)), batches_for(proto)
    found, expected = both(model, quantized(model, batches, tmp_path / "q.onnx", 2), batches)
    assert found == expected
    assert any("no float" in note for note in found.notes)


def test_state_is_fed_back_in_both(save: Save, tmp_path: Path) -> None:
    model = load_model(save(parsed(RUNNING_SUM)), {"state": "next"})
    x = values(12, 1, 6)
    batches = [Batch({"x": step}, restart=n % 6 == 0) for n, step in enumerate(x)]
    path = quantized(model, batches, tmp_path / "q.onnx")
    found, expected = both(model, path, batches)
    assert found == expected
    with Reference(model, lambda: iter(batches)) as reference:
        assert reference.compare(path) == reference.compare(path) == expected


def test_a_model_in_memory_is_compared_as_its_file(save: Save, tmp_path: Path) -> None:
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    table, _ = calibrated(model, all_bits(4), dict(batches[0].feed))
    made = write_qdq(model, table)
    made.save(tmp_path / "q.onnx")
    with Reference(model, lambda: iter(batches)) as reference:
        assert reference.compare(made.ir) == evaluate(model, tmp_path / "q.onnx", iter(batches))


METRIC = """
import numpy as np

def mean(answers):
    return float(np.mean([np.square(outputs["output"]).mean() for outputs, *_ in answers]))
"""


def test_a_metric_judges_both_models(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judging.py").write_text(METRIC, "utf-8")
    monkeypatch.chdir(tmp_path)
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    path = quantized(model, batches, tmp_path / "q.onnx", 2)
    with Reference(model, lambda: iter(batches), metric="judging:mean") as reference:
        found = reference.compare(path)
    exact = [
        float(np.mean([np.square(Session(p).run(b.feed)["output"]).mean() for b in batches]))
        for p in (model.path, path)
    ]
    assert found.scores is not None
    assert found.scores.name == "judging:mean"
    assert [found.scores.float_model, found.scores.quantized_model] == pytest.approx(exact)
    assert replace(found, scores=None) == evaluate(model, path, iter(batches))
    assert isinstance(found.scores, Scores)


# --- what it costs ------------------------------------------------------------------------------


def test_the_float_model_is_run_once_however_many_are_compared(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    path = quantized(model, batches, tmp_path / "q.onnx")
    loaded: list[Any] = []
    plain = Session.__init__

    def noted(self: Session, source: Any, *rest: Any, **more: Any) -> None:
        loaded.append(source)
        plain(self, source, *rest, **more)

    monkeypatch.setattr(Session, "__init__", noted)
    with Reference(model, lambda: iter(batches)) as reference:
        for _ in range(3):
            reference.compare(path)
    assert loaded == [model.path, path, path, path]


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")


@needs_proc
def test_the_outputs_lie_in_a_file_without_a_name_that_goes_with_it(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    with Reference(model, lambda: iter(batches)):
        assert any(str(folder) in name for name in open_files())
        assert list(folder.iterdir()) == []
    assert not any(str(folder) in name for name in open_files())


# --- what goes wrong ----------------------------------------------------------------------------


def test_nan_of_the_quantized_model_is_its_fault(save: Save) -> None:
    text = """(float[N,6] x) => (float[N,4] y) <float[6,4] w> {
      a = MatMul(x, w)
      y = MUL(a, factor) }"""
    proto = parsed(text.replace("MUL", "Mul"), {"factor": np.array(1, np.float32)})
    model, batches = load_model(save(proto)), batches_for(proto)
    bad = save(parsed(text.replace("MUL", "Mul"), {"factor": np.array(np.nan, np.float32)}))
    with (
        Reference(model, lambda: iter(batches)) as reference,
        pytest.raises(VerificationError, match="output 'y' of the quantized model holds NaN"),
    ):
        reference.compare(bad)


def test_nan_in_the_data_names_the_sample(save: Save) -> None:
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    batches[1].feed["image"][3] = np.nan
    with pytest.raises(DataError, match=r"sample 111\b"):
        Reference(model, lambda: iter(batches), first=lambda: 100)
    gc.collect()  # a tape that was left open would warn


class Full:
    """A disk without room."""

    closed = False

    def write(self, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        Full.closed = True


def test_a_full_disk_is_one_line_that_says_what_to_do(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    with pytest.raises(OutputError) as caught:
        Reference(model, lambda: iter(batches))
    message = str(caught.value)
    assert "\n" not in message
    assert "No space left on device" in message
    assert "outputs of the float model cannot be kept" in message
    assert "let TMPDIR name a folder with room" in message
    assert Full.closed


def test_no_temporary_folder_at_all_is_one_line_too(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    with pytest.raises(OutputError, match=r"cannot be kept: .*No such file"):
        Reference(model, lambda: iter(batches))


def test_a_model_that_onnxruntime_cannot_load_leaves_the_reference_usable(
    save: Save, tmp_path: Path
) -> None:
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    path = quantized(model, batches, tmp_path / "q.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with Reference(model, lambda: iter(batches)) as reference:
        with pytest.raises(Exception, match=r"."):
            reference.compare(tmp_path / "bad.onnx")
        assert reference.compare(path) == evaluate(model, path, iter(batches))


@pytest.mark.parametrize("change", [-1, 1])
def test_data_that_is_another_at_every_pass_is_refused(
    save: Save, tmp_path: Path, change: int
) -> None:
    proto = MODELS["conv_bias"]()
    model, batches = load_model(save(proto)), batches_for(proto)
    path = quantized(model, batches, tmp_path / "q.onnx")
    sizes = iter([2, 2 + change])

    def drifting() -> Iterator[Batch]:
        return iter(batches[: next(sizes)])

    with (
        Reference(model, drifting) as reference,
        pytest.raises(DataError, match="more or fewer batches at every pass"),
    ):
        reference.compare(path)


def test_labels_that_do_not_fit_are_the_datas_fault(save: Save, tmp_path: Path) -> None:
    proto = MODELS["conv_bn_relu"]()
    batches = batches_for(proto, labels=lambda _: np.full(8, 7))
    model = load_model(save(proto))
    path = quantized(model, batches, tmp_path / "q.onnx")
    with (
        Reference(model, lambda: iter(batches)) as reference,
        pytest.raises(DataError, match="label 7: the model's 'logits' has 5 classes"),
    ):
        reference.compare(path)
