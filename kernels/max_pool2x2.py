"""Max pooling over 2x2 windows in Triton, a kernel for either memory format, each reading runs of 16 bytes.

In channels_last memory the channels of a pixel are adjacent: a program has a tile of pixels (of one row of windows) by
channels, and reads the four tiles that make up its windows. In contiguous memory the two columns of a window are
adjacent: a program has a tile of rows of windows by columns, reads both rows of each completely and splits them into
columns in registers. Rows have W = PART * parts pixels, which tells Triton that they are aligned to PART; by itself it
knows only multiples of 16. Offsets of rows are 64-bit, those within a tile 32-bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, launch, on_its_device
from ._tiles import ceil_div, power_of_2

_WIDEST = 64  # channels of a tile: 128 bytes of a half type


@triton.jit
def _comparable(x):
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _take(y, place, x, i):
    """The larger of y and x, the first of equal ones, NaN before all others; and its place."""
    larger = (x > y) | (x != x)
    return tl.where(larger, x, y), tl.where(larger, i, place)


@triton.jit
def _largest(a, b, c, d):
    y, place = _take(a, tl.zeros(a.shape, tl.int32), b, 1)
    y, place = _take(y, place, c, 2)
    return _take(y, place, d, 3)


@triton.jit
def _pixel_tile(H, W, C, pixel_blocks, channel_blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile's windows begin, in the input and in the output; offsets within both; what is inside."""
    pid = tl.program_id(0)
    channel = pid % channel_blocks * BLOCK_C
    rest = pid // channel_blocks
    first = rest % pixel_blocks * BLOCK_P
    row = (rest // pixel_blocks).to(tl.int64)  # of the windows of all images
    height = H // 2
    top = (row // height * H + row % height * 2) * W
    pixels = tl.arange(0, BLOCK_P)[:, None]
    channels = tl.arange(0, BLOCK_C)[None, :]
    inside = (first + pixels < W // 2) & (channel + channels < C)
    read = (top + first * 2) * C + channel
    written = (row * (W // 2) + first) * C + channel
    return read, written, pixels * (2 * C) + channels, pixels * C + channels, inside


@triton.jit
def channels_last_kernel(
    x, y, places, H, W, C, pixel_blocks, channel_blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    read, written, window, o, inside = _pixel_tile(H, W, C, pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C)
    upper = x + read
    lower = upper + W.to(tl.int64) * C
    a = _comparable(tl.load(upper + window, inside, other=0))
    b = _comparable(tl.load(upper + C + window, inside, other=0))
    c = _comparable(tl.load(lower + window, inside, other=0))
    d = _comparable(tl.load(lower + C + window, inside, other=0))
    value, place = _largest(a, b, c, d)
    tl.store(y + written + o, value.to(y.dtype.element_ty), inside)
    tl.store(places + written + o, place.to(tl.uint8), inside)


@triton.jit
def channels_last_backward_kernel(
    dy, places, dx, H, W, C, pixel_blocks, channel_blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    read, written, window, o, inside = _pixel_tile(H, W, C, pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C)
    gradient = tl.load(dy + written + o, inside, other=0)
    place = tl.load(places + written + o, inside, other=0)
    zero = tl.zeros_like(gradient)
    upper = dx + read
    lower = upper + W.to(tl.int64) * C
    tl.store(upper + window, tl.where(place == 0, gradient, zero), inside)
    tl.store(upper + C + window, tl.where(place == 1, gradient, zero), inside)
    tl.store(lower + window, tl.where(place == 2, gradient, zero), inside)
    tl.store(lower + C + window, tl.where(place == 3, gradient, zero), inside)


@triton.jit
def _row_tile(rows, H, parts, column_blocks, PART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Offsets of a tile's elements in the upper rows of its windows, and in the output; what is inside."""
    W = parts * PART
    if PART == 1:
        width, even = W // 2, W // 2 * 2
    else:
        width, even = parts * (PART // 2), W
    pid = tl.program_id(0)
    first = pid % column_blocks * BLOCK_W
    row = (pid // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # of the windows of all maps
    height = H // 2
    top = (row // height * H + row % height * 2) * W
    wide = first * 2 + tl.arange(0, 2 * BLOCK_W)
    narrow = first + tl.arange(0, BLOCK_W)
    valid = (row < rows)[:, None]
    read = top[:, None] + wide[None, :]
    written = (row * width)[:, None] + narrow[None, :]
    return read, valid & (wide < even)[None, :], written, valid & (narrow < width)[None, :]


@triton.jit
def contiguous_kernel(
    x, y, places, rows, H, parts, column_blocks, PART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    read, inside, written, within = _row_tile(rows, H, parts, column_blocks, PART, BLOCK_R, BLOCK_W)
    upper = _comparable(tl.load(x + read, inside, other=0))
    lower = _comparable(tl.load(x + parts * PART + read, inside, other=0))
    a, b = tl.split(tl.reshape(upper, (BLOCK_R, BLOCK_W, 2)))
    c, d = tl.split(tl.reshape(lower, (BLOCK_R, BLOCK_W, 2)))
    value, place = _largest(a, b, c, d)
    tl.store(y + written, value.to(y.dtype.element_ty), within)
    tl.store(places + written, place.to(tl.uint8), within)


@triton.jit
def contiguous_backward_kernel(
    dy, places, dx, rows, H, parts, column_blocks, PART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    read, inside, written, within = _row_tile(rows, H, parts, column_blocks, PART, BLOCK_R, BLOCK_W)
    gradient = tl.load(dy + written, within, other=0)
    place = tl.load(places + written, within, other=0)
    zero = tl.zeros_like(gradient)
    upper = tl.join(tl.where(place == 0, gradient, zero), tl.where(place == 1, gradient, zero))
    lower = tl.join(tl.where(place == 2, gradient, zero), tl.where(place == 3, gradient, zero))
    tl.store(dx + read, tl.reshape(upper, (BLOCK_R, 2 * BLOCK_W)), inside)
    tl.store(dx + parts * PART + read, tl.reshape(lower, (BLOCK_R, 2 * BLOCK_W)), inside)


def _cut(channels_last: bool, n: int, c: int, h: int, w: int, block: int) -> tuple[int, tuple, dict[str, int]]:
    """(programs, arguments, constants) of the kernel for maps of h x w pixels, in tiles of about `block` windows."""
    height, width = h // 2, w // 2
    if channels_last:
        block_c = min(power_of_2(c), _WIDEST)
        block_p = min(max(block // block_c, 1), power_of_2(width))
        cut = ceil_div(width, block_p), ceil_div(c, block_c)
        return n * height * cut[0] * cut[1], (h, w, c, *cut), {"BLOCK_P": block_p, "BLOCK_C": block_c}
    block_w = min(power_of_2(width), block)
    block_r = block // block_w
    rows, columns = n * c * height, ceil_div(width, block_w)
    part = math.gcd(w, 16)
    constants = {"PART": part, "BLOCK_R": block_r, "BLOCK_W": block_w}
    return ceil_div(rows, block_r) * columns, (rows, h, w // part, columns), constants


@on_its_device
def max_pool2x2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense x (N, C, H, W), contiguous or channels_last -> maxima and uint8 places (N, C, H // 2, W // 2)."""
    n, c, h, w = x.shape
    channels_last = x.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=layout)
    places = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        options = dict(configuration("max_pool2x2", x.device))
        programs, cut, constants = _cut(channels_last, n, c, h, w, options.pop("BLOCK"))
        kernel = channels_last_kernel if channels_last else contiguous_kernel
        launch(kernel, (programs,), x, y, places, *cut, **constants, **options)
    return y, places


@on_its_device
def max_pool2x2_backward(dy: Tensor, places: Tensor, dx: Tensor, channels_last: bool) -> None:
    """Dense dy and places, both channels_last or not; every window of dx (N, C, H, W), likewise, is filled."""
    if dy.numel():
        options = dict(configuration("max_pool2x2", dy.device))
        block = options.pop("BLOCK")
        # Joining two columns to rows takes twice the registers: with full tiles ptxas spills some of them.
        programs, cut, constants = _cut(channels_last, *dx.shape, block if channels_last else block // 2)
        kernel = channels_last_backward_kernel if channels_last else contiguous_backward_kernel
        launch(kernel, (programs,), dy, places, dx, *cut, **constants, **options)
