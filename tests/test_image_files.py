"""Folders of images: kinds of files, their order, and their classes from a CSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_models import joined, model_taking, read, refusal
from models import Array

from calib.data import Reading, open_data
from calib.images import Preprocessing

pytest.importorskip("PIL")
from PIL import Image

RAW = Preprocessing(pixel_scale=1)
MODEL = model_taking(("x", "float32", ("N", "h", "w", 3)))
RGBA = model_taking(("x", "float32", ("N", "h", "w", 4)))
RGB = np.random.default_rng(5).integers(0, 256, (6, 7, 3), np.uint8)
GRAY = RGB[..., 0]


def pixels(path: Path) -> Array:
    """The one image of the folder ``path`` as 8-bit pixels."""
    (batch,) = read(MODEL, path, Reading(images=RAW))
    found: Array = batch.feed["x"][0]
    return found


def write(path: Path, *names: str) -> Path:
    """``path`` with an image of one value each: 0, 1 and so on."""
    for value, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(path / name)
    return path


def order(path: Path, labels: Path | None = None) -> list[int]:
    """Values of the images in the order in which they are fed."""
    batches = open_data(MODEL, path, Reading(images=RAW, labels=labels)).batches()
    return joined(batches, "x")[:, 0, 0, 0].astype(int).tolist()  # type: ignore[no-any-return]


# --- kinds of files ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".ppm", ".tif", ".TIFF", ".webp"])
def test_common_formats_are_read_whatever_the_case_of_their_suffix(
    suffix: str, tmp_path: Path
) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}", lossless=True)  # a WebP would have losses
    np.testing.assert_array_equal(pixels(tmp_path), RGB)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_a_jpeg_is_read_as_pillow_reads_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels(tmp_path), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / ("a.tif" if mode in ("CMYK", "LA") else "a.png"))
    np.testing.assert_array_equal(pixels(tmp_path), np.asarray(image.convert("RGB")))


def test_transparency_of_a_palette_is_dropped_or_kept_as_the_channels_say(tmp_path: Path) -> None:
    image = Image.new("P", (4, 3))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 2), 1)
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    wanted = np.broadcast_to(np.array([10, 20, 30]), (3, 4, 3)).copy()
    wanted[2, 1] = 40, 50, 60
    np.testing.assert_array_equal(pixels(tmp_path), wanted)
    (batch,) = read(RGBA, tmp_path, Reading(images=RAW))
    assert batch.feed["x"][0, 2, 1].tolist() == [40, 50, 60, 0]
    assert batch.feed["x"][0, 0, 0].tolist() == [10, 20, 30, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_becomes_8_bit(suffix: str, tmp_path: Path) -> None:
    wide = GRAY.astype(np.uint16) * 257
    wide[0, 0] += 100
    Image.fromarray(wide).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path), np.repeat(GRAY[..., None], 3, axis=2))


def test_an_image_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # turned right by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path), np.rot90(RGB, -1))


def test_the_first_picture_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((3, 4), value, np.uint8)) for value in (7, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path) == 7).all()


def test_files_that_are_no_images_are_refused_by_name(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    assert refusal(MODEL, tmp_path) == f"{bad}: is no image that Pillow can read"
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes()[:-200])
    assert refusal(MODEL, tmp_path).startswith(f"{bad}: cannot be used as an image: ")
    bad.unlink()
    for dtype, told in (("float32", "floating-point numbers"), ("int32", "integers of 32 bits")):
        path = tmp_path / "bad.tif"
        Image.fromarray(np.full((3, 4), 1 << 20, dtype)).save(path)
        assert refusal(MODEL, tmp_path) == (
            f"{path}: cannot be used as an image: its pixels are {told}; save them as .npy"
        )


# --- which, and in which order ----------------------------------------------------------------


def test_images_come_in_natural_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, "10.png", "9.png", "b/1.png", "a/2.png", "a/10.png", "1.png")
    assert order(tmp_path) == [5, 1, 0, 3, 4, 2]


def test_hidden_files_and_files_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "1.png", ".2.png", ".thumbs/3.png", "4.png")
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "README.txt").write_text("")
    assert order(tmp_path) == [0, 3]


# --- classes ----------------------------------------------------------------------------------


def classes(folder: Path, text: str | bytes) -> list[int]:
    """What the CSV ``text`` says of the images in ``folder``, as it arrives with them."""
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    batches = read(MODEL, folder, Reading(2, labels=path))
    return [int(label) for b in batches if b.labels is not None for label in b.labels]


@pytest.mark.parametrize(
    "text",
    [
        "file,label\n1.png,7\na/2.png,0\n10.png,3\n",
        "label,where,file\n3,here,10.png\n7,,1.png\n0,,2.png\n",
        "1.png,7\n\n10.png,3\n./a/2.png, 0\n",
        '\ufefffile,label\r\n"1.png",7\r\n10.png,3\r\na\\2.png,0\r\n',
        "File, Label\n1.png,7\n1.png,7\n10.png,3\na/2.png,0\n",
    ],
)
def test_classes_are_found_by_path_or_name(text: str, tmp_path: Path) -> None:
    assert classes(write(tmp_path, "1.png", "10.png", "a/2.png"), text) == [7, 3, 0]


def test_classes_travel_with_their_images(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(7)))
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{number}.png,{10 * number}\n" for number in range(7)))
    for batch in open_data(MODEL, tmp_path, Reading(3, 0, labels, RAW)).batches(2, 6):
        np.testing.assert_array_equal(batch.feed["x"][:, 0, 0, 0] * 10, np.asarray(batch.labels))


def test_classes_of_images_that_are_not_there_are_noted(tmp_path: Path) -> None:
    labels = write(tmp_path, "1.png") / "labels.csv"
    labels.write_text("file,label\n1.png,4\n2.png,5\n3.png,6\n")
    data = open_data(MODEL, tmp_path, Reading(labels=labels))
    assert data.notes[1:] == ("labels.csv: 2 classes belong to no image: not used",)


def test_tables_that_do_not_tell_the_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png", "a/1.png", "b/1.png", "a/3.png")
    labels = tmp_path / "labels.csv"
    all_but = "1.png,0\n2.png,1\na/1.png,2\nb/1.png,3\n"
    columns = "two columns, file and label, or a header that names them are needed"
    cases: list[tuple[str | bytes, str]] = [
        (all_but, "no class for 1 of 5 images: 'a/3.png'"),
        ("", "no class for 5 of 5 images: '1.png', '2.png', 'a/1.png' and 2 more"),
        ("file,label\n1.png,cat\n",
         "line 2: the class must be an integer, got 'cat'; a header must be file,label"),
        ("image,class\n1.png,1\n",
         "line 1: the class must be an integer, got 'class'; a header must be file,label"),
        ("1.png,1.0\n",
         "line 1: the class must be an integer, got '1.0'; a header must be file,label"),
        ("1.png,1,2\n", f"line 1: 3 columns and no header: {columns}"),
        ("file,label\n1.png,1\n2.png\n", "line 3: 1 columns, 2 are needed"),
        ("2.png,1\n2.png,3\n", "line 2: '2.png' has class 3 here, 1 before"),
        (f"1.png,{10**30}\n", f"line 1: the class {10**30} is too large"),
    ]  # fmt: skip
    for text, message in cases:
        assert text_refusal(tmp_path, text) == f"{labels}: {message}"
    assert text_refusal(tmp_path, b"1.png,\xff\n").startswith(f"{labels}: cannot be read: ")
    assert text_refusal(tmp_path, '"1.png,0\n').startswith(f"{labels}: cannot be read: ")
    missing = tmp_path / "no.csv"
    assert refusal(MODEL, tmp_path, Reading(labels=missing)) == f"{missing}: no such file"


def test_a_name_that_several_images_have_is_no_name(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    assert text_refusal(tmp_path, "1.png,0\n") == (
        f"{tmp_path / 'labels.csv'}: line 1: '1.png' is the name of 2 images"
    )


def text_refusal(folder: Path, text: str | bytes) -> str:
    """Why the CSV ``text`` is no table of classes."""
    labels = folder / "labels.csv"
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    return refusal(MODEL, folder, Reading(labels=labels))
