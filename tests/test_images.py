"""Images as calibration data: every step against Pillow and NumPy used by hand, and refusals."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_models import joined, model_taking, read, refusal
from models import Array

from calib.data import Reading, open_data
from calib.graph import Model
from calib.images import Preprocessing

PIL = pytest.importorskip("PIL")
from PIL import Image  # noqa: E402 - after the skip

SHARE = "centre square of 87.5% of the shorter side"
BILINEAR = Image.Resampling.BILINEAR


def nchw(*shape: Any, dtype: str = "float32") -> Model:
    """A model that takes one input of that shape; N x 3 x free x free where none is given."""
    return model_taking(("x", dtype, shape or ("N", 3, "h", "w")))


def pixels(height: int, width: int, seed: int = 0, channels: int = 3) -> Array:
    """Random 8-bit pixels."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng((seed, height, width)).integers(0, 256, shape, np.uint8)


def folder(path: Path, *images: Array, suffix: str = ".png") -> Path:
    """``path`` with images 0.png, 1.png and so on, without loss."""
    path.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(images):
        Image.fromarray(array).save(path / f"{number}{suffix}")
    return path


def using(**options: Any) -> Reading:
    return Reading(images=Preprocessing(**options))


def first(model: Model, path: Path, **options: Any) -> Array:
    """The one image of a folder as the model is fed it."""
    (batch,) = read(model, path, using(**options))
    return batch.feed["x"]


def planes(image: Array) -> Array:
    """As float32 of 0 to 1, N x 3 x H x W."""
    return (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]


# --- geometry ---------------------------------------------------------------------------------


def test_images_keep_their_size_where_nothing_says_another(tmp_path: Path) -> None:
    image = pixels(5, 9)
    found = first(nchw(), folder(tmp_path, image))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, planes(image), atol=1e-7)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (7, 50), (16, 12)])
def test_an_image_is_resized_to_cover_the_models_size_and_cropped(
    height: int, width: int, tmp_path: Path
) -> None:
    image = pixels(height, width)
    found = first(nchw("N", 3, 16, 12), folder(tmp_path, image))
    scale = max(16 / height, 12 / width)
    tall, wide = round(height * scale), round(width * scale)
    resized = np.asarray(Image.fromarray(image).resize((wide, tall), BILINEAR))
    top, left = (tall - 16) // 2, (wide - 12) // 2
    np.testing.assert_allclose(found, planes(resized[top : top + 16, left : left + 12]), atol=1e-7)


@pytest.mark.parametrize("resize", [None, "16", "16x16"])
def test_a_crop_to_a_share_is_a_square_that_is_resized_to_the_models_size(
    resize: str | None, tmp_path: Path
) -> None:
    image = pixels(41, 30)
    found = first(nchw("N", 3, 16, 16), folder(tmp_path, image), crop="70%", resize=resize)
    square = Image.fromarray(image[10:31, 4:25])
    wanted = np.asarray(square.resize((16, 16), BILINEAR))
    np.testing.assert_allclose(found, planes(wanted), atol=1e-7)


@pytest.mark.parametrize(("height", "width", "wanted"), [(30, 45, (20, 30)), (47, 30, (31, 20))])
def test_resizing_the_shorter_side_keeps_the_shape_and_truncates_the_longer(
    height: int, width: int, wanted: tuple[int, int], tmp_path: Path
) -> None:
    path = folder(tmp_path, pixels(height, width))
    assert first(nchw(), path, resize="20").shape[2:] == wanted
    assert first(nchw(), path, resize="12x34").shape[2:] == (12, 34)
    assert first(nchw(), path, resize="20", crop="17").shape[2:] == (17, 17)
    assert first(nchw(), path, crop="17x9").shape[2:] == (17, 9)


def test_sizes_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    path, model = folder(tmp_path, pixels(20, 30)), nchw("N", 3, 16, 16)
    told = "the model takes 16x16, height x width: set resize or crop to it"
    assert refusal(model, path, using(resize="16")) == f"{path / '0.png'}: becomes 16x24, {told}"
    for options in ({"resize": "8x8"}, {"crop": "8"}, {"crop": "50%", "resize": "8"}):
        assert refusal(model, path, using(**options)) == f"{path}: becomes 8x8, {told}"
    assert refusal(nchw("N", 3, 16, "w"), path).startswith(f"{path / '0.png'}: becomes 20x30")
    assert refusal(nchw(), path, using(crop="24")) == (
        f"{path / '0.png'}: cannot be used as an image: it is 20x30 where 24x24 are to be cropped: "
        f"resize it first"
    )


# --- colours and values -----------------------------------------------------------------------


