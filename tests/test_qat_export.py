"""Exported models as files: interface, batch, metadata, what is refused, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_models import contents
from conftest import Save
from qat_models import (
    Attention,
    ConvNet,
    SideBySide,
    assert_same_state,
    draw,
    hooks,
    image_batches,
    images,
    ready,
    refusal,
    relative,
    seeded,
    side_by_side_inputs,
    state,
    train,
    written_outputs,
)
from torch import Tensor, nn

import calib
from calib.bounds import Bounds
from calib.errors import OutputError, TrainingError, VerificationError
from calib.gate import check_models
from calib.graph import load_model
from calib.qat import Exported, export, prepare, quantizers
from calib.run import Run
from calib.write import METADATA_KEY

FIXED = "the batch is fixed, as the model's code depends on its size"


def linear() -> nn.Module:
    return seeded(lambda: nn.Linear(6, 4))


def shapes(path: Path) -> dict[str, tuple[Any, ...] | None]:
    return {spec.name: spec.shape for spec in load_model(path).inputs}


def exported(model: nn.Module, inputs: object, folder: Path, **options: Any) -> Exported:
    """Prepared, calibrated and exported."""
    return export(ready(model, inputs), inputs, folder / "q.onnx", **options)


# --- the model handed in ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_model_handed_in_stays_as_it_is(training: bool, tmp_path: Path) -> None:
    model = prepare(seeded(ConvNet))
    train(model, image_batches())
    model.train(training)
    before, attached = state(model), hooks(model)
    modes = [module.training for module in model.modules()]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    inputs = images()
    export(model, inputs, tmp_path / "q.onnx")
    assert_same_state(before, state(model))
    assert hooks(model) == attached
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(q.marker is None for q in quantizers(model).values())
    assert torch.equal(inputs, images())
    train(model, image_batches())


def test_a_compiled_model_is_exported_as_what_was_compiled(tmp_path: Path) -> None:
    model = ready(seeded(ConvNet), images())
    files = [tmp_path / "plain.onnx", tmp_path / "compiled.onnx"]
    compiled_model: Any = torch.compile(model, backend="eager")
    for each, path in zip((model, compiled_model), files, strict=True):
        export(each, images(), path)
    plain, compiled = (written_outputs(path, images())[0] for path in files)
    assert np.array_equal(plain, compiled)


# --- interface --------------------------------------------------------------------------------


def test_names_of_inputs_and_outputs_can_be_given(tmp_path: Path) -> None:
    result = exported(
        seeded(ConvNet), images(), tmp_path, input_names=["image"], output_names=["logits"]
    )
    graph = onnx.load(result.output).graph
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize("n", [1, 8])
def test_the_batch_is_free_whatever_the_example_has(n: int, tmp_path: Path) -> None:
    model = ready(seeded(ConvNet), images())
    result = export(model, images(n), tmp_path / "q.onnx")
    assert FIXED not in result.notes
    ((first, *others),) = [shape or () for shape in shapes(result.output).values()]
    assert not isinstance(first, int)
    assert others == [3, 8, 8]
    for size in (1, 5):
        with torch.no_grad():
            expected = model(images(size, seed=9)).numpy()
        assert relative(written_outputs(result.output, images(size, seed=9))[0], expected) < 1e-5


def test_the_batch_of_a_model_with_any_number_of_arguments_is_free(tmp_path: Path) -> None:
    result = exported(seeded(SideBySide), side_by_side_inputs(), tmp_path)
    assert FIXED not in result.notes
    assert not any(isinstance((shape or (0,))[0], int) for shape in shapes(result.output).values())


@pytest.mark.parametrize("n", [1, 8])
def test_a_batch_that_the_code_names_is_fixed_and_a_note_says_so(n: int, tmp_path: Path) -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input.reshape(n, 3, 2).flatten(1))

    result = exported(seeded(lambda: Fixed(6, 4)), draw(n, 6), tmp_path)
    assert result.notes[0] == FIXED
    assert list(shapes(result.output).values()) == [(n, 6)]


def test_axes_can_be_said_to_be_free(tmp_path: Path) -> None:
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "mask": None}
    model = ready(seeded(Attention), draw(4, 5, 8))
    inputs = (draw(4, 5, 8), None)
    result = export(model, inputs, tmp_path / "q.onnx", dynamic_shapes=free)
    ((batch, tokens, width),) = [shape or () for shape in shapes(result.output).values()]
    assert (isinstance(batch, int), isinstance(tokens, int), width) == (False, False, 8)
    with torch.no_grad():
        expected = model(draw(2, 9, 8)).numpy()
    assert relative(written_outputs(result.output, draw(2, 9, 8))[0], expected) < 1e-5


# --- as a file --------------------------------------------------------------------------------


def test_the_file_says_how_it_was_trained(tmp_path: Path) -> None:
    result = exported(seeded(ConvNet), images(), tmp_path)
    onnx.checker.check_model(str(result.output), full_check=True)
    props = {p.key: p.value for p in onnx.load(result.output).metadata_props}
    manifest = json.loads(props[METADATA_KEY])
    assert manifest == result.table.manifest
    trained = manifest["options"]["trained"]
    assert trained["conv2.weight"] == "4 bits, per-channel(axis=0), octav, dynamic, mad"
    assert set(trained) == set(quantizers(prepare(seeded(ConvNet))))
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["digests"]) == {"model_sha256"}


def test_the_file_does_not_tell_where_the_code_lies_on_this_machine(tmp_path: Path) -> None:
    written = exported(seeded(ConvNet), images(), tmp_path).output.read_bytes()
    assert str(Path(__file__).parent).encode() not in written
    assert str(Path(torch.__file__).parent).encode() not in written


def test_the_table_holds_what_was_trained(tmp_path: Path) -> None:
    model = prepare(seeded(ConvNet), rules=[calib.qat.LayerRule("conv2", gradient="lsq", bits=5)])
    train(model, image_batches())
    table = export(model, images(), tmp_path / "q.onnx").table
    found = quantizers(model)
    activations = [r for r in table.records if r.spec.kind == "activation"]
    for record, name in zip(activations, ("conv1", "conv2", "head"), strict=True):
        quantizer = found[f"{name}.activation"]
        assert record.qtype == quantizer.qtype
        assert record.threshold.tolist() == quantizer.current().double().tolist()
        assert record.spec.method == ("lsq" if name == "conv2" else "octav")
    widths = {r.qtype.bits for r in table.records if r.spec.kind == "weight"}
    assert widths == {5, 8}


# PyTorch's exporter warns of itself.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_model_is_checked_against_the_float_one_as_any_other(
    tmp_path: Path, save: Save
) -> None:
    """Both come from PyTorch, with the same names."""
    model = seeded(ConvNet).eval()
    program = torch.onnx.export(
        model,
        (images(),),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        dynamic_shapes=({0: "batch"},),
    )
    assert program is not None
    plain = save(program.model_proto)
    names = {
        "input_names": ["image"],
        "output_names": [v.name for v in onnx.load(plain).graph.output],
    }
    ready(model, images(64), bits=8)
    result = export(model, images(), tmp_path / "q.onnx", **names)  # type: ignore[arg-type]
    np.savez(tmp_path / "data.npz", image=images(64).numpy())
    run = Run(bounds=Bounds(min_sqnr=25))
    check = check_models(plain, result.output, tmp_path / "data.npz", run)
    assert check.passed, check.failures
    strict = Run(bounds=Bounds(min_sqnr=90))
    assert not check_models(plain, result.output, tmp_path / "data.npz", strict).passed


# --- refusals ---------------------------------------------------------------------------------


def test_exporting_before_any_data_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    assert refusal(TrainingError, lambda: export(prepare(seeded(ConvNet)), images(), path)) == (
        "conv1.activation: has no threshold yet: train for a step, or call calib.qat.calibrate "
        "before"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_no_batch_has_reached_is_named(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, which: bool = False) -> Tensor:
            y: Tensor = self.never(x) if which else self.often(x)
            return y

    model = ready(seeded(Branches), draw(4, 6))
    call = (draw(4, 6), True)
    message = refusal(TrainingError, lambda: export(model, call, tmp_path / "q.onnx"))
    assert message.startswith("never.activation: has no threshold yet")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_precision_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ready(seeded(ConvNet), images()).to(dtype)
    call = images().to(dtype)
    assert refusal(TrainingError, lambda: export(model, call, tmp_path / "q.onnx")) == (
        f"conv1.weight is {dtype}, only float32 models can be exported: model.float() makes it one"
    )


def test_control_flow_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    class Deciding(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            if float(input.sum()) > 0:
                return super().forward(input)
            return super().forward(-input)

    model = ready(seeded(lambda: Deciding(6, 4)), draw(4, 6))
    path = tmp_path / "q.onnx"
    message = refusal(TrainingError, lambda: export(model, draw(4, 6), path))
    assert message.startswith("the model cannot be exported to ONNX: ")
    assert "data-dependent" in message
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_a_shape_that_the_model_does_not_take_are_an_error(tmp_path: Path) -> None:
    model = ready(seeded(ConvNet), images())
    with pytest.raises(TrainingError, match=r"^the model fails on the example inputs: "):
        export(model, draw(4, 2, 8, 8), tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_tensor_that_more_than_a_layer_reads_is_refused(
    tmp_path: Path,
) -> None:
    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) + input.square().sum()

    model = ready(seeded(lambda: Squared(6, 4)), draw(4, 6))
    message = refusal(TrainingError, lambda: export(model, draw(4, 6), tmp_path / "q.onnx"))
    assert message.startswith("activation: cannot be exported: in the ONNX graph it is read by ")


def test_a_file_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    path.write_text("mine")
    model = ready(linear(), draw(4, 6))
    message = refusal(OutputError, lambda: export(model, draw(4, 6), path))
    assert message.startswith(f"{path}: exists; ")
    assert path.read_text() == "mine"
    export(model, draw(4, 6), path, force=True)
    assert path.read_bytes()[:4] != b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["absent/q.onnx", "folder"])
def test_a_file_that_cannot_be_written_is_refused_at_once(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    model = prepare(linear())
    message = refusal(OutputError, lambda: export(model, draw(4, 6), tmp_path / path, force=True))
    assert message.startswith(str(tmp_path / path))


@pytest.mark.parametrize("step", ["verify", "trained_table"])
def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise VerificationError("as planned")

    monkeypatch.setattr(f"calib.qat.exporting.{step}", fails)
    path = tmp_path / "q.onnx"
    path.write_text("old")
    model = ready(linear(), draw(4, 6))
    before = state(model)
    call = draw(4, 6)
    assert refusal(VerificationError, lambda: export(model, call, path, force=True)) == "as planned"
    assert [file.name for file in tmp_path.iterdir()] == ["q.onnx"]
    assert path.read_text() == "old"
    assert_same_state(before, state(model))


def test_a_written_model_that_is_worse_than_the_prepared_one_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prepared model's outputs are swapped for those without quantized activations."""
    from calib.qat.exporting import _outputs as real

    def better(model: nn.Module, inputs: object) -> list[Any]:
        for quantizer in quantizers(model).values():
            quantizer.marker = lambda x, _name: x
        return real(model, inputs)

    monkeypatch.setattr("calib.qat.exporting._outputs", better)
    model = ready(seeded(ConvNet), images())
    message = refusal(VerificationError, lambda: export(model, images(), tmp_path / "q.onnx"))
    assert message.startswith("the exported model does not compute what the prepared one does: ")
    assert contents(tmp_path) == {}
