"""How each kind of picture is read: scaled, laid on white, turned upright, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image, TiffImagePlugin

from kvprune.comparison.data.pictures import read_picture
from kvprune.errors import DataError


def read_one(folder: Path, name: str, picture: Image.Image, **options: Any) -> Image.Image:
    """Save a picture and read it again."""
    picture.save(folder / name, **options)
    read, content = read_picture(folder / name)
    assert read.mode == "RGB"
    assert content == (folder / name).read_bytes()
    return read


def colour(picture: Image.Image) -> tuple[int, ...]:
    """Return the only colour of a picture."""
    ((_, found),) = picture.getcolors()
    return tuple(found)


GREYS = {0: 0, 128: 0, 129: 1, 30_000: 117, 32_767: 127, 32_768: 128, 65_535: 255}
"""Grey values of 16 bits, and the nearest of 8 bits: v / 257."""


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm", "grey.jp2"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("value", GREYS)
def test_grey_of_16_bits_is_scaled(tmp_path: Path, mode: str, name: str, value: int) -> None:
    if (mode, name) in (("I;16B", "grey.pgm"), ("I;16B", "grey.jp2")):
        pytest.skip("Pillow does not write it, or with swapped bytes")
    options = {"irreversible": False} if name.endswith("jp2") else {}
    read = read_one(tmp_path, name, Image.new(mode, (64, 64), value), **options)
    assert colour(read) == (GREYS[value],) * 3


def test_grey_of_12_bits_is_scaled_by_its_own_range(tmp_path: Path) -> None:
    # Two pixels of 12 bits in three bytes: 0xFFF and 0x800.
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 3}.items():
        tags[tag] = value
    header = b"II*\0" + (8).to_bytes(4, "little")
    (tmp_path / "grey.tiff").write_bytes(header + tags.tobytes(8) + b"\xff\xf8\x00")
    assert [read_picture(tmp_path / "grey.tiff")[0].getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]


def test_grey_of_which_zero_is_white_is_inverted(tmp_path: Path) -> None:
    tags = {262: 0}
    read = read_one(tmp_path, "grey.tiff", Image.new("I;16", (4, 4), 65_535), tiffinfo=tags)
    assert colour(read) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "mode", "value", "message"),
    [
        ("a.tiff", "F", 0.5, r"a\.tiff holds floats, .*; save it as RGB, or as grey of 8 or 16 bits"),
        ("a.pfm", "F", 0.5, r"a\.pfm holds floats"),
        ("a.tiff", "I", 30_000, r"a\.tiff holds whole numbers of 32 bits"),
        ("a.tiff", "LAB", (50, 0, 0), r"a\.tiff holds colours of the mode LAB, .*; save it as RGB"),
    ],
)
def test_pictures_without_a_known_range_are_refused(
    tmp_path: Path, name: str, mode: str, value: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_one(tmp_path, name, Image.new(mode, (4, 4), value))


def with_palette() -> Image.Image:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    return picture


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("a.png", lambda: Image.new("1", (4, 4), 1), (255, 255, 255)),
        ("a.png", lambda: Image.new("L", (4, 4), 77), (77, 77, 77)),
        ("a.png", with_palette, (200, 100, 50)),
        ("a.gif", with_palette, (200, 100, 50)),
        ("a.tiff", lambda: Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
        ("a.tiff", lambda: Image.new("YCbCr", (4, 4), (90, 128, 128)), (90, 90, 90)),
        ("a.webp", lambda: Image.new("RGB", (4, 4), (0, 0, 0)), (0, 0, 0)),
    ],
)
def test_other_colours_become_rgb(
    tmp_path: Path, name: str, make: Callable[[], Image.Image], expected: tuple[int, ...]
) -> None:
    assert colour(read_one(tmp_path, name, make())) == expected


@pytest.mark.parametrize(
    ("name", "make", "options", "expected"),
    [
        ("a.png", lambda: Image.new("RGBA", (4, 4), (1, 2, 3, 0)), {}, 255),
        ("a.png", lambda: Image.new("RGBA", (4, 4), (0, 0, 0, 51)), {}, 204),
        ("a.png", lambda: Image.new("LA", (4, 4), (0, 0)), {}, 255),
        ("a.tiff", lambda: Image.new("RGBA", (4, 4), (1, 2, 3, 0)), {}, 255),
        ("a.webp", lambda: Image.new("RGBA", (4, 4), (1, 2, 3, 0)), {"lossless": True, "exact": True}, 255),
        ("a.png", with_palette, {"transparency": 1}, 255),
        ("a.png", with_palette, {"transparency": b"\xff\x00"}, 255),
        ("a.gif", with_palette, {"transparency": 1}, 255),
        ("a.png", lambda: Image.new("L", (4, 4), 9), {"transparency": 9}, 255),
        ("a.png", lambda: Image.new("1", (4, 4), 0), {"transparency": 0}, 255),
        ("a.png", lambda: Image.new("RGB", (4, 4), (9, 9, 9)), {"transparency": (9, 9, 9)}, 255),
        ("a.png", lambda: Image.new("I;16", (4, 4), 900), {"transparency": 900}, 255),
    ],
)
def test_what_is_transparent_is_laid_on_white(
    tmp_path: Path, name: str, make: Callable[[], Image.Image], options: dict[str, Any], expected: int
) -> None:
    assert colour(read_one(tmp_path, name, make(), **options)) == (expected,) * 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_picture_is_turned_upright(tmp_path: Path, name: str, mode: str) -> None:
    if (mode != "RGB" and name == "a.jpg") or (mode, name) == ("I;16", "a.webp"):
        pytest.skip("there is no such file")
    stored = numpy.zeros((16, 48), dtype=numpy.uint8)
    stored[:, :24] = 255  # white on the left, which is the top once it is turned by 90 degrees
    picture = Image.fromarray(stored)
    deep = Image.fromarray(stored.astype(numpy.uint16) * 257)
    picture = deep if mode == "I;16" else picture.convert(mode)
    exif = Image.Exif()
    exif[274] = 6
    read = read_one(tmp_path, name, picture, exif=exif)
    assert read.size == (16, 48)
    assert read.getpixel((8, 8))[0] > 250
    assert read.getpixel((8, 40))[0] < 5


def test_an_orientation_that_does_not_exist_changes_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 99
    assert read_one(tmp_path, "a.jpg", Image.new("RGB", (16, 48)), exif=exif).size == (16, 48)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_animations_and_pages_are_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    with pytest.raises(DataError, match=r"a\.\w+ holds 3 pictures \(an animation, or pages\); save the one"):
        read_one(tmp_path, name, frames[0], save_all=True, append_images=frames[1:])


def test_a_photograph_with_a_preview_is_read(tmp_path: Path) -> None:
    photograph, preview = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (8, 8), "black")
    photograph.save(tmp_path / "a.mpo", save_all=True, append_images=[preview])
    assert colour(read_picture(tmp_path / "a.mpo")[0]) == (255, 255, 255)
