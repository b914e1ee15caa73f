"""Makes images of any size and kind uniform: colour, padding, cropping, resizing."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from gdd_fast.errors import ConfigError, DataError
from gdd_fast.settings import Settings

Color = Literal["auto", "gray", "rgb"]
Crop = Literal["none", "center"]
Filter = Literal["lanczos", "box"]

MAX_SIZE = 1 << 14  # pixels: beyond this, a single image takes gigabytes
_GRAY_MODES = {"1", "L", "LA"}
_COLOR_MODES = {"RGB", "RGBA", "P", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Transform(Settings):
    """In this order: 8 bits per channel, colour (transparency over white), black border, crop, resize."""

    resolution: int | None = None
    """Height and width of the result; None keeps the size."""
    crop: Crop = "none"
    """`center` cuts the largest square out of the middle."""
    pad_to: int | None = None
    """First pad with black to this height and width, as is often done to bring MNIST from 28 to 32."""
    filter: Filter = "lanczos"
    """`box` averages whole blocks of pixels, for reducing by an integer factor."""
    color: Color = "auto"
    """`auto` keeps gray images gray and converts all others to RGB; all images of a set must come out alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resolution", "pad_to"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 1 to {MAX_SIZE}, not {value}")

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """`image` as uint8 (C, R, R). Raises a `DataError` naming `name` if these settings do not make it square."""
        image = self._colored(image, name)
        if self.pad_to is not None:
            image = _padded(image, self.pad_to, name)
        if self.crop == "center":
            image = _center_square(image)
        if image.width != image.height:
            raise DataError(f"{name} is {image.width}x{image.height}, not square: --crop center cuts out the middle")
        image = self._resized(image, name)
        pixels = np.asarray(image)
        return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _colored(self, image: Image.Image, name: str) -> Image.Image:
        if image.mode.startswith("I;16"):
            # the upper 8 of 16 bits, as Pillow does with 48-bit colour
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        gray = image.mode in _GRAY_MODES
        if not gray and image.mode not in _COLOR_MODES:
            raise DataError(
                f"{name} has Pillow mode {image.mode}, which has no plain conversion to 8 bits per channel: convert "
                "it to 8 or 16 bits first, or leave it out"
            )
        if image.has_transparency_data:
            # Dropping alpha would reveal whatever colour is below transparent pixels.
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if self.color != "auto":
            gray = self.color == "gray"
        return image.convert("L" if gray else "RGB")

    def _resized(self, image: Image.Image, name: str) -> Image.Image:
        size = self.resolution
        if size is None or size == image.width:
            return image
        if self.filter == "lanczos":
            return image.resize((size, size), Image.Resampling.LANCZOS)
        if image.width % size:
            raise DataError(f"{name}: --filter box cannot reduce {image.width} to {size} pixels, not a whole factor")
        return image.reduce(image.width // size)


def _padded(image: Image.Image, size: int, name: str) -> Image.Image:
    if image.width > size or image.height > size:
        raise DataError(f"{name} is {image.width}x{image.height}, larger than --pad-to {size}")
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _center_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
