"""The bits of ReLUs in Triton: packed in the pass that clamps, read in the pass that masks.

Tensors are dense and treated as one run of memory. A program has a tile (BLOCK bytes, 8 bits): reading eight elements
per byte keeps loads contiguous, and the sum over a row is the byte. Traffic is the tensor, read and written once, and
its bits. All offsets are 64-bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, launch, on_its_device


@triton.jit
def relu_bits_kernel(y_ptr, bits_ptr, size, CEILING: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    i = byte[:, None] * 8 + bit[None, :]
    inside = i < size
    y = tl.load(y_ptr + i, inside, other=0)
    y = y if y.dtype == tl.float64 else y.to(tl.float32)
    low = y <= 0  # false for NaN, which is kept and passes its gradient
    clamped = tl.where(low, 0, y)
    blocked = low
    if CEILING is not None:
        high = y >= CEILING
        clamped = tl.where(high, CEILING, clamped)
        blocked = low | high
    tl.store(y_ptr + i, clamped, inside)
    packed = tl.sum(tl.where(blocked & inside, 1 << bit[None, :], 0), 1)
    tl.store(bits_ptr + byte, packed.to(tl.uint8), byte * 8 < size)


@triton.jit
def mask_bits_kernel(dy_ptr, bits_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    i = byte[:, None] * 8 + bit[None, :]
    inside = i < size
    packed = tl.load(bits_ptr + byte, byte * 8 < size, other=0).to(tl.int32)
    blocked = (packed[:, None] >> bit[None, :]) & 1
    dy = tl.load(dy_ptr + i, inside, other=0)
    tl.store(dx_ptr + i, tl.where(blocked != 0, tl.zeros_like(dy), dy), inside)


@on_its_device
def relu_bits_(y: Tensor, ceiling: float) -> Tensor:
    """Clamp dense y to [0, ceiling] in place (infinity: no ceiling) -> bits, uint8 (ceil(numel / 8),)."""
    bits = torch.empty((y.numel() + 7) // 8, dtype=torch.uint8, device=y.device)
    if bits.numel():
        options = configuration("relu_bits", y.device)
        grid = (triton.cdiv(bits.numel(), options["BLOCK"]),)
        launch(relu_bits_kernel, grid, y, bits, y.numel(), CEILING=None if ceiling == math.inf else ceiling, **options)
    return bits


@on_its_device
def mask_bits(dy: Tensor, bits: Tensor) -> Tensor:
    """Dense dy, zero where its bit is 1, in a new tensor of the same strides."""
    dx = torch.empty_like(dy)
    if bits.numel():
        options = configuration("relu_bits", dy.device)
        launch(mask_bits_kernel, (triton.cdiv(bits.numel(), options["BLOCK"]),), dy, bits, dx, dy.numel(), **options)
    return dx
