"""What the channel-wise kernels share: tiles, Welford statistics, sums over groups, affine parts.

All offsets are 64-bit.

Statistics of a tensor (N, C, H, W) are float32 (N, P, 2, C): the mean and the sum of squared deviations (M2) of each
channel over each of P consecutive runs of ceil(H * W / P) pixels, the last one possibly shorter. Merging follows Chan,
Golub & LeVeque (1979); no value is a difference of large squares.
"""

import triton
import triton.language as tl


@triton.jit
def program(blocks, parts):
    """(block of channels, part of the pixels, sample) of this program: neighbours in memory run next to each other."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % parts, (pid // blocks // parts).to(tl.int64)


@triton.jit
def tile_pointers(x, stride_c, stride_s, channel, start, BLOCK_S: tl.constexpr):
    """Pointers [BLOCK_S, channels] to the first tile of the pixels from `start` on; `x` points at the sample."""
    pixel = start + tl.arange(0, BLOCK_S)
    return x + channel.to(tl.int64)[None, :] * stride_c + pixel.to(tl.int64)[:, None] * stride_s


@triton.jit
def tile_step(stride_s, BLOCK_S: tl.constexpr):
    """From a tile's pointers to the next one's."""
    return tl.cast(stride_s, tl.int64) * BLOCK_S


@triton.jit
def column_sum(v):
    """Sum over the tile's pixels, float64: once per program, that costs nothing."""
    return tl.sum(v.to(tl.float64), 0)


@triton.jit
def welford_update(mean, m2, x, inside, count):
    """Take up x where `inside`: the `count`-th value (from 1) of every element that is still inside."""
    delta = tl.where(inside, x - mean, 0.0)
    mean += delta * (1.0 / count)
    return mean, m2 + delta * (x - mean)


@triton.jit
def welford_reduce(mean, m2, start, end, BLOCK_S: tl.constexpr):
    """Channels' mean and M2, float64, from those of a tile's elements, which went from `start` to `end`."""
    pixels = end - start
    values = tl.maximum(pixels - tl.arange(0, BLOCK_S) + BLOCK_S - 1, 0) // BLOCK_S
    count = values.to(tl.float32)[:, None]
    total = column_sum(mean * count) / (pixels * 1.0)
    delta = mean - total.to(tl.float32)[None, :]
    return total, column_sum(m2 + count * delta * delta)


@triton.jit
def channel_statistics(
    x, stride_c, stride_s, channel, inside, start, end, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean and M2, float64 [BLOCK_C], of the pixels start <= s < end; zero for channels not `inside`."""
    pointers = tile_pointers(x, stride_c, stride_s, channel, start, BLOCK_S)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = 0.0
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        count += 1.0
        mean, m2 = welford_update(mean, m2, tl.load(pointers, valid, 0).to(tl.float32), valid, count)
        pointers += tile_step(stride_s, BLOCK_S)
    return welford_reduce(mean, m2, start, end, BLOCK_S)


@triton.jit
def merged_statistics(statistics, n, channel, inside, C, S, parts, PARTS: tl.constexpr):
    """Mean and M2, float64 [BLOCK_C], over all pixels, from statistics (N, parts, 2, C); zero if not `inside`."""
    part = tl.arange(0, PARTS)[:, None]
    valid = (part < parts) & inside[None, :]
    pointers = statistics + (n * parts + part) * 2 * C + channel[None, :]
    means = tl.load(pointers, valid, 0)
    m2s = tl.load(pointers + C, valid, 0)
    chunk = (S + parts - 1) // parts
    count = tl.where(part < parts, tl.minimum(S - part * chunk, chunk), 0).to(tl.float32)
    mean = column_sum(means * count) / (S * 1.0)
    delta = means - mean.to(tl.float32)[None, :]
    return mean, column_sum(m2s + count * delta * delta)


@triton.jit
def store_statistics(statistics, n, part, parts, channel, inside, C, mean, m2):
    pointers = statistics + (n * parts + part) * 2 * C + channel
    tl.store(pointers, mean, inside)
    tl.store(pointers + C, m2, inside)


@triton.jit
def group_sum(v, member):
    """Float64 [BLOCK_C]: for each channel the sum of v over its group; `member` is [groups, BLOCK_C]."""
    totals = tl.sum(tl.where(member, v.to(tl.float64)[None, :], 0.0), 1)
    return tl.sum(tl.where(member, totals[:, None], 0.0), 0)


@triton.jit
def row_values(row, n, row_n, channel, inside):
    """Values (N, C) of sample n as float32 [BLOCK_C]; zero without."""
    if row is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(row + n * row_n + channel, inside, 0).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside):
    """(a, b) with a * xhat + b = (1 + scale) * (weight * xhat + bias) + shift."""
    factor = 1.0 + row_values(scale, n, scale_n, channel, inside)
    a = factor * tl.load(weight + channel, inside, 0).to(tl.float32)
    b = factor * tl.load(bias + channel, inside, 0).to(tl.float32)
    return a, b + row_values(shift, n, shift_n, channel, inside)
