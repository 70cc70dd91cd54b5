"""Options of image preprocessing: those that make no sense are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from calib.errors import OptionError
from calib.images import Preprocessing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "big"}, "resize must be a size like 256 or 240x320, height x width; got 'big'"),
        ({"resize": "0"}, "resize must be a size like 256 or 240x320, height x width; got '0'"),
        ({"resize": "87.5%"}, "resize must be a size like .*; got '87.5%'"),
        ({"crop": "1x2x3"}, "crop must be a size .*, or a share like 87.5%; got '1x2x3'"),
        ({"crop": "-3"}, "crop must be a size .*, or a share like 87.5%; got '-3'"),
        ({"crop": "0%"}, "crop must be above 0% and at most 100%, got '0%'"),
        ({"crop": "100.5%"}, "crop must be above 0% and at most 100%, got '100.5%'"),
        ({"color": "RGB"}, "color must be rgb, bgr, gray, got 'RGB'"),
        ({"layout": "chw"}, "layout must be nchw, nhwc, got 'chw'"),
        ({"pixel_scale": float("nan")}, "pixel-scale must be one number, got nan"),
        ({"pixel_scale": 0.0}, "pixel-scale must be above 0, got 0.0"),
        ({"mean": (1.0, 2.0)}, r"mean must be one number, or one for each channel, got \(1.0, 2"),
        ({"mean": ("a",)}, r"mean must be one number, or one for each channel, got \('a',\)"),
        ({"std": (1.0, 0.0, 1.0)}, r"std must be above 0, got \(1.0, 0.0, 1.0\)"),
        ({"std": ()}, r"std must be one number, or one for each channel, got \(\)"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        Preprocessing(**options)


def test_numbers_may_come_as_they_stand_in_yaml() -> None:
    assert Preprocessing(mean=[1, 2, 3], std=2) == Preprocessing(mean=(1.0, 2.0, 3.0), std=(2.0,))  # type: ignore[arg-type]
    assert Preprocessing(resize=7).resize == 7  # type: ignore[arg-type, comparison-overlap]
