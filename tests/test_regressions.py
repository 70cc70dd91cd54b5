"""Bugs that a user or a reviewer met, each with the test that would have caught it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Save, all_bits
from models import MODELS, Array, feed_for, parsed, values

from calib import Run, Selection, calibrate_model, load_model
from calib.arrays import Batch
from calib.calibration import calibrate
from calib.errors import ObservationsError
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.rules import Reduction, Rules
from calib.write import write_qdq
from cli.calibrate import main


@pytest.fixture
def model(save: Save) -> Path:
    return save(MODELS["conv_bn_relu"]())


def batches(n: int = 4) -> list[Array]:
    return [values(8, 3, 6, 6, seed=seed) for seed in range(n)]


def test_an_error_of_the_users_own_data_is_not_called_an_output_error(model: Path) -> None:
    class Folder:
        passes = 0

        def __iter__(self) -> Iterator[Array]:
            self.passes += 1
            if self.passes > 1:
                raise FileNotFoundError(2, "No such file or directory", "img7.jpg")
            yield from batches()

    with pytest.raises(FileNotFoundError, match=r"img7\.jpg"):
        calibrate_model(model, Folder())
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_a_mean_is_refused_where_observations_keep_fewer_batches_than_there_were(
    model: Path, tmp_path: Path
) -> None:
    loaded = load_model(model)
    feeds = [Batch({"image": batch}) for batch in batches(4)]
    observe(loaded, feeds, make_plan(loaded, Rules()).activations, Observing(1)).save(
        tmp_path / "o.npz"
    )
    saved = Observations.load(tmp_path / "o.npz", loaded)
    assert (len(saved.batches), saved.n_batches) == (1, 4)
    rules = Rules(reduction=Reduction("mean", 4))
    with pytest.raises(ObservationsError, match=r"counters of 1 single batches, .* needs 4"):
        calibrate(loaded, saved, make_plan(loaded, rules), rules)


def test_the_default_domain_may_be_called_ai_onnx(save: Save) -> None:
    model = MODELS["conv_bn_relu"]()
    model.opset_import[0].domain = "ai.onnx"
    onnx.checker.check_model(model, full_check=True)
    path = save(model)
    result = calibrate_model(path, batches(), all_bits(4))
    assert {entry.domain for entry in onnx.load(result.output).opset_import} == {""}


@pytest.mark.parametrize(
    ("arguments", "methods"),
    [
        (["--method", "percentile", "--weight-method", "percentile"], ("percentile:99.0",) * 2),
        (["--weight-method", "percentile"], ("octav", "percentile:99.0")),
        (["--method", "percentile", "--weight-method", "max"], ("percentile:99.0", "max")),
    ],
)
def test_percentile_reaches_every_method_that_takes_it(
    arguments: list[str],
    methods: tuple[str, str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Rules] = []
    monkeypatch.setattr("cli.calibrate._dry_run", lambda _, rules: seen.append(rules))
    assert main([str(model), "--dry-run", "--percentile", "99", *arguments]) == 0
    assert (seen[0].method, seen[0].weight_method) == methods


def test_labels_that_serve_nothing_are_noted(save: Save) -> None:
    path = save(MODELS["attention"]())
    feed = feed_for(MODELS["attention"](), 8)
    result = calibrate_model(path, [{**feed, "labels": np.zeros(8, np.int64)}])
    assert result.comparison.top1 is None
    assert any(note.startswith("labels are not used") for note in result.notes)


def test_a_4_bit_activation_stored_in_8_bits_is_noted_and_others_are_not(save: Save) -> None:
    for name, noted in (("relu6", True), ("conv_bn_relu", False)):
        path = save(MODELS[name]())
        feed = feed_for(MODELS[name](), 8)
        result = calibrate_model(path, [feed], all_bits(4), path.with_name(f"{name}-q.onnx"))
        assert any("stored in 8 bits" in note for note in result.notes) == noted


def test_paths_may_be_strings(model: Path) -> None:
    folder = model.parent
    run_ = Run(summary=f"{folder}/s.json", save_observations=f"{folder}/o.npz")  # type: ignore[arg-type]
    calibrate_model(str(model), batches(), output=f"{folder}/q.onnx", run=run_)
    again = Run(observations=f"{folder}/o.npz", force=True)  # type: ignore[arg-type]
    calibrate_model(str(model), batches(), output=f"{folder}/q.onnx", run=again)
    assert {p.name for p in folder.iterdir()} == {model.name, "s.json", "o.npz", "q.onnx"}


def test_raising_the_opset_logs_nothing(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = calibrate_model(model, batches(), all_bits(4))
    assert any("opset raised" in note for note in result.notes)
    assert [record for record in caplog.records if "version" in record.name] == []


def test_a_poor_comparison_on_made_up_inputs_is_not_called_a_collapse(model: Path) -> None:
    folder = model.parent
    calibrate_model(model, batches(), run=Run(save_observations=folder / "o.npz"))
    settings = Run(observations=folder / "o.npz", force=True)
    result = calibrate_model(model, None, all_bits(2), run=settings)
    assert [warning.split(":")[0] for warning in result.warnings] == ["NO DATA"]


def test_thresholds_of_16_bit_weights_say_where_their_sqnr_is_from(model: Path) -> None:
    result = calibrate_model(model, batches(), all_bits(16))
    for record in result.table.records:
        source = "raw values" if record.spec.kind == "weight" else "noise model"
        assert any(source in note for note in record.notes), record.name


def test_onnxruntimes_messages_come_without_the_places_in_its_source(model: Path) -> None:
    from calib.capture import Session
    from calib.errors import ModelError

    with pytest.raises(ModelError) as caught:
        Session(model).run({"image": values(1, 2, 6, 6)})
    assert "ONNXRuntimeError" not in str(caught.value)
    assert ".cc:" not in str(caught.value)


def test_weights_alone_can_be_quantized(save: Save) -> None:
    """Weights alone: nothing to observe, the data is gone through all the same."""
    path = save(parsed("(float[N, 6] x) => (float[N, 4] y) { y = MatMul(x, w) }",
                       {"w": values(6, 4)}))  # fmt: skip
    rules = Rules(widths=all_bits(4).widths, selection=Selection(only="w"))
    loaded = load_model(path)
    plan = make_plan(loaded, rules)
    observations = observe(loaded, [Batch({"x": values(8, 6)})], plan.activations)
    quantized = write_qdq(loaded, calibrate(loaded, observations, plan, rules))
    quantized.save(path.with_name("q.onnx"))
    written = onnx.load(path.with_name("q.onnx"))
    assert [n.op_type for n in written.graph.node] == ["DequantizeLinear", "MatMul"]
