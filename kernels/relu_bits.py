"""The bits of ReLUs in Triton: packed in the pass that clamps, read in the pass that masks.

Tensors are dense and treated as one run of memory. A program has a tile (BLOCK bytes, 8 bits): reading eight elements
per byte keeps loads contiguous, and the sum over a row is the byte. Traffic is the tensor, read and written once, and
its bits. All offsets are 64-bit.

A bias (one value per channel) is added in the same pass, and the sum is rounded before clamping, as in a separate pass.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, launch, on_its_device


@triton.jit
def _channel(first, channels, run, BLOCK: tl.constexpr, OCTET: tl.constexpr):
    """The channels [BLOCK, 8] of the elements from `first` on, each channel `run` elements long. OCTET says what eight
    neighbours are: consecutive "channels", all of one "channel", or ("") anything."""
    channel = ((first // run) % channels).to(tl.int32)
    rest = (first % run).to(tl.int32)
    row = tl.arange(0, BLOCK)[:, None] * 8
    bit = tl.arange(0, 8)[None, :]
    if OCTET == "channels":
        return tl.max_contiguous(tl.multiple_of((channel + row) % channels + bit, (1, 8)), (1, 8))
    elif OCTET == "channel":
        return (channel + (rest + row) // run) % channels + bit * 0
    else:
        return (channel + (rest + row + bit) // run) % channels


@triton.jit
def relu_bits_kernel(
    y_ptr, bits_ptr, bias_ptr, size, channels, run, CEILING: tl.constexpr, OCTET: tl.constexpr, BLOCK: tl.constexpr
):
    """Without bits_ptr only clamps; bias_ptr may be None."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    i = byte[:, None] * 8 + bit[None, :]
    inside = i < size
    y = tl.load(y_ptr + i, inside, other=0)
    kind = y.dtype
    y = y if kind == tl.float64 else y.to(tl.float32)
    if bias_ptr is not None:
        channel = _channel(tl.program_id(0).to(tl.int64) * (BLOCK * 8), channels, run, BLOCK, OCTET)
        y = (y + tl.load(bias_ptr + channel, inside, other=0).to(y.dtype)).to(kind).to(y.dtype)
    low = y <= 0  # false for NaN, which is kept and passes its gradient on
    clamped = tl.where(low, 0, y)
    blocked = low
    if CEILING is not None:
        high = y >= CEILING
        clamped = tl.where(high, CEILING, clamped)
        blocked = low | high
    tl.store(y_ptr + i, clamped, inside)
    if bits_ptr is not None:
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
def relu_bits_(y: Tensor, ceiling: float, bias: Tensor | None = None) -> Tensor:
    """Add `bias` (C,), clamp dense y (N, C, H, W) to [0, ceiling] in place (infinity: no ceiling) -> bits, uint8
    (ceil(numel / 8),)."""
    bits = torch.empty((y.numel() + 7) // 8, dtype=torch.uint8, device=y.device)
    _clamp(y, bits, ceiling, bias)
    return bits


@on_its_device
def clamp_(y: Tensor, ceiling: float, bias: Tensor | None = None) -> Tensor:
    """The same without bits -> y."""
    _clamp(y, None, ceiling, bias)
    return y


def _clamp(y: Tensor, bits: Tensor | None, ceiling: float, bias: Tensor | None) -> None:
    if not y.numel():
        return
    options = configuration("relu_bits", y.device)
    channels, run, octet = 1, 1, ""
    if bias is not None:
        channels, run = y.shape[1], y.shape[2] * y.shape[3] if y.is_contiguous() else 1
        octet = "channels" if run == 1 and channels % 8 == 0 else "channel" if run % 8 == 0 else ""
    grid = (triton.cdiv(y.numel(), 8 * options["BLOCK"]),)
    launch(relu_bits_kernel, grid, y, bits, bias, y.numel(), channels, run,
        CEILING=None if ceiling == math.inf else ceiling, OCTET=octet, **options,
    )  # fmt: skip


@on_its_device
def mask_bits(dy: Tensor, bits: Tensor) -> Tensor:
    """Dense dy, zero where its bit is 1, in a new tensor of the same strides."""
    dx = torch.empty_like(dy)
    if bits.numel():
        options = configuration("relu_bits", dy.device)
        launch(mask_bits_kernel, (triton.cdiv(bits.numel(), options["BLOCK"]),), dy, bits, dx, dy.numel(), **options)
    return dx
