"""Gradients of fake quantization against the papers' formulas, value by value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.qat import prepare
from calib.qat.estimators import (
    ESTIMATORS,
    fake_quantize,
    learn_scale,
    learn_threshold,
)
from calib.qat.grid import along_tensor

torch.set_num_threads(1)  # of tensors this small, on machines this busy: many times faster

estimators = pytest.mark.parametrize("estimator", ESTIMATORS)
kinds = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
axes = pytest.mark.parametrize("axis", [None, 0, 1])


def factor(estimator: str, x: float, s: float, signed: bool) -> float:
    """method.md, section 1.5: what the upstream gradient is multiplied by."""
    if not signed and x < 0:
        return 0.0
    if estimator == "ste" or abs(x) <= s:
        return 1.0
    return 0.0 if estimator == "pwl" else s / abs(x)


def factors(estimator: str, x: Tensor, s: Tensor, signed: bool) -> Tensor:
    """`factor` of each value; ``s`` broadcasts against ``x``."""
    pairs = zip(x.double().ravel().tolist(), s.double().expand_as(x).ravel().tolist(), strict=True)
    found = [factor(estimator, value, limit, signed) for value, limit in pairs]
    return torch.tensor(found, dtype=torch.float64).reshape(x.shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(output: Tensor, upstream: Tensor, *leaves: Tensor) -> tuple[Any, ...]:
    return torch.autograd.grad(output, leaves, upstream, allow_unused=True)


def back(call: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that ``x`` gets."""
    leaf = x.detach().requires_grad_()
    gradient: Tensor = gradients(call(leaf), upstream, leaf)[0]
    assert gradient.dtype == x.dtype
    assert gradient.shape == x.shape
    return gradient


def estimated(estimator: str, x: Tensor, s: Tensor, signed: bool, axis: int | None) -> Tensor:
    """The gradient of 4-bit fake quantization for upstream gradients `upstream_of` ``x``."""

    def call(leaf: Tensor) -> Tensor:
        return fake_quantize(leaf, s, torch.tensor(signed), 4, False, axis, estimator)

    return back(call, x, upstream_of(x))


def upstream_of(x: Tensor) -> Tensor:
    return random(*x.shape, seed=9).to(x.dtype)


def edges(s: float) -> list[float]:
    """Values at, just below and just above each place where a formula bends."""
    bends = np.array([0.0, s, -s, 1.5 * s], np.float32)
    around = [np.nextafter(bends, np.float32(towards)) for towards in (-np.inf, np.inf)]
    found = np.concatenate([bends, *around, [-0.0, 1e-30, -1e-30, 1e30, -1e30]])
    return [float(value) for value in found]


# --- ste, pwl, mad ------------------------------------------------------------------------------


@estimators
@kinds
@pytest.mark.parametrize("s", [1.0, 0.3, 1e-30, 2e38])
def test_every_bend_of_a_formula_is_where_it_says(estimator: str, signed: bool, s: float) -> None:
    limit = torch.tensor([s])
    x = torch.tensor(edges(float(limit)))
    expected = upstream_of(x) * factors(estimator, x, limit, signed)
    found = estimated(estimator, x, limit, signed, None)
    assert torch.allclose(found.double(), expected, rtol=3e-7, atol=1e-38)
    if estimator != "mad":
        assert torch.equal(found.double(), expected)


@estimators
@kinds
@axes
def test_each_channel_has_its_own_threshold(estimator: str, signed: bool, axis: int | None) -> None:
    x = random(3, 4, 5)
    s = torch.linspace(0.2, 1.7, 1 if axis is None else x.shape[axis])
    expected = upstream_of(x) * factors(estimator, x, along_tensor(s, 3, axis), signed)
    found = estimated(estimator, x, s, signed, axis)
    assert torch.allclose(found.double(), expected, rtol=3e-7, atol=0)
    assert (found == 0).any() or (signed and estimator != "pwl")


@estimators
@kinds
@axes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_have_the_same_gradients_rounded(
    estimator: str, signed: bool, axis: int | None, dtype: torch.dtype
) -> None:
    x = random(3, 4, 5).to(dtype)
    s = torch.linspace(0.25, 1.75, 1 if axis is None else x.shape[axis])
    limit = along_tensor(s, 3, axis)
    expected = upstream_of(x).double() * factors(estimator, x, limit, signed)
    found = estimated(estimator, x, s, signed, axis)
    tolerance = max(torch.finfo(dtype).eps, 3e-7)
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=1e-7)


