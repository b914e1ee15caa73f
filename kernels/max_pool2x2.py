"""Max pooling over 2x2 windows in Triton: a program has BLOCK windows, in the memory order of the output.

A contiguous tensor (N, C, H, W) is read as channels_last (N * C, 1, H, W), so one kernel serves both formats. All
offsets are 64-bit; divisions are not, except one per program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, on_its_device


@triton.jit
def _windows(H, W, C, BLOCK: tl.constexpr):
    """Offsets of the program's outputs, and in the input of the top left of their windows; both channels_last."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    width = W // 2 * C
    row = start // width  # of all images
    height = H // 2
    i = (start % width).to(tl.int32) + tl.arange(0, BLOCK)  # counted from the beginning of that row
    y = (row % height).to(tl.int32) + i // width  # counted from the first row of that image
    image = row // height + y // height
    i %= width
    return start + tl.arange(0, BLOCK), ((image * H + y % height * 2) * W + i // C * 2) * C + i % C


@triton.jit
def _comparable(x):
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def max_pool2x2_kernel(x_ptr, y_ptr, places_ptr, size, H, W, C, BLOCK: tl.constexpr):
    o, first = _windows(H, W, C, BLOCK)
    inside = o < size
    y = _comparable(tl.load(x_ptr + first, inside, other=0))
    place = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(1, 4):
        x = _comparable(tl.load(x_ptr + first + ((i // 2) * W + i % 2) * C, inside, other=0))
        larger = (x > y) | (x != x)  # the first of equal values; NaN wins
        y = tl.where(larger, x, y)
        place = tl.where(larger, i, place)
    tl.store(y_ptr + o, y, inside)
    tl.store(places_ptr + o, place.to(tl.uint8), inside)


@triton.jit
def max_pool2x2_backward_kernel(dy_ptr, places_ptr, dx_ptr, size, H, W, C, BLOCK: tl.constexpr):
    o, first = _windows(H, W, C, BLOCK)
    inside = o < size
    dy = tl.load(dy_ptr + o, inside, other=0)
    place = tl.load(places_ptr + o, inside, other=0).to(tl.int32)
    for i in tl.static_range(4):
        dx = tl.where(place == i, dy, tl.zeros_like(dy))
        tl.store(dx_ptr + first + ((i // 2) * W + i % 2) * C, dx, inside)


@on_its_device
def max_pool2x2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense x (N, C, H, W), contiguous or channels_last -> maxima and uint8 places (N, C, H // 2, W // 2)."""
    n, c, h, w = x.shape
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    y = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=layout)
    places = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        options = configuration("max_pool2x2", x.device)
        channels = c if layout is torch.channels_last else 1
        grid = (triton.cdiv(y.numel(), options["BLOCK"]),)
        max_pool2x2_kernel[grid](x, y, places, y.numel(), h, w, channels, **options)
    return y, places


@on_its_device
def max_pool2x2_backward(dy: Tensor, places: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """Dense dy and places, both channels_last or not -> the gradient of an input of `height` x `width`, likewise."""
    n, c = dy.shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty((n, c, height, width), dtype=dy.dtype, device=dy.device, memory_format=layout)
    if height % 2 or width % 2:
        dx.zero_()  # the row and column that no window holds
    if dy.numel():
        options = configuration("max_pool2x2", dy.device)
        channels = c if channels_last else 1
        grid = (triton.cdiv(dy.numel(), options["BLOCK"]),)
        max_pool2x2_backward_kernel[grid](dy, places, dx, dy.numel(), height, width, channels, **options)
    return dx
