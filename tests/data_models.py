"""Stand-ins for models that only say what they are fed, for the tests of calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Array

from calib.arrays import Batch
from calib.data import Reading, open_data
from calib.errors import DataError
from calib.graph import Model, ValueSpec

Input = tuple[str, str, tuple[Any, ...] | None]


@dataclass
class _StandIn:
    inputs: tuple[ValueSpec, ...]
    feedback: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path("model.onnx")


def model_taking(*inputs: Input, optional: str = "", fed_back: str = "") -> Model:
    """A stand-in with nothing but inputs (name, dtype, shape); ``optional`` and ``fed_back`` hold
    names of inputs, with blanks between them."""
    feedback = {name: f"{name}_out" for name in fed_back.split()}
    without = {*optional.split(), *feedback}
    specs = (ValueSpec(n, np.dtype(t), shape, n in without) for n, t, shape in inputs)
    return _StandIn(tuple(specs), feedback)  # type: ignore[return-value]


ONE = model_taking(("x", "float32", ("N", 6)))
TWO = model_taking(("x", "float32", ("N", 6)), ("z", "float32", ("N", 4)))


def read(model: Model, source: object, reading: Reading | None = None) -> list[Batch]:
    """All batches of ``source``."""
    return list(open_data(model, source, reading).batches())


def refusal(model: Model, source: object, reading: Reading | None = None) -> str:
    """The one line that says why ``source`` is no data for ``model``."""
    with pytest.raises(DataError) as caught:
        read(model, source, reading)
    message = str(caught.value)
    assert "\n" not in message
    return message


def joined(batches: Iterable[Batch], name: str) -> Array:
    """One array of all batches."""
    return np.concatenate([batch.feed[name] for batch in batches])
