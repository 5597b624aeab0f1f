"""Decode image files to 8-bit RGB."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from codistill_worker.errors import ConfigurationError, is_out_of_memory

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["decode_image"]

# Pillow warns from here on, and raises an error at twice as many.
_MOST_PIXELS = 89_478_485

# EPS is not among them: Pillow would run Ghostscript.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PPM", "PNG", "AVIF", "JPEG2000", "TIFF", "WEBP")
_LONGEST_SIGNATURE = 16

_MODES_OF_8_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"})
_MODES_OF_16_BITS = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_FORMATS_OF_16_BITS = ("PNG", "PPM")  # of mode I, their integers have 16 bits
_UNSUPPORTED = {"F": " (floating point)", "I": " (32-bit or signed integers)", "LAB": " (CIELab)"}
_ALLOWED = (
    "grey, palette and RGB images (with alpha or without), CMYK and YCbCr, of unsigned integers of at most 16 bits"
)

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF 6.0, section 8 and 19
_WHITE_IS_ZERO = 0
_UNSIGNED = 1


def decode_image(path: str, out: np.ndarray) -> None:
    """Decode a file to RGB; an image of another size is cut to its centred square and resized.

    The result is that of resizing the shorter side and cutting out the centre, without resizing the rest. 16-bit grey is
    scaled to 8 bits, so that the format's white is 255. Alpha is dropped, an orientation in EXIF is ignored, and of several
    frames or pages the first is taken.

    Args:
        path: of the file.
        out: receives the image, uint8 of shape [3, S, S].

    Raises:
        ConfigurationError: the file cannot be decoded, has too many pixels, or pixels without a defined white.
    """
    from PIL import Image

    size = out.shape[-1]
    try:
        with Path(path).open("rb") as file:
            image = _rgb(_open(file, path), path)
        if image.size != (size, size):
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    except ConfigurationError:
        raise
    except Exception as error:  # of a damaged file, Pillow's decoders raise errors of many types
        if is_out_of_memory(error):
            raise
        text = str(error) or type(error).__name__
        raise ConfigurationError(f"data.root: {path} cannot be decoded: {text}; replace or remove it") from error
    out[:] = np.asarray(image).transpose(2, 0, 1)


def _open(file: BinaryIO, path: str) -> Image.Image:
    """Read a file's header.

    `Image.open` warns of images that are too large before their size can be seen, and tries every format there is.
    """
    signature = file.read(_LONGEST_SIGNATURE)
    for factory, accept in _openers():
        try:
            accepted = accept is None or accept(signature)
            if not accepted or isinstance(accepted, str):  # text says what this Pillow lacks
                continue
            file.seek(0)
            image: Image.Image = factory(file, path)
        except (SyntaxError, IndexError, TypeError, KeyError, struct.error):  # another format, as in Image.open
            continue
        width, height = image.size
        if width * height > _MOST_PIXELS:
            raise ConfigurationError(
                f"data.root: {path} has {width:,}×{height:,} pixels; allowed: at most {_MOST_PIXELS:,} in one image; "
                "scale it down or remove it"
            )
        return image
    raise ValueError(f"no image of a format ({', '.join(_FORMATS)}) and kind of pixels that Pillow reads here")


@cache
def _openers() -> list[tuple[Any, Any]]:
    from PIL import Image

    Image.init()
    return [Image.OPEN[name] for name in _FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, path: str) -> Image.Image:
    tags: Any = image.tag_v2 if image.format == "TIFF" else {}  # pyright: ignore[reportAttributeAccessIssue]
    signed = any(sample != _UNSIGNED for sample in tags.get(_SAMPLE_FORMAT, ()))
    if image.mode in _MODES_OF_8_BITS and not signed:
        image.load()
        image.info.pop("transparency", None)  # Pillow warns of it, although RGB needs no alpha
        return image.convert("RGB")
    if image.mode == "La" and not signed:  # alpha is multiplied in
        return image.convert("LA").convert("RGB")
    if image.mode in _MODES_OF_16_BITS or (image.mode == "I" and image.format in _FORMATS_OF_16_BITS):
        bits = tags.get(_BITS, (16,))[0]
        return _grey(image, 2**bits - 1, inverted=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO).convert("RGB")
    kind = _UNSUPPORTED.get(image.mode, " (signed integers)" if signed else "")
    raise ConfigurationError(
        f"data.root: {path} has pixels of mode {image.mode}{kind}; allowed: {_ALLOWED}; convert or remove it"
    )


def _grey(image: Image.Image, white: int, *, inverted: bool) -> Image.Image:
    """Scale 0..white to 0..255, rounded to the nearest."""
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    scaled = ((values * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - scaled if inverted else scaled)
