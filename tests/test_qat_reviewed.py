"""What reviews of training found: each once went wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qat_models import (
    ConvNet,
    draw,
    images,
    ready,
    refusal,
    relative,
    seeded,
    thresholds,
    two_layers,
    written_outputs,
)
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from calib.errors import OptionError, TrainingError
from calib.qat import LayerRule, calibrate, export, prepare, quantizers, remove


def test_gradient_checkpointing_observes_a_batch_once_and_computes_the_same_gradients() -> None:
    plain = prepare(seeded(two_layers), mode="static")
    again = copy.deepcopy(plain)
    for step in range(3):
        plain(images(seed=step)).sum().backward()
        checkpoint(again, images(seed=step), use_reentrant=False).sum().backward()
    for name, quantizer in quantizers(again).items():
        assert int(quantizer.n_seen) == (1 if quantizer.settings.is_weight else 3)
        assert torch.equal(quantizer.threshold, quantizers(plain)[name].threshold)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_parts_that_were_prepared_apart_or_copied_keep_names_of_their_own(tmp_path: Path) -> None:
    part = prepare(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), bits=4, edge_bits=4)
    model: Any = nn.Sequential(part, copy.deepcopy(part), nn.Linear(6, 3))
    with torch.no_grad():
        model[1][0].weight.mul_(-2)
    calibrate(model, [draw(32, 6)])
    wanted = {f"{n}.0.{tensor}" for n in "01" for tensor in ("weight", "activation")}
    assert {*quantizers(model)} == wanted
    result = export(model, draw(4, 6), tmp_path / "q.onnx")
    assert len(result.table.records) == 4
    expected = model.eval()(draw(4, 6)).detach().numpy()
    assert relative(written_outputs(result.output, draw(4, 6))[0], expected) < 1e-5


def test_only_one_kind_of_tensor_can_be_kept_float(tmp_path: Path) -> None:
    rules = [LayerRule("", kind="activation", skip=True)]
    model = ready(seeded(ConvNet), images(), rules=rules)
    assert all(name.endswith("weight") for name in quantizers(model))
    records = export(model, images(), tmp_path / "q.onnx").table.records
    assert {record.spec.kind for record in records} == {"weight"}


def test_a_call_that_was_interrupted_leaves_no_weight_behind_once_the_quantizers_are_gone() -> None:
    model: Any = ready(seeded(ConvNet), images())
    model.conv1.__dict__["weight"] = torch.zeros_like(model.conv1.weight)
    remove(model)
    assert isinstance(model.conv1.weight, nn.Parameter)


def test_a_model_that_ddp_has_wrapped_is_refused(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(seeded(two_layers))
        said = refusal(TrainingError, lambda: prepare(wrapped))
    finally:
        distributed.destroy_process_group()
    assert said == "prepare the model before DistributedDataParallel wraps it"


def test_rules_find_the_layers_of_a_compiled_model_by_their_own_names() -> None:
    compiled: Any = torch.compile(seeded(ConvNet), backend="eager")
    prepare(compiled, rules=[LayerRule("^conv1$", skip=True)])
    assert not any("conv1" in name for name in quantizers(compiled))


def test_learned_scales_start_from_the_first_batch_that_tells_anything() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4)), gradient="lsq")
    model(torch.zeros(3, 4))
    model(10 * draw(64, 4))
    threshold = float(thresholds(model)["0.activation"])
    assert float(quantizers(model)["0.activation"].current()) == pytest.approx(threshold, rel=1e-5)
    assert threshold > 10


def test_one_tensor_in_place_of_batches_is_refused() -> None:
    said = refusal(OptionError, lambda: calibrate(prepare(seeded(ConvNet)), images()))
    assert said == "calibrate takes batches, and was given one tensor: put it into a list"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrator": None}, "calibrator must be a name such as 'octav', got None"),
        ({"reduction": "mean"}, "reduction must be a calib.Reduction, got 'mean'"),
        ({"rules": ["head"]}, "rules must be a list of calib.qat.LayerRule, got 'head'"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, Any], message: str) -> None:
    assert refusal(OptionError, lambda: prepare(seeded(ConvNet), **settings)) == message
