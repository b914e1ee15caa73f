"""group_norm_silu's forward kernels: the statistics of a map, and the norm with the operations around it.

A program owns whole groups of one sample, or a part of their pixels (see group_norm_silu.py).
"""

import triton
import triton.language as tl

from ._channels import (
    affine,
    channel_statistics,
    group_mean,
    group_sum,
    merged_statistics,
    program,
    row_values,
    silu,
    store_statistics,
    tile_pointers,
    tile_step,
)


@triton.jit(do_not_specialize=["parts", "blocks"])
def statistics_kernel(
    x, statistics, x_n, x_c, x_s, C, S, parts, chunk, blocks,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, part, n = program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    channel = block * CHANNELS + local
    inside = (local < CHANNELS) & (channel < C)
    start = part * chunk
    end = tl.minimum(start + chunk, S)
    mean, m2 = channel_statistics(x + n * x_n, x_c, x_s, channel, inside, start, end, BLOCK_C, BLOCK_S)
    store_statistics(statistics, n, part, parts, channel, inside, C, mean, m2)


@triton.jit(do_not_specialize=["parts", "blocks", "x_parts", "skip_parts"])
def forward_kernel(
    x, skip, x_statistics, skip_statistics, add, weight, bias, scale, shift, y, mean_out, rstd_out,
    x_n, x_c, x_s, skip_n, skip_c, skip_s, y_n, y_c, y_s, add_n, scale_n, shift_n,
    C, C1, S, eps, parts, chunk, blocks, x_parts, skip_parts,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    X_PARTS: tl.constexpr, SKIP_PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """X_PARTS and SKIP_PARTS: room for the parts of given statistics; 0: compute them here."""
    block, part, n = program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    first = block * CHANNELS
    channel = first + local
    inside = (local < CHANNELS) & (channel < C)
    x += n * x_n
    y += n * y_n
    if skip is None:
        mean, m2 = _statistics(x, x_statistics, n, x_c, x_s, channel, inside, C, S, x_parts, X_PARTS, BLOCK_C, BLOCK_S)
    else:
        skip += n * skip_n
        in_x = inside & (channel < C1)
        in_skip = inside & (channel >= C1)
        mean = tl.zeros([BLOCK_C], tl.float32)
        m2 = tl.zeros([BLOCK_C], tl.float32)
        if first < C1:
            mean, m2 = _statistics(
                x, x_statistics, n, x_c, x_s, channel, in_x, C1, S, x_parts, X_PARTS, BLOCK_C, BLOCK_S
            )
        if first + CHANNELS > C1:
            skip_mean, skip_m2 = _statistics(
                skip, skip_statistics, n, skip_c, skip_s, channel - C1, in_skip, C - C1, S,
                skip_parts, SKIP_PARTS, BLOCK_C, BLOCK_S,
            )  # fmt: skip
            mean += skip_mean
            m2 += skip_m2
    offset = row_values(add, n, add_n, channel, inside)
    mean += offset
    member = tl.arange(0, BLOCK_G)[:, None] == (local // GROUP)[None, :]
    member = member & inside[None, :]
    mean, delta = group_mean(mean, member, GROUP)
    variance = group_sum(m2 + delta * delta * S, member) * (1.0 / (GROUP * (S * 1.0)))
    rstd = tl.rsqrt(variance + eps)
    if part == 0:
        leader = inside & (local % GROUP == 0)
        group = n * (C // GROUP) + channel // GROUP
        tl.store(mean_out + group, mean, leader)
        tl.store(rstd_out + group, rstd, leader)

    a, b = affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
    a *= rstd
    centre = mean - offset
    start = part * chunk
    end = tl.minimum(start + chunk, S)
    if skip is None:
        _apply(x, y, x_c, x_s, y_c, y_s, channel, channel, inside, start, end, centre, a, b, BLOCK_S, SILU)
    else:
        if first < C1:
            _apply(x, y, x_c, x_s, y_c, y_s, channel, channel, in_x, start, end, centre, a, b, BLOCK_S, SILU)
        if first + CHANNELS > C1:
            _apply(
                skip, y, skip_c, skip_s, y_c, y_s, channel - C1, channel, in_skip, start, end, centre, a, b,
                BLOCK_S, SILU,
            )  # fmt: skip


@triton.jit
def _statistics(
    x, statistics, n, x_c, x_s, channel, inside, C, S, parts,
    PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    if PARTS == 0:
        return channel_statistics(x, x_c, x_s, channel, inside, 0, S, BLOCK_C, BLOCK_S)
    else:
        return merged_statistics(statistics, n, channel, inside, C, S, parts, PARTS)


@triton.jit
def _apply(
    x, y, x_c, x_s, y_c, y_s, x_channel, y_channel, inside, start, end, centre, a, b,
    BLOCK_S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    x = tile_pointers(x, x_c, x_s, x_channel, start, BLOCK_S)
    y = tile_pointers(y, y_c, y_s, y_channel, start, BLOCK_S)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        # centred before scaling, so that a mean far above the spread costs no digits
        t = (tl.load(x, valid, 0).to(tl.float32) - centre[None, :]) * a[None, :] + b[None, :]
        if SILU:
            t = silu(t, y.dtype.element_ty)
        tl.store(y, t, valid)
        x += tile_step(x_s, BLOCK_S)
        y += tile_step(y_s, BLOCK_S)
