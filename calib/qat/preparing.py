"""Choose the layers of a PyTorch model and how each is quantized; calibrate them; undo it all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from calib.errors import OptionError, TrainingError
from calib.graph import Kind
from calib.qat.estimators import LEARNED
from calib.qat.hooks import OPERANDS, attach, detach, prepared_layers
from calib.qat.modules import MatMul
from calib.qat.quantizer import Quantizer, TensorSettings
from calib.qat.settings import LayerRule, Recipe
from calib.qtypes import check_width
from calib.rules import Reduction, Widths

_LOG = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_UNSUPPORTED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)

Model = TypeVar("Model", bound=nn.Module)


def prepare(
    model: Model,
    bits: int | Widths = 4,
    calibrator: str = "octav",
    mode: str = "dynamic",
    gradient: str = "mph",
    edge_bits: int | None = None,
    rules: Iterable[LayerRule] = (),
    reduction: Reduction | None = None,
) -> Model:
    """``model``, its layers quantizing their inputs and weights from now on; changed in place.

    Weights get one threshold for each output channel, activations one, on an unsigned grid as long
    as nothing negative was seen. Training needs no change; `export` writes the result.

    Args:
        model: every Conv, ConvTranspose, Linear and `MatMul` in it is prepared. Layers of other
            kinds stay float, which is logged where they multiply weights.
        bits: of weights and activations; `Widths` for different ones.
        calibrator: as `calib.calibrators.make` reads it: ``octav``, ``percentile:99.9``, …
        mode: ``dynamic``: a threshold of its own for each step; evaluation and export use the
            running mean of an activation's and the last of a weight's. ``static``: calibrated on
            the first training batches, or by `calibrate`, then fixed (OCTAV, section 5).
        gradient: ``ste``, ``pwl``, ``mad``, ``mph`` (mad for weights, pwl for activations);
            ``pact`` or ``lsq`` for a learned threshold or scale, which starts from the
            calibrator's: make the optimizer after this. ``pact`` learns activations' thresholds
            alone; weights then have ``ste`` and a dynamic or static threshold.
        edge_bits: of the first and last layer with weights, in the order of
            ``model.named_modules()``; None: 8, or ``bits`` where that is more.
        rules: what holds for some layers instead; of those that match, the first decides.
        reduction: of static calibration, over how many batches, ``mean`` or ``pool``; None for the
            mean over 5.

    Raises:
        OptionError, CalibratorError: for a setting that is unknown or out of bounds, a rule that
            matches nothing.
        TrainingError: if the model is prepared already, is in DistributedDataParallel, has no
            layer to quantize, or one whose shape is not known yet.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TrainingError("prepare the model before DistributedDataParallel wraps it")
    widths = bits if isinstance(bits, Widths) else Widths(check_width(bits, "bits"), bits)
    if edge_bits is not None:
        widths = Widths(widths.weights, widths.activations, edge_bits)
    if widths.activations is None:
        raise OptionError("bits: activations must have a width in training; skip what stays float")
    recipe = Recipe(
        widths, calibrator, mode, gradient, tuple(rules), reduction or Reduction("mean")
    )
    if any(True for _ in prepared_layers(model)):
        raise TrainingError("the model is prepared already: calib.qat.remove(model) undoes that")
    layers, others = _find(unwrapped(model))
    recipe.check_layers([*layers, *others])
    weighted = [name for name, layer in layers.items() if not isinstance(layer, MatMul)]
    edges = {*weighted[:1], *weighted[-1:]}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = {
        name: _quantizers_of(name, layer, recipe, edge=name in edges)
        for name, layer in layers.items()
    }
    if not any(found.values()):
        raise _nothing(layers, others)
    for name, its_quantizers in found.items():
        if its_quantizers:
            attach(layers[name], its_quantizers, device)
    for name, reason in others.items():
        _LOG.warning("%s stays float: %s", name, reason)
    _forget_compiled()
    return model


def remove(model: Model) -> Model:
    """``model`` without quantizers, a float model again; changed in place.

    Raises:
        TrainingError: if it is not prepared.
    """
    layers = list(prepared_layers(model))
    if not layers:
        raise not_prepared()
    for _, layer, quantizers in layers:
        detach(layer, quantizers)
    _forget_compiled()
    return model