def test_colours_are_what_the_channels_say_or_as_asked(tmp_path: Path) -> None:
    image = pixels(6, 7)
    path = folder(tmp_path, image)
    wanted = planes(image)
    np.testing.assert_allclose(first(nchw(), path, color="bgr"), wanted[:, ::-1], atol=1e-7)
    gray = np.asarray(Image.fromarray(image).convert("L"), np.float32)[None, None] / 255
    np.testing.assert_allclose(first(nchw("N", 1, 6, 7), path), gray, atol=1e-7)
    free = nchw("N", "c", "h", "w")
    np.testing.assert_allclose(first(free, path, color="gray", layout="nchw"), gray, atol=1e-7)
    rgba = first(nchw("N", 4, "h", "w"), path)
    np.testing.assert_allclose(rgba[:, :3], wanted, atol=1e-7)
    assert (rgba[:, 3] == 1).all()
    assert refusal(nchw("N", 1, 6, 7), path, using(color="bgr")) == (
        f"{path}: color bgr makes 3 channels, the model takes 1"
    )


def test_mean_and_std_are_applied_after_the_scale_channel_by_channel(tmp_path: Path) -> None:
    image = pixels(6, 7)
    path = folder(tmp_path, image)
    options = {"pixel_scale": 0.5, "mean": (10.0, 20.0, 30.0), "std": (2.0, 4.0, 8.0)}
    wanted = (image * 0.5 - [10, 20, 30]) / [2, 4, 8]
    np.testing.assert_allclose(
        first(nchw(), path, **options)[0], wanted.transpose(2, 0, 1), rtol=1e-6, atol=1e-6
    )
    two = using(mean=(1.0, 2.0, 3.0))
    assert refusal(nchw("N", 1, 6, 7), path, two) == (
        f"{path}: mean holds 3 numbers, the images have 1 channels"
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_values_are_of_the_inputs_type(dtype: str, tmp_path: Path) -> None:
    image = pixels(6, 7)
    found = first(nchw("N", 3, 6, 7, dtype=dtype), folder(tmp_path, image))
    assert found.dtype == dtype
    scale = 255 if dtype.startswith("f") else 1
    wanted = image.transpose(2, 0, 1)[None] / scale
    np.testing.assert_allclose(found.astype(np.float64), wanted, atol=1e-3 if scale > 1 else 0)


def test_integers_are_rounded_and_must_hold_every_pixel(tmp_path: Path) -> None:
    image = pixels(6, 7)
    path, model = folder(tmp_path, image), nchw("N", 3, 6, 7, dtype="int8")
    found = first(model, path, mean=(128.0,))
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), image.astype(int) - 128)
    found = first(model, path, pixel_scale=0.3)
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), np.rint(image * 0.3))
    assert refusal(model, path) == (
        f"{path}: pixels become 0 to 255, the model's int8 holds -128 to 127: set pixel-scale, "
        f"mean and std"
    )
    assert refusal(nchw("N", 3, 6, 7, dtype="bool"), path) == (
        f"{path}: images cannot become bool, which the model takes"
    )


# --- the model's input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "fed"),
    [
        (("N", 3, "h", "w"), None, (1, 3, 6, 7)),
        (("N", "h", "w", 3), None, (1, 6, 7, 3)),
        (("N", "h", "w", 1), None, (1, 6, 7, 1)),
        (("N", "c", "h", "w"), "nchw", (1, 3, 6, 7)),
        (("N", None, None, None), "nhwc", (1, 6, 7, 3)),
        ((1, 4, 6, 3), None, (1, 4, 6, 3)),
        ((3, 6, 7), None, (3, 6, 7)),
        (("h", "w", 3), None, (6, 7, 3)),
        (("N", 3, 6, 3), "nhwc", (1, 3, 6, 3)),
    ],
)
def test_the_layout_is_that_of_the_input(
    shape: tuple[Any, ...], layout: str | None, fed: tuple[int, ...], tmp_path: Path
) -> None:
    found = first(nchw(*shape), folder(tmp_path, pixels(6, 7)), layout=layout)
    assert found.shape == fed
    assert found.flags.c_contiguous


def test_a_model_without_a_batch_axis_gets_one_image_a_feed(tmp_path: Path) -> None:
    path = folder(tmp_path, pixels(6, 7), pixels(6, 7, 1))
    data = open_data(nchw(3, 6, 7), path)
    assert (data.n_samples, data.multiple) == (2, 1)
    assert [(b.n_samples, b.feed["x"].shape) for b in data.batches()] == [(1, (3, 6, 7))] * 2
    assert len(list(data.batches(1, 2))) == 1


def test_models_that_take_no_images_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, pixels(6, 7))
    needs = f"{path}: images need a model with one input of 3 or 4 axes, this one has"
    axes = f"{path}: which axis of"
    cases: list[tuple[Model, str]] = [
        (nchw("N", 6), f"{needs} 'x': Nx6"),
        (model_taking(("x", "float32", None)), f"{needs} 'x': ?"),
        (model_taking(("x", "float32", ("N", 3, 6, 7)), ("n", "int64", ("N",))),
         f"{needs} 'x': Nx3x6x7, 'n': N"),
        (nchw("N", "c", "h", "w"),
         f"{axes} 'x': Nxcxhxw holds the colours cannot be told: set layout to nchw or nhwc"),
        (nchw("N", 3, 6, 3),
         f"{axes} 'x': Nx3x6x3 holds the colours cannot be told: set layout to nchw or nhwc"),
        (nchw("N", 7, 6, 6),
         f"{axes} 'x': Nx7x6x6 holds the colours cannot be told: set layout to nchw or nhwc"),
    ]  # fmt: skip
    for model, message in cases:
        assert refusal(model, path) == message
    assert refusal(nchw("N", 7, 6, 6), path, using(layout="nchw")) == (
        f"{path}: images have 1, 3 or 4 channels, the model takes 7 ('x': Nx7x6x6, nchw)"
    )


