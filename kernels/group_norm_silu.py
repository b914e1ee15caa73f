"""act((1 + scale) * GN(x + add; weight, bias) + shift) and its gradient in Triton, over one tensor or a pair of them.

A program owns whole groups of one sample (see _tiles.py) and addresses every tensor by the strides of sample, channel
and pixel, so contiguous and channels_last memory and slices of either are read where they lie. A pair (x, skip) is the
concatenation of their channels: a block of channels reads the part in x, then the part in skip.

Where samples and blocks alone fill the device, one kernel does all: it walks over its pixels once for the statistics
and once more to apply them, the second time from cache. Otherwise pixels are split over programs, and the statistics
(or the sums the gradient needs) of each part come from a kernel before. No atomics: results repeat to the bit.

Counts of programs and parts tell nothing of addresses, so kernels are not compiled anew for each (do_not_specialize).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._channels import (
    channel_statistics,
    column_sum,
    group_sum,
    merged_statistics,
    store_statistics,
    tile_pointers,
)
from ._launch import configuration, on_its_device, pixel_stride, programs_wanted
from ._tiles import MOST_PARTS, Tile, ceil_div, power_of_2, split, tile


@triton.jit(do_not_specialize=["parts", "blocks"])
def statistics_kernel(
    x, statistics, x_n, x_c, x_s, C, S, parts, chunk, blocks,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, part, n = _program(blocks, parts)
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
    """X_PARTS and SKIP_PARTS: room for the parts of the statistics given; 0 to compute them here."""
    block, part, n = _program(blocks, parts)
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
        mean = tl.zeros([BLOCK_C], tl.float64)
        m2 = tl.zeros([BLOCK_C], tl.float64)
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
    offset = _row(add, n, add_n, channel, inside)
    mean += offset
    member = tl.arange(0, BLOCK_G)[:, None] == (local // GROUP)[None, :]
    member = member & inside[None, :]
    group_mean = group_sum(mean, member) / GROUP
    delta = mean - group_mean
    variance = group_sum(m2 + delta * delta * S, member) / (GROUP * (S * 1.0))
    rstd = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    if part == 0:
        leader = inside & (local % GROUP == 0)
        group = n * (C // GROUP) + channel // GROUP
        tl.store(mean_out + group, group_mean, leader)
        tl.store(rstd_out + group, rstd, leader)

    a, b = _affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
    a *= rstd
    centre = (group_mean - offset).to(tl.float32)
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


@triton.jit(do_not_specialize=["parts", "blocks"])
def backward_sums_kernel(
    x, skip, dy, mean, rstd, add, weight, bias, scale, shift, sums,
    x_n, x_c, x_s, skip_n, skip_c, skip_s, dy_n, dy_c, dy_s, add_n, scale_n, shift_n,
    C, C1, S, parts, chunk, blocks,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, SUMS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """`sums` (N, parts, SUMS, C): of dt, of dt * xhat and, if SUMS is 3, of xhat, over the part's pixels."""
    block, part, n = _program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    first = block * CHANNELS
    channel = first + local
    inside = (local < CHANNELS) & (channel < C)
    offset = _row(add, n, add_n, channel, inside)
    group = n * (C // GROUP) + channel // GROUP
    centre = tl.load(mean + group, inside, 0) - offset
    r = tl.load(rstd + group, inside, 0)
    a, b = _affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
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
    block, part, n = _program(blocks, parts)
    local = tl.arange(0, BLOCK_C)
    first = block * CHANNELS
    channel = first + local
    inside = (local < CHANNELS) & (channel < C)
    offset = _row(add, n, add_n, channel, inside)
    group = n * (C // GROUP) + channel // GROUP
    centre = tl.load(mean + group, inside, 0) - offset
    r = tl.load(rstd + group, inside, 0)
    a, b = _affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside)
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
        factor = 1.0 + _row(scale, n, scale_n, channel, inside)
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
def _program(blocks, parts):
    """(block of channels, part of the pixels, sample) of this program: neighbours in memory run next to each other."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % parts, (pid // blocks // parts).to(tl.int64)


@triton.jit
def _row(row, n, row_n, channel, inside):
    """Values (N, C) of sample n as float32 [BLOCK_C]; zero without."""
    if row is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(row + n * row_n + channel, inside, 0).to(tl.float32)


@triton.jit
def _affine(weight, bias, scale, shift, n, scale_n, shift_n, channel, inside):
    """(a, b) with a * xhat + b = (1 + scale) * (weight * xhat + bias) + shift."""
    factor = 1.0 + _row(scale, n, scale_n, channel, inside)
    a = factor * tl.load(weight + channel, inside, 0).to(tl.float32)
    b = factor * tl.load(bias + channel, inside, 0).to(tl.float32)
    return a, b + _row(shift, n, shift_n, channel, inside)


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
        # centred before it is scaled: a mean far above the spread costs no digits
        t = (tl.load(x, valid, 0).to(tl.float32) - centre[None, :]) * a[None, :] + b[None, :]
        if SILU:
            t *= tl.sigmoid(t)
        tl.store(y, t, valid)
        x += BLOCK_S * x_s
        y += BLOCK_S * y_s


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
        x += BLOCK_S * x_s
        dy += BLOCK_S * dy_s
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
        x += BLOCK_S * x_s
        dy += BLOCK_S * dy_s
        dx += BLOCK_S * dx_s


class Plan:
    """How one call is cut: the tile, the parts that pixels are split into, and whether one kernel does it all."""

    def __init__(self, kind: str, x: Tensor, channels: int, groups: int) -> None:
        n, _, h, w = x.shape
        self.pixels = h * w
        options = dict(configuration(f"group_norm_silu.{kind}", x.device, (n, channels, self.pixels)))
        self.tile: Tile = tile(channels, channels // groups, self.pixels, x.stride(1) == 1, options.pop("elements"))
        self.options = options
        self.blocks = n * self.tile.blocks
        self.parts, self.chunk = split(self.blocks, self.pixels, self.tile.block_s, programs_wanted(x.device))

    @property
    def cut(self) -> dict[str, int]:
        """Arguments of a kernel whose pixels go to `parts` programs of `chunk` each."""
        return {"parts": self.parts, "chunk": self.chunk, "blocks": self.tile.blocks}

    @property
    def whole(self) -> dict[str, int]:
        """Arguments of a kernel whose programs take all pixels of a sample."""
        return {"parts": 1, "chunk": self.pixels, "blocks": self.tile.blocks}

    def constants(self, group: int) -> dict[str, int]:
        t = self.tile
        return {"GROUP": group, "CHANNELS": t.channels, "BLOCK_C": t.block_c, "BLOCK_S": t.block_s, **self.options}


@on_its_device
def statistics(x: Tensor, parts: int) -> Tensor:
    """The statistics (see _channels.py) of x (N, C, H, W), whose pixels are evenly spaced, over `parts` runs."""
    n, c, h, w = x.shape
    options = dict(configuration("group_norm_silu.forward", x.device, (n, c, h * w)))
    t = tile(c, 1, h * w, x.stride(1) == 1, options.pop("elements"))
    out = torch.empty((n, parts, 2, c), dtype=torch.float32, device=x.device)
    statistics_kernel[(n * t.blocks * parts,)](
        x, out, *_strides(x), c, h * w, parts, ceil_div(h * w, parts), t.blocks,
        CHANNELS=t.channels, BLOCK_C=t.block_c, BLOCK_S=t.block_s, **options,
    )  # fmt: skip
    return out


@on_its_device
def forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_statistics: Tensor | None,
    skip_statistics: Tensor | None,
    silu: bool,
    y: Tensor,
    statistics_parts: int,
) -> tuple[Tensor, Tensor]:
    """Fill y (N, C, H, W) and return mean and rstd, float32 (N, groups).

    Pixels of x, skip and y are evenly spaced; rows of add, scale and shift are contiguous. Statistics that are missing
    and cannot be computed on the way go over `statistics_parts` runs of pixels.
    """
    n, c = y.shape[:2]
    mean, rstd = (torch.empty((n, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    plan = Plan("forward", x, c, num_groups)
    if plan.parts > 1:
        if x_statistics is None:
            x_statistics = statistics(x, statistics_parts)
        if skip is not None and skip_statistics is None:
            skip_statistics = statistics(skip, statistics_parts)
    elif x_statistics is None:
        skip_statistics = None  # two maps of a network: not worth a kernel compiled for the skip's alone
    x_parts = 0 if x_statistics is None else x_statistics.shape[1]
    skip_parts = 0 if skip_statistics is None else skip_statistics.shape[1]
    forward_kernel[(plan.blocks * plan.parts,)](
        x, skip, x_statistics, skip_statistics, add, weight, bias, scale, shift, y, mean, rstd,
        *_strides(x), *_strides(skip), *_strides(y), _row_stride(add), _row_stride(scale), _row_stride(shift),
        C=c, C1=x.shape[1], S=plan.pixels, eps=eps, **plan.cut, x_parts=x_parts, skip_parts=skip_parts,
        BLOCK_G=plan.tile.block_g, X_PARTS=_room(x_parts), SKIP_PARTS=_room(skip_parts), SILU=silu,
        **plan.constants(c // num_groups),
    )  # fmt: skip
    return mean, rstd


@on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    dx: Tensor | None,
    dskip: Tensor | None,
    dadd: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    """Fill the gradients given. All but dx and dskip are (N, C), dweight and dbias still to be summed over N."""
    n, c = dy.shape[:2]
    group = c // mean.shape[1]
    plan = Plan("backward", x, c, mean.shape[1])
    sources = (x, skip, dy, mean, rstd, add, weight, bias, scale, shift)
    strides = (*_strides(x), *_strides(skip), *_strides(dy))
    row_strides = (_row_stride(add), _row_stride(scale), _row_stride(shift))
    number = 2 if dadd is None else 3
    sums = None
    if plan.parts > 1:
        sums = torch.empty((n, plan.parts, number, c), dtype=torch.float32, device=x.device)
        backward_sums_kernel[(plan.blocks * plan.parts,)](
            *sources, sums, *strides, *row_strides, c, x.shape[1], plan.pixels, **plan.cut,
            SUMS=number, SILU=silu, **plan.constants(group),
        )  # fmt: skip
    cut = plan.whole if dx is None and dskip is None else plan.cut
    backward_kernel[(plan.blocks * cut["parts"],)](
        *sources, sums, dx, dskip, dadd, dweight, dbias, dscale, dshift,
        *strides, *_strides(dx), *_strides(dskip), *row_strides, C=c, C1=x.shape[1], S=plan.pixels, **cut,
        sum_parts=plan.parts, BLOCK_G=plan.tile.block_g, SUM_PARTS=0 if sums is None else MOST_PARTS,
        SUMS=number, SILU=silu, **plan.constants(group),
    )  # fmt: skip


def _room(parts: int) -> int:
    """For `parts` statistics: the same for all that residual and `statistics` make, so that one kernel takes any."""
    return parts and max(power_of_2(parts), 16)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of sample, channel and pixel."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), pixel_stride(x))


def _row_stride(row: Tensor | None) -> int:
    """Of sample; rows of a single sample serve all."""
    return 0 if row is None or row.shape[0] == 1 else row.stride(0)
