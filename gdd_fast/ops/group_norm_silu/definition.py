"""group_norm_silu and its gradients in plain PyTorch, saving no more than the fused implementations do."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.ops._memory_format import compute_dtype, memory_format


def gradients(
    dx: Tensor | None, dskip: Tensor | None, rows: list[Tensor | None], inputs: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """What the backward operator returns; `rows` are the gradients of `inputs`, some still (N, C) of what is (C,)."""
    summed = []
    for gradient, like in zip(rows, inputs, strict=True):
        if gradient is not None:
            if gradient.shape != like.shape:
                gradient = gradient.sum(0, keepdim=like.dim() == 2)
            summed.append(gradient.to(like.dtype))
    return [g for g in (dx, dskip) if g is not None] + summed


def _joined(x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
    """u, dense, in the dtype that is computed in."""
    dtype = compute_dtype(x)
    u = (x if skip is None else torch.cat([x, skip], 1)).to(dtype)
    u = u if add is None else u + add.to(dtype)[:, :, None, None]
    return _laid_out(u, layout_of(x))


def layout_of(x: Tensor) -> torch.memory_format:
    """The format that x is normalised in. Off the CPU PyTorch's group norm knows contiguous memory alone: forward
    refuses another and backward takes it for contiguous."""
    return memory_format(x) if x.is_cpu else torch.contiguous_format


def _laid_out(u: Tensor, layout: torch.memory_format) -> Tensor:
    """u in `layout` to the last stride, those of dimensions of size 1 too: PyTorch's kernels refuse others."""
    _, c, h, w = u.shape
    strides = (c * h * w, 1, c * w, c) if layout is torch.channels_last else (c * h * w, h * w, w, 1)
    u = u.contiguous(memory_format=layout)
    return u if u.stride() == strides else u.as_strided(u.shape, strides)


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
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    u = _joined(x, skip, add)
    n, c, h, w = u.shape
    y, mean, rstd = torch.native_group_norm(u, weight.to(u.dtype), bias.to(u.dtype), n, c, h * w, num_groups, eps)
    if scale is not None:
        y = y * (scale.to(u.dtype)[:, :, None, None] + 1)
    if shift is not None:
        y = y + shift.to(u.dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, rstd


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
    needed: list[bool],
) -> list[Tensor]:
    need_x, need_skip, need_weight, need_bias, need_add, need_scale, need_shift = needed
    u = _joined(x, skip, add)
    n, c, h, w = u.shape
    weight_, factor = weight.to(u.dtype), None if scale is None else scale.to(u.dtype)[:, :, None, None] + 1
    dt = _laid_out(dy.to(u.dtype), layout_of(x))
    if silu or need_scale:
        a = rstd.repeat_interleave(c // rstd.shape[1], 1) * weight_
        centre = mean.repeat_interleave(c // mean.shape[1], 1)
        z = torch.addcmul(bias.to(u.dtype)[:, None, None], u - centre[:, :, None, None], a[:, :, None, None])
    if silu:
        t = z if factor is None else z * factor
        t = t if shift is None else t + shift.to(u.dtype)[:, :, None, None]
        dt = torch.ops.aten.silu_backward(dt, t)
    dshift = dt.sum((2, 3)) if need_shift else None
    dscale = (dt * z).sum((2, 3)) if need_scale else None
    dz = dt if factor is None else dt * factor
    mask = [True, need_weight, need_bias]  # on CPU torch crashes on channels_last memory if told to leave du out
    du, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dz, u, mean, rstd, weight_, n, c, h * w, mean.shape[1], mask
    )
    dadd = du.sum((2, 3)) if need_add else None
    # of a pair each gets memory of its own: an operator's results may not be views of one another
    dx, dskip = (
        du[:, part].to(t.dtype, copy=skip is not None, memory_format=memory_format(t)) if need else None
        for part, t, need in ((slice(x.shape[1]), x, need_x), (slice(x.shape[1], None), skip, need_skip))
    )
    rows = [dweight if need_weight else None, dbias if need_bias else None, dadd, dscale, dshift]
    return gradients(dx, dskip, rows, (weight, bias, add, scale, shift))
