"""Max pooling over 2x2 windows in Triton: a program has BLOCK windows, in the memory order of the output.

A contiguous tensor (N, C, H, W) is read as channels_last (N * C, 1, H, W), so one kernel serves both formats. All
offsets are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration


@triton.jit
def _window(o, H, W, C):
    """Offset in the input of the top left of output o; both channels_last."""
    c = o % C
    column = o // C % (W // 2)
    row = o // C // (W // 2)  # of all images
    image = row // (H // 2)
    return ((image * H + row % (H // 2) * 2) * W + column * 2) * C + c


@triton.jit
def max_pool2x2_kernel(x_ptr, y_ptr, places_ptr, size, H, W, C, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < size
    first = _window(o, H, W, C)
    y = tl.load(x_ptr + first, inside, other=0)
    place = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(1, 4):
        x = tl.load(x_ptr + first + ((i // 2) * W + i % 2) * C, inside, other=0)
        larger = (x > y) | (x != x)  # the first of equal values; NaN wins
        y = tl.where(larger, x, y)
        place = tl.where(larger, i, place)
    tl.store(y_ptr + o, y, inside)
    tl.store(places_ptr + o, place.to(tl.uint8), inside)


@triton.jit
def max_pool2x2_backward_kernel(dy_ptr, places_ptr, dx_ptr, size, H, W, C, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < size
    first = _window(o, H, W, C)
    dy = tl.load(dy_ptr + o, inside, other=0)
    place = tl.load(places_ptr + o, inside, other=0).to(tl.int32)
    for i in tl.static_range(4):
        dx = tl.where(place == i, dy, tl.zeros_like(dy))
        tl.store(dx_ptr + first + ((i // 2) * W + i % 2) * C, dx, inside)


def max_pool2x2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense x (N, C, H, W), contiguous or channels_last -> maxima and uint8 places (N, C, H // 2, W // 2)."""
    n, c, h, w = x.shape
    layout = _layout(x)
    y = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=layout)
    places = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        options = configuration("max_pool2x2", x.device)
        channels = c if layout is torch.channels_last else 1
        grid = (triton.cdiv(y.numel(), options["BLOCK"]),)
        max_pool2x2_kernel[grid](x, y, places, y.numel(), h, w, channels, **options)
    return y, places


def max_pool2x2_backward(dy: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """dy in the layout of `places` -> the gradient of an input of `height` x `width`."""
    n, c = dy.shape[:2]
    layout = _layout(places)
    dx = torch.empty((n, c, height, width), dtype=dy.dtype, device=dy.device, memory_format=layout)
    if height % 2 or width % 2:
        dx.zero_()  # the row and column that no window holds
    if dy.numel():
        options = configuration("max_pool2x2", dy.device)
        channels = c if layout is torch.channels_last else 1
        grid = (triton.cdiv(dy.numel(), options["BLOCK"]),)
        max_pool2x2_backward_kernel[grid](dy, places, dx, dy.numel(), height, width, channels, **options)
    return dx


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
