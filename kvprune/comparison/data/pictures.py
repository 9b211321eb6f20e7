"""Reads picture files as RGB of 8 bits, which is what image processors expect, or refuses them by name.

A picture that would lose its contents silently is never converted: its brightness is scaled where its range
is known, and the picture is refused where it is not.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kvprune.errors import DataError
from kvprune.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["read_picture"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats of pictures that are plain data. Pillow would also open EPS, a program that Ghostscript runs."""

_COLOURS = ("RGB", "YCbCr", "CMYK", "L", "1", "P", "RGBX")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_REFUSED = {
    "I": "whole numbers of 32 bits, or signed ones, and does not say which are black and white",
    "F": "floats, and does not say which are black and white",
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value
_ORIENTATION = 274  # a tag of EXIF


def read_picture(path: Path) -> tuple[Image, bytes]:
    """Return a picture, decoded, upright and in RGB, and the bytes of its file.

    Transparent parts become white, and grey of more than 8 bits is scaled from its whole range. The
    orientation that EXIF states is applied.

    Raises:
        DataError: If there is no such file, or it is not a plain file, of another format, cut off, damaged,
            or has more pixels than Pillow allows; if it holds several pictures, or numbers without a known
            range, such as floats.
    """
    from PIL import Image

    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{_named(path)} is not a plain file")
        content = path.read_bytes()
        Image.init()
        formats = [name for name in _FORMATS if name in Image.OPEN]
        with Image.open(io.BytesIO(content), formats=formats) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames != 1 and picture.format != "MPO":  # a photograph with previews or a depth map
                raise DataError(
                    f"{_named(path)} holds {frames} pictures (an animation, or pages); save the one that is "
                    "asked about as a file of its own"
                )
            return _upright_rgb(picture, path), content
    except DataError:
        raise
    except FileNotFoundError:
        parent = _named(path.parent)
        raise DataError(f"no file at {_named(path)}; paths are relative to {parent}") from None
    except Exception as error:  # Pillow raises errors of many classes for damaged pictures
        reason = printable(str(error), 400) or type(error).__name__
        raise DataError(f"{_named(path)} is not a readable picture ({reason})") from error


def _named(path: Path) -> str:
    return printable(str(path), 400)


def _upright_rgb(picture: Image, path: Path) -> Image:
    from PIL import Image, ImageOps

    picture.load()  # a TIFF is turned when it is loaded, and then says so
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        rgb = _scaled(picture)
    elif picture.mode in _TRANSPARENT or (picture.mode in _COLOURS and "transparency" in picture.info):
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    elif picture.mode in _COLOURS:
        rgb = picture.convert("RGB")
    else:
        kind = _REFUSED.get(picture.mode, f"colours of the mode {picture.mode}, which are not converted")
        raise DataError(f"{_named(path)} holds {kind}; save it as RGB, or as grey of 8 or 16 bits")
    orientation = picture.getexif().get(_ORIENTATION, 1)
    if orientation == 1:
        return rgb
    turned = Image.Exif()
    turned[_ORIENTATION] = orientation
    rgb.info = {"exif": turned.tobytes()}
    return ImageOps.exif_transpose(rgb)


def _scaled(picture: Image) -> Image:
    """Return a grey picture of up to 16 bits in RGB, with its whole range from black to white."""
    import numpy  # Pillow's own arithmetic on such pictures clips
    from PIL import Image

    grey = numpy.asarray(picture).astype(numpy.int64)  # [height, width]
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFFs; other formats fill 16
    white = 2**bits - 1
    transparent = grey == picture.info.get("transparency", -1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = white - grey
    scaled = (grey.clip(0, white) * 255 + white // 2) // white
    scaled[transparent] = 255
    return Image.fromarray(scaled.astype(numpy.uint8)).convert("RGB")
