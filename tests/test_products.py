"""Products in pieces are those of the whole, and no piece is large enough for threads of a BLAS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.products import UNTHREADED, product


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 3, 2), (1, 400, 100), (24, 401, 100), (5000, 34, 100), (3, 2000, 300)]
)
def test_pieces_are_the_product_of_the_whole_and_stay_small(
    dtype: Any, m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(m)
    left: NDArray[Any] = rng.random((m, k)).astype(dtype)
    right: NDArray[Any] = rng.random((k, n)).astype(dtype)
    rows, matmul = list[int](), np.matmul

    def noted(one: Any, other: Any, **given: Any) -> Any:
        rows.append(len(one))
        return matmul(one, other, **given)

    with monkeypatch.context() as patched:
        patched.setattr(np, "matmul", noted)
        found = product(left, right)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, left @ right, rtol=1e-5)
    assert sum(rows) == m
    assert all(r == 1 or r * k * n <= UNTHREADED for r in rows)
