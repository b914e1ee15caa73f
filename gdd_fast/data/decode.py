"""From the bytes of an image file to an array."""

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from gdd_fast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow's decoders raise on damaged input, found in its documentation and by damaging files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


_DEEP = "bits_per_channel"


def decode(content: bytes, name: str) -> "Image":
    """The image in `content`, fully decoded and rotated as its EXIF data says.

    Raises a `DataError` that names `name` if that cannot be done.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        deep = any(";16" in str(part) for tile in image.tile for part in tile)
        image.load()
        image = ImageOps.exif_transpose(image)
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        # Pillow's own message for a format it does not know names an object in memory.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} is not a readable image: {reason}") from error
    if deep or image.mode.startswith("I;16"):
        image.info[_DEEP] = 16  # Pillow returns 48-bit colour as 8 bits per channel without saying so
    return image


def is_deep(image: "Image") -> bool:
    """Whether the file has 16 bits per channel. `image` then has the upper 8 bits of colour, but all bits of gray."""
    return image.info.get(_DEEP) == 16


def to_array(image: "Image", name: str) -> np.ndarray:
    """Pixels as uint8 (C, H, W), C = 1 for gray and 3 for RGB.

    Other kinds (palette, transparency, 16 bits) have no single right conversion to network input and raise `DataError`;
    `gdd_fast.prepare` converts them.
    """
    if image.mode == "L":
        return np.asarray(image)[np.newaxis]
    if image.mode == "RGB" and not is_deep(image):
        return np.asarray(image).transpose(2, 0, 1)
    kind = "16 bits per channel" if is_deep(image) else f"Pillow mode {image.mode}"
    raise DataError(f"{name} has {kind}, not 8-bit gray or RGB; convert the set with gdd_fast.prepare")
