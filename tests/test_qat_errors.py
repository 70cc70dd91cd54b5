"""What training refuses, what it leaves float, and what it says of either."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qat_models import (
    ConvNet,
    assert_same_state,
    draw,
    hooks,
    image_batches,
    images,
    ready,
    refusal,
    seeded,
    state,
    train,
)
from torch import nn

from calib import Widths
from calib.errors import (
    CalibError,
    CalibratorError,
    OptionError,
    TrainingError,
)
from calib.qat import LayerRule, calibrate, export, prepare, quantizers, remove
from calib.rules import Reduction

NOT_PREPARED = "the model is not prepared: calib.qat.prepare(model) comes first"


# --- preparing --------------------------------------------------------------------------------


def test_a_model_that_is_prepared_already_is_refused_and_stays_as_it_is() -> None:
    model = prepare(seeded(ConvNet), bits=3)
    before = state(model)
    message = refusal(TrainingError, lambda: prepare(model, bits=5))
    assert message == "the model is prepared already: calib.qat.remove(model) undoes that"
    assert_same_state(before, state(model))
    assert refusal(TrainingError, lambda: prepare(nn.Sequential(nn.Linear(2, 2), model))) == message


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.ReLU(), ""),
        (
            nn.LSTM(3, 4),
            " (: LSTM is not supported)",
        ),
        (
            nn.Sequential(nn.GRU(3, 4)),
            " (0: GRU is not supported)",
        ),
    ],
)
def test_a_model_without_a_layer_to_quantize_is_refused(model: nn.Module, why: str) -> None:
    assert refusal(TrainingError, lambda: prepare(model)) == (
        f"nothing to quantize: no Conv, ConvTranspose, Linear or calib.qat.MatMul in the model{why}"
    )


def test_rules_that_skip_everything_are_refused_and_nothing_is_attached() -> None:
    model = seeded(ConvNet)
    rules = [LayerRule("conv", skip=True), LayerRule("head", skip=True)]
    message = refusal(OptionError, lambda: prepare(model, rules=rules))
    assert message == "nothing left to quantize: rules skip all layers"
    assert hooks(model) == []


def test_a_rule_that_matches_no_layer_is_refused_with_the_layers_that_there_are() -> None:
    rules = [LayerRule("conv"), LayerRule("^fc$", bits=3)]
    assert refusal(OptionError, lambda: prepare(seeded(ConvNet), rules=rules)) == (
        "rules[1].match: '^fc$' matches no layer; there are 'conv1', 'conv2', 'head'"
    )
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    assert refusal(OptionError, lambda: prepare(many, rules=rules[1:])) == (
        "rules[0].match: '^fc$' matches no layer; there are '0', '1', '2', '3', '4' and 3 more"
    )


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"gradient": "mhp"},
            OptionError,
            "gradient must be ste, pwl, mad, mph, pact or lsq, got 'mhp' (did you mean 'mph'?)",
        ),
        (
            {"mode": "dynamical"},
            OptionError,
            "mode must be dynamic or static, got 'dynamical' (did you mean 'dynamic'?)",
        ),
        ({"mode": "on"}, OptionError, "mode must be dynamic or static, got 'on'"),
        ({"bits": 1}, OptionError, "bits must be one of 2 to 8 or 16, got 1"),
        ({"bits": 9}, OptionError, "bits must be one of 2 to 8 or 16, got 9"),
        ({"edge_bits": 17}, OptionError, "edge-bits must be one of 2 to 8 or 16, got 17"),
        (
            {"calibrator": "percentile:101"},
            OptionError,
            "percentile must be above 1 and at most 100, got 101.0: it is in percent, ",
        ),
        ({"calibrator": "octave"}, CalibratorError, "octave"),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_bounds_is_refused(
    settings: dict[str, Any], kind: type[CalibError], message: str
) -> None:
    model = seeded(ConvNet)
    found = refusal(kind, lambda: prepare(model, **settings))
    assert found.startswith(message) if kind is OptionError else message in found
    assert hooks(model) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "("}, "match: '(' is no regular expression: "),
        ({"match": "a{99999999999}"}, "match: 'a{99999999999}' is no regular expression: "),
        ({"match": "", "kind": "weights"}, "kind must be weight or activation, got 'weights'"),
        ({"match": "", "bits": 12}, "bits must be one of 2 to 8 or 16, got 12"),
        ({"match": "", "mode": "off"}, "mode must be dynamic or static, got 'off'"),
        ({"match": "", "gradient": "mph2"}, "gradient must be ste, pwl, mad, mph, pact or lsq"),
        ({"match": "", "skip": True, "bits": 4}, "skip keeps tensors float, bits has no meaning"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    assert refusal(OptionError, lambda: LayerRule(**settings)).startswith(message)


def test_a_rule_with_an_unknown_calibrator_is_refused() -> None:
    assert "maxx" in refusal(CalibratorError, lambda: LayerRule("", calibrator="maxx"))


def test_a_reduction_over_no_batches_and_widths_out_of_bounds_are_refused() -> None:
    assert refusal(OptionError, lambda: Reduction("mean", 0)).startswith("mean-batches must be")
    assert refusal(OptionError, lambda: Widths(4, 20)).startswith("activation-bits must be")


def test_a_lazy_layer_whose_shape_is_not_known_is_refused_until_it_is() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    assert refusal(TrainingError, lambda: prepare(model)) == (
        "0: the shape of its weight is not known yet: run the model once before"
    )
    model(draw(4, 5))
    assert len(quantizers(prepare(model))) == 4


# --- a model that is not prepared -------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        remove,
        quantizers,
        lambda model: calibrate(model, image_batches()),
        lambda model: export(model, images(), "never.onnx"),
        lambda model: remove(remove(prepare(model))),
    ],
)
def test_what_needs_a_prepared_model_refuses_another(call: Callable[[nn.Module], Any]) -> None:
    assert refusal(TrainingError, lambda: call(seeded(ConvNet))) == NOT_PREPARED


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_data_that_is_not_finite_is_refused_by_the_name_of_what_holds_it(
    mode: str, value: float
) -> None:
    model = prepare(seeded(ConvNet), mode=mode)
    train(model, image_batches(6))
    broken = images().index_put([torch.tensor(2)], torch.tensor(value))
    before = state(model)
    for _ in range(2):
        assert refusal(TrainingError, lambda: model(broken)) == (
            "conv1.activation: holds NaN or infinity: the training data does, or training has "
            "diverged (try a lower learning rate)"
        )
    after = state(model)
    assert_same_state(
        {k: v for k, v in before.items() if k.startswith("conv1")},
        {k: v for k, v in after.items() if k.startswith("conv1")},
    )


@pytest.mark.parametrize("gradient", ["mph", "lsq"])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(gradient: str) -> None:
    model = prepare(seeded(ConvNet), gradient=gradient)
    assert isinstance(model, ConvNet)
    train(model, image_batches())
    with torch.no_grad():
        model.conv2.weight[1, 0, 0, 0] = torch.nan
    assert refusal(TrainingError, lambda: model(images())).startswith("conv2.weight: holds NaN")


def test_a_checkpoint_that_lacks_some_thresholds_is_refused_strictly() -> None:
    saved = state(prepare(seeded(ConvNet)))
    saved.pop("conv1.fake_quant.weight.threshold")
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1.fake_quant.weight.threshold"):
        prepare(seeded(ConvNet)).load_state_dict(saved)


def test_calibrating_on_no_batch_is_refused() -> None:
    model = prepare(seeded(ConvNet)).train()
    message = refusal(TrainingError, lambda: calibrate(model, iter([])))
    assert message == "calibrate was given no batch"
    assert model.training


def test_evaluating_before_any_training_warns_once_per_tensor_and_stores_nothing() -> None:
    model = prepare(seeded(ConvNet)).eval()
    with pytest.warns(UserWarning, match="evaluated before it has seen a training batch") as caught:
        model(images())
    assert len(caught) == 3
    found = quantizers(model)
    assert all(int(q.n_seen) == 0 for name, q in found.items() if name.endswith("activation"))


# --- what stays float ---------------------------------------------------------------------------


def test_multi_head_attention_stays_float_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = prepare(nn.TransformerEncoderLayer(8, 2, 16))
    assert {name.partition(".")[0] for name in quantizers(model)} == {"linear1", "linear2"}
    (message,) = caplog.messages
    assert message == (
        "self_attn stays float: MultiheadAttention calls functions that hooks cannot see; build "
        "it from Linear and calib.qat.ScaledDotProductAttention"
    )


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRUCell, lambda a, b: nn.Bilinear(a, b, 3)])
def test_other_layers_with_weights_stay_float_and_the_log_says_so(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = build(4, 4)
    prepare(nn.ModuleDict({"linear": nn.Linear(3, 4), "other": other}))
    assert caplog.messages == [f"other stays float: {type(other).__name__} is not supported"]


def test_a_weight_that_is_computed_stays_float_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    normalized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = prepare(nn.Sequential(nn.Linear(3, 4), normalized))
    assert set(quantizers(model)) == {"0.weight", "0.activation"}
    assert caplog.messages == ["1 stays float: its weight is computed from other parameters"]


# --- without PyTorch --------------------------------------------------------------------------

_WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Blocked(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path[:] = [Blocked if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_calib_works_without_torch_and_calib_qat_says_what_to_install(tmp_path: Path) -> None:
    code = f"{_WITHOUT_TORCH}\nimport calib\ncalib.check_models\nprint('fine')\nimport calib.qat"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout == "fine\n"
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: calib.qat needs PyTorch: pip install 'octav-calibrate[torch]'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_fast_path_of_a_transformer_does_not_go_around_the_quantizers(
    layers: int, padded: bool
) -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, layers) if layers else layer

    x, mask = draw(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = ready(seeded(build), x, bits=2, edge_bits=2)
    given = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        quantized, plain = model(x, **given), seeded(build).eval()(x, **given)
    # With gradients there is no fast path.
    expected = model(x.clone().requires_grad_(), **given).detach()
    kept = ~mask if padded else slice(None)
    torch.testing.assert_close(quantized[kept], expected[kept])
    assert (quantized[kept] - plain[kept]).abs().max() > 0.01
