"""to_uint8 in Triton: one program per BLOCK of output bytes of one image, so that stores are contiguous.

x is addressed by the strides of image, channel and pixel, so that contiguous and channels_last memory are both read in
place. All offsets are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, launch, on_its_device, pixel_stride


@triton.jit
def to_uint8_kernel(
    x_ptr, y_ptr, stride_n, stride_c, stride_p, image_size, blocks_per_image, C: tl.constexpr, BLOCK: tl.constexpr
):
    n = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    block = (tl.program_id(0) % blocks_per_image).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)  # byte in the image: pixel * C + channel
    inside = i < image_size
    pixel = i // C
    channel = i % C
    x = tl.load(x_ptr + n * stride_n + channel * stride_c + pixel * stride_p, inside)
    x = x if x.dtype == tl.float64 else x.to(tl.float32)
    y = x * 127.5 + 128
    y = tl.where(y > 0, y, 0)  # NaN compares false: 0
    y = tl.where(y < 255, y, 255)
    # through int32: the cast from float straight to an unsigned byte is not defined the same everywhere
    tl.store(y_ptr + n * image_size + i, y.to(tl.int32).to(tl.uint8), inside)


@on_its_device
def to_uint8(x: Tensor) -> Tensor:
    """x (N, C, H, W) whose pixels are evenly spaced -> uint8 (N, H, W, C), contiguous."""
    n, c, h, w = x.shape
    y = torch.empty((n, h, w, c), dtype=torch.uint8, device=x.device)
    if y.numel() == 0:
        return y
    options = configuration("to_uint8", x.device)
    size = c * h * w
    blocks = triton.cdiv(size, options["BLOCK"])
    # the definition rounds the product before the sum: no fused multiply-add
    launch(
        to_uint8_kernel,
        (n * blocks,),
        x,
        y,
        x.stride(0),
        x.stride(1),
        pixel_stride(x),
        size,
        blocks,
        C=c,
        enable_fp_fusion=False,
        **options,
    )
    return y
