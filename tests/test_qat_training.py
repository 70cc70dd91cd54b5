"""Training a prepared model with what PyTorch offers: compiled, in lower precision, distributed,
copied, saved, averaged."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from qat_models import (
    ConvNet,
    assert_same_state,
    draw,
    image_batches,
    images,
    ready,
    seeded,
    state,
    thresholds,
    train,
    two_layers,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from calib.qat import export, prepare, quantizers, remove


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state(model).items() if "fake_quant" in key}


def saved_and_loaded(saved: Any, weights_only: bool = True) -> Any:
    stream = io.BytesIO()
    torch.save(saved, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


# --- compiled ---------------------------------------------------------------------------------


# torch.compile itself does what PyTorch warns of.
_COMPILING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@_COMPILING
@pytest.mark.parametrize(
    ("mode", "gradient", "calibrator"),
    [("dynamic", "mph", "octav"), ("static", "lsq", "max")],
)
def test_a_compiled_model_trains_as_an_eager_one(mode: str, gradient: str, calibrator: str) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings: dict[str, Any] = {"mode": mode, "gradient": gradient, "calibrator": calibrator}
    eager, other = (prepare(seeded(two_layers), **settings) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    first, second = (
        train(model, image_batches(7), compiled=run)
        for model, run in ((eager, eager), (other, compiled))
    )
    for one, another in zip(first, second, strict=True):
        torch.testing.assert_close(one, another)
    for key, tensor in state(eager).items():
        torch.testing.assert_close(tensor, state(other)[key])
    eager.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(eager(images()), compiled(images()))
    assert counters["graph_break"] == {}
    # Before and after the first batch, in training and in evaluation.
    assert counters["stats"]["unique_graphs"] <= 4


@_COMPILING
def test_a_model_compiled_to_machine_code_trains_as_an_eager_one() -> None:
    torch.compiler.reset()
    eager, other = (ready(seeded(lambda: nn.Linear(6, 4)), draw(8, 6)) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True)
    batches = [draw(8, 6, seed=seed) for seed in range(3)]
    first, second = train(eager, batches), train(other, batches, compiled=compiled)
    for one, another in zip(first, second, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)
    for key, tensor in state(eager).items():
        torch.testing.assert_close(tensor, state(other)[key], rtol=1e-4, atol=1e-5)


@_COMPILING
def test_what_was_compiled_before_is_quantized_after_prepare_and_float_after_remove() -> None:
    torch.compiler.reset()
    model, x = seeded(lambda: nn.Linear(6, 4)).eval(), draw(8, 6)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x)
        ready(model, x, bits=2, edge_bits=2)
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), plain, atol=0.01)
        remove(model)
        torch.testing.assert_close(compiled(x), plain)


# --- in lower precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["mph", "ste", "pact", "lsq"])
def test_training_under_autocast_is_near_to_training_without(
    dtype: torch.dtype, gradient: str
) -> None:
    models = [prepare(seeded(ConvNet), bits=8, gradient=gradient) for _ in range(2)]

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            output: Tensor = models[1](x)
        return output

    first = train(models[0], image_batches(), rate=0.01)
    second = train(models[1], image_batches(), rate=0.01, compiled=cast)
    for one, other in zip(first, second, strict=True):
        assert other.dtype == dtype
        torch.testing.assert_close(one, other.float(), atol=0.05, rtol=0.05)
    for name, tensor in thresholds(models[0]).items():
        torch.testing.assert_close(tensor, thresholds(models[1])[name], rtol=0.03, atol=0.0)
    assert all(p.dtype == torch.float32 for p in models[1].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_stay_float32_whatever_the_model_is_cast_to(dtype: torch.dtype) -> None:
    model = ready(seeded(ConvNet), images())
    before = stored(model)
    model.to(dtype)
    assert_same_state(before, stored(model))
    assert model(images().to(dtype)).dtype == dtype
    output = train(model, [images().to(dtype)])[0]
    assert output.isfinite().all()
    assert {key: t.dtype for key, t in stored(model).items()} == {
        key: t.dtype for key, t in before.items()
    }
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("gradient", ["mph", "pact", "lsq"])
def test_evaluation_uses_what_is_stored_and_changes_nothing(mode: str, gradient: str) -> None:
    model = prepare(seeded(ConvNet), mode=mode, gradient=gradient)
    train(model, image_batches())
    model.eval()
    before = state(model)
    with torch.no_grad():
        expected = model(images())
        model(100 * images(seed=5))  # would move any threshold
        # Each image alone is quantized as among the others.
        alone = torch.cat([model(image[None]) for image in images()])
    assert_same_state(before, state(model))
    torch.testing.assert_close(alone, expected)
    largest = quantizers(model)["conv1.activation"](torch.full((1,), 1e6))
    torch.testing.assert_close(largest, thresholds(model)["conv1.activation"])


# --- copied, saved, averaged ------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["mph", "lsq"])
@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_copy_trains_on_as_the_original_does(how: str, gradient: str) -> None:
    model = prepare(seeded(ConvNet), gradient=gradient)
    train(model, image_batches())
    twin = copy.deepcopy(model) if how == "copied" else saved_and_loaded(model, weights_only=False)
    assert_same_state(state(model), state(twin))
    before = state(model)
    outputs = train(twin, image_batches(seed=1))
    assert_same_state(before, state(model))
    for one, other in zip(train(model, image_batches(seed=1)), outputs, strict=True):
        assert torch.equal(one, other)
    assert_same_state(state(model), state(twin))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("gradient", ["mph", "pact", "lsq"])
def test_a_checkpoint_goes_on_in_a_new_model(mode: str, gradient: str) -> None:
    model, new = (prepare(seeded(ConvNet, n), mode=mode, gradient=gradient) for n in range(2))
    train(model, image_batches(6))
    new.load_state_dict(saved_and_loaded(model.state_dict()))
    assert_same_state(state(model), state(new))
    assert torch.equal(model.eval()(images()), new.eval()(images()))
    for one, other in zip(*(train(m, image_batches()) for m in (model, new)), strict=True):
        assert torch.equal(one, other)
    assert_same_state(state(model), state(new))


def test_a_float_checkpoint_is_loaded_strictly_and_forgets_what_was_seen() -> None:
    model = prepare(seeded(ConvNet))
    train(model, image_batches())
    result = model.load_state_dict(seeded(ConvNet, 7).state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(int(q.n_seen) == 0 for q in quantizers(model).values())
    fresh = prepare(seeded(ConvNet, 7))
    for one, other in zip(*(train(m, image_batches()) for m in (model, fresh)), strict=True):
        assert torch.equal(one, other)
    assert {k: t.tolist() for k, t in thresholds(model).items()} == {
        k: t.tolist() for k, t in thresholds(fresh).items()
    }


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_a_model_in_training_evaluates_and_is_exported(
    use_buffers: bool, tmp_path: Path
) -> None:
    model = prepare(seeded(ConvNet))
    averaging = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=use_buffers)
    for seed in range(3):
        train(model, image_batches(2, seed))
        average.update_parameters(model)
    average.eval()
    before = state(average)
    with torch.no_grad():
        found = average(images())  # without a warning
        torch.testing.assert_close(found, model.eval()(images()), atol=0.2, rtol=0.2)
    assert_same_state(before, state(average))
    assert export(average, images(), tmp_path / "q.onnx").sqnr_db > 40


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["mph", "lsq"])
def test_a_model_with_gradient_checkpointing_trains_as_without(
    gradient: str, reentrant: bool
) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            output: Tensor = checkpoint(super().forward, input, use_reentrant=reentrant)
            return output

    model = prepare(seeded(lambda: Checkpointed(two_layers())), gradient=gradient)
    plain = prepare(seeded(lambda: nn.Sequential(two_layers())), gradient=gradient)
    outputs = [
        train(m, [x.clone().requires_grad_() for x in image_batches(4)], rate=0.01)
        for m in (model, plain)
    ]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, plain.get_parameter(key), atol=1e-3, rtol=1e-3, msg=key
        )
