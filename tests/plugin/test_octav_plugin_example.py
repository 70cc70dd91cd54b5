"""The plug-in's own tests: one parametrized function runs the whole battery."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from octav_plugin_example import MeanMax, three_sigma

from calib.calibrators import Calibrator
from calib.testing import CALIBRATOR_CHECKS


@pytest.mark.parametrize("check", CALIBRATOR_CHECKS)
@pytest.mark.parametrize("calibrator", [MeanMax(), MeanMax(0.1), MeanMax(1), three_sigma])
def test_the_calibrator_passes_the_battery(
    calibrator: Calibrator, check: Callable[[Calibrator], None]
) -> None:
    check(calibrator)
