"""Images as calibration data: how pixels become the model's input. The only door to Pillow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import DataError, OptionError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
COLORS = ("rgb", "bgr", "gray")
LAYOUTS = ("nchw", "nhwc")

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to an image, in this order: crop to a share, resize, crop to a size, colour,
    ``(pixel * pixel_scale - mean) / std``, layout.

    With neither ``resize`` nor ``crop``, an image is resized to cover the height and width that
    the model fixes, and cropped to them; a crop to a share alone is resized to them. Where the
    model fixes none, images keep their size. Resizing is Pillow's bilinear filter on 8-bit RGB, the
    longer side truncated to whole pixels; a share is rounded to them. Crops are from the centre,
    half a pixel to the left and the top if need be.

    Args:
        resize: ``"256"`` for the shorter side, or ``"240x320"``, height x width.
        crop: from the centre: ``"224"`` or ``"240x320"`` after resizing, or ``"87.5%"`` of the
            shorter side, a square, before it.
        color: ``rgb``, ``bgr`` or ``gray``; None for what the model's channels say.
        pixel_scale: what pixels of 0 to 255 are multiplied by; None for 1/255, or 1 where the
            model takes integers.
        mean: subtracted after scaling, one number or one a channel; None for 0.
        std: divided by, likewise; None for 1.
        layout: ``nchw`` or ``nhwc``; None for what the model's input shape says.

    Raises:
        OptionError: if one of them is none of this.
    """

    resize: str | None = None
    crop: str | None = None
    color: str | None = None
    pixel_scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        Geometry.of(self)
        for name, allowed in (("color", COLORS), ("layout", LAYOUTS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise OptionError(f"{name} must be {', '.join(allowed)}, got {value!r}")
        scale = _numbers("pixel-scale", self.pixel_scale, (1,))
        if scale is not None and scale[0] <= 0:
            raise OptionError(f"pixel-scale must be above 0, got {self.pixel_scale}")
        std = _numbers("std", self.std, (1, 3, 4))
        if std is not None and min(std) <= 0:
            raise OptionError(f"std must be above 0, got {self.std}")
        object.__setattr__(self, "mean", _numbers("mean", self.mean, (1, 3, 4)))
        object.__setattr__(self, "std", std)


def _numbers(option: str, value: object, counts: tuple[int, ...]) -> tuple[float, ...] | None:
    """One number or several as a tuple of finite ones."""
    if value is None:
        return None
    several = isinstance(value, Iterable) and not isinstance(value, str)
    try:
        numbers = tuple(float(v) for v in (value if several else [value]))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        allowed = "one number" if counts == (1,) else "one number, or one for each channel"
        raise OptionError(f"{option} must be {allowed}, got {value!r}")
    return numbers


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which pixels of an image are used.

    Attributes:
        share: of the shorter side, 0 to 1: the side of a square to crop to, first.
        resize: length of the shorter side, or height and width.
        cover: height and width that resizing covers, with nothing to spare on one side.
        crop: height and width to crop to, last.
    """

    share: float | None = None
    resize: tuple[int, ...] | None = None
    cover: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @classmethod
    def of(cls, options: Preprocessing) -> Geometry:
        """What is asked for, before the model has been looked at."""
        resize = None if options.resize is None else _size("resize", options.resize)
        if options.crop is None:
            return cls(resize=resize)
        share = _SHARE.fullmatch(str(options.crop))
        if share is None:
            size = _size("crop", options.crop)
            return cls(resize=resize, crop=(size[0], size[-1]))
        if not 0 < float(share[1]) <= 100:
            raise OptionError(f"crop must be above 0% and at most 100%, got {options.crop!r}")
        return cls(float(share[1]) / 100, resize)

    @property
    def result(self) -> tuple[int, int] | None:
        """Height and width afterwards; None where they depend on the image."""
        if self.crop is not None or self.resize is None:
            return self.crop
        fixed = len(self.resize) == 2 or self.share is not None
        return (self.resize[0], self.resize[-1]) if fixed else None

    def apply(self, image: Image) -> Image:
        """The pixels that are used of ``image``."""
        from PIL.Image import Resampling  # noqa: PLC0415 - an extra

        if self.share is not None:
            side = max(1, round(min(image.size) * self.share))
            image = _centre(image, side, side)
        size = self._resized(image.height, image.width)
        if size is not None:
            image = image.resize((size[1], size[0]), Resampling.BILINEAR)
        return image if self.crop is None else _centre(image, *self.crop)

    def _resized(self, height: int, width: int) -> tuple[int, int] | None:
        if self.cover is not None:
            scale = max(self.cover[0] / height, self.cover[1] / width)
            wanted = round(height * scale), round(width * scale)
            return max(self.cover[0], wanted[0]), max(self.cover[1], wanted[1])
        if self.resize is None or len(self.resize) == 2:
            return self.resize and (self.resize[0], self.resize[1])
        shorter, side = min(height, width), self.resize[0]
        return max(side * height // shorter, side), max(side * width // shorter, side)

    def __str__(self) -> str:
        steps = []
        if self.share is not None:
            steps.append(f"centre square of {100 * self.share:g}% of the shorter side")
        if self.cover is not None:
            steps.append(f"resized to cover {self.cover[0]}x{self.cover[1]}")
        elif self.resize is not None:
            what = "" if len(self.resize) == 2 or self.share else "shorter side "
            size = self.result if self.share else self.resize
            steps.append(f"{what}resized to {'x'.join(map(str, size or ()))}")
        if self.crop is not None:
            steps.append(f"centre {self.crop[0]}x{self.crop[1]} of it")
        return ", ".join(steps) or "of their own size"


def _size(option: str, text: str) -> tuple[int, ...]:
    match = _SIZE.fullmatch(str(text))
    size = tuple(int(side) for side in match.groups() if side) if match else ()
    if not size or min(size) < 1:
        share = ", or a share like 87.5%" if option == "crop" else ""
        raise OptionError(
            f"{option} must be a size like 256 or 240x320, height x width{share}; got {text!r}"
        )
    return size


def _centre(image: Image, height: int, width: int) -> Image:
    if height > image.height or width > image.width:
        raise ValueError(
            f"it is {image.height}x{image.width} where {height}x{width} are to be cropped: "
            f"resize it first"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_pillow(where: str) -> None:
    """Raises `DataError` if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise DataError(
            f"{where}: reading images needs Pillow: pip install 'octav-calibrate[images]'"
        )


def read_pixels(path: Path, geometry: Geometry, color: str) -> NDArray[np.uint8]:
    """The pixels of an image as ``(height, width, channels)``.

    It is turned as its EXIF data says. The first picture of several is used. Palettes and CMYK
    become RGB, 16-bit gray becomes 8-bit, and transparency is dropped, all as Pillow does it.

    Args:
        path: the file.
        geometry: which of the pixels.
        color: ``rgb``, ``bgr``, ``gray`` or ``rgba``.

    Raises:
        DataError: if the image cannot be read, or is too small.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415 - an extra

    try:
        with Image.open(path) as opened:
            image = _eight_bit(ImageOps.exif_transpose(opened))
        # Pillow warns of transparency that is lost from a palette, but not from RGBA.
        image = image.convert("RGBA") if color == "rgba" or image.mode in ("P", "PA") else image
        image = geometry.apply(image if color == "rgba" else image.convert("RGB"))
        pixels = np.asarray(image.convert("L") if color == "gray" else image, np.uint8)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is no image that Pillow can read") from error
    except Exception as error:  # each format raises types of its own
        raise DataError(f"{path}: cannot be used as an image: {one_line(error)}") from error
    pixels = pixels.reshape(image.height, image.width, -1)
    return pixels[..., ::-1] if color == "bgr" else pixels


def _eight_bit(image: Image) -> Image:
    """16-bit gray as 8-bit gray; anything else as it is."""
    from PIL import Image as Images  # noqa: PLC0415 - an extra

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save them as .npy")
    if image.mode != "I" and not image.mode.startswith("I;"):
        return image
    wide: NDArray[Any] = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 0xFFFF:
        raise ValueError("its pixels are integers of 32 bits; save them as .npy")
    return Images.fromarray(((wide + 128) // 257).astype(np.uint8))
