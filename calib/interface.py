"""Whether two models can stand in for each other: inputs, outputs, types and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.arrays import by, listed
from calib.errors import ModelError
from calib.graph import Model, ValueSpec


def check_interface(model: Model, other: Model) -> None:
    """Raises `ModelError` unless both take the same inputs and give the same outputs."""
    path = other.path
    ours, theirs = ({spec.name: spec for spec in each.inputs} for each in (model, other))
    needed = [name for name, spec in theirs.items() if not spec.optional or name in ours]
    _check_names(f"{path}: its inputs are", needed, ours)
    for name in needed:
        _check_input(path, ours[name], theirs[name])
    graphs = (each.ir.graph for each in (model, other))
    given, found = ({str(v.name): v.dtype for v in graph.outputs} for graph in graphs)
    _check_names(f"{path}: its outputs are", found, given)
    for name, dtype in found.items():
        if dtype != given[name]:
            raise ModelError(
                f"{path}: output {name!r} is {_type(dtype)}, the float model's {_type(given[name])}"
            )


def feeding_model(model: Model, other: Model) -> tuple[Model, tuple[str, ...]]:
    """The model that data is read for, the one that leaves less of its shapes free; and a note if
    that is not the float one."""
    fixed = [
        sum(isinstance(axis, int) for spec in each.inputs for axis in spec.shape or ())
        for each in (model, other)
    ]
    if fixed[1] <= fixed[0]:
        return model, ()
    shapes = ", ".join(f"{spec.name!r} {by(spec.shape)}" for spec in other.inputs if spec.shape)
    note = f"both models are fed as the quantized one takes it, which fixes more: {shapes}"
    return replace(other, feedback=model.feedback), (note,)


def _check_names(where: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    found, wanted = list(found), list(wanted)
    if set(found) != set(wanted):
        raise ModelError(
            f"{where} {listed(found)}, the float model's {listed(wanted)}: only models with the "
            f"same interface can be compared"
        )


def _check_input(path: Path, wanted: ValueSpec, found: ValueSpec) -> None:
    where = f"{path}: input {found.name!r}"
    if found.dtype != wanted.dtype:
        raise ModelError(f"{where} is {found.dtype}, the float model's {wanted.dtype}")
    if found.shape is None or wanted.shape is None:
        return
    pairs = zip(found.shape, wanted.shape, strict=False)
    if len(found.shape) != len(wanted.shape) or any(
        a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int)
    ):
        raise ModelError(f"{where} is {by(found.shape)}, the float model's {by(wanted.shape)}")


def _type(dtype: Any) -> str:
    return "of unknown type" if dtype is None else str(dtype.name).lower()
