"""group_norm_silu's backward kernels: the sums over pixels that the gradients need, and the gradients.

With xhat = (u - mean) * rstd, dt the gradient of what enters the SiLU and a = (1 + scale) * weight,

    dx = rstd * (a * dt - mean(a * dt) - xhat * mean(a * dt * xhat))

where means go over a group; every other gradient is a sum of dt, of dt * xhat or, for `add`, of dx over the pixels.
"""

import triton
import triton.language as tl

from ._channels import affine, column_sum, group_sum, program, row_values, tile_pointers, tile_step


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
    """SUM_PARTS: room for the parts of the sums given; 0 to compute them here.

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
        p = column_sum(tl.load(pointers, valid, 0))
        q = column_sum(tl.load(pointers + C, valid, 0))
        h = p
        if SUMS == 3:
            h = column_sum(tl.load(pointers + 2 * C, valid, 0))
    member = tl.arange(0, BLOCK_G)[:, None] == (local // GROUP)[None, :]
    member = member & inside[None, :]
    size = GROUP * (S * 1.0)
    c1 = group_sum(a * p, member) / size
    c2 = group_sum(a * q, member) / size

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

    c1 = c1.to(tl.float32)
    c2 = c2.to(tl.float32)
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
def _activation_gradient(x, dy, centre, rstd, a, b, SILU: tl.constexpr):
    """xhat, and dt: the gradient before the activation, recomputed from x."""
    xhat = (x - centre[None, :]) * rstd[None, :]
    dt = dy
    if SILU:
        t = xhat * a[None, :] + b[None, :]
        sigmoid = tl.sigmoid(t)
        dt = dy * sigmoid * (1.0 + t * (1.0 - sigmoid))
    return xhat, dt


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
        p = tl.zeros([BLOCK_C], tl.float64)
        q = tl.zeros([BLOCK_C], tl.float64)
        h = tl.zeros([BLOCK_C], tl.float64)
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
    p = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        g = tl.load(dy, valid, 0).to(tl.float32)
        xhat, dt = _activation_gradient(tl.load(x, valid, 0).to(tl.float32), g, centre, rstd, a, b, SILU)
        p += dt
        q += dt * xhat
        if SUMS == 3:
            h += tl.where(valid, xhat, 0.0)
        x += tile_step(x_s, BLOCK_S)
        dy += tile_step(dy_s, BLOCK_S)
    return column_sum(p), column_sum(q), column_sum(h)


@triton.jit
def _input_gradient(
    x, dy, dx, x_c, x_s, dy_c, dy_s, dx_c, dx_s, x_channel, dy_channel, inside, start, end, centre, rstd, a, b, c1, c2,
    BLOCK_S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    x = tile_pointers(x, x_c, x_s, x_channel, start, BLOCK_S)
    dy = tile_pointers(dy, dy_c, dy_s, dy_channel, start, BLOCK_S)
    dx = tile_pointers(dx, dx_c, dx_s, x_channel, start, BLOCK_S)
    for s in range(start, end, BLOCK_S):
        valid = (s + tl.arange(0, BLOCK_S) < end)[:, None] & inside[None, :]
        g = tl.load(dy, valid, 0).to(tl.float32)
        xhat, dt = _activation_gradient(tl.load(x, valid, 0).to(tl.float32), g, centre, rstd, a, b, SILU)
        du = rstd[None, :] * (dt * a[None, :] - c1[None, :] - xhat * c2[None, :])
        tl.store(dx, du, valid)
        x += tile_step(x_s, BLOCK_S)
        dy += tile_step(dy_s, BLOCK_S)
        dx += tile_step(dx_s, BLOCK_S)
