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

if not compiled.enabled():
    pytest.skip("numba is not installed", allow_module_level=True)

Pack = Callable[[int, int], int]
GUARD, MINUS_ZERO = 0xABCDEF01, 0x80000000
COUNTED = """
import numpy as np
from calib import compiled
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
        source[rng.random(64) < 0.2] = MINUS_ZERO
        source[rng.random(64) < share] = 0
        target = np.full(64, GUARD, np.uint32)
        own = source[offset : offset + compiled.PACKED]
        n = way(source.ctypes.data + 4 * offset, target.ctypes.data)
        np.testing.assert_array_equal(target[:n], own[own != 0])
        assert n == np.count_nonzero(own)
        assert (target[compiled.PACKED :] == GUARD).all()


needs_packing = pytest.mark.skipif(not compiled.packs(), reason="no AVX-512, or an older LLVM")


@needs_packing
@pytest.mark.parametrize(
    ("name", "value"),
    [("CPU_NAME", "znver5"), ("CPU_FEATURES", "-avx512f"), ("ENABLE_AVX", 0)],
)
def test_nothing_is_packed_where_numba_compiles_for_something_else(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    assert compiled.packs.__wrapped__()
    monkeypatch.setattr(f"numba.config.{name}", value)
    assert not compiled.packs.__wrapped__()


@needs_packing
def test_nothing_is_packed_where_the_processor_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown() -> dict[str, bool]:
        raise RuntimeError("no idea")

    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", unknown)
    assert not compiled.packs.__wrapped__()


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
