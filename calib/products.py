"""Products of matrices, beside other work."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)

# Of two numbers; OpenBLAS takes a thread for so many (interface/gemm.c), and so a second for twice.
UNTHREADED = 1 << 18


def product(left: NDArray[Real], right: NDArray[Real]) -> NDArray[Real]:
    """``left @ right``, ``(M, K)`` and ``(K, N)``, in pieces for which a BLAS begins no threads:
    these wait by spinning, and take the cores from whatever else is done."""
    result = np.empty((len(left), right.shape[1]), left.dtype)
    size = max(1, UNTHREADED // max(right.size, 1))
    for first in range(0, len(left), size):
        own = slice(first, first + size)
        np.matmul(left[own], right, out=result[own])
    return result
