"""group_norm_silu and its gradients by the Triton kernels and the extension: preparing their arguments and layouts.

Arguments and results are those of the operators in definition.py. The batch must not be empty.
"""

import torch
from torch import Tensor

from gdd_fast.ops._memory_format import empty_map, evenly_spaced, memory_format, statistics_parts
from gdd_fast.ops.group_norm_silu.definition import gradients
from gdd_fast.ops.group_norm_silu.norm_inputs import NormInputs, Statistics


def forward_triton(i: NormInputs, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    from gdd_fast.kernels import group_norm_silu as kernels

    i = i.mapped(evenly_spaced, _contiguous_rows)
    y = empty_map(i.x, i.weight.shape[0])
    known = (None if s is None else s.contiguous() for s in statistics)
    mean, rstd = kernels.forward(*i[:-1], *known, i.silu, y, statistics_parts(i.x.shape[2] * i.x.shape[3]))
    return y, mean, rstd


def backward_triton(dy: Tensor, i: NormInputs, mean: Tensor, rstd: Tensor, needed: list[bool]) -> list[Tensor]:
    i = i.mapped(evenly_spaced, _contiguous_rows)
    given = iter(launch_backward(evenly_spaced(dy), i, mean, rstd, needed))
    dx, dskip, *rows = (next(given) if need else None for need in needed)
    return gradients(dx, dskip, rows, i)


def launch_backward(dy: Tensor, i: NormInputs, mean: Tensor, rstd: Tensor, needed: list[bool]) -> list[Tensor]:
    """The gradients that are `needed`, those of the parameters by image: float32 (N, C). All maps are evenly spaced."""
    from gdd_fast.kernels import group_norm_silu as kernels

    n, c = i.x.shape[0], i.weight.shape[0]
    rows = [i.x.new_empty((n, c), dtype=torch.float32) if need else None for need in needed[2:]]
    dweight, dbias, dadd, dscale, dshift = rows
    dx, dskip = (
        empty_map(t, t.shape[1]) if need and t is not None else None for t, need in zip(i.maps, needed[:2], strict=True)
    )
    kernels.backward(dy, *i.maps, *i.parameters, mean, rstd, i.silu, dx, dskip, dadd, dweight, dbias, dscale, dshift)
    return [t for t in (dx, dskip, *rows) if t is not None]


def forward_cpp(i: NormInputs) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = memory_format(i.x) == torch.channels_last
    # the dimension that is contiguous: channels, or pixels, which form a column if the image is one pixel wide
    innermost = 1 if channels_last else 3 if i.x.shape[3] > 1 else 2
    return torch.ops.gdd_fast_C.group_norm_silu(*_as_cpp_takes(i, innermost, memory_format(i.x)), channels_last)


def backward_cpp(dy: Tensor, i: NormInputs, mean: Tensor, rstd: Tensor, needed: list[bool]) -> list[Tensor]:
    """For channels_last maps; contiguous ones are left to the definition."""
    dy = _side_by_side(dy, 1, torch.channels_last)
    taken = _as_cpp_takes(i, 1, torch.channels_last)
    arguments = (dy, *taken.maps, *taken.parameters, mean, rstd, i.silu)
    dx, dskip, by_image = torch.ops.gdd_fast_C.group_norm_silu_backward(*arguments)
    rows = [gradient if need else None for gradient, need in zip(by_image, needed[2:], strict=True)]
    return gradients(dx if needed[0] else None, dskip if needed[1] else None, rows, i)


def _as_cpp_takes(i: NormInputs, innermost: int, layout: torch.memory_format) -> NormInputs:
    return i.mapped(lambda x: _side_by_side(x, innermost, layout), lambda row: _contiguous_rows(row).float())


def _side_by_side(x: Tensor, innermost: int, layout: torch.memory_format) -> Tensor:
    """x itself if its dimension `innermost` is contiguous and its pixels are evenly spaced, else a copy."""
    x = evenly_spaced(x)
    return x if x.stride(innermost) == 1 else x.contiguous(memory_format=layout)


def _contiguous_rows(row: Tensor) -> Tensor:
    """(C,), (N, C) or (1, C) with contiguous channels, which is all that kernels need."""
    return row if row.stride(-1) == 1 else row.contiguous()
