"""(h + skip + bias) * scale in Triton, optionally with the statistics of the result that the next norm needs.

One program per block of channels and run of pixels of one sample; every tensor is addressed by the strides of sample,
channel and pixel.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._channels import pixel_row, program, run_statistics, store_statistics, tile_pointers, tile_step
from ._launch import configuration, launch, on_its_device, pixel_stride
from ._tiles import ceil_div, tile


@triton.jit(do_not_specialize=["parts", "blocks"])
def residual_kernel(
    h, skip, bias, y, statistics, h_n, h_c, h_s, skip_n, skip_c, skip_s, y_n, y_c, y_s,
    C, S, scale, parts, chunk, blocks, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, part, n = program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    channel = block * CHANNELS + local
    inside = (local < CHANNELS) & (channel < C)
    start = part * chunk
    end = tl.minimum(start + chunk, S)
    b = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        b += tl.load(bias + channel, inside, 0).to(tl.float32)
    h += n * h_n
    skip += n * skip_n
    k = b
    if statistics is not None:
        middle = start + (end - start) // 2
        row = pixel_row(h, h_c, h_s, channel, inside, middle).to(tl.float32)
        row += pixel_row(skip, skip_c, skip_s, channel, inside, middle).to(tl.float32)
        k = ((row + b) * scale).to(y.dtype.element_ty).to(tl.float32)
    h = tile_pointers(h, h_c, h_s, channel, start, BLOCK_S)
    skip = tile_pointers(skip, skip_c, skip_s, channel, start, BLOCK_S)
    y = tile_pointers(y + n * y_n, y_c, y_s, channel, start, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        total = tl.load(h, valid, 0).to(tl.float32) + tl.load(skip, valid, 0).to(tl.float32)
        result = ((total + b[None, :]) * scale).to(y.dtype.element_ty)
        tl.store(y, result, valid)
        if statistics is not None:
            # of the stored, rounded values, as the norm reads these
            d = tl.where(valid, result.to(tl.float32) - k[None, :], 0.0)
            sums += d
            squares += d * d
        h += tile_step(h_s, BLOCK_S)
        skip += tile_step(skip_s, BLOCK_S)
        y += tile_step(y_s, BLOCK_S)
    if statistics is not None:
        mean, m2 = run_statistics(sums, squares, k, start, end)
        store_statistics(statistics, n, part, parts, channel, inside, C, mean, m2)


@on_its_device
def residual(h: Tensor, skip: Tensor, bias: Tensor | None, scale: float, y: Tensor, statistics: Tensor | None) -> None:
    """Fill y (N, C, H, W), and statistics (N, parts, 2, C) if given. Pixels of all three tensors are evenly spaced."""
    n, c, height, width = y.shape
    pixels = height * width
    options = dict(configuration("residual", y.device, (n, c, pixels)))
    t = tile(c, 1, pixels, y.stride(1) == 1, options.pop("elements"))
    parts = ceil_div(pixels, t.block_s) if statistics is None else statistics.shape[1]
    strides = (stride for x in (h, skip, y) for stride in (x.stride(0), x.stride(1), pixel_stride(x)))
    launch(residual_kernel, (n * t.blocks * parts,),
        h, skip, bias, y, statistics, *strides, c, pixels, scale, parts, ceil_div(pixels, parts), t.blocks,
        CHANNELS=t.channels, BLOCK_C=t.block_c, BLOCK_S=t.block_s, **options,
    )  # fmt: skip
