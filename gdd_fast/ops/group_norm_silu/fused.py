"""group_norm_silu and its gradients by the Triton kernels and by the extension: what either is handed, and how it lies.

Arguments and results are those of the definition in _group_norm_torch.py. The batch is not empty.
"""

import torch
from torch import Tensor

from gdd_fast.ops._memory_format import empty_map, evenly_spaced, memory_format, statistics_parts
from gdd_fast.ops.group_norm_silu.definition import gradients


def forward_triton(
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
    statistics: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics`: those of x and skip, where they are known."""
    from gdd_fast.kernels import group_norm_silu as kernels

    x, skip = evenly_spaced(x), None if skip is None else evenly_spaced(skip)
    statistics = (None if s is None else s.contiguous() for s in statistics)
    y = empty_map(x, weight.shape[0])
    mean, rstd = kernels.forward(
        x,
        skip,
        num_groups,
        weight.contiguous(),
        bias.contiguous(),
        eps,
        *(_rows(t) for t in (add, scale, shift)),
        *statistics,
        silu,
        y,
        statistics_parts(x.shape[2] * x.shape[3]),
    )
    return y, mean, rstd


def backward_triton(
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
    from gdd_fast.kernels import group_norm_silu as kernels

    n, c = x.shape[0], weight.shape[0]
    per_sample = [x.new_empty((n, c), dtype=torch.float32) if need else None for need in needed[2:]]
    dweight, dbias, dadd, dscale, dshift = per_sample
    dx = empty_map(x, x.shape[1]) if needed[0] else None
    dskip = empty_map(skip, skip.shape[1]) if needed[1] else None
    kernels.backward(
        evenly_spaced(dy),
        evenly_spaced(x),
        None if skip is None else evenly_spaced(skip),
        weight.contiguous(),
        bias.contiguous(),
        *(_rows(t) for t in (add, scale, shift)),
        mean,
        rstd,
        silu,
        *(dx, dskip, dadd, dweight, dbias, dscale, dshift),
    )
    return gradients(dx, dskip, per_sample, (weight, bias, add, scale, shift))


def forward_cpp(
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
    layout = memory_format(x)
    channels_last = layout == torch.channels_last
    # what lies side by side: channels, or pixels, which are in a column where the image is one pixel wide
    innermost = 1 if channels_last else 3 if x.shape[3] > 1 else 2
    maps = [None if t is None else evenly_spaced(t) for t in (x, skip)]
    maps = [t if t is None or t.stride(innermost) == 1 else t.contiguous(memory_format=layout) for t in maps]
    rows = [None if t is None else _rows(t).float() for t in (add, scale, shift)]
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    return torch.ops.gdd_fast_C.group_norm_silu(*maps, num_groups, weight, bias, eps, *rows, silu, channels_last)


def backward_cpp(
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
    """For channels_last maps; contiguous ones are left to the definition."""
    maps = [None if t is None else _innermost_channels(t) for t in (dy, x, skip)]
    rows = [None if t is None else _rows(t).float() for t in (add, scale, shift)]
    parameters = weight.float().contiguous(), bias.float().contiguous()
    dx, dskip, by_image = torch.ops.gdd_fast_C.group_norm_silu_backward(*maps, *parameters, *rows, mean, rstd, silu)
    per_sample = [gradient if need else None for gradient, need in zip(by_image, needed[2:], strict=True)]
    inputs = (weight, bias, add, scale, shift)
    return gradients(dx if needed[0] else None, dskip if needed[1] else None, per_sample, inputs)


def _innermost_channels(x: Tensor) -> Tensor:
    """x itself if its channels lie side by side and its pixels are evenly spaced, else a channels_last copy."""
    x = evenly_spaced(x)
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def _rows(row: Tensor | None) -> Tensor | None:
    """(N, C) or (1, C) with contiguous rows, which is all the kernels need."""
    return row if row is None or row.stride(1) == 1 else row.contiguous()
