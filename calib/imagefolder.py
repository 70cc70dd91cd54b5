"""Folders of images as calibration data: what the model's input takes, and image after image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calib.arrays import Array, Batch, Feeds, Takes, by, identify
from calib.errors import DataError
from calib.folders import usable
from calib.graph import ValueSpec
from calib.images import Geometry, Preprocessing, check_pillow, read_pixels
from calib.labels import read_labels


@dataclass(frozen=True, slots=True)
class _Target:
    """An input that takes images: ``size`` is its height and width, None where it is free."""

    spec: ValueSpec
    layout: str
    channels: int | None
    size: tuple[int | None, int | None]

    @property
    def one_image(self) -> bool:
        """Whether it has no batch axis."""
        return len(self.spec.shape or ()) == 3


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How an image becomes a feed of ``target``."""

    target: _Target
    geometry: Geometry
    color: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, path: Path) -> Array:
        """The image as the model takes it, with a batch axis if it takes one."""
        pixels = read_pixels(path, self.geometry, self.color)
        self._check_size(str(path), (pixels.shape[0], pixels.shape[1]))
        values = self.values(pixels)
        if self.target.layout == "nchw":
            values = values.transpose(2, 0, 1)
        values = np.ascontiguousarray(values)
        return values if self.target.one_image else values[None]

    def values(self, pixels: Array) -> Array:
        """``(pixel * scale - mean) / std`` in the input's type; integers are rounded."""
        dtype: np.dtype[Any] = self.target.spec.dtype
        if dtype.kind != "f" and (self.scale, set(self.mean), set(self.std)) == (1, {0}, {1}):
            return pixels.astype(dtype)
        exact = np.result_type(dtype, np.float32) if dtype.kind == "f" else np.dtype(np.float64)
        scale, mean, std = (np.asarray(v, exact) for v in (self.scale, self.mean, self.std))
        values = (pixels.astype(exact) * scale - mean) / std
        rounded: Array = values if dtype.kind == "f" else np.rint(values)
        return rounded.astype(dtype)

    @property
    def unknown_size(self) -> bool:
        """Whether what comes out depends on the size of the image."""
        return self.geometry.result is None and None in self.target.size

    def check(self, where: str) -> None:
        """Raises `DataError` if what comes out cannot be what the input takes."""
        if self.geometry.result is not None:
            self._check_size(where, self.geometry.result)
        dtype: np.dtype[Any] = self.target.spec.dtype
        if dtype.kind == "f":
            return
        ends = np.array([[0.0], [255.0]]) * self.scale
        values = np.rint((ends - np.array(self.mean)) / np.array(self.std))
        bounds = np.iinfo(dtype)
        if values.min() < bounds.min or values.max() > bounds.max:
            raise DataError(
                f"{where}: pixels become {values.min():g} to {values.max():g}, the model's "
                f"{dtype} holds {bounds.min} to {bounds.max}: set pixel-scale, mean and std"
            )

    def _check_size(self, where: str, size: tuple[int, int]) -> None:
        if any(d not in (None, n) for d, n in zip(self.target.size, size, strict=True)):
            raise DataError(
                f"{where}: becomes {by(size)}, the model takes {by(self.target.size)}, height x "
                f"width: set resize or crop to it"
            )

    def __str__(self) -> str:
        value = {1.0: "pixel", 1 / 255: "pixel / 255"}.get(self.scale, f"pixel * {self.scale:g}")
        if {*self.mean} != {0}:
            value = f"({value} - {_listed(self.mean)})"
        if {*self.std} != {1}:
            value = f"{value} / {_listed(self.std)}"
        return f"images: {self.geometry}; {self.color}; {value}; {self.target.layout}"


def _listed(numbers: Sequence[float]) -> str:
    text = ", ".join(f"{number:g}" for number in numbers)
    return text if len(numbers) == 1 else f"({text})"


