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


def decode(content: bytes, name: str) -> "Image":
    """The image in `content`, wholly decoded; `DataError` naming `name` when that cannot be done."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable image: {error}") from error
    return image


def to_array(image: "Image", name: str) -> np.ndarray:
    """Pixels as uint8 (C, H, W), C = 1 for gray and 3 for RGB.

    Other kinds (palette, transparency, 16 bit) have no one right meaning as network input and raise `DataError`;
    `gdd_fast.prepare` converts them.
    """
    if image.mode == "L":
        return np.asarray(image)[np.newaxis]
    if image.mode == "RGB":
        return np.asarray(image).transpose(2, 0, 1)
    raise DataError(
        f"{name} has Pillow mode {image.mode}, not 8-bit gray or RGB; convert the set with gdd_fast.prepare"
    )
