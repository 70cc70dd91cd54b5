"""Quantizers on a layer: a submodule that holds them, and hooks that call them.

A layer keeps its class, its parameters and their names. It gains a submodule ``fake_quant`` with
its quantizers, and two hooks: one that quantizes its input, and its weight for the time of the
call, and one that puts the weight back. Hooks are functions of this module, so that deepcopy and
torch.save take them along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.qat.modules import MatMul
from calib.qat.quantizer import Quantizer

FOLDER = "fake_quant"
OPERANDS = ("first", "second")


class FakeQuant(nn.Module):
    """The quantizers of one layer: ``weight`` and ``activation``, or the operands of a `MatMul`.

    ``handles`` are those of the hooks.
    """

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__()
        self.handles: tuple[Any, ...] = ()
        for name, quantizer in quantizers.items():
            self.add_module(name, quantizer)


def attach(layer: nn.Module, its_quantizers: Mapping[str, Quantizer], device: torch.device) -> None:
    """Gives a layer its quantizers, by part, and hooks that call them."""
    folder = FakeQuant(its_quantizers)
    folder.to(next((p.device for p in layer.parameters()), device))
    folder.train(layer.training)
    layer.add_module(FOLDER, folder)
    before = _before_product if isinstance(layer, MatMul) else _before_layer
    folder.handles = (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(_after, always_call=True),
    )


def detach(layer: nn.Module, folder: FakeQuant) -> None:
    """Takes them off again."""
    for handle in folder.handles:
        handle.remove()
    restore(layer)
    delattr(layer, FOLDER)


def restore(layer: nn.Module) -> None:
    """Puts the parameter back in sight, also where the call was interrupted."""
    layer.__dict__.pop("weight", None)


def prepared_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FakeQuant]]:
    """Name, layer and quantizers of all prepared layers."""
    for name, module in model.named_modules():
        folder = module._modules.get(FOLDER)
        if isinstance(folder, FakeQuant):
            yield name, module, folder


def _before_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = layer._modules[FOLDER]._modules  # type: ignore[union-attr]
    quantize_input, quantize_weight = found.get("activation"), found.get("weight")
    if quantize_input is not None:
        if args:
            args = (quantize_input(args[0]), *args[1:])
        else:
            kwargs = {**kwargs, "input": quantize_input(kwargs["input"])}
    if quantize_weight is not None:
        # Found before the parameter, which stays where it is.
        layer.__dict__["weight"] = quantize_weight(layer._parameters["weight"])
    return args, kwargs


def _before_product(
    product: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = product._modules[FOLDER]._modules  # type: ignore[union-attr]
    first, second = (*args, *(kwargs[name] for name in ("a", "b") if name in kwargs))
    operands: list[Tensor] = []
    for name, operand in zip(OPERANDS, (first, second), strict=True):
        quantizer = found.get(name)
        operands.append(operand if quantizer is None else quantizer(operand))
    return tuple(operands), {}


def _after(layer: nn.Module, _args: object, _output: object) -> None:
    restore(layer)
