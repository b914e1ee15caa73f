"""Many small images on one sheet, for viewing."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gdd_fast.files import atomic_write
from gdd_fast.ops.to_uint8 import to_uint8

_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_TILE = 64  # pixels to which small images are enlarged, so that 16x16 ones can be seen


def save_grid(
    images: torch.Tensor, path: str | Path, *, cols: int | None = None, zoom: int | None = None, padding: int = 2
) -> None:
    """Write `images` as one PNG, row by row, on a sheet that is `cols` images wide, by default as square as possible.

    `images` is `(N, C, H, W)`, C 1 or 3, float in [-1, 1] or uint8; uint8 may also be `(N, H, W, C)`. `zoom` is a
    whole factor, nearest neighbour; by default it brings small images to about 64 pixels. Raises `ValueError` for
    anything else.
    """
    _save(_sheet(_tiles(images, zoom), cols, padding), path)


def save_panel(
    rows: Sequence[tuple[str, torch.Tensor]],
    path: str | Path,
    *,
    cols: int | None = None,
    zoom: int | None = None,
    padding: int = 2,
) -> None:
    """Write sheets of images one below the other, each under its title, for example to compare samplers.

    `rows` holds `(title, images)`; images as in `save_grid`, of one size and number, so that the same seed is in the
    same place. `cols` defaults to one line per title, at most 12. Raises `ValueError` for anything else.
    """
    if not rows:
        raise ValueError("a panel needs at least one row")
    tiles = [_tiles(images, zoom) for _, images in rows]
    if len({part.shape for part in tiles}) > 1:
        raise ValueError(f"rows of a panel differ in number or size: {[tuple(images.shape) for _, images in rows]}")
    sheets = [_sheet(part, cols or min(len(part), 12), padding) for part in tiles]

    font = ImageFont.load_default(size=16)
    titles = [title for title, _ in rows]
    boxes = [font.getbbox(title) for title in titles]
    band, margin = 30, 10
    width = max(max(sheet.shape[1] for sheet in sheets), *(math.ceil(box[2]) for box in boxes)) + 2 * margin
    height = sum(band + sheet.shape[0] for sheet in sheets) + margin
    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    top = 0
    for title, sheet in zip(titles, sheets, strict=True):
        draw.text((margin + padding, top + band / 2 + 1), title, fill=_INK, font=font, anchor="lm")
        panel.paste(Image.fromarray(sheet), (margin, top + band))
        top += band + sheet.shape[0]
    _save(np.asarray(panel), path)


def _tiles(images: torch.Tensor, zoom: int | None) -> np.ndarray:
    """Any accepted form as uint8 `(N, H, W, 3)`, enlarged."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected at least one image, (N, C, H, W), got shape {tuple(images.shape)}")
    if images.is_floating_point():
        images = to_uint8(images.detach())
    elif images.dtype != torch.uint8:
        raise ValueError(f"images must be float in [-1, 1] or uint8, not {images.dtype}")
    elif images.shape[3] not in (1, 3):
        images = images.permute(0, 2, 3, 1)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, not {images.shape[3]}")
    array = images.cpu().numpy()
    zoom = zoom or max(1, _TILE // array.shape[1])
    return np.broadcast_to(array, (*array.shape[:3], 3)).repeat(zoom, axis=1).repeat(zoom, axis=2)


def _sheet(tiles: np.ndarray, cols: int | None, padding: int) -> np.ndarray:
    """`(N, H, W, 3)` laid out on white paper, `padding` pixels around every tile."""
    n, height, width, _ = tiles.shape
    cols = min(n, cols or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / cols)
    sheet = np.full((rows * (height + padding) + padding, cols * (width + padding) + padding, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = padding + i // cols * (height + padding), padding + i % cols * (width + padding)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _save(sheet: np.ndarray, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(sheet).save(temporary, "PNG")
