"""group_norm_silu's backward kernels: the sums over pixels that the gradients need, and the gradients.

With xhat = (u - mean) * rstd, dt the gradient of the SiLU's input and a = (1 + scale) * weight,

    dx = rstd * (a * dt - mean(a * dt) - xhat * mean(a * dt * xhat))

where means are over a group; every other gradient is a sum of dt, of dt * xhat or, for `add`, of dx over the pixels.
"""

import triton
import triton.language as tl

from ._channels import affine, group_sum, program, row_values, sigmoids, tile_pointers, tile_step


@triton.jit(do_not_specialize=["parts", "blocks"])
def backward_sums_kernel(
    x, skip, dy, mean, rstd, add, weight, bias, scale, shift, sums,
    x_n, x_c, x_s, skip_n, skip_c, skip_s, dy_n, dy_c, dy_s, add_n, scale_n, shift_n,
    C, C1, S, parts, chunk, blocks,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, SUMS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """`sums` (N, parts, SUMS, C): of dt, of dt * xhat and, if SUMS is 3, of xhat, over the part's pixels."""
    block, part, n = program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    first = block * CHANNELS
    channel = first + local
    inside = (local < CHANNELS) & (channel < C)
    offset = row_values(add, n, add_n, channel, inside)
    group = n * (C // GROUP) + channel // GROUP
    centre = tl.load(mean + group, inside, 0) - offset
    r = tl.load(rstd + group, inside, 0)
    a, b = affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
    start = part * chunk
    end = tl.minimum(start + chunk, S)
    if skip is not None:
        skip += n * skip_n
    p, q, h = _pair_sums(
        x + n * x_n, skip, dy + n * dy_n, x_c, x_s, skip_c, skip_s, dy_c, dy_s, C1, first, channel, inside, start, end,
        centre, r, a, b, CHANNELS, BLOCK_C, BLOCK_S, SUMS, SILU,
    )  # fmt: skip
    pointers = sums + (n * parts + part) * SUMS * C + channel
    tl.store(pointers, p, inside)
    tl.store(pointers + C, q, inside)
    if SUMS == 3:
        tl.store(pointers + 2 * C, h, inside)


@triton.jit(do_not_specialize=["parts", "blocks", "sum_parts"])
def backward_kernel(
    x, skip, dy, mean, rstd, add, weight, bias, scale, shift, sums,
    dx, dskip, dadd, dweight, dbias, dscale, dshift,
    x_n, x_c, x_s, skip_n, skip_c, skip_s, dy_n, dy_c, dy_s, dx_n, dx_c, dx_s, dskip_n, dskip_c, dskip_s,
    add_n, scale_n, shift_n, C, C1, S, parts, chunk, blocks, sum_parts,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    SUM_PARTS: tl.constexpr, SUMS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """SUM_PARTS: room for the parts of given sums; 0: compute them here.

    dadd, dscale and dshift are (N, C); dweight and dbias too, still to be summed over the samples.
    """
    block, part, n = program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    first = block * CHANNELS
    channel = first + local
    inside = (local < CHANNELS) & (channel < C)
    offset = row_values(add, n, add_n, channel, inside)
    group = n * (C // GROUP) + channel // GROUP
    centre = tl.load(mean + group, inside, 0) - offset
    r = tl.load(rstd + group, inside, 0)
    a, b = affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
    x += n * x_n
    dy += n * dy_n
    if skip is not None:
        skip += n * skip_n
    if SUM_PARTS == 0:
        p, q, h = _pair_sums(
            x, skip, dy, x_c, x_s, skip_c, skip_s, dy_c, dy_s, C1, first, channel, inside, 0, S, centre, r, a, b,
            CHANNELS, BLOCK_C, BLOCK_S, SUMS, SILU,
        )  # fmt: skip
    else:
        rows = tl.arange(0, SUM_PARTS)[:, None]
        valid = (rows < sum_parts) & inside[None, :]
        pointers = sums + (n * sum_parts + rows) * SUMS * C + channel[None, :]
        p = tl.sum(tl.load(pointers, valid, 0), 0)
        q = tl.sum(tl.load(pointers + C, valid, 0), 0)
        h = p
        if SUMS == 3:
            h = tl.sum(tl.load(pointers + 2 * C, valid, 0), 0)
    member = tl.arange(0, BLOCK_G)[:, None] == (local // GROUP)[None, :]
    member = member & inside[None, :]
    share = 1.0 / (GROUP * (S * 1.0))
    c1 = group_sum(a * p, member) * share
    c2 = group_sum(a * q, member) * share

    if part == 0:
        here = n * C + channel
        if dadd is not None:
            tl.store(dadd + here, r * (a * p - c1 * S - c2 * h), inside)
        if dshift is not None:
            tl.store(dshift + here, p, inside)
        if dscale is not None:
            w = tl.load(weight + channel, inside, 0).to(tl.float32)
            tl.store(dscale + here, w * q + tl.load(bias + channel, inside, 0).to(tl.float32) * p, inside)
        factor = 1.0 + row_values(scale, n, scale_n, channel, inside)
        if dweight is not None:
            tl.store(dweight + here, factor * q, inside)
        if dbias is not None:
            tl.store(dbias + here, factor * p, inside)

    start = part * chunk
    end = tl.minimum(start + chunk, S)
    if skip is None:
        if dx is not None:
            _input_gradient(
                x, dy, dx + n * dx_n, x_c, x_s, dy_c, dy_s, dx_c, dx_s, channel, channel, inside, start, end,
                centre, r, a, b, c1, c2, BLOCK_S, SILU,
            )  # fmt: skip
    else:
        if dx is not None and first < C1:
            _input_gradient(
                x, dy, dx + n * dx_n, x_c, x_s, dy_c, dy_s, dx_c, dx_s, channel, channel, inside & (channel < C1),
                start, end, centre, r, a, b, c1, c2, BLOCK_S, SILU,
            )  # fmt: skip
        if dskip is not None and first + CHANNELS > C1:
            _input_gradient(
                skip, dy, dskip + n * dskip_n, skip_c, skip_s, dy_c, dy_s, dskip_c, dskip_s, channel - C1, channel,
                inside & (channel >= C1), start, end, centre, r, a, b, c1, c2, BLOCK_S, SILU,
            )  # fmt: skip


@triton.jit
def _activation_gradient(d, dy, ra, b, dtype: tl.constexpr, SILU: tl.constexpr):
    """dt: the gradient before the activation, which is recomputed from d = u - mean; `ra` is rstd * a, `dtype` x's."""
    if not SILU:
        return dy
    else:
        t = d * ra[None, :] + b[None, :]
        s, rest = sigmoids(t, dtype)
        return dy * s * (1.0 + t * rest)


@triton.jit
def _pair_sums(
    x, skip, dy, x_c, x_s, skip_c, skip_s, dy_c, dy_s, C1, first, channel, inside, start, end, centre, rstd, a, b,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, SUMS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    if skip is None:
        return _sums(
            x, dy, x_c, x_s, dy_c, dy_s, channel, channel, inside, start, end, centre, rstd, a, b,
            BLOCK_C, BLOCK_S, SUMS, SILU,
        )  # fmt: skip
    else:
        p = tl.zeros([BLOCK_C], tl.float32)
        q = tl.zeros([BLOCK_C], tl.float32)
        h = tl.zeros([BLOCK_C], tl.float32)
        if first < C1:
            p, q, h = _sums(
                x, dy, x_c, x_s, dy_c, dy_s, channel, channel, inside & (channel < C1), start, end, centre, rstd, a, b,
                BLOCK_C, BLOCK_S, SUMS, SILU,
            )  # fmt: skip
        if first + CHANNELS > C1:
            skip_p, skip_q, skip_h = _sums(
                skip, dy, skip_c, skip_s, dy_c, dy_s, channel - C1, channel, inside & (channel >= C1), start, end,
                centre, rstd, a, b, BLOCK_C, BLOCK_S, SUMS, SILU,
            )  # fmt: skip
            p += skip_p
            q += skip_q
            h += skip_h
        return p, q, h


@triton.jit
def _sums(
    x, dy, x_c, x_s, dy_c, dy_s, x_channel, dy_channel, inside, start, end, centre, rstd, a, b,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, SUMS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    x = tile_pointers(x, x_c, x_s, x_channel, start, BLOCK_S)
    dy = tile_pointers(dy, dy_c, dy_s, dy_channel, start, BLOCK_S)
    ra = rstd * a
    p = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        g = tl.load(dy, valid, 0).to(tl.float32)
        d = tl.load(x, valid, 0).to(tl.float32) - centre[None, :]
        dt = _activation_gradient(d, g, ra, b, x.dtype.element_ty, SILU)
        p += dt
        q += dt * d
        if SUMS == 3:
            h += tl.where(valid, d, 0.0)
        x += tile_step(x_s, BLOCK_S)
        dy += tile_step(dy_s, BLOCK_S)
    return tl.sum(p, 0), tl.sum(q, 0) * rstd, tl.sum(h, 0) * rstd


@triton.jit
def _input_gradient(
    x, dy, dx, x_c, x_s, dy_c, dy_s, dx_c, dx_s, x_channel, dy_channel, inside, start, end, centre, rstd, a, b, c1, c2,
    BLOCK_S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    x = tile_pointers(x, x_c, x_s, x_channel, start, BLOCK_S)
    dy = tile_pointers(dy, dy_c, dy_s, dy_channel, start, BLOCK_S)
    dx = tile_pointers(dx, dx_c, dx_s, x_channel, start, BLOCK_S)
    ra = rstd * a
    level = rstd * c1
    slope = rstd * rstd * c2
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        g = tl.load(dy, valid, 0).to(tl.float32)
        d = tl.load(x, valid, 0).to(tl.float32) - centre[None, :]
        dt = _activation_gradient(d, g, ra, b, x.dtype.element_ty, SILU)
        tl.store(dx, dt * ra[None, :] - (d * slope[None, :] + level[None, :]), valid)
        x += tile_step(x_s, BLOCK_S)
        dy += tile_step(dy_s, BLOCK_S)
        dx += tile_step(dx_s, BLOCK_S)
