"""What the channel-wise kernels share: tiles, statistics, sums over groups, affine maps, the sigmoid.

All offsets are 64-bit, all arithmetic is float32.

Statistics of a tensor (N, C, H, W) are (N, P, 2, C): the mean and the sum of squared deviations (M2) of each channel
over each of P consecutive runs of ceil(H * W / P) pixels, the last one possibly shorter. A run of n pixels is summed
after subtracting one of its own values, k: with d = x - k, M2 = sum(d^2) - sum(d)^2 / n. As k is one of the values, M2
is at least (mean - k)^2 and the terms are at most n times as large, so a mean far above the spread costs no digits. k
is the middle pixel, as corners of a convolution's result are often outliers. Runs are merged as in Chan, Golub &
LeVeque (1979), also relative to one of them.
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
def pixel_row(x, stride_c, stride_s, channel, inside, pixel):
    """One pixel [channels] of the sample at `x`; zero for channels not `inside`."""
    return tl.load(x + channel.to(tl.int64) * stride_c + tl.cast(pixel, tl.int64) * stride_s, inside, 0)


@triton.jit
def run_statistics(sums, squares, k, start, end):
    """Mean and M2 [channels] of the run start <= s < end from a tile's sums of x - k and of their squares."""
    total = tl.sum(sums, 0)
    mean = total * (1.0 / (end - start))
    return k + mean, tl.sum(squares, 0) - total * mean


@triton.jit
def channel_statistics(
    x, stride_c, stride_s, channel, inside, start, end, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean and M2 [BLOCK_C] of the pixels start <= s < end; zero for channels not `inside`."""
    pointers = tile_pointers(x, stride_c, stride_s, channel, start, BLOCK_S)
    raw = pixel_row(x, stride_c, stride_s, channel, inside, start + (end - start) // 2)
    k = raw.to(tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        d = tl.load(pointers, valid, raw[None, :]).to(tl.float32) - k[None, :]
        sums += d
        squares += d * d
        pointers += tile_step(stride_s, BLOCK_S)
    return run_statistics(sums, squares, k, start, end)


@triton.jit
def merged_statistics(statistics, n, channel, inside, C, S, parts, PARTS: tl.constexpr):
    """Mean and M2 [BLOCK_C] over all pixels, from statistics (N, parts, 2, C); zero if not `inside`."""
    part = tl.arange(0, PARTS)[:, None]
    valid = (part < parts) & inside[None, :]
    first = statistics + n * parts * 2 * C + channel
    pointers = first[None, :] + part.to(tl.int64) * 2 * C
    k = tl.load(first, inside, 0)
    means = tl.load(pointers, valid, 0) - k[None, :]
    m2s = tl.load(pointers + C, valid, 0)
    chunk = (S + parts - 1) // parts
    count = tl.where(part < parts, tl.minimum(S - part * chunk, chunk), 0).to(tl.float32)
    mean = tl.sum(means * count, 0) * (1.0 / S)
    delta = means - mean[None, :]
    return k + mean, tl.sum(m2s + count * delta * delta, 0)


@triton.jit
def store_statistics(statistics, n, part, parts, channel, inside, C, mean, m2):
    pointers = statistics + (n * parts + part) * 2 * C + channel
    tl.store(pointers, mean, inside)
    tl.store(pointers + C, m2, inside)


@triton.jit
def group_sum(v, member):
    """For each channel the sum of v [BLOCK_C] over its group; `member` is [groups, BLOCK_C]."""
    totals = tl.sum(tl.where(member, v[None, :], 0.0), 1)
    return tl.sum(tl.where(member, totals[:, None], 0.0), 0)


@triton.jit
def group_mean(v, member, GROUP: tl.constexpr):
    """For each channel the mean of v over its group, and v minus that mean; a second pass restores digits that the
    first loses if v is far from zero."""
    mean = group_sum(v, member) * (1.0 / GROUP)
    rest = v - mean
    correction = group_sum(rest, member) * (1.0 / GROUP)
    return mean + correction, rest - correction


@triton.jit
def sigmoids(t, dtype: tl.constexpr):
    """1 / (1 + exp(-t)) and 1 / (1 + exp(t)). Half types use a reciprocal root, one instruction instead of a division's
    five: these kernels have only some 40 to 60 in the time that an element's bytes take."""
    # The second is not computed as 1 minus the first, to keep its digits, and the bound avoids infinity times zero. At
    # minus infinity it is 0, and products with both are NaN, as in PyTorch.
    e = tl.exp2(t * -1.4426950408889634)  # log2(e)
    if dtype == tl.float32:
        s = 1.0 / (1.0 + e)
    else:
        root = tl.rsqrt(1.0 + e)
        s = root * root
    return s, tl.minimum(e, 8.507059173023462e37) * s  # 2^126


@triton.jit
def silu(t, dtype: tl.constexpr):
    """t / (1 + exp(-t)); NaN at minus infinity, as PyTorch's. Half types as in `sigmoids`."""
    e = tl.exp2(t * -1.4426950408889634)
    if dtype == tl.float32:
        return t * (1.0 / (1.0 + e))
    else:
        root = tl.rsqrt(1.0 + e)
        return t * (root * root)


@triton.jit
def row_values(row, n, row_n, channel, inside):
    """Values (N, C) of sample n as float32 [BLOCK_C]; zeros if there are none."""
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
