"""What kernels can call besides each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from calib import compiled
from calib.compiled import pack

pytestmark = pytest.mark.skipif(not compiled.enabled(), reason="numba is not installed")

Pack = Callable[[int, int], int]
GUARD = 0xABCDEF01
COUNTED = """
import numpy as np
from calib import compiled
from calib.compiled import pack
from calib.counter import Counter
values = np.maximum(np.random.default_rng(0).standard_normal(100_003).astype(np.float32), 0)
counter = Counter.of(values)
codes = (values.view(np.uint32) + 0x8000) >> 16
np.testing.assert_array_equal(counter.counts, np.bincount(codes, minlength=65536))
print(counter.n_zero - np.count_nonzero(values == 0), compiled.packs())
"""


@compiled.kernel()
def _packed(source: int, target: int) -> int:
    return pack(source, target)


@pytest.mark.parametrize("way", [_packed, compiled._pack_one_by_one()], ids=["own", "plain"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_what_is_not_zero_is_packed_in_its_order(way: Pack, share: float) -> None:
    rng = np.random.default_rng(1)
    for offset in range(20):
        source = rng.integers(1, 1 << 32, 64, np.uint32)
        source[rng.random(64) < share] = 0
        target = np.full(64, GUARD, np.uint32)
        own = source[offset : offset + compiled.PACKED]
        n = way(source.ctypes.data + 4 * offset, target.ctypes.data)
        np.testing.assert_array_equal(target[:n], own[own != 0])
        assert n == np.count_nonzero(own)
        assert (target[compiled.PACKED :] == GUARD).all()


def test_without_the_instructions_that_pack_counts_are_the_same() -> None:
    """As on another processor."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", compiled.PLAIN: ""}
    run = subprocess.run(
        [sys.executable, "-c", COUNTED],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )
    assert run.stdout.split() == ["0", "False"]
