"""Modules to swap in for calls of functions, which hooks cannot see."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MatMul(nn.Module):
    """``torch.matmul(a, b)`` as a module: `calib.qat.prepare` quantizes both operands, per tensor.

    Give each call in the model one of its own.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product: ``(…, n, m) @ (…, m, k)`` → ``(…, n, k)``."""
        return torch.matmul(a, b)


class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` as a module, its two products each a
    `MatMul`, so that `calib.qat.prepare` quantizes queries, keys, probabilities and values.

    Args:
        dropout: probability of leaving out a weight, in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.scores = MatMul()
        self.values = MatMul()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Softmax(query keyᵀ / √d + mask) value.

        Args:
            query: ``(…, n, d)``.
            key: ``(…, m, d)``.
            value: ``(…, m, e)``.
            mask: broadcasts to ``(…, n, m)``: bool, True where attention is allowed, or a float
                that is added to the scores; None for neither.

        Returns:
            ``(…, n, e)``.
        """
        scores = self.scores(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        attended: Tensor = self.values(self.dropout(scores.softmax(-1)), value)
        return attended