@estimators
@kinds
@axes
def test_the_layout_of_memory_does_not_matter(
    estimator: str, signed: bool, axis: int | None
) -> None:
    plain = random(4, 6, 5)
    s = torch.linspace(0.2, 1.7, 1 if axis is None else plain.shape[axis])
    expected = estimated(estimator, plain, s, signed, axis)
    apart = torch.stack([plain, plain], dim=-1)[..., 1]
    turned = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for same in (apart, turned):
        assert not same.is_contiguous()
        assert torch.equal(estimated(estimator, same, s, signed, axis), expected)


@estimators
@kinds
@axes
def test_nothing_gets_a_gradient_of_nothing(estimator: str, signed: bool, axis: int | None) -> None:
    x = torch.zeros(3, 4, 0)
    s = torch.ones(1 if axis is None else x.shape[axis])
    assert estimated(estimator, x, s, signed, axis).shape == (3, 4, 0)


@estimators
@kinds
def test_compiled_graphs_and_gpus_have_the_same_gradients(
    estimator: str, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bounds must not become plain numbers."""
    x, s = torch.tensor(edges(0.3)), torch.tensor([0.3])
    expected = estimated(estimator, x, s, signed, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(Tensor, "item", None)
    assert torch.equal(estimated(estimator, x, s, signed, None), expected)


@kinds
def test_pwl_is_the_derivative_of_clipping(signed: bool) -> None:
    x, s = random(500), 0.8

    def clip(leaf: Tensor) -> Tensor:
        return leaf.clamp(-s if signed else 0.0, s)

    expected = back(clip, x, upstream_of(x))
    assert torch.equal(estimated("pwl", x, torch.tensor([s]), signed, None), expected)


@kinds
@pytest.mark.parametrize("estimator", ["pwl", "mad"])
def test_the_estimator_is_a_true_derivative(estimator: str, signed: bool) -> None:
    """Of the clip, and of what grows by the logarithm beyond: by finite differences."""
    s = torch.tensor([0.8])
    x = random(300)
    x = x[(x.abs() - 0.8).abs().minimum(x.abs()) > 0.01].double()

    def antiderivative(values: Tensor) -> Tensor:
        beyond = 0.8 * (1 + (values.abs() / 0.8).log()) if estimator == "mad" else 0.8
        grown = torch.where(values.abs() <= 0.8, values, values.sign() * beyond)
        return grown if signed else grown * (values > 0)

    step = 1e-6
    slope = (antiderivative(x + step) - antiderivative(x - step)) / (2 * step)
    found = estimated(estimator, x.float(), s, signed, None) / upstream_of(x.float())
    assert torch.allclose(found.double(), slope, rtol=1e-5, atol=1e-5)


def test_the_threshold_is_not_differentiated() -> None:
    x, s = random(5).requires_grad_(), torch.ones(1, requires_grad=True)
    quantized = fake_quantize(x, s, torch.tensor(True), 4, False, None, "mad")
    assert gradients(quantized, torch.ones(5), s) == (None,)


# --- mph ----------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("gradient", ["mph", "mad", "pwl", "ste"])
def test_a_trained_layer_multiplies_its_gradients_by_the_formulas(
    signed: bool, gradient: str
) -> None:
    """``mph`` is mad for weights and pwl for activations."""
    layer = nn.Linear(40, 6, bias=False)
    weight, x = random(6, 40, seed=1) ** 3, random(8, 40, seed=2)
    layer.weight.data.copy_(weight)
    x = (x if signed else x.abs()).requires_grad_()
    model = prepare(nn.Sequential(layer), bits=3, edge_bits=3, gradient=gradient)
    upstream = random(8, 6, seed=3)
    of_x, of_layer = gradients(model(x), upstream, x, layer.weight)
    folder = layer.get_submodule("fake_quant")
    s_weight, s_input = (folder.get_buffer(f"{n}.threshold") for n in ("weight", "activation"))
    sign = torch.tensor(signed)
    quantized = fake_quantize(x.detach(), s_input, sign, 3, False, None, "ste")
    on_grid = fake_quantize(weight, s_weight, torch.tensor(True), 3, True, 0, "ste")
    for_weight = "mad" if gradient == "mph" else gradient
    for_input = "pwl" if gradient == "mph" else gradient
    of_weight = factors(for_weight, weight, s_weight[:, None], True)
    of_input = factors(for_input, x.detach(), s_input, signed)
    assert torch.allclose(of_layer.double(), (upstream.T @ quantized) * of_weight)
    assert torch.allclose(of_x.double(), (upstream @ on_grid) * of_input)
    assert (s_weight < weight.abs().amax(1)).all()
    assert s_input < x.abs().max()


# --- PACT ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("threshold", [0.7, -0.7, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pact_sums_the_gradients_of_what_is_clipped(
    signed: bool, threshold: float, dtype: torch.dtype
) -> None:
    x = random(6, 50).to(dtype).requires_grad_()
    learned = torch.tensor([threshold], requires_grad=True)
    upstream = upstream_of(x)
    quantized = learn_threshold(x, learned, torch.tensor(signed), 4)
    of_x, slope = gradients(quantized, upstream, x, learned)
    s, total = float(learned.detach().abs()), 0.0
    for value, gradient in zip(x.ravel().tolist(), upstream.ravel().tolist(), strict=True):
        total += gradient * (value > s) - gradient * (signed and value < -s)
    assert slope.shape == (1,)
    expected = total * math.copysign(1, threshold)
    assert slope.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (expected == 0) == (threshold == 5.0)
    passed = upstream.double() * factors("pwl", x.detach(), torch.tensor(s), signed)
    assert of_x.dtype == dtype
    assert torch.equal(of_x.double(), passed)


@kinds
def test_pact_is_the_derivative_of_clipping_by_the_threshold(signed: bool) -> None:
    x = random(500)
    upstream = upstream_of(x)
    learned = torch.tensor([0.6], requires_grad=True)
    quantized = learn_threshold(x, learned, torch.tensor(signed), 8)
    s = torch.tensor([0.6], requires_grad=True)
    clipped = torch.minimum(torch.maximum(x, -s if signed else torch.zeros(1)), s)
    (found,), (expected,) = gradients(quantized, upstream, learned), gradients(clipped, upstream, s)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_pact_takes_a_value_at_the_threshold_as_not_clipped() -> None:
    for x in (0.5, -0.5, 0.0):
        leaf = torch.tensor([x], requires_grad=True)
        learned = torch.tensor([0.5], requires_grad=True)
        quantized = learn_threshold(leaf, learned, torch.tensor(True), 4)
        assert gradients(quantized, torch.ones(1), learned, leaf) == (0, 1)


# --- LSQ ----------------------------------------------------------------------------------------


def listing(x: Tensor, scale: Tensor, low: int, high: int, n: int) -> Tensor:
    """Appendix B of the paper: torch differentiates what is not detached."""
    damping = 1 / math.sqrt(n * high)
    step = (scale - scale * damping).detach() + scale * damping
    levels = (x / step).clamp(low, high)
    return ((levels.round() - levels).detach() + levels) * step


@kinds
@axes
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lsq_has_the_gradients_of_the_papers_listing(
    signed: bool, axis: int | None, bits: int, dtype: torch.dtype
) -> None:
    x, sign = random(6, 8, 5).to(dtype), torch.tensor(signed)
    high = 2 ** (bits - signed) - 1
    start = torch.linspace(0.3, 1.5, 1 if axis is None else x.shape[axis]) / high
    found, wanted = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    low, n = (-high - 1 if signed else 0), x.numel() // start.numel()
    quantized = learn_scale(mine, found, sign, bits, False, axis)
    expected = listing(theirs, along_tensor(wanted, 3, axis), low, high, n)
    assert torch.allclose(quantized.float(), expected, rtol=max(torch.finfo(dtype).eps, 1e-6))
    of_x, slope = gradients(quantized, upstream_of(x), mine, found)
    of_x_there, slope_there = gradients(expected, upstream_of(x).float(), theirs, wanted)
    assert of_x.dtype == dtype
    assert torch.allclose(of_x.float(), of_x_there, rtol=1e-6, atol=0)
    assert torch.allclose(slope, slope_there, rtol=1e-4, atol=1e-5)
    turned = (-start).requires_grad_()
    again = learn_scale(x, turned, sign, bits, False, axis)
    assert torch.equal(gradients(again, upstream_of(x), turned)[0], -slope)  # the magnitude counts


def test_each_value_adds_its_own_term_to_the_gradient_of_an_lsq_scale() -> None:
    """On -7 … 7 with Δ = 1: round(x/Δ) - x/Δ inside, 7 and -7 beyond, over √(1·7)."""
    terms = {0.0: 0, 0.3: -0.3, -0.3: 0.3, 2.75: 0.25, 7.0: 0, 7.01: 7, -7.0: 0, -99.0: -7}
    for value, term in terms.items():
        x, scale = torch.tensor([value], requires_grad=True), torch.ones(1, requires_grad=True)
        quantized = learn_scale(x, scale, torch.tensor(True), 4, True, None)
        slope, of_x = gradients(quantized, torch.ones(1), scale, x)
        assert slope.item() == pytest.approx(term / math.sqrt(7), rel=1e-5)
        assert of_x == float(abs(value) <= 7)


@axes
def test_no_values_leave_an_lsq_scale_alone(axis: int | None) -> None:
    x = torch.zeros(3, 4, 0)
    scale = torch.ones(1 if axis is None else x.shape[axis], requires_grad=True)
    quantized = learn_scale(x, scale, torch.tensor(True), 4, False, axis)
    assert not gradients(quantized, x, scale)[0].any()
