"""The rule by which channel-wise kernels cut (N, C, H, W) into tiles of pixels x channels; tuned.json scales it.

A program owns a block of whole groups of one sample, so that programs share no group, and walks over its pixels in
tiles. Group sizes need not be powers of two (6, 12, 18, 36 channels), but blocks are: the rule takes the smallest block
that wastes at most a quarter of its lanes, which masks switch off without touching memory.
"""

import functools
import math
from dataclasses import dataclass

_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WASTE = 0.25
_VECTOR = 8
MOST_PARTS = 32


@dataclass(frozen=True)
class Tile:
    """A block of `channels` channels (whole groups, `blocks` of them make C) in tiles of block_s x block_c."""

    channels: int
    blocks: int
    block_c: int
    block_g: int
    block_s: int


def power_of_2(x: int) -> int:
    """The smallest power of two that is at least x >= 1."""
    return 1 << (x - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def tile(channels: int, group: int, pixels: int, channels_last: bool, elements: int) -> Tile:
    """The tile for `channels` in groups of `group`, of about `elements` elements."""
    # In channels_last memory a row of the tile is contiguous, and 32 channels fill two sectors of the cache or more. In
    # contiguous memory a column is: the fewer channels, the longer the run, but a tile should not be too narrow.
    narrowest = 32 if channels_last else max(1, elements // (4 * power_of_2(pixels)))
    best, best_quality = None, (False, 0.0)
    for block_c in _BLOCKS:
        if block_c < min(narrowest, power_of_2(channels)) or block_c > power_of_2(channels):
            continue
        # rows of a channels_last tile start at a multiple of eight elements, 16 bytes of a half type, wherever they can
        whole = math.lcm(group, _VECTOR) if channels_last else group
        step = whole if whole <= block_c else group
        width = min(block_c // step * step, channels)
        if not width:
            continue
        blocks = ceil_div(channels, width)
        use = channels / (blocks * block_c)
        quality = (not channels_last or width % _VECTOR == 0, use)
        if best is None or quality > best_quality:
            best, best_quality = (width, blocks, block_c), quality
        if quality >= (True, 1 - _WASTE):
            break
    if best is None:
        best = (group, channels // group, power_of_2(group))
    width, blocks, block_c = best
    block_s = max(1, min(elements // block_c, power_of_2(pixels)))
    return Tile(width, blocks, block_c, power_of_2(width // group), block_s)


def split(blocks: int, pixels: int, block_s: int, programs: int) -> tuple[int, int]:
    """(parts, chunk): a sample's pixels form `parts` runs of `chunk`, so that `blocks` x parts is about `programs`.

    No run is empty and the last may be shorter. Runs start at multiples of 16 pixels, for vector loads from contiguous
    memory.
    """
    parts = min(ceil_div(programs, blocks), ceil_div(pixels, block_s), MOST_PARTS)
    chunk = ceil_div(pixels, parts)
    if parts > 1:
        chunk = ceil_div(chunk, 16) * 16
    return ceil_div(pixels, chunk), min(chunk, pixels)