def calibrate(model: Model, batches: Iterable[object]) -> Model:
    """``model``, its thresholds observed on ``batches`` without any training; changed in place.

    Args:
        model: prepared; runs in evaluation mode, without gradients.
        batches: what it is called with: a tensor, a tuple of arguments or a dictionary of keyword
            arguments each. Static calibration is over after as many as it takes. Wrapped in
            DistributedDataParallel, all ranks do this together, with as many batches each.

    Raises:
        TrainingError: if the model is not prepared, there is no batch, or a value is not finite.
    """
    if isinstance(batches, Tensor):
        raise OptionError("calibrate takes batches, and was given one tensor: put it into a list")
    found = quantizers(model)
    modes = {module: module.training for module in model.modules()}
    n_batches = 0
    model.eval()
    for quantizer in found.values():
        quantizer.train()
    try:
        with torch.no_grad():
            for n_batches, batch in enumerate(batches, 1):  # noqa: B007 - counted
                call(model, batch)
    finally:
        for module, training in modes.items():
            module.training = training
    if not n_batches:
        raise TrainingError("calibrate was given no batch")
    return model


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers by the names of their tensors: ``conv1.weight``, ``conv1.activation``, and
    for a `MatMul` ``scores.first``, ``scores.second``.

    Raises:
        TrainingError: if the model is not prepared.
    """
    found = {
        f"{name}.{part}".lstrip("."): quantizer
        for name, _, folder in prepared_layers(model)
        for part, quantizer in folder.named_children()
        if isinstance(quantizer, Quantizer)
    }
    if not found:
        raise not_prepared()
    return found


def not_prepared() -> TrainingError:
    """The error for a model without quantizers."""
    return TrainingError("the model is not prepared: calib.qat.prepare(model) comes first")


def call(model: nn.Module, batch: object) -> Any:
    """The model's answer to a tensor, a tuple of arguments or a dictionary of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside what `torch.compile` or DistributedDataParallel made of it."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _forget_compiled() -> None:
    """What was compiled does not look whether a layer has hooks by now."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _find(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers to quantize by name, and those that cannot be, with reasons."""
    layers: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        if isinstance(module, _UNSUPPORTED):
            others[name] = _why_unsupported(module)
            inside.append(name)
        elif isinstance(module, MatMul):
            layers[name] = module
        elif isinstance(module, _WEIGHTED):
            if parametrize.is_parametrized(module) or "weight" not in module._parameters:
                others[name] = "its weight is computed from other parameters"
            elif isinstance(module.weight, nn.parameter.UninitializedParameter):
                raise TrainingError(
                    f"{name}: the shape of its weight is not known yet: run the model once before"
                )
            else:
                layers[name] = module
    return layers, others


def _why_unsupported(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return (
            "MultiheadAttention calls functions that hooks cannot see; build it from Linear and "
            "calib.qat.ScaledDotProductAttention"
        )
    return f"{type(module).__name__} is not supported"


def _nothing(layers: Mapping[str, nn.Module], others: Mapping[str, str]) -> Exception:
    if layers:
        return OptionError("nothing left to quantize: rules skip all layers")
    first = "".join(f" ({name}: {reason})" for name, reason in list(others.items())[:1])
    return TrainingError(
        f"nothing to quantize: no Conv, ConvTranspose, Linear or calib.qat.MatMul in the "
        f"model{first}"
    )


def _quantizers_of(
    name: str, layer: nn.Module, recipe: Recipe, *, edge: bool
) -> dict[str, Quantizer]:
    """The quantizers of a layer by part, without those that a rule leaves out."""
    kinds: dict[str, Kind] = {"activation": "activation", "weight": "weight"}
    if isinstance(layer, MatMul):
        kinds = dict.fromkeys(OPERANDS, "activation")
    found = {}
    for part, kind in kinds.items():
        if not recipe.rule_for(name, kind).skip:
            settings = _settings((name, part), layer, recipe, edge=edge)
            axis = settings.axis
            groups = 1 if axis is None else layer.get_parameter("weight").shape[axis]
            found[part] = Quantizer(settings, groups)
    return found


def _settings(
    place: tuple[str, str], layer: nn.Module, recipe: Recipe, *, edge: bool
) -> TensorSettings:
    name, part = place
    kind: Kind = "weight" if part == "weight" else "activation"
    rule = recipe.rule_for(name, kind)
    gradient = rule.gradient or recipe.gradient
    if gradient == "mph":
        gradient = "mad" if kind == "weight" else "pwl"
    elif gradient == "pact" and kind == "weight":
        gradient = "ste"
    static = (rule.mode or recipe.mode) == "static"
    batches = recipe.reduction.batches if static else 0
    if (kind == "weight" and static) or gradient in LEARNED:
        batches = 1
    return TensorSettings(
        name=f"{name}.{part}".lstrip("."),
        kind=kind,
        bits=rule.bits or recipe.widths.of(kind, edge),
        axis=None if kind == "activation" else int(isinstance(layer, _TRANSPOSED)),
        calibrator=rule.calibrator or recipe.calibrator,
        batches=batches,
        pooled=static and kind == "activation" and batches > 1 and recipe.reduction.name == "pool",
        gradient=gradient,
    )