def test_an_input_that_need_not_be_fed_does_not_matter(tmp_path: Path) -> None:
    model = model_taking(
        ("state", "float32", (2, 5)), ("x", "float32", ("N", 3, 6, 7)), ("n", "int64", ()),
        optional="n", fed_back="state",
    )  # fmt: skip
    batches = read(model, folder(tmp_path, pixels(6, 7), pixels(6, 7, 1)))
    assert [(list(b.feed), b.n_samples, b.restart) for b in batches] == [
        (["x"], 1, True),
        (["x"], 1, False),
    ]


# --- feeds ------------------------------------------------------------------------------------


def test_neighbours_of_equal_size_share_a_feed_and_no_others(tmp_path: Path) -> None:
    images = [pixels(6, 7, 0), pixels(6, 7, 1), pixels(6, 7, 2), pixels(7, 6), pixels(6, 7, 3)]
    path = folder(tmp_path, *images)
    data = open_data(nchw(), path, Reading(2))
    assert data.n_samples == 5
    shapes = [batch.feed["x"].shape for batch in data.batches()]
    assert shapes == [(2, 3, 6, 7), (1, 3, 6, 7), (1, 3, 7, 6), (1, 3, 6, 7)]
    assert [b.feed["x"].shape for b in data.batches(1, 4)] == [(2, 3, 6, 7), (1, 3, 7, 6)]


def test_a_fixed_batch_of_images_is_kept_to(tmp_path: Path) -> None:
    path = folder(tmp_path, *(pixels(6, 7, seed) for seed in range(5)))
    data = open_data(nchw(2, 3, 6, 7), path)
    assert (data.n_samples, data.multiple) == (4, 2)
    assert data.notes[1:] == ("1 samples fill no batch of 2: not used",)
    np.testing.assert_allclose(
        joined(data.batches(), "x"), np.concatenate([planes(pixels(6, 7, s)) for s in range(4)])
    )
    assert refusal(nchw(2, 3, "h", "w"), path) == (
        f"{path}: the model takes 2 images of one size at a time, and images of any size: set "
        f"resize or crop to one size, height x width"
    )
    assert refusal(nchw(8, 3, 6, 7), path) == (
        f"{path}: 5 samples, the model takes 8 of the same shape at a time: nothing to calibrate on"
    )


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "images: resized to cover 16x16, centre 16x16 of it; rgb; pixel / 255; nchw"),
        ({"crop": "87.5%", "resize": "16", "mean": (0.5,), "std": (0.5,)},
         f"images: {SHARE}, resized to 16x16; rgb; (pixel / 255 - 0.5) / 0.5; nchw"),
        ({"resize": "20", "crop": "16", "color": "bgr", "pixel_scale": 1.0},
         "images: shorter side resized to 20, centre 16x16 of it; bgr; pixel; nchw"),
        ({"resize": "16x16", "pixel_scale": 0.25, "mean": (1.0, 2.0, 3.0)},
         "images: resized to 16x16; rgb; (pixel * 0.25 - (1, 2, 3)); nchw"),
    ],
)  # fmt: skip
def test_what_happens_to_images_is_noted_in_one_line(
    options: dict[str, Any], note: str, tmp_path: Path
) -> None:
    path = folder(tmp_path, pixels(18, 18))
    assert open_data(nchw("N", 3, 16, 16), path, using(**options)).notes == (note,)
    assert open_data(nchw(), path).notes == ("images: of their own size; rgb; pixel / 255; nchw",)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    path = folder(tmp_path, *(np.full((64, 64, 3), n, np.uint8) for n in range(200)))
    data = open_data(nchw("N", 3, 64, 64), path, Reading(4))
    next(data.batches())  # Pillow loads its formats
    tracemalloc.start()
    try:
        n = sum(batch.n_samples for batch in data.batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 200
    assert peak < 2e6  # all: 9.8 MB


def test_the_same_files_read_in_the_same_way_have_the_same_identity(tmp_path: Path) -> None:
    path, labels = folder(tmp_path / "images", pixels(6, 7), pixels(6, 7, 1)), tmp_path / "l.csv"
    labels.write_text("0.png,1\n1.png,2\n")
    readings = [Reading(), Reading(4), using(mean=(0.5,)), using(crop="5"), Reading(labels=labels)]
    found = [open_data(nchw(), path, reading).identity for reading in readings]
    assert None not in found
    assert len(set(found)) == len(readings)
    assert [open_data(nchw(), path, reading).identity for reading in readings] == found
    Image.fromarray(pixels(8, 7)).save(path / "1.png")
    assert open_data(nchw(), path).identity not in found


def test_without_pillow_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, pixels(6, 7))
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refusal(nchw(), path) == (
        f"{path}: reading images needs Pillow: pip install 'octav-calibrate[images]'"
    )
