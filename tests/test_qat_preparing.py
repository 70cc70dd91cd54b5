"""Quantizers on a user's model: where they go, what they leave alone, how they come off again."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from qat_models import (
    Attention,
    Called,
    ConvNet,
    Shared,
    SideBySide,
    Tied,
    assert_same_state,
    draw,
    hooks,
    image_batches,
    images,
    ready,
    seeded,
    side_by_side_inputs,
    state,
    thresholds,
    train,
)
from torch import Tensor, nn

from calib import Widths
from calib.qat import LayerRule, MatMul, calibrate, prepare, quantizers, remove
from calib.qat.hooks import prepared_layers
from calib.qat.preparing import call

MODELS: dict[str, tuple[Callable[[], nn.Module], object]] = {
    "conv_net": (ConvNet, images()),
    "side_by_side": (SideBySide, side_by_side_inputs()),
    "attention": (Attention, draw(4, 5, 8)),
    "shared": (Shared, draw(8, 6)),
    "tied": (Tied, torch.arange(14).reshape(2, 7) % 7),
    "called_by_keyword": (Called, draw(8, 6)),
    "one_layer": (lambda: nn.Linear(6, 4), draw(8, 6)),
}


def outputs(model: nn.Module, inputs: object) -> tuple[Tensor, ...]:
    """In evaluation mode."""
    with torch.no_grad():
        found = call(model.eval(), inputs)
    return found if isinstance(found, tuple) else (found,)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


# --- where they go ----------------------------------------------------------------------------


def test_every_kind_of_layer_gets_its_quantizers() -> None:
    model = prepare(seeded(SideBySide))
    weighted = [name for name, _ in model.named_children() if name != "product"]
    expected = {f"{name}.{part}" for name in weighted for part in ("weight", "activation")}
    assert set(quantizers(model)) == expected | {"product.first", "product.second"}


def test_weights_have_a_threshold_for_each_output_channel_activations_one() -> None:
    model = ready(seeded(SideBySide), side_by_side_inputs())
    for name, quantizer in quantizers(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight"):
            axis = int("Transpose" in type(layer).__name__)
            weight = layer.get_parameter("weight")
            largest = weight.detach().abs().movedim(axis, 0).flatten(1).amax(1)
            assert quantizer.threshold.shape == largest.shape
            assert (quantizer.threshold <= largest).all()
            assert len(set(quantizer.threshold.tolist())) == len(largest)
        else:
            assert quantizer.threshold.shape == (1,)


def test_activations_are_unsigned_exactly_where_they_were_never_negative() -> None:
    inputs = side_by_side_inputs()
    model = ready(seeded(SideBySide), inputs)
    names = [name for name in quantizers(model) if not name.endswith(".weight")]
    found = {name: bool(quantizers(model)[name].signed) for name in names}
    assert found == {name: bool((x < 0).any()) for name, x in zip(names, inputs, strict=True)}
    assert set(found.values()) == {True, False}


def test_a_prepared_model_computes_with_what_its_quantizers_make() -> None:
    """The oracle calls the functions of torch on quantized tensors itself."""
    model = ready(seeded(ConvNet), images())
    assert isinstance(model, ConvNet)
    found = quantizers(model)

    def q(name: str, tensor: Tensor) -> Tensor:
        return found[name](tensor)  # type: ignore[no-any-return]

    with torch.no_grad():
        x = nn.functional.conv2d(
            q("conv1.activation", images()), q("conv1.weight", model.conv1.weight), padding=1
        )
        x = torch.relu(model.norm(x))
        x = nn.functional.conv2d(
            q("conv2.activation", x), q("conv2.weight", model.conv2.weight), model.conv2.bias
        )
        x = torch.relu(x).mean((2, 3))
        expected = q("head.activation", x) @ q("head.weight", model.head.weight).T + model.head.bias
        torch.testing.assert_close(model(images()), expected)


def test_both_operands_of_products_in_attention_are_quantized() -> None:
    x = draw(4, 5, 8)
    coarse = ready(seeded(Attention), x, bits=2, edge_bits=2)
    plain = seeded(Attention)
    for product in ("scores", "values"):
        for operand in ("first", "second"):
            levels: list[int] = []
            quantizer = quantizers(coarse)[f"attention.{product}.{operand}"]
            quantizer.register_forward_hook(
                lambda _m, _i, y, n=levels: n.append(len(torch.unique(y)))
            )
            outputs(coarse, x)
            assert levels
            assert levels[0] <= 4
    assert not same(outputs(plain, x), outputs(coarse, x))


def test_layers_called_by_keyword_are_quantized_as_by_position() -> None:
    x = draw(8, 6)
    model = ready(seeded(Called), x)
    assert isinstance(model, Called)
    with torch.no_grad():
        by_position = model.product(model.linear(x), x.transpose(0, 1))
        assert torch.equal(model(x), by_position)
        assert torch.equal(model.product(by_position, b=x), model.product(by_position, x))
    assert not torch.equal(by_position, outputs(seeded(Called), x)[0])


def test_a_layer_that_is_called_twice_has_one_pair_of_quantizers_that_sees_both_calls() -> None:
    model = prepare(seeded(Shared))
    train(model, [draw(8, 6)])
    found = quantizers(model)
    assert len(found) == 6
    assert int(found["twice.activation"].n_seen) == int(found["twice.weight"].n_seen) == 2
    assert int(found["first.activation"].n_seen) == 1
    # Values before the Relu come first, and are negative.
    assert bool(found["twice.activation"].signed)


def test_tied_weights_stay_one_parameter_and_the_embedding_reads_it_in_float() -> None:
    model = prepare(seeded(Tied), bits=2, edge_bits=2)
    assert isinstance(model, Tied)
    assert model.head.weight is model.embedding.weight
    ids = torch.arange(7)[None]
    train(model, [ids])
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding(ids)[0], model.embedding.weight)
    assert len(torch.unique(model.embedding.weight)) > 4 * 6


def test_a_model_that_is_itself_one_layer_is_prepared() -> None:
    model = prepare(nn.Linear(6, 4))
    assert set(quantizers(model)) == {"weight", "activation"}


def test_a_layer_of_a_class_derived_from_linear_is_prepared() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return nn.functional.linear(input, self.weight, self.bias) * 2

    layer = seeded(lambda: Scaled(6, 4))
    expected = 2 * outputs(ready(seeded(lambda: nn.Linear(6, 4)), draw(8, 6)), draw(8, 6))[0]
    assert torch.equal(outputs(ready(layer, draw(8, 6)), draw(8, 6))[0], expected)


# --- what they leave alone --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_classes_keys_and_parameters_stay_and_new_keys_lie_apart(name: str) -> None:
    model = seeded(MODELS[name][0])
    before, classes = state(model), {n: type(m) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    prepare(model)
    after = state(model)
    assert_same_state(before, {k: v for k, v in after.items() if k in before})
    new = [key for key in after if key not in before]
    assert new
    assert all(re.search(r"(^|\.)fake_quant\.", key) for key in new)
    assert {n: type(m) for n, m in model.named_modules() if n in classes} == classes
    assert all(parameters[n] is p for n, p in model.named_parameters())


@pytest.mark.parametrize("how", ["itself", "copy", "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_remove_gives_the_float_model_back(name: str, how: str) -> None:
    build, inputs = MODELS[name]
    original = seeded(build)
    expected, modules = outputs(original, inputs), [n for n, _ in original.named_modules()]
    attributes = {n: set(vars(m)) for n, m in original.named_modules()}
    model = ready(seeded(build), inputs)
    if how != "itself":
        model = copy.deepcopy(model) if how == "copy" else saved_and_loaded(model)
    assert not same(outputs(model, inputs), expected)
    remove(model)
    assert same(outputs(model, inputs), expected)
    assert_same_state(state(model), state(original))
    assert [n for n, _ in model.named_modules()] == modules
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert hooks(model) == []


def test_hooks_of_the_user_see_what_they_would_see_and_outlive_remove() -> None:
    model = seeded(ConvNet)
    assert isinstance(model, ConvNet)
    seen: list[Tensor] = []
    model.conv2.register_forward_hook(lambda _module, _args, y: seen.append(y))
    prepare(model)
    model(images())
    remove(model)
    model(images())
    assert len(seen) == 2
    assert hooks(model) == ["conv2._forward_hooks"]


def test_a_layer_whose_call_fails_has_its_own_weight_afterwards() -> None:
    model = prepare(seeded(lambda: nn.Linear(6, 4)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(draw(8, 5))
    assert "weight" not in vars(model)
    assert model.weight is dict(model.named_parameters())["weight"]


def test_a_frozen_layer_is_quantized_and_stays_as_it_is() -> None:
    model = seeded(ConvNet)
    assert isinstance(model, ConvNet)
    model.conv1.requires_grad_(False)
    before = model.conv1.weight.clone()
    prepare(model)
    train(model, image_batches())
    assert torch.equal(model.conv1.weight, before)
    assert model.conv1.weight.grad is None
    assert int(quantizers(model)["conv1.weight"].n_seen) == 3


# --- settings ---------------------------------------------------------------------------------


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: q.settings.bits for name, q in quantizers(model).items()}


@pytest.mark.parametrize(
    ("bits", "edge_bits", "edge", "weight", "activation"),
    [
        (4, None, (8, 8), 4, 4),
        (16, None, (16, 16), 16, 16),
        (4, 4, (4, 4), 4, 4),
        (Widths(3, 5), None, (8, 8), 3, 5),
        (Widths(3, 5), 6, (6, 6), 3, 5),
        (Widths(3, 16), None, (8, 16), 3, 16),
    ],
)
def test_first_and_last_weighted_layers_have_widths_of_their_own(
    bits: int | Widths, edge_bits: int | None, edge: tuple[int, int], weight: int, activation: int
) -> None:
    found = bits_of(prepare(seeded(Attention), bits=bits, edge_bits=edge_bits))
    for name in ("query", "out"):
        assert (found[f"{name}.weight"], found[f"{name}.activation"]) == edge
    assert (found["key.weight"], found["key.activation"]) == (weight, activation)
    assert found["attention.scores.first"] == found["attention.values.second"] == activation


def test_rules_say_what_holds_for_the_layers_that_they_match_and_the_first_decides() -> None:
    rules = [
        LayerRule("^conv1$", kind="weight", bits=2, gradient="lsq"),
        LayerRule("conv", bits=6, mode="static", calibrator="percentile:99"),
        LayerRule("head", skip=True),
        LayerRule("", gradient="pact"),
    ]
    model = prepare(seeded(ConvNet), rules=rules)
    found = {name: q.settings for name, q in quantizers(model).items()}
    assert set(found) == {f"conv{n}.{part}" for n in (1, 2) for part in ("weight", "activation")}
    assert (found["conv1.weight"].bits, found["conv1.weight"].gradient) == (2, "lsq")
    assert found["conv1.weight"].calibrator == "octav"
    for name in ("conv1.activation", "conv2.weight", "conv2.activation"):
        assert (found[name].bits, found[name].calibrator) == (6, "percentile:99")
        assert found[name].gradient == ("mad" if name.endswith("weight") else "pwl")
    assert (found["conv2.activation"].batches, found["conv2.weight"].batches) == (5, 1)


@pytest.mark.parametrize(
    ("gradient", "weight", "activation"),
    [
        ("mph", "mad", "pwl"),
        ("ste", "ste", "ste"),
        ("pact", "ste", "pact"),
        ("lsq", "lsq", "lsq"),
    ],
)
def test_a_gradient_means_one_for_weights_and_one_for_activations(
    gradient: str, weight: str, activation: str
) -> None:
    model = prepare(seeded(ConvNet), gradient=gradient)
    found = {name.rpartition(".")[2]: q.settings for name, q in quantizers(model).items()}
    assert (found["weight"].gradient, found["activation"].gradient) == (weight, activation)
    learned = [name for name, _ in model.named_parameters() if name.endswith(".learned")]
    assert len(learned) == {"pact": 3, "lsq": 6}.get(gradient, 0)


def test_a_repr_names_the_settings() -> None:
    model = prepare(seeded(ConvNet), bits=3, mode="static", calibrator="max")
    assert (
        "(weight): Quantizer(3 bits, per-channel(axis=0), max, static over 1 batches, mad)"
        in repr(model)
    )


# --- calibrating -------------------------------------------------------------------------------


def test_calibrating_leaves_parameters_and_modes_alone() -> None:
    model = prepare(seeded(ConvNet)).train()
    assert isinstance(model, ConvNet)
    model.conv2.eval()
    modes = [module.training for module in model.modules()]
    before = {k: v for k, v in state(model).items() if "fake_quant" not in k}
    calibrate(model, image_batches())
    after = state(model)
    assert_same_state(before, {k: after[k] for k in before})
    assert [module.training for module in model.modules()] == modes
    assert all(int(q.n_seen) == 3 for q in quantizers(model).values())
    assert len(thresholds(model)) == 6


def test_a_matmul_alone_is_a_model() -> None:
    assert set(quantizers(prepare(nn.Sequential(MatMul())))) == {"0.first", "0.second"}
    assert [name for name, _, _ in prepared_layers(prepare(MatMul()))] == [""]