def image_folder(
    folder: Path,
    images: Sequence[Path],
    takes: Takes,
    options: Preprocessing,
    labels: Path | None,
) -> Feeds:
    """One sample for each image, with its class if there are ``labels``; those of equal sizes
    share a feed.

    Raises:
        DataError: if Pillow is missing, the model takes no images, they would not become what it
            takes, or a class is missing.
    """
    check_pillow(str(folder))
    recipe = _recipe(str(folder), takes, options)
    recipe.check(str(folder))
    classes, notes = read_labels(labels, folder, images) if labels else (None, ())
    name, whole = recipe.target.spec.name, takes.whole
    if recipe.target.one_image:  # whose first axis is none of samples
        takes, whole = replace(takes, size=1, first_axes=()), whole | {name}

    def read(number: int, _start: int, _stop: int, _size: int) -> Iterator[Batch]:
        label = None if classes is None else classes[number : number + 1]
        yield Batch({name: recipe.read(images[number])}, label, whole=whole)

    counts, left = usable(folder, [1] * len(images), [0] * len(images), takes)
    settings = (takes.size, recipe, identify([labels]) if labels else None)
    return Feeds(counts, read, takes, (str(recipe), *left, *notes), identify(images, *settings))


def _recipe(where: str, takes: Takes, options: Preprocessing) -> _Recipe:
    target = _target(where, takes, options)
    free = {1: "gray", 4: "rgba"}.get(target.channels or 3, "rgb")
    color = options.color or free
    channels = {"gray": 1, "rgba": 4}.get(color, 3)
    if target.channels not in (None, channels):
        raise DataError(
            f"{where}: color {color} makes {channels} channels, the model takes {target.channels}"
        )
    mean, std = options.mean or (0.0,), options.std or (1.0,)
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise DataError(
                f"{where}: {name} holds {len(numbers)} numbers, the images have {channels} channels"
            )
    scale = options.pixel_scale
    if scale is None:
        scale = 1 / 255 if target.spec.dtype.kind == "f" else 1.0
    recipe = _Recipe(target, _geometry(options, target), color, scale, mean, std)
    if (takes.fixed or 1) > 1 and not target.one_image and recipe.unknown_size:
        raise DataError(
            f"{where}: the model takes {takes.fixed} images of one size at a time, and images of "
            f"any size: set resize or crop to one size, height x width"
        )
    return recipe


def _geometry(options: Preprocessing, target: _Target) -> Geometry:
    """What is asked for, completed by the size that the model fixes."""
    asked = Geometry.of(options)
    height, width = target.size
    if height is None or width is None or asked.resize or asked.crop:
        return asked
    if asked.share is None:
        return Geometry(cover=(height, width), crop=(height, width))
    return Geometry(asked.share, resize=(height, width))


def _target(where: str, takes: Takes, options: Preprocessing) -> _Target:
    """The model's only required input, and which of its axes is which."""
    specs = takes.required
    told = ", ".join(f"{spec.name!r}: {by(spec.shape or (None,))}" for spec in specs)
    shape = specs[0].shape
    if len(specs) != 1 or shape is None or len(shape) not in (3, 4):
        raise DataError(
            f"{where}: images need a model with one input of 3 or 4 axes, this one has {told}"
        )
    if specs[0].dtype.kind not in "fiu":
        raise DataError(f"{where}: images cannot become {specs[0].dtype}, which the model takes")
    planes, pixels = shape[-3], shape[-1]
    layouts = [options.layout] if options.layout else _layouts(planes, pixels)
    if len(layouts) != 1:
        raise DataError(
            f"{where}: which axis of {told} holds the colours cannot be told: set layout to nchw "
            f"or nhwc"
        )
    nchw = layouts[0] == "nchw"
    channels, size = (planes, shape[-2:]) if nchw else (pixels, shape[-3:-1])
    if isinstance(channels, int) and channels not in (1, 3, 4):
        raise DataError(
            f"{where}: images have 1, 3 or 4 channels, the model takes {channels} ({told}, "
            f"{layouts[0]})"
        )
    height, width = (d if isinstance(d, int) else None for d in size)
    return _Target(
        specs[0], layouts[0], channels if isinstance(channels, int) else None, (height, width)
    )


def _layouts(planes: object, pixels: object) -> list[str]:
    """The layouts that the lengths of these two axes allow."""
    for channels in ((1, 3), (1, 3, 4)):
        found = [
            layout for layout, axis in (("nchw", planes), ("nhwc", pixels)) if axis in channels
        ]
        if found:
            return found
    return []
