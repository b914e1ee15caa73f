"""group_norm_silu in plain PyTorch: the formula, and an operator that saves as little as the fused ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.ops._memory_format import cast, compute_dtype, memory_format
from gdd_fast.ops.group_norm_silu.norm_inputs import NormInputs


def formula(i: NormInputs) -> Tensor:
    """The definition, which PyTorch differentiates any number of times."""
    dtype = compute_dtype(i.x)
    y = cast(i.x if i.skip is None else torch.cat([i.x, i.skip], 1), dtype)
    if i.add is not None:
        y = y + cast(i.add, dtype)[:, :, None, None]
    y = F.group_norm(y, i.num_groups, cast(i.weight, dtype), cast(i.bias, dtype), i.eps)
    if i.scale is not None:
        y = y * (cast(i.scale, dtype)[:, :, None, None] + 1)
    if i.shift is not None:
        y = y + cast(i.shift, dtype)[:, :, None, None]
    if i.silu:
        y = F.silu(y)
    return cast(y, i.x.dtype)


def gradients(dx: Tensor | None, dskip: Tensor | None, rows: list[Tensor | None], i: NormInputs) -> list[Tensor]:
    """The backward operator's results; `rows` are the gradients of `i.parameters`, some of (C,) still as (N, C)."""
    summed = []
    for gradient, like in zip(rows, i.parameters, strict=True):
        if gradient is not None and like is not None:
            if gradient.shape != like.shape:
                gradient = gradient.sum(0, keepdim=like.dim() == 2)
            summed.append(gradient.to(like.dtype))
    return [g for g in (dx, dskip) if g is not None] + summed


def _joined(i: NormInputs) -> Tensor:
    """u, dense, in the compute dtype."""
    dtype = compute_dtype(i.x)
    u = (i.x if i.skip is None else torch.cat([i.x, i.skip], 1)).to(dtype)
    u = u if i.add is None else u + i.add.to(dtype)[:, :, None, None]
    return _laid_out(u, layout_of(i.x))


def layout_of(x: Tensor) -> torch.memory_format:
    """The format in which x is normalised. Except on CPUs, PyTorch's group norm supports only contiguous memory:
    forward refuses any other, and backward assumes it."""
    return memory_format(x) if x.is_cpu else torch.contiguous_format


def _laid_out(u: Tensor, layout: torch.memory_format) -> Tensor:
    """u in `layout` with exact strides, even for dimensions of size 1: PyTorch's kernels refuse others."""
    _, c, h, w = u.shape
    strides = (c * h * w, 1, c * w, c) if layout is torch.channels_last else (c * h * w, h * w, w, 1)
    u = u.contiguous(memory_format=layout)
    return u if u.stride() == strides else u.as_strided(u.shape, strides)


def forward(i: NormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, and each group's mean and reciprocal deviation (N, groups)."""
    u = _joined(i)
    n, c, h, w = u.shape
    parameters = (i.weight.to(u.dtype), i.bias.to(u.dtype))
    y, mean, rstd = torch.native_group_norm(u, *parameters, n, c, h * w, i.num_groups, i.eps)
    if i.scale is not None:
        y = y * (i.scale.to(u.dtype)[:, :, None, None] + 1)
    if i.shift is not None:
        y = y + i.shift.to(u.dtype)[:, :, None, None]
    if i.silu:
        y = F.silu(y)
    return y.to(i.x.dtype).contiguous(memory_format=memory_format(i.x)), mean, rstd


def backward(dy: Tensor, i: NormInputs, mean: Tensor, rstd: Tensor, needed: list[bool]) -> list[Tensor]:
    """The gradients that are `needed`, of x, skip, weight, bias, add, scale and shift."""
    need_x, need_skip, need_weight, need_bias, need_add, need_scale, need_shift = needed
    u = _joined(i)
    n, c, h, w = u.shape
    weight, factor = i.weight.to(u.dtype), None if i.scale is None else i.scale.to(u.dtype)[:, :, None, None] + 1
    dt = _laid_out(dy.to(u.dtype), layout_of(i.x))
    if i.silu or need_scale:
        a = rstd.repeat_interleave(c // rstd.shape[1], 1) * weight
        centre = mean.repeat_interleave(c // mean.shape[1], 1)
        z = torch.addcmul(i.bias.to(u.dtype)[:, None, None], u - centre[:, :, None, None], a[:, :, None, None])
    if i.silu:
        t = z if factor is None else z * factor
        t = t if i.shift is None else t + i.shift.to(u.dtype)[:, :, None, None]
        dt = torch.ops.aten.silu_backward(dt, t)
    dshift = dt.sum((2, 3)) if need_shift else None
    dscale = (dt * z).sum((2, 3)) if need_scale else None
    dz = dt if factor is None else dt * factor
    mask = [True, need_weight, need_bias]  # on a CPU torch crashes on channels_last memory if du is not requested
    du, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dz, u, mean, rstd, weight, n, c, h * w, mean.shape[1], mask
    )
    dadd = du.sum((2, 3)) if need_add else None
    # for a pair, each gets its own memory: an operator's results must not be views of one another
    dx, dskip = (
        du[:, part].to(t.dtype, copy=i.skip is not None, memory_format=memory_format(t))
        if need and t is not None
        else None
        for part, t, need in ((slice(i.x.shape[1]), i.x, need_x), (slice(i.x.shape[1], None), i.skip, need_skip))
    )
    return gradients(
        dx, dskip, [dweight if need_weight else None, dbias if need_bias else None, dadd, dscale, dshift], i
    )
