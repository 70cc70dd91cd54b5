"""What stands for nothing, in batches of sequences that are made equally long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.arrays import Batch, listed
from calib.errors import DataError, OptionError
from calib.graph import Model

Mask = NDArray[np.bool_]


class Padding:
    """Where a model's activations hold padding.

    Args:
        model, names: the activations ``names`` of ``model``.
        mask_name: input that is 0 where padding stands; None if there is none.

    Attributes:
        unmasked: activations that the mask did not fit.

    Raises:
        OptionError: if the mask is no input.
    """

    def __init__(self, model: Model, names: Sequence[str], mask_name: str | None):
        self._mask_name = mask_name
        self._maskable = _maskable(model, names, mask_name)
        self.unmasked = set[str]()

    def check(self, batch: Batch, first: int) -> None:
        """Sees to it that there is a mask.

        Raises:
            DataError: if ``batch``, which starts at sample ``first``, has none.
        """
        if self._mask_name is not None and self._mask_name not in batch.feed:
            raise DataError(
                f"padding-mask: the batch from sample {first} holds no {self._mask_name!r}"
            )

    def mask(self, part: Batch) -> Mask | None:
        """Where ``part`` holds something."""
        return None if self._mask_name is None else part.feed[self._mask_name] != 0

    def removed(self, name: str, array: NDArray[Any], mask: Mask | None) -> NDArray[Any]:
        """What the ``array`` of an activation holds besides padding, of any shape."""
        if mask is None:
            return array
        if name in self._maskable and array.shape[: mask.ndim] == mask.shape:
            return np.asarray(array[mask])
        self.unmasked.add(name)
        return array


def _maskable(model: Model, names: Sequence[str], mask: str | None) -> set[str]:
    """Values of which the first axes may be those of the mask: numbers where it has the same
    numbers, free where it is free. Lengths alone could mistake heads for tokens."""
    inputs = [spec.name for spec in model.inputs]
    if mask is not None and mask not in inputs:
        raise OptionError(f"padding-mask: the model has no input {mask!r}, only {listed(inputs)}")
    graph = model.ir.graph
    values = {v.name: v.shape for node in graph for v in node.outputs}
    values.update({v.name: v.shape for v in graph.inputs})
    wanted = values.get(mask)
    if wanted is None:
        return set()
    kinds = [d if isinstance(d, int) else None for d in wanted.dims]
    found = ((name, shape) for name in names if (shape := values.get(name)) is not None)
    return {
        name
        for name, shape in found
        if [d if isinstance(d, int) else None for d in shape.dims[: len(kinds)]] == kinds
    }
